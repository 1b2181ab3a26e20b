"""LangGraph's own specification of a checkpointer, the optional part too, held by ours; and threads that keep changes only."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Annotated, Any, TypedDict

import pytest
from langgraph.channels.delta import DeltaChannel
from langgraph.checkpoint.conformance import checkpointer_test, validate
from langgraph.graph import START, StateGraph

from agentops.checkpoints import ThreadSaver, lease, open_checkpointer
from agentops.errors import RecordError, UsageError
from agentops.settings import Settings

EXPECTED = {
    "put": 17,
    "put_writes": 10,
    "get_tuple": 10,
    "list": 16,
    "delete_thread": 5,
    "delete_for_runs": 7,
    "copy_thread": 8,
    "prune": 8,
}


async def test_the_specification_is_held_in_full(either_settings: Settings) -> None:
    places = iter(range(100))

    @checkpointer_test(name="threads in files of their own, or in Postgres")
    async def ours() -> AsyncIterator[ThreadSaver]:
        thread = f"conformance-{next(places)}"
        async with lease(either_settings, thread) as held, open_checkpointer(held, frozenset()) as saver:
            yield saver

    report = await validate(ours)
    assert {name: one.failures for name, one in report.results.items() if one.failures} == {}
    assert {name: one.tests_passed for name, one in report.results.items()} == EXPECTED


def joined(before: list[str], writes: Sequence[list[str]]) -> list[str]:
    return before + [one for each in writes for one in each]


class State(TypedDict):
    said: Annotated[list[str], DeltaChannel(joined, snapshot_frequency=4)]


@asynccontextmanager
async def thread_of_changes(settings: Settings) -> AsyncIterator[tuple[ThreadSaver, Any]]:
    """A thread with two runs of two steps each, whose only channel is whole after every fourth change."""
    builder: Any = StateGraph(State).add_node("a", lambda state: {"said": ["a"]}).add_node("b", lambda state: {"said": ["b"]})
    builder.add_edge(START, "a").add_edge("a", "b")
    async with lease(settings, "t") as held, open_checkpointer(held, frozenset()) as saver:
        graph = builder.compile(checkpointer=saver)
        for run in ("one", "two"):
            await graph.ainvoke({"said": [run]}, {"configurable": {"thread_id": "t"}, "metadata": {"run_id": run}})
        yield saver, graph


async def said(graph: Any, thread: str = "t") -> list[str]:
    return list((await graph.aget_state({"configurable": {"thread_id": thread}})).values["said"])


async def count(saver: ThreadSaver, thread: str = "t") -> int:
    return len([one async for one in saver.alist({"configurable": {"thread_id": thread}})])


WHOLE = ["one", "a", "b", "two", "a", "b"]


async def test_a_thread_of_changes_is_pruned_to_what_it_is_read_from(either_settings: Settings) -> None:
    async with thread_of_changes(either_settings) as (saver, graph):
        before = await count(saver)
        await saver.aprune(["t"])
        assert 1 < await count(saver) < before
        assert await said(graph) == WHOLE
        with pytest.raises(UsageError, match="no way to prune"):
            await saver.aprune(["t"], strategy="some")
        await saver.aprune(["t"], strategy="delete")
        assert await count(saver) == 0


async def test_a_thread_of_changes_is_copied_whole(either_settings: Settings) -> None:
    async with thread_of_changes(either_settings) as (saver, graph):
        await saver.acopy_thread("t", "u")
        await saver.adelete_thread("t")
        assert await said(graph, "u") == WHOLE


async def test_what_later_runs_build_on_is_not_deleted(either_settings: Settings) -> None:
    async with thread_of_changes(either_settings) as (saver, graph):
        before = await count(saver)
        with pytest.raises(RecordError, match="later runs build on"):
            await saver.adelete_for_runs(["one"])
        assert (await count(saver), await said(graph)) == (before, WHOLE)
        await saver.adelete_for_runs(["two"])
        assert await said(graph) == ["one", "a", "b"]
        await saver.adelete_for_runs(["one", "two"])
        assert await count(saver) == 0
