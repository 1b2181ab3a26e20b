"""Runs that are delivered more than once, and what they do outside: nothing is done twice that has a name of its own."""

from __future__ import annotations

import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Annotated, Any, TypedDict

import pytest
from langchain_core.tools import InjectedToolCallId
from langgraph.graph import END, START, StateGraph
from langgraph.runtime import Runtime as Given
from langgraph.types import RetryPolicy, Send

from agentops import Context, Runtime, ScriptedEngine, Settings
from agentops.errors import NodeFailed, ThreadBusy, UsageError
from agentops.people import ask
from agentops.records import RunResult, RunStarted, ToolCall
from agentops.retrieval.embed import HashEmbedder
from agentops.store import open_store
from agentops.tools import Toolbox, tool


class State(TypedDict, total=False):
    trail: Annotated[list[str], lambda left, right: left + right]


@pytest.fixture
def runtime(either_settings: Settings) -> Iterator[Runtime]:
    with Runtime(either_settings, engine=ScriptedEngine(), embedder=HashEmbedder()) as opened:
        yield opened


class Work:
    """A graph of two nodes that counts what it does, and fails or asks in the second one as long as it is told to."""

    def __init__(self) -> None:
        self.done: Counter[str] = Counter()
        self.fails = self.asks = False
        builder = StateGraph(State).add_node("first", self.first).add_node("second", self.second)
        self.graph = builder.add_edge(START, "first").add_edge("first", "second").add_edge("second", END)

    def first(self, state: State) -> State:
        self.done["first"] += 1
        return {"trail": ["first"]}

    def second(self, state: State) -> State:
        if self.fails:
            raise OSError("no network")
        said = str(ask("go on?")) if self.asks else "second"
        self.done["second"] += 1
        return {"trail": [said]}


def test_a_run_that_is_delivered_again_when_it_is_done_tells_what_it_gave(runtime: Runtime) -> None:
    work = Work()
    once = runtime.run(work.graph, {"trail": []}, run_id="order-17")
    assert (once.run_id, once.thread_id, once.status) == ("order-17", "th_order-17", "done")
    events = list(runtime.stream(work.graph, {"trail": []}, run_id="order-17"))
    assert [type(event) for event in events] == [RunStarted, RunResult]
    again = events[-1]
    assert isinstance(again, RunResult)
    assert (again.output, again.status, again.usage) == (once.output, once.status, once.usage)
    assert work.done == {"first": 1, "second": 1}
    with open_store(runtime.settings) as store:
        assert sum(span.kind == "workflow" for span in store.spans("order-17")) == 1
    assert runtime.run(work.graph, {"trail": []}, run_id="order-1").run_id == "order-1", "a beginning of a name is another name"


def test_a_run_that_failed_goes_on_when_it_is_delivered_again(runtime: Runtime) -> None:
    work = Work()
    work.fails = True
    with pytest.raises(NodeFailed, match="no network"):
        runtime.run(work.graph, {"trail": []}, run_id="order-17")
    work.fails = False
    assert runtime.run(work.graph, {"trail": []}, run_id="order-17").output == {"trail": ["first", "second"]}
    assert work.done == {"first": 1, "second": 1}


def test_a_run_that_waits_asks_the_same_when_it_is_delivered_again(runtime: Runtime) -> None:
    work = Work()
    work.asks = True
    asked = runtime.run(work.graph, {"trail": []}, run_id="order-17", thread="mine")
    again = runtime.run(work.graph, {"trail": []}, run_id="order-17", thread="mine")
    assert asked.status == again.status == "waiting"
    assert asked.interrupts == again.interrupts
    assert runtime.resume("order-17", answer="yes", graph=work.graph).output == {"trail": ["first", "yes"]}


def test_a_delivery_is_not_repeated_when_the_record_does_not_know_of_the_first(settings: Settings) -> None:
    work = Work()
    work.fails = True
    with Runtime(settings, engine=ScriptedEngine(), embedder=HashEmbedder()) as runtime, pytest.raises(NodeFailed):
        runtime.run(work.graph, {"trail": []}, run_id="order-17")
    work.fails = False
    for _ in range(2):
        (settings.paths.home / "record.db").unlink()
        shutil.rmtree(settings.paths.home / "journal")
        with Runtime(settings, engine=ScriptedEngine(), embedder=HashEmbedder()) as runtime:
            assert runtime.run(work.graph, {"trail": []}, run_id="order-17").output == {"trail": ["first", "second"]}
    assert work.done == {"first": 1, "second": 1}


def test_of_two_deliveries_at_once_one_does_the_work(either_settings: Settings) -> None:
    done: list[str] = []

    def only(state: State) -> State:
        time.sleep(1.5)  # longer than a lease is waited for
        done.append("only")
        return {"trail": ["only"]}

    graph = StateGraph(State).add_node(only).add_edge(START, "only").add_edge("only", END)
    ends: list[str] = []
    with Runtime(either_settings, engine=ScriptedEngine()) as one, Runtime(either_settings, engine=ScriptedEngine()) as other:

        def deliver(runtime: Runtime) -> None:
            try:
                ends.append(runtime.run(graph, {"trail": []}, run_id="order-17").status)
            except ThreadBusy:
                ends.append("busy")

        threads = [threading.Thread(target=deliver, args=(runtime,)) for runtime in (one, other, one)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert done == ["only"]
    assert "done" in ends
    assert set(ends) <= {"done", "busy"}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"thread": "another"}, "another thread"),
        ({"input": {"trail": ["x"]}}, "another input"),
        ({"run_id": "../17"}, "cannot name a run"),
        ({"run_id": ""}, "cannot name a run"),
    ],
)
def test_what_is_not_the_same_run_cannot_have_its_name(runtime: Runtime, changed: dict[str, Any], said: str) -> None:
    work = Work()
    given: dict[str, Any] = {"input": {"trail": []}, "run_id": "order-17"}
    runtime.run(work.graph, **given)
    with pytest.raises(UsageError, match=said):
        runtime.run(work.graph, **given | changed)


def test_a_key_is_the_same_when_a_node_runs_again_and_another_for_all_else(runtime: Runtime) -> None:
    keys: dict[str, list[list[str]]] = {}
    broken = True

    def pay(state: dict[str, Any], runtime: Given[Context]) -> State:
        context = runtime.context
        key = [context.idempotency_key("pay", 5), context.idempotency_key("pay", 5), context.idempotency_key("pay", 6)]
        keys.setdefault(state["to"], []).append(key)
        if broken:
            raise OSError("no network")
        return {"trail": [state["to"]]}

    graph = StateGraph(State, context_schema=Context)
    graph.add_node("pay", pay, retry_policy=RetryPolicy(max_attempts=2, initial_interval=0.01, retry_on=OSError))
    graph.add_conditional_edges(START, lambda _: [Send("pay", {"to": name}) for name in ("Ada", "Bob")], ["pay"])
    with pytest.raises(NodeFailed):
        runtime.run(graph, {"trail": []}, run_id="a")
    broken = False
    runtime.run(graph, {"trail": []}, run_id="a")
    for tried in keys.values():
        assert len(tried) >= 2
        assert all(key == tried[0] for key in tried), "attempts and what is resumed"
    runtime.run(graph, {"trail": []}, run_id="b")
    distinct = {key for tried in keys.values() for attempt in tried for key in attempt}
    assert len(distinct) == 2 * 2 * 3, "two runs, two tasks, three asked for in each"


def test_calls_proposed_twice_by_a_task_have_names_of_their_own_which_stay(runtime: Runtime) -> None:
    paid: Counter[str] = Counter()
    broken = True

    @tool(effect="none")
    def pay(amount: int, call_id: Annotated[str, InjectedToolCallId]) -> str:
        """Pays."""
        paid[call_id] += 1
        return "paid"

    box = Toolbox([pay])

    async def act(state: State, runtime: Given[Context]) -> State:
        for _ in range(2):
            call = ToolCall("pay", {"amount": 5}, runtime.context.idempotency_key("pay", {"amount": 5}))
            await runtime.context.perform(box, call)
        if broken:
            raise OSError("no network")
        return {"trail": ["paid"]}

    graph = StateGraph(State, context_schema=Context).add_node(act).add_edge(START, "act").add_edge("act", END)
    with pytest.raises(NodeFailed):
        runtime.run(graph, {"trail": []}, run_id="a")
    broken = False
    runtime.run(graph, {"trail": []}, run_id="a")
    assert sorted(paid.values()) == [2, 2], "two calls, each made twice under one name"
