"""Checkpoints: LangGraph's SQLite saver, one file and one owner a thread.

The lease on a thread is an exclusive lock on a file beside its checkpoints; the system drops it when the process dies.
With one file a thread there is never a second process writing it, so SQLite's WAL-reset defect (versions 3.7.0 to
3.51.2) cannot be met. What is read back may only become types that the graph's own schema names, and executes nothing;
that the library beneath keeps to this is tried once a process. Conversations are for their owner's eyes: folder and files
are made so that nobody else can read them.
This module knows nothing of runs, spans or models.
"""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import enum
import fcntl
import functools
import importlib
import json
import logging
import os
import re
import threading
import typing
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import aiosqlite
import ormsgpack
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import BaseCheckpointSaver, ChannelVersions, Checkpoint, CheckpointMetadata
from langgraph.checkpoint.serde import jsonplus
from langgraph.checkpoint.serde._msgpack import SAFE_MSGPACK_METHODS, SAFE_MSGPACK_TYPES
from langgraph.checkpoint.serde.base import SerializerProtocol
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver
from pydantic import BaseModel

from agentops.errors import RecordError, SettingsError, StateUnfit, StoreBroken, ThreadBusy, UsageError
from agentops.settings import Settings

_UNFIT_HINT = (
    "name its type in the graph's state or in record.types, or keep texts, numbers, lists and dicts; then resume the run"
)
S = TypeVar("S", bound=BaseCheckpointSaver[Any])
_THREAD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")

Told = Callable[[str, int, str, Any, str], None]
"""Called with a graph's namespace, its step, where the state is from (input, loop, ...), the values of its
channels, and the checkpoint's id."""


def checkpoint_folder(settings: Settings) -> Path:
    return settings.paths.home / "threads"


def check_thread_id(thread_id: str) -> str:
    """
    Raises:
        UsageError: it could not be a file's name.
    """
    if not _THREAD.fullmatch(thread_id):
        raise UsageError(
            f"{thread_id[:80]!r} cannot name a thread",
            hint="use up to 128 letters, digits, '.', '_' and '-', a letter or digit first",
        )
    return thread_id


@contextmanager
def lease(settings: Settings, thread_id: str) -> Iterator[None]:
    """Sole right to run a thread, within and across processes, until the block ends or the process dies.

    Raises:
        ThreadBusy: another run holds it.
    """
    folder = checkpoint_folder(settings)
    try:
        folder.parent.mkdir(0o700, parents=True, exist_ok=True)
        folder.mkdir(0o700, exist_ok=True)
        handle = os.open(folder / f"{check_thread_id(thread_id)}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise RecordError(f"{folder} cannot be written: {error.strerror}", hint="see: agentops doctor") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ThreadBusy(
                f"thread {thread_id} is in use by another run",
                hint="wait for it to end (agentops runs --status running); a new run may have another --thread",
            ) from None
        yield
    finally:
        os.close(handle)


@asynccontextmanager
async def open_checkpointer(
    settings: Settings, thread_id: str, types: frozenset[type], told: Told | None = None
) -> AsyncIterator[ThreadSaver]:
    """The saver of one thread. Hold its `lease` around this.

    `types` may be built while reading, beside LangGraph's list of safe ones. `told` is called with every state that is saved.

    Raises:
        StoreBroken: the file is not a database; while reading, what it holds was not written by this program.
        RecordError: the file cannot be made, or the library beneath would execute what a checkpoint names.
        SettingsError: `record.types` names something that is no class.
    """
    _try_strictness()
    file = checkpoint_folder(settings) / f"{check_thread_id(thread_id)}.db"
    _make_private(file)
    async with aiosqlite.connect(file) as connection:
        saver = ThreadSaver(connection, serde=_Serializer(types | _named_types(settings.record.types)))
        try:
            await saver.setup()
            await connection.execute("PRAGMA synchronous=FULL")
        except aiosqlite.OperationalError:
            raise  # the disk is full, or the file is locked: what it holds is not in question
        except aiosqlite.DatabaseError as error:
            raise StoreBroken(
                f"the checkpoints of thread {thread_id} cannot be read: {error}",
                hint=f"move {file} away; the thread then starts anew",
            ) from error
        try:
            yield telling(saver, told) if told else saver
        finally:
            # LangGraph leaves a run that failed while writes of others are under way: those that have begun come to their end.
            # Closed in the middle of one, the connection would keep the file locked for as long as anything holds its cursor.
            await asyncio.sleep(0)
            async with saver.lock:
                await connection.rollback()
                await connection.close()


class ThreadSaver(AsyncSqliteSaver):
    """LangGraph's saver with what it leaves out: copying a thread, deleting what runs have written, and pruning. It keeps nothing
    that would come back as something else.

    A channel that keeps changes only (`DeltaChannel`) is read from the checkpoints before, back to the last whole value; these
    are not pruned, and are not deleted while later ones need them.
    """

    def __init__(self, conn: aiosqlite.Connection, *, serde: SerializerProtocol) -> None:
        super().__init__(conn, serde=serde)
        # LangGraph does not wait for what a node wrote to be kept, so the step's checkpoint, which comes after it, tells it.
        self._order = asyncio.Lock()
        self._refused: list[StateUnfit] = []

    async def aput(
        self, config: RunnableConfig, checkpoint: Checkpoint, metadata: CheckpointMetadata, new_versions: ChannelVersions
    ) -> RunnableConfig:
        """
        Raises:
            StateUnfit: a value of the state cannot be kept; nothing is.
        """
        async with self._order:
            if self._refused:
                raise self._refused.pop()
            try:
                return await super().aput(config, checkpoint, metadata, new_versions)
            except TypeError as error:
                where = {"input": "the input", "update": "the update"}.get(metadata.get("source", ""), "the state")
                raise self._unfit(where, checkpoint["channel_values"].items(), error) from error

    async def aput_writes(
        self, config: RunnableConfig, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str = ""
    ) -> None:
        """
        Raises:
            StateUnfit: a value that a node has returned, sent or asked cannot be kept; nothing is.
        """
        async with self._order:
            try:
                await super().aput_writes(config, writes, task_id, task_path)
            except TypeError as error:
                node = await self._node(config, task_path)
                unfit = self._unfit(f"node {node}" if node else "a node", writes, error)
                self._refused[:] = [unfit]
                raise unfit from error

    def _unfit(self, where: str, values: Iterable[tuple[str, Any]], error: Exception) -> StateUnfit:
        for channel, value in values:
            try:
                self.serde.dumps_typed(value)
            except TypeError as found:
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

    async def acopy_thread(self, source_thread_id: str, target_thread_id: str) -> None:
        columns = {
            "checkpoints": "checkpoint_ns, checkpoint_id, parent_checkpoint_id, type, checkpoint, metadata",
            "writes": "checkpoint_ns, checkpoint_id, task_id, task_path, idx, channel, type, value",
        }
        async with self._changing() as cursor:
            for table, names in columns.items():
                copied = f"SELECT ?, {names} FROM {table} WHERE thread_id = ?"
                statement = f"INSERT OR REPLACE INTO {table} (thread_id, {names}) {copied}"
                await cursor.execute(statement, (target_thread_id, source_thread_id))

    async def adelete_for_runs(self, run_ids: Sequence[str]) -> None:
        """
        Raises:
            RecordError: later checkpoints of other runs could not be read without these; nothing is deleted.
        """
        async with self._changing() as cursor:
            for thread in await _threads(cursor):
                rows = await _lineage(cursor, thread)
                gone = {key for key, row in rows.items() if row.run_id in run_ids}
                if gone & _needed(rows, rows.keys() - gone):
                    raise RecordError(
                        f"thread {thread} keeps changes that later runs build on; nothing was deleted",
                        hint="delete the whole thread, or the later runs with these",
                    )
                await _delete(cursor, thread, gone)

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
                await _delete(cursor, thread, rows.keys() - kept - _needed(rows, kept))

    @asynccontextmanager
    async def _changing(self) -> AsyncIterator[aiosqlite.Cursor]:
        """A transaction: all or nothing."""
        await self.setup()
        async with self.lock, self.conn.cursor() as cursor:
            try:
                yield cursor
                await self.conn.commit()
            except BaseException:
                await self.conn.rollback()
                raise


_Key = tuple[str, str]
"""A checkpoint of a thread: its namespace and its id."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Kept:
    """What of a checkpoint tells whether another can do without it. `changes` says that it has no whole value of some channel."""

    run_id: str
    parent: _Key
    changes: bool


async def _threads(cursor: aiosqlite.Cursor) -> list[str]:
    await cursor.execute("SELECT DISTINCT thread_id FROM checkpoints")
    return [str(row[0]) for row in await cursor.fetchall()]


async def _lineage(cursor: aiosqlite.Cursor, thread: str) -> dict[_Key, _Kept]:
    query = "SELECT checkpoint_ns, checkpoint_id, parent_checkpoint_id, metadata FROM checkpoints WHERE thread_id = ?"
    await cursor.execute(query, (thread,))
    found = {}
    for namespace, key, parent, metadata in await cursor.fetchall():
        about = json.loads(metadata) if metadata else {}
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


async def _delete(cursor: aiosqlite.Cursor, thread: str, keys: Iterable[_Key]) -> None:
    for table in ("checkpoints", "writes"):
        statement = f"DELETE FROM {table} WHERE thread_id = ? AND checkpoint_ns = ? AND checkpoint_id = ?"
        await cursor.executemany(statement, [(thread, *key) for key in keys])


def telling(saver: S, told: Told) -> S:
    """The same saver, over the same checkpoints, which calls `told` with every state that it saves."""
    twin: Any = copy.copy(saver)

    def tell(config: RunnableConfig, checkpoint: Checkpoint, metadata: CheckpointMetadata) -> None:
        namespace = str(config.get("configurable", {}).get("checkpoint_ns", ""))
        told(namespace, metadata.get("step", 0), metadata.get("source", "loop"), checkpoint["channel_values"], checkpoint["id"])

    async def aput(
        config: RunnableConfig, checkpoint: Checkpoint, metadata: CheckpointMetadata, new_versions: ChannelVersions
    ) -> RunnableConfig:
        saved = await saver.aput(config, checkpoint, metadata, new_versions)
        tell(config, checkpoint, metadata)
        return saved

    def put(
        config: RunnableConfig, checkpoint: Checkpoint, metadata: CheckpointMetadata, new_versions: ChannelVersions
    ) -> RunnableConfig:
        saved = saver.put(config, checkpoint, metadata, new_versions)
        tell(config, checkpoint, metadata)
        return saved

    # A graph that a node calls synchronously writes its checkpoints so.
    twin.aput, twin.put = aput, put
    return cast(S, twin)


def _make_private(file: Path) -> None:
    """An empty file that only its owner may read; what SQLite puts beside it inherits that."""
    try:
        # Only ever one that is not there: closing another descriptor of an open database drops SQLite's locks on it.
        os.close(os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        return
    except OSError as error:
        raise RecordError(f"{file} cannot be made: {error.strerror}", hint="see: agentops doctor") from error


class _Serializer(jsonplus.JsonPlusSerializer):
    """Reads what it writes and nothing else: LangGraph's older JSON form can name objects to build, a pickle any code."""

    def __init__(self, types: frozenset[type]) -> None:
        super().__init__(allowed_msgpack_modules=[(kind.__module__, kind.__qualname__) for kind in types] or None)

    def dumps_typed(self, obj: Any) -> tuple[str, bytes]:
        """
        Raises:
            TypeError: something in it would be read back as a dict, a list or a text, and not as what it is.
        """
        kind, blob = super().dumps_typed(obj)
        refused: list[str] = []

        def look(code: int, data: bytes) -> None:
            if code == jsonplus.EXT_NUMPY_ARRAY:
                return
            named = ormsgpack.unpackb(data, ext_hook=look, option=ormsgpack.OPT_NON_STR_KEYS)
            if code == jsonplus.EXT_DELTA_SNAPSHOT:
                return
            module, name = named[:2]
            own = self._allowed_msgpack_modules
            if code == jsonplus.EXT_METHOD_SINGLE_ARG:
                known = (module, name, named[3]) in SAFE_MSGPACK_METHODS
            else:
                known = (module, name) in SAFE_MSGPACK_TYPES or (isinstance(own, set) and (module, name) in own)
            if not known:
                refused.append(f"{module}.{name}")

        if kind == "msgpack":
            ormsgpack.unpackb(blob, ext_hook=look, option=ormsgpack.OPT_NON_STR_KEYS)
        if refused:
            raise TypeError(f"{refused[-1]} is neither named by the graph's state nor in record.types")
        return kind, blob

    def loads_typed(self, data: tuple[str, bytes]) -> Any:
        if data[0] not in ("msgpack", "bytes", "bytearray", "null"):
            raise StoreBroken(
                f"a checkpoint is of the kind {str(data[0])[:40]!r}, which is never written here; nothing of it was read",
                hint="something else changed the thread's file; begin a new thread",
            )
        return super().loads_typed(data)


# Calls that show when they are made, in every form that a checkpoint has for them; their bare argument must come back.
_HARMLESS_CALLS: tuple[tuple[int, tuple[Any, ...]], ...] = (
    (jsonplus.EXT_CONSTRUCTOR_SINGLE_ARG, ("builtins", "len", "abc")),
    (jsonplus.EXT_CONSTRUCTOR_POS_ARGS, ("os", "getcwd", [])),
    (jsonplus.EXT_CONSTRUCTOR_KW_ARGS, ("os", "getcwd", {})),
    (jsonplus.EXT_METHOD_SINGLE_ARG, ("builtins", "str", "abc", "upper")),
    (jsonplus.EXT_PYDANTIC_V1, ("os", "getcwd", {})),
    (jsonplus.EXT_PYDANTIC_V2, ("os", "getcwd", {}, "model_validate_json")),
)


@functools.cache
def _try_strictness() -> None:
    """
    Raises:
        RecordError: something that a checkpoint names was called.
    """
    serializer, me = _Serializer(frozenset()), threading.get_ident()

    def of_others(record: logging.LogRecord) -> bool:
        return record.thread != me

    # Each call refused is logged as an attack; these are ours.
    jsonplus.logger.addFilter(of_others)
    try:
        for code, call in _HARMLESS_CALLS:
            blob = ormsgpack.packb(ormsgpack.Ext(code, ormsgpack.packb(call)))
            if serializer.loads_typed(("msgpack", blob)) != call[2]:
                raise RecordError(
                    f"the installed langgraph-checkpoint calls what a checkpoint names ({call[0]}.{call[1]}); none was opened",
                    hint="install the versions that agentops-runtime asks for",
                )
    finally:
        jsonplus.logger.removeFilter(of_others)


def _named_types(names: Sequence[str]) -> frozenset[type]:
    """
    Raises:
        SettingsError: one of them is no class that can be imported.
    """
    found = set()
    for name in names:
        module, _, last = name.rpartition(".")
        try:
            kind = getattr(importlib.import_module(module), last)
        except (ImportError, AttributeError, ValueError) as error:
            raise SettingsError(f"record.types: {name!r} cannot be imported: {error}", hint="write it as module.Class") from error
        if not isinstance(kind, type):
            raise SettingsError(f"record.types: {name!r} is not a class", hint="write it as module.Class")
        found.add(kind)
    return frozenset(found)


def schema_types(*schemas: Any) -> frozenset[type]:
    """Classes that values of these state schemas consist of: dataclasses, pydantic models, enums, named tuples."""
    found: set[type] = set()
    # With the hints themselves: another would have the place in memory, and so the id, of one that is gone.
    seen: dict[int, Any] = {}

    def walk(kind: Any) -> None:
        if id(kind) in seen:
            return
        seen[id(kind)] = kind
        for part in typing.get_args(kind):
            walk(part)
        if not isinstance(kind, type):
            return
        structured = dataclasses.is_dataclass(kind) or issubclass(kind, BaseModel) or hasattr(kind, "_fields")
        if structured or issubclass(kind, enum.Enum):
            found.add(kind)
        if structured or typing.is_typeddict(kind):
            try:
                hints = typing.get_type_hints(kind, include_extras=True)
            except (NameError, TypeError):
                hints = {}
            for hint in hints.values():
                walk(hint)

    for schema in schemas:
        walk(schema)
    return frozenset(found)
