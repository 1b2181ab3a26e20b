"""What LangGraph's store, node cache and custom stream do in a run, as spans. Callbacks tell of none of them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

from langgraph._internal._constants import CONFIG_KEY_RUNTIME, CONFIG_KEY_STREAM
from langgraph.cache.base import BaseCache
from langgraph.pregel.protocol import StreamProtocol
from langgraph.runtime import Runtime
from langgraph.store.base import BaseStore, GetOp, Item, ListNamespacesOp, Op, PutOp, Result, SearchOp

from agentops.tracer.payload import public
from agentops.tracer.trace import RunTrace, Span


class TracedStore(BaseStore):
    """A store that records a memory span for each operation of the one it wraps."""

    __slots__ = ("_run", "_store")

    def __init__(self, store: BaseStore, run: RunTrace) -> None:
        self._store = store
        self._run = run

    @property
    def supports_ttl(self) -> bool:  # type: ignore[override]
        return self._store.supports_ttl

    @property
    def ttl_config(self) -> Any:  # type: ignore[override]
        return self._store.ttl_config

    def batch(self, ops: Iterable[Op]) -> list[Result]:
        wanted = list(ops)
        calls = [self._open(op) for op in wanted]
        try:
            found = self._store.batch(wanted)
        except BaseException as error:
            self._failed(calls, error)
            raise
        return self._done(calls, found)

    async def abatch(self, ops: Iterable[Op]) -> list[Result]:
        wanted = list(ops)
        calls = [self._open(op) for op in wanted]
        try:
            found = await self._store.abatch(wanted)
        except BaseException as error:
            self._failed(calls, error)
            raise
        return self._done(calls, found)

    def _open(self, op: Op) -> Span:
        name, given = told(op)
        run, parent, notes = self._run.place()
        return run.open("memory", name, parent=parent, input=given, attributes=notes)

    def _failed(self, calls: Sequence[Span], error: BaseException) -> None:
        for call in calls:
            self._run.close(call, error=error)

    def _done(self, calls: Sequence[Span], found: list[Result]) -> list[Result]:
        for call, result in zip(calls, found, strict=True):
            self._run.close(call, output=_plain(result))
        return found


def told(op: Op) -> tuple[str, dict[str, Any]]:
    """The name of an operation, and what it is asked."""
    match op:
        case GetOp():
            return "get", {"namespace": list(op.namespace), "key": op.key, "refresh_ttl": op.refresh_ttl}
        case SearchOp():
            asked = {"namespace": list(op.namespace_prefix), "query": op.query, "filter": op.filter}
            return "search", {**asked, "limit": op.limit, "offset": op.offset, "refresh_ttl": op.refresh_ttl}
        case PutOp():
            name = "delete" if op.value is None else "put"
            given = {} if op.value is None else {"value": op.value, "index": op.index, "ttl": op.ttl}
            return name, {"namespace": list(op.namespace), "key": op.key, **given}
        case ListNamespacesOp():
            conditions = [{"match": one.match_type, "path": list(one.path)} for one in op.match_conditions or ()]
            return "list", {"conditions": conditions, "max_depth": op.max_depth, "limit": op.limit, "offset": op.offset}


def _plain(result: Result) -> Any:
    match result:
        case Item():
            return _item(result)
        case list():
            return [_item(one) if isinstance(one, Item) else list(one) for one in result]
    return result


def _item(item: Item) -> dict[str, Any]:
    times = {"created_at": item.created_at.isoformat(), "updated_at": item.updated_at.isoformat()}
    score = getattr(item, "score", None)
    kept = {"namespace": list(item.namespace), "key": item.key, "value": item.value, **times}
    return kept if score is None else {**kept, "score": score}


def traced_cache(cache: BaseCache[Any], run: RunTrace) -> BaseCache[Any]:
    """The same cache, over the same entries; a node that it answers for is recorded as a span with `cached`.

    The runtime asks for nodes by `aget` alone. A subgraph does not take over the cache of the graph around it, and what one of
    its own answers is not seen here.
    """
    twin: Any = copy.copy(cache)

    async def aget(keys: Sequence[Any]) -> dict[Any, Any]:
        found = await cache.aget(keys)
        for (namespace, _), writes in found.items():
            name = str(namespace[-1]).rpartition(".")[2]
            opened = run.open("node", name, parent=run.place()[1], attributes={"cached": True}, node=name, step=run.step)
            run.close(opened, output=public(dict(writes)))
        return found

    twin.aget = aget
    made: BaseCache[Any] = twin
    return made


def told_of_stream(run: RunTrace, store: BaseStore | None) -> dict[str, Any]:
    """What to add to `configurable` so that a graph's stream writers record what they are given, where they are called.
    `store` is the graph's.

    LangGraph gives a graph inside another the writer of the outer one, and takes ours for that. Reading the stream instead costs
    every superstep, says no node, and what a dying process had not read is lost.
    """

    def write(chunk: Any) -> None:
        run.event("custom", chunk)

    return {
        CONFIG_KEY_STREAM: StreamProtocol(lambda _: None, set()),
        CONFIG_KEY_RUNTIME: Runtime(store=store, stream_writer=write),
    }
