"""A Postgres that goes away in the middle of a run: the run stops at its step, and goes on from there, in another home too."""

from __future__ import annotations

import asyncio
import operator
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, TypedDict

import pytest
from langgraph.graph import END, START, StateGraph
from langgraph.runtime import Runtime as Given
from langgraph.types import interrupt
from postgres_server import Postgres

from agentops import Context, Runtime, ScriptedEngine, Settings
from agentops.clock import SystemClock
from agentops.errors import LeaseLost, StoreUnavailable
from agentops.retrieval.embed import HashEmbedder
from agentops.store import open_store


class State(TypedDict, total=False):
    trail: Annotated[list[str], operator.add]


class Paid:
    """A graph `first -> inner (pay -> check) -> last` that counts what it does, and what happens while it pays."""

    def __init__(self, meanwhile: Callable[[], object]) -> None:
        self.meanwhile = meanwhile
        self.done: list[str] = []
        self.effects: dict[str, int] = {}
        inner = StateGraph(State, context_schema=Context).add_node("pay", self._pay).add_node("check", self._step("check"))
        inner.add_edge(START, "pay").add_edge("pay", "check").add_edge("check", END)
        self.graph = StateGraph(State, context_schema=Context).add_node("first", self._step("first"))
        self.graph.add_node("inner", inner.compile()).add_node("last", self._step("last"))
        self.graph.add_edge(START, "first").add_edge("first", "inner").add_edge("inner", "last").add_edge("last", END)

    def _pay(self, state: State, runtime: Given[Context]) -> State:
        self.done.append("pay")
        self.effects.setdefault(runtime.context.idempotency_key("pay"), len(self.done))
        self.meanwhile()
        return {"trail": ["pay"]}

    def _step(self, name: str) -> Any:
        def node(state: State) -> State:
            self.done.append(name)
            return {"trail": [name]}

        return node


def opened(settings: Settings) -> Runtime:
    return Runtime(settings, engine=ScriptedEngine(), embedder=HashEmbedder())


def elsewhere(settings: Settings, folder: Path) -> Settings:
    return replace(settings, paths=replace(settings.paths, home=folder / "elsewhere"))


@pytest.mark.parametrize("crash", [False, True])
def test_a_run_stops_at_its_step_and_goes_on_in_another_home(
    postgres_settings: Settings, postgres_server: Postgres, tmp_path: Path, crash: bool
) -> None:
    paid = Paid(postgres_server.kill if crash else postgres_server.stop)
    with opened(postgres_settings) as runtime:
        try:
            with pytest.raises(LeaseLost, match=r"the connection to the Postgres at .* broke") as caught:
                runtime.run(paid.graph, {"trail": []}, run_id="r")
            with pytest.raises(StoreUnavailable):
                runtime.run(paid.graph, {"trail": []}, run_id="other")
        finally:
            postgres_server.start()
    assert "agentops resume" in caught.value.hint
    assert paid.done == ["first", "pay"]
    paid.meanwhile = lambda: None
    with opened(elsewhere(postgres_settings, tmp_path)) as runtime:
        result = runtime.resume("r", graph=paid.graph)
        again = runtime.run(paid.graph, {"trail": []}, run_id="r")
        steps = [one.step for one in runtime.history("r", graph=paid.graph) if not one.graph]
    assert (result.status, again.output["trail"]) == ("done", result.output["trail"])
    assert paid.done == ["first", "pay", "pay", "check", "last"]
    assert len(paid.effects) == 1, "the key is the same whenever the task runs again"
    assert steps == [-1, 0, 1, 2, 3]


def test_a_question_is_answered_in_another_home(postgres_settings: Settings, tmp_path: Path) -> None:
    builder = StateGraph(State).add_node("ask", lambda state: {"trail": [interrupt("how many?")]})
    graph = builder.add_edge(START, "ask").add_edge("ask", END)
    with opened(postgres_settings) as runtime:
        waiting = runtime.run(graph, {"trail": []})
    with opened(elsewhere(postgres_settings, tmp_path)) as runtime:
        assert runtime.resume(waiting.run_id, answer="two", graph=graph).output == {"trail": ["two"]}
        forked = runtime.fork(waiting.run_id, step=0, graph=graph)
        assert (forked.status, len(forked.interrupts)) == ("waiting", 1)


class SlowClock(SystemClock):
    """Of a machine whose clock is an hour behind."""

    def now_ns(self) -> int:
        return super().now_ns() - 3600 * 10**9


@pytest.mark.parametrize("what", ["answered", "cancelled"])
def test_a_home_whose_clock_is_behind_has_the_last_word_all_the_same(
    postgres_settings: Settings, tmp_path: Path, what: str
) -> None:
    builder = StateGraph(State).add_node("ask", lambda state: {"trail": [interrupt("how many?")]})
    graph = builder.add_edge(START, "ask").add_edge("ask", END)
    with opened(postgres_settings) as runtime:
        waiting = runtime.run(graph, {"trail": []})
    other = elsewhere(postgres_settings, tmp_path)
    with Runtime(other, engine=ScriptedEngine(), embedder=HashEmbedder(), clock=SlowClock()) as runtime:
        if what == "answered":
            runtime.resume(waiting.run_id, answer="two", graph=graph)
        else:
            runtime.cancel(waiting.run_id)
    with open_store(postgres_settings) as store:
        assert store.run(waiting.run_id).status == ("done" if what == "answered" else "cancelled")


async def test_runs_beyond_what_a_server_has_connections_for_wait(postgres_settings: Settings) -> None:
    now = most = 0

    async def work(state: State) -> State:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.2)
        now -= 1
        return {"trail": ["work"]}

    graph = StateGraph(State).add_node(work).add_edge(START, "work").add_edge("work", END)
    async with opened(postgres_settings) as runtime:
        results = await asyncio.gather(*(runtime.arun(graph, {"trail": []}) for _ in range(40)))
    assert {one.status for one in results} == {"done"}
    assert 1 < most <= 32
