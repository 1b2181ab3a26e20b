"""A thread's checkpoints, wherever they are kept: LangGraph's saver of that place, with what all of them leave out.

A value that would come back as something else is an error when it is written. Threads can be copied and pruned, and what runs
have written be deleted.
"""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import json
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, ClassVar, TypeVar, cast

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import BaseCheckpointSaver, ChannelVersions, Checkpoint, CheckpointMetadata

from agentops.errors import LeaseLost, RecordError, StateUnfit, UsageError

_UNFIT_HINT = (
    "name its type in the graph's state or in record.types, or keep texts, numbers, lists and dicts; then resume the run"
)
S = TypeVar("S", bound=BaseCheckpointSaver[Any])

Told = Callable[[str, int, str, Any, str], None]
"""Called with a graph's namespace, its step, where the state is from (input, loop, ...), the values of its
channels, and the checkpoint's id."""

Refused = LeaseLost | tuple[RunnableConfig, Sequence[tuple[str, Any]], str, TypeError]
"""What came of writes that were not kept: the thread is somebody else's, or what could not be packed, of which task, and why."""


class ThreadSaver(BaseCheckpointSaver[str]):
    """What is the same in all places. A class of a place has LangGraph's saver behind this one among its bases.

    A channel that keeps changes only (`DeltaChannel`) is read from the checkpoints before, back to the last whole value; these
    are not pruned, and are not deleted while later ones need them.
    """

    TABLES: ClassVar[Mapping[str, str]]
    """The tables, each with its columns beside `thread_id`."""

    def __init__(self, *of_place: Any, **named: Any) -> None:
        super().__init__(*of_place, **named)
        self.told: Told | None = None
        # LangGraph does not wait for what a node wrote to be kept, so the step's checkpoint, which comes after it, tells it.
        self._order: AbstractAsyncContextManager[Any] = asyncio.Lock()
        self._refused: list[Refused] = []

    @abstractmethod
    def _writing(self) -> AbstractAsyncContextManager[None]:
        """Around what LangGraph's saver writes.

        Raises:
            LeaseLost: the thread is somebody else's by now; nothing was written.
        """

    @abstractmethod
    def _changing(self) -> AbstractAsyncContextManager[Any]:
        """A cursor in a transaction: all or nothing. It takes `?` for arguments.

        Raises:
            LeaseLost
        """

    def _kept(self, checkpoint: Checkpoint) -> Checkpoint:
        """The checkpoint in the form that LangGraph's saver gets it."""
        return checkpoint

    async def aput(
        self, config: RunnableConfig, checkpoint: Checkpoint, metadata: CheckpointMetadata, new_versions: ChannelVersions
    ) -> RunnableConfig:
        """
        Raises:
            StateUnfit: a value of the state cannot be kept.  LeaseLost: the thread is somebody else's by now. Nothing is kept.
        """
        async with self._order:
            if self._refused:
                raise await self._told(self._refused.pop())
            try:
                async with self._writing():
                    saved = await super().aput(config, self._kept(checkpoint), metadata, new_versions)
            except TypeError as error:
                where = {"input": "the input", "update": "the update"}.get(metadata.get("source", ""), "the state")
                raise self._unfit(where, checkpoint["channel_values"].items(), error) from error
        if self.told is not None:
            _tell(self.told, config, checkpoint, metadata)
        return saved

    async def aput_writes(
        self, config: RunnableConfig, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str = ""
    ) -> None:
        """
        Raises:
            StateUnfit: a value that a node has returned, sent or asked cannot be kept.  LeaseLost: the thread is somebody else's
                by now. Nothing is kept.
        """
        async with self._order:
            try:
                async with self._writing():
                    await super().aput_writes(config, writes, task_id, task_path)
            except LeaseLost as lost:
                self._refused[:] = [lost]
                raise
            except TypeError as error:
                self._refused[:] = [refused := (config, writes, task_path, error)]
                raise await self._told(refused) from error

    async def _told(self, refused: Refused) -> StateUnfit | LeaseLost:
        """What is told of writes that were refused."""
        if isinstance(refused, LeaseLost):
            return refused
        config, writes, task_path, error = refused
        node = await self._node(config, task_path)
        return self._unfit(f"node {node}" if node else "a node", writes, error)

    def _unfit(self, where: str, values: Iterable[tuple[str, Any]], error: Exception) -> StateUnfit:
        for channel, value in values:
            try:
                self.serde.dumps_typed(value)
            except TypeError as found:
                if channel == "__start__" and isinstance(value, Mapping):
                    return self._unfit(where, value.items(), found)
                if "Recursion limit" in str(found):
                    found = TypeError("it holds itself, or has no bottom within a thousand levels")
                field = {"__interrupt__": "what it asks", "__pregel_tasks": "what it sends"}.get(channel, f"field {channel}")
                return StateUnfit(f"{where}, {field}: {found}", hint=_UNFIT_HINT)
        return StateUnfit(f"the run's metadata: {error}", hint="give it texts, numbers, lists and dicts")

    async def _node(self, config: RunnableConfig, task_path: str) -> str:
        """The node of a task, from LangGraph's path of it: "~__pregel_pull, NODE", or "~__pregel_push, PLACE, ..." of a
        packet."""
        kind, _, place = task_path.partition(", ")
        if kind == "~__pregel_pull":
            return place
        place = place.partition(", ")[0]
        if kind == "~__pregel_push" and place.isdigit() and (kept := await self.aget_tuple(config)):
            sent = kept.checkpoint["channel_values"].get("__pregel_tasks", ())
            return str(getattr(sent[int(place)], "node", "")) if int(place) < len(sent) else ""
        return ""

    async def adelete_thread(self, thread_id: str) -> None:
        """
        Raises:
            LeaseLost
        """
        async with self._writing():
            await super().adelete_thread(thread_id)

    async def acopy_thread(self, source_thread_id: str, target_thread_id: str) -> None:
        async with self._changing() as cursor:
            for table, names in self.TABLES.items():
                copied = f"SELECT ?, {names} FROM {table} WHERE thread_id = ?"
                statement = f"INSERT INTO {table} (thread_id, {names}) {copied} ON CONFLICT DO NOTHING"
                await cursor.execute(statement, (target_thread_id, source_thread_id))

    async def adelete_for_runs(self, run_ids: Sequence[str]) -> None:
        """
        Raises:
            RecordError: later checkpoints of other runs could not be read without these; nothing is deleted.
        """
        async with self._changing() as cursor:
            for thread in await self._threads(cursor, run_ids):
                rows = await _lineage(cursor, thread)
                gone = {key for key, row in rows.items() if row.run_id in run_ids}
                if gone & _needed(rows, rows.keys() - gone):
                    raise RecordError(
                        f"thread {thread} keeps changes that later runs build on; nothing was deleted",
                        hint="delete the whole thread, or the later runs with these",
                    )
                await self._delete(cursor, thread, gone)

    async def aprune(self, thread_ids: Sequence[str], *, strategy: str = "keep_latest") -> None:
        """Keeps the newest checkpoint of each namespace ("keep_latest"), or none ("delete").

        Raises:
            UsageError: another strategy.
        """
        if strategy not in ("keep_latest", "delete"):
            raise UsageError(f"'{strategy}' is no way to prune", hint="keep_latest or delete")
        async with self._changing() as cursor:
            for thread in thread_ids:
                rows = await _lineage(cursor, thread)
                newest = {namespace: max(key for space, key in rows if space == namespace) for namespace, _ in rows}
                kept = set(newest.items()) if strategy == "keep_latest" else set()
                await self._delete(cursor, thread, rows.keys() - kept - _needed(rows, kept))

    async def aforget_failed(self, thread_id: str) -> None:
        """Forgets what tasks that failed have written to channels: they begin anew when their run goes on. What they were
        answered stays; LangGraph gives it a number below zero."""
        async with self._changing() as cursor:
            for table in (name for name, columns in self.TABLES.items() if "task_id" in columns):
                failed = f"SELECT task_id FROM {table} WHERE thread_id = ? AND channel = '__error__'"
                statement = f"DELETE FROM {table} WHERE thread_id = ? AND idx >= 0 AND task_id IN ({failed})"
                await cursor.execute(statement, (thread_id, thread_id))

    @abstractmethod
    async def _threads(self, cursor: Any, run_ids: Sequence[str]) -> list[str]:
        """The threads in which these runs may have written."""

    async def _delete(self, cursor: Any, thread: str, keys: Iterable[_Key]) -> None:
        rows = [(thread, *key) for key in keys]
        for table, names in self.TABLES.items():
            if rows and "checkpoint_id" in names:
                statement = f"DELETE FROM {table} WHERE thread_id = ? AND checkpoint_ns = ? AND checkpoint_id = ?"
                await cursor.executemany(statement, rows)


_Key = tuple[str, str]
"""A checkpoint of a thread: its namespace and its id."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Kept:
    """What of a checkpoint tells whether another can do without it. `changes` says that it has no whole value of some channel."""

    run_id: str
    parent: _Key
    changes: bool


async def _lineage(cursor: Any, thread: str) -> dict[_Key, _Kept]:
    query = "SELECT checkpoint_ns, checkpoint_id, parent_checkpoint_id, metadata FROM checkpoints WHERE thread_id = ?"
    await cursor.execute(query, (thread,))
    found = {}
    for namespace, key, parent, metadata in await cursor.fetchall():
        about = json.loads(metadata) if isinstance(metadata, str | bytes) else metadata or {}
        kept = _Kept(str(about.get("run_id", "")), (namespace, parent or ""), bool(about.get("counters_since_delta_snapshot")))
        found[namespace, key] = kept
    return found


def _needed(rows: Mapping[_Key, _Kept], kept: Iterable[_Key]) -> set[_Key]:
    """The checkpoints that those which are kept are read from."""
    found: set[_Key] = set()
    for key in kept:
        while key in rows and rows[key].changes and rows[key].parent not in found:
            key = rows[key].parent
            found.add(key)
    return found


def _tell(told: Told, config: RunnableConfig, checkpoint: Checkpoint, metadata: CheckpointMetadata) -> None:
    namespace = str(config.get("configurable", {}).get("checkpoint_ns", ""))
    told(namespace, metadata.get("step", 0), metadata.get("source", "loop"), checkpoint["channel_values"], checkpoint["id"])


def telling(saver: S, told: Told) -> S:
    """A saver of somebody else's, over the same checkpoints, which calls `told` with every state that it saves."""
    twin: Any = copy.copy(saver)

    async def aput(
        config: RunnableConfig, checkpoint: Checkpoint, metadata: CheckpointMetadata, new_versions: ChannelVersions
    ) -> RunnableConfig:
        saved = await saver.aput(config, checkpoint, metadata, new_versions)
        _tell(told, config, checkpoint, metadata)
        return saved

    def put(
        config: RunnableConfig, checkpoint: Checkpoint, metadata: CheckpointMetadata, new_versions: ChannelVersions
    ) -> RunnableConfig:
        saved = saver.put(config, checkpoint, metadata, new_versions)
        _tell(told, config, checkpoint, metadata)
        return saved

    # A graph that a node calls synchronously writes its checkpoints so.
    twin.aput, twin.put = aput, put
    return cast(S, twin)
