"""Time travel: the checkpoints of a thread, those of its subgraphs too, and new threads that begin at one of them.

A fork is a copy of all that the thread held when the checkpoint was written, so that a graph goes on from it as from a crash
right after: what the step under way had not finished is done again, models are called, and what comes later never happened.
Nothing here runs a graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from langgraph.channels.base import BaseChannel
from langgraph.checkpoint.base import CheckpointTuple
from langgraph.errors import EmptyChannelError, InvalidUpdateError

from agentops.checkpoints import Lease
from agentops.errors import RecordError, UsageError
from agentops.execution import checkpointed
from agentops.graph import LoadedGraph
from agentops.tracer.payload import public

_UNFINISHED = ("__error__", "__interrupt__", "__resume__", "__scheduled__")
"""What is kept of a task that has not come to its end."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A checkpoint of a thread. `graph` names the subgraphs around it, with slashes between, and is empty for the graph itself;
    `namespace` tells apart those of one name. `source` is input, loop, update or fork. `by` are the nodes whose results made it,
    `next` those that come after it. `run_id` is the run that wrote it, `parent` the checkpoint before it; `at` is ISO 8601.
    `values` are those of the state's fields."""

    id: str
    graph: str
    namespace: str
    step: int
    source: str
    run_id: str
    at: str
    parent: str | None
    by: tuple[str, ...] = ()
    next: tuple[str, ...] = ()
    values: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a new run begins: at a checkpoint of another, maybe with other values in some fields of its state. `saved` is what
    the thread held then, oldest first."""

    run_id: str
    snapshot: Snapshot
    changes: Mapping[str, Any]
    saved: Sequence[CheckpointTuple]

    @property
    def told(self) -> dict[str, Any]:
        """What the new run has on record of it."""
        return {
            "forked_from": self.run_id,
            "forked_at": self.snapshot.id,
            "forked_step": self.snapshot.step,
            **({"forked_in": self.snapshot.graph} if self.snapshot.graph else {}),
        }


async def history(graph: LoadedGraph, held: Lease) -> list[Snapshot]:
    """All checkpoints of a thread, oldest first. Of a graph that a node calls by itself, which LangGraph does not know as a
    subgraph, `next` is not known.

    Raises:
        StoreBroken
    """
    async with checkpointed(graph, held) as compiled:
        return await _read(compiled, await _saved(compiled, held.thread_id))


async def origin(
    graph: LoadedGraph,
    held: Lease,
    run_id: str,
    *,
    at: str | None = None,
    step: int | None = None,
    changes: Mapping[str, Any] | None = None,
) -> Origin:
    """The checkpoint of a run to begin anew from: `at` (its id), or that after `step`, or the last that has something after it.

    Raises:
        UsageError: there is no such checkpoint, or nothing comes after it.
    """
    async with checkpointed(graph, held) as compiled:
        saved = await _saved(compiled, held.thread_id)
        snapshots = await _read(compiled, saved)
    mine = [one for one in snapshots if one.run_id == run_id]
    if at is None and step is None:
        mine = [one for one in mine if one.next] or mine
    found = chosen(mine, at=at, step=step, where=f"run {run_id}")
    if not found.graph and not found.next:
        raise UsageError(f"nothing comes after checkpoint {found.id}", hint=f"choose an earlier one: agentops history {run_id}")
    return Origin(run_id, found, changes or {}, [one for one in saved if _id(one) <= found.id])


def chosen(snapshots: Sequence[Snapshot], *, at: str | None, step: int | None, where: str) -> Snapshot:
    """The checkpoint of that id (or unique beginning of it), or of that step of the graph itself, or else the graph's newest.

    Raises:
        UsageError: there is none, or more than one.
    """
    found = [one for one in snapshots if one.id == at] or [
        one for one in snapshots if (one.id.startswith(at) if at else not one.graph and (step is None or one.step == step))
    ]
    if not found or (at and len(found) > 1):
        meant = f"'{at}'" if at else f"step {step}" if step is not None else "that"
        said = "more than one checkpoint begins with" if found else "there is no checkpoint for"
        raise UsageError(f"{said} {meant} in {where}", hint="list them with: agentops history")
    return found[-1]


async def plant(origin: Origin, graph: LoadedGraph, held: Lease, run_id: str) -> None:
    """Makes a new thread out of a copy, in which the run can go on.

    Raises:
        UsageError: a field that is to be changed is none of the graph's, or cannot hold the value.
    """
    here, around = origin.snapshot, _around(origin.snapshot.namespace)
    newest = {_namespace(one): _id(one) for one in origin.saved}
    async with checkpointed(graph, held) as compiled:
        changed = _changed(compiled, origin) if origin.changes else None
        for one in origin.saved:
            namespace, last = _namespace(one), newest[_namespace(one)] == _id(one)
            checkpoint, metadata = one.checkpoint, one.metadata
            if _id(one) == here.id and changed is not None:
                checkpoint = changed
            if last and namespace in around:
                metadata = {**metadata, "source": "fork", "run_id": run_id}
            place: Any = {"thread_id": held.thread_id, "checkpoint_ns": namespace}
            if one.parent_config is not None:
                place["checkpoint_id"] = one.parent_config["configurable"]["checkpoint_id"]
            kept = await compiled.checkpointer.aput({"configurable": place}, checkpoint, metadata, checkpoint["channel_versions"])
            writes: dict[str, list[tuple[str, Any]]] = {}
            for task, channel, value in one.pending_writes or ():
                ends = last and (channel in _UNFINISHED or _id(one) == here.id or around.get(namespace) == task)
                if not ends:
                    writes.setdefault(task, []).append((channel, value))
            for task, written in writes.items():
                await compiled.checkpointer.aput_writes(kept, written, task)


def _around(namespace: str) -> dict[str, str]:
    """The namespaces of a checkpoint and of the graphs around it, each with the task of it that is on the way there."""
    levels = namespace.split("|") if namespace else []
    found = {"|".join(levels[:depth]): levels[depth].rpartition(":")[2] for depth in range(len(levels))}
    return {**found, namespace: ""}


def _changed(compiled: Any, origin: Origin) -> Any:
    """The checkpoint with other values in its fields; those that the graph has not taken in yet are changed in the input."""
    (saved,) = (one for one in origin.saved if _id(one) == origin.snapshot.id)
    path = origin.snapshot.graph.replace("/", "|")
    inner = dict(compiled.get_subgraphs(recurse=True)).get(path) if path else compiled
    channels = public(inner.channels) if inner is not None else {}
    fields = {name: channel for name, channel in channels.items() if isinstance(channel, BaseChannel)}
    values, versions = dict(saved.checkpoint["channel_values"]), dict(saved.checkpoint["channel_versions"])
    seen = {node: dict(of_node) for node, of_node in saved.checkpoint["versions_seen"].items()}

    def set_value(name: str, value: Any) -> None:
        # A saver may keep one value for each version; who has seen the version before has seen this one, and does not run again.
        before = versions.get(name)
        values[name] = value
        versions[name] = compiled.checkpointer.get_next_version(max(versions.values(), default=None), None)
        for of_node in seen.values():
            if before is not None and of_node.get(name) == before:
                of_node[name] = versions[name]

    for name, value in origin.changes.items():
        if name not in fields:
            raise UsageError(f"the graph has no field '{name}'", hint=f"its fields are: {', '.join(fields) or 'not known'}")
        if isinstance(values.get("__start__"), Mapping):
            set_value("__start__", {**values["__start__"], name: value})
            continue
        channel = fields[name].copy()
        try:
            channel.update([value])
            set_value(name, channel.checkpoint())
        except (InvalidUpdateError, EmptyChannelError, TypeError, ValueError) as error:
            raise UsageError(f"field '{name}' cannot hold {str(value)[:80]!r}: {error}", hint="give what nodes give") from error
    return {**saved.checkpoint, "channel_values": values, "channel_versions": versions, "versions_seen": seen}


def _id(saved: CheckpointTuple) -> str:
    return str(saved.checkpoint["id"])


def _namespace(saved: CheckpointTuple) -> str:
    return str(saved.config["configurable"].get("checkpoint_ns", ""))


async def _saved(compiled: Any, thread_id: str) -> list[CheckpointTuple]:
    """All that is saved of a thread, in the order in which it was written: a checkpoint's id begins with its time."""
    found = [one async for one in compiled.checkpointer.alist({"configurable": {"thread_id": thread_id}})]
    if not found:
        raise RecordError(f"thread {thread_id} has no checkpoints", hint="it never came so far, or they were removed")
    return sorted(found, key=_id)


async def _read(compiled: Any, saved: Sequence[CheckpointTuple]) -> list[Snapshot]:
    thread_id = saved[0].config["configurable"]["thread_id"]
    nexts: dict[tuple[str, str], tuple[str, ...]] = {}
    tasks: dict[tuple[str, str], tuple[str, ...]] = {}
    values: dict[tuple[str, str], Mapping[str, Any]] = {}
    for namespace in {_namespace(one) for one in saved}:
        place: Any = {"configurable": {"thread_id": thread_id, "checkpoint_ns": namespace}}
        try:
            async for state in compiled.aget_state_history(place):
                key = namespace, str(state.config["configurable"]["checkpoint_id"])
                tasks[key] = tuple(task.name for task in state.tasks)
                nexts[key] = state.next or tasks[key]
                values[key] = state.values if isinstance(state.values, Mapping) else {"output": state.values}
        except ValueError:
            continue  # no subgraph that LangGraph knows of
    found = []
    for one in saved:
        namespace = _namespace(one)
        parent = one.parent_config["configurable"]["checkpoint_id"] if one.parent_config else None
        snapshot = Snapshot(
            id=_id(one),
            graph="/".join(level.partition(":")[0] for level in namespace.split("|") if level),
            namespace=namespace,
            step=int(one.metadata.get("step", 0)),
            source=str(one.metadata.get("source", "loop")),
            run_id=str(one.metadata.get("run_id", "")),
            at=str(one.checkpoint.get("ts", "")),
            parent=parent,
            next=nexts.get((namespace, _id(one)), ()),
            values=values.get((namespace, _id(one)), public(one.checkpoint["channel_values"])),
        )
        by = tasks.get((namespace, parent or ""), ()) if snapshot.source == "loop" else ()
        found.append(replace(snapshot, by=by))
    return found
