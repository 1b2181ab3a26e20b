"""Budgets: what ends a run that would not end by itself, what is said of it, and how it goes on."""

from __future__ import annotations

import asyncio
import contextlib
import json
import operator
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, TypedDict

import pytest
from langchain_core.language_models import FakeListChatModel
from langgraph.graph import END, START, StateGraph
from langgraph.runtime import Runtime as Given

from agentops import Context, Runtime, ScriptedEngine, Settings
from agentops.engine import generate
from agentops.errors import BudgetSpent, NodeFailed, SettingsError, UsageError
from agentops.records import Budget, Message, NodeBudget, Request, RunResult
from agentops.retrieval.embed import HashEmbedder
from agentops.run_settings import budget_of
from agentops.store import RunRow, open_store
from agentops.tracer import catch_up

PLENTY = Budget(steps=60, model_calls=100, tokens=100_000, seconds=60.0)


class State(TypedDict, total=False):
    trail: Annotated[list[str], operator.add]


def row(settings: Settings, run_id: str) -> RunRow:
    catch_up(settings)
    with open_store(settings) as store:
        return store.run(run_id)


def forever(node: Callable[..., Any]) -> StateGraph[Any, Any, Any, Any]:
    return StateGraph(State, context_schema=Context).add_node("work", node).add_edge(START, "work").add_edge("work", "work")


async def ask(state: State, runtime: Given[Context]) -> State:
    made = await generate(runtime.context.engine, Request(messages=(Message("user", "one two three"),), max_tokens=8))
    return {"trail": [made.text]}


@pytest.fixture
def runtime(settings: Settings) -> Any:
    engine = ScriptedEngine(lambda request: "yes it is")
    with Runtime(settings, engine=engine, embedder=HashEmbedder()) as opened:
        yield opened


@pytest.mark.parametrize(
    ("budget", "spent", "said", "steps"),
    [
        (replace(PLENTY, steps=5), "steps", "its 5 steps are spent; reached: 5 steps, 5 model calls", 5),
        (replace(PLENTY, model_calls=4), "model_calls", "its 4 model calls are spent; reached: 5 steps, 4 model calls", 4),
        (replace(PLENTY, tokens=20), "tokens", "its 20 tokens are spent", 5),
    ],
)
def test_a_loop_that_never_ends_is_ended(
    runtime: Runtime, settings: Settings, budget: Budget, spent: str, said: str, steps: int
) -> None:
    events: deque[Any] = deque(maxlen=1)
    with pytest.raises(BudgetSpent, match=said) as stopped:
        events.extend(runtime.stream(forever(ask), {"trail": []}, budget=budget))
    assert stopped.value.budget == spent
    assert f"--max-{spent.replace('_', '-')}" in stopped.value.hint
    (result,) = events
    assert isinstance(result, RunResult)
    assert result.status == "failed"
    assert result.output == {"trail": ["yes it is"] * steps}, "what was reached"
    assert f"{result.usage.computed_tokens + result.usage.output_tokens:,} tokens" in str(stopped.value)
    recorded = row(settings, result.run_id)
    assert recorded.status == "failed"
    assert "spent" in str(recorded.error)
    with open_store(settings) as store:
        assert store.payload(str(recorded.output_hash)) == result.output
        assert store.balance(result.run_id).balanced


def test_a_stopped_run_goes_on_with_a_new_budget_where_it_was(runtime: Runtime, settings: Settings) -> None:
    graph = forever(ask)
    with pytest.raises(BudgetSpent):
        runtime.run(graph, {"trail": []}, budget=replace(PLENTY, model_calls=2), thread="t")
    run = runtime._runs.find("last")
    with pytest.raises(BudgetSpent, match="its 3 model calls"):
        runtime.resume(run.id, graph=graph, budget=replace(PLENTY, model_calls=3))
    with open_store(settings) as store:
        output = store.payload(str(row(settings, run.id).output_hash))
    assert output == {"trail": ["yes it is"] * 5}


def test_time_ends_nodes_that_wait_and_nodes_that_block_a_thread(runtime: Runtime) -> None:
    async def wait(state: State) -> State:
        await asyncio.sleep(60)
        return {}

    release = threading.Event()

    def block(state: State) -> State:
        release.wait(60)
        return {}

    for node in (wait, block):
        begun = time.monotonic()
        with pytest.raises(BudgetSpent, match=r"its 0\.3 seconds are spent"):
            runtime.run(forever(node), {"trail": []}, budget=replace(PLENTY, seconds=0.3))
        assert time.monotonic() - begun < 10
    release.set()


def test_a_time_out_of_the_graphs_own_is_not_taken_for_ours(runtime: Runtime) -> None:
    async def own(state: State) -> State:
        async with asyncio.timeout(0.01):
            await asyncio.sleep(60)
        return {}

    with pytest.raises(Exception, match="TimeoutError") as failed:
        runtime.run(forever(own), {"trail": []}, budget=PLENTY)
    assert not isinstance(failed.value, BudgetSpent)


def test_a_node_that_swallows_the_refusal_goes_no_further(runtime: Runtime) -> None:
    swallowed = 0

    async def stubborn(state: State, runtime: Given[Context]) -> State:
        nonlocal swallowed
        try:
            return await ask(state, runtime)
        except Exception:
            swallowed += 1
            return {"trail": ["swallowed"]}

    with pytest.raises(BudgetSpent, match="2 model calls"):
        runtime.run(forever(stubborn), {"trail": []}, budget=replace(PLENTY, model_calls=2))
    assert swallowed == 1


def test_calls_side_by_side_are_counted_one_by_one(runtime: Runtime) -> None:
    refused = 0

    async def many(state: State, runtime: Given[Context]) -> State:
        nonlocal refused
        ends = await asyncio.gather(*(ask(state, runtime) for _ in range(20)), return_exceptions=True)
        refused += sum(isinstance(end, BudgetSpent) for end in ends)
        return {"trail": [end["trail"][0] for end in ends if isinstance(end, dict)]}

    with pytest.raises(BudgetSpent):
        runtime.run(forever(many), {"trail": []}, budget=replace(PLENTY, model_calls=7))
    assert refused == 13


def test_models_that_are_not_ours_count_too(settings: Settings) -> None:
    model = FakeListChatModel(responses=["a"])

    async def chat(state: State) -> State:
        return {"trail": [str((await model.ainvoke("hi")).content)]}

    graph = StateGraph(State).add_node("chat", chat).add_edge(START, "chat").add_edge("chat", "chat")
    with Runtime(settings) as runtime, pytest.raises(BudgetSpent, match="its 3 model calls"):
        runtime.run(graph, {"trail": []}, budget=replace(PLENTY, model_calls=3))


def test_a_run_within_its_budget_is_not_touched(runtime: Runtime) -> None:
    graph = StateGraph(State, context_schema=Context).add_node("work", ask).add_edge(START, "work").add_edge("work", END)
    assert runtime.run(graph, {"trail": []}, budget=Budget(1, 1, 1, 60.0)).status == "done"


ENDLESS = """
from typing import TypedDict
from langgraph.graph import START, StateGraph

class State(TypedDict):
    n: int

def work(state):
    return {"n": state["n"] + 1}

def block(state):
    import time
    time.sleep(600)

graph = StateGraph(State).add_node(work).add_edge(START, "work").add_edge("work", "work")
blocked = StateGraph(State).add_node(block).add_edge(START, "block")
"""


@pytest.mark.parametrize(
    ("graph", "flags", "said"),
    [
        ("graph", ["--max-steps", "7"], "its 7 steps are spent"),
        ("blocked", ["--max-seconds", "0.5"], "its 0.5 seconds are spent"),
    ],
)
def test_the_command_line_says_what_was_spent_and_ends_at_once(
    environment: dict[str, str], tmp_path: Path, graph: str, flags: list[str], said: str
) -> None:
    (tmp_path / "endless.py").write_text(ENDLESS)
    command = [sys.executable, "-m", "agentops", "run", f"endless.py:{graph}", '{"n": 0}', "--json", *flags]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    printed = json.loads(done.stdout)
    assert printed["status"] == "failed"
    if graph == "graph":
        assert printed["output"] == {"n": 7}


def test_time_ends_a_loop_that_takes_no_notice_of_being_cancelled(runtime: Runtime) -> None:
    turns = 0

    async def deaf(state: State) -> State:
        nonlocal turns
        turns += 1
        with contextlib.suppress(BaseException):
            await asyncio.sleep(0.2)
        return {"trail": ["deaf"]}

    with pytest.raises(BudgetSpent, match="seconds are spent"):
        runtime.run(forever(deaf), {"trail": []}, budget=replace(PLENTY, steps=1000, seconds=0.5))
    assert turns < 10


def test_a_limit_that_a_node_sets_for_a_graph_of_its_own_is_not_taken_for_ours(runtime: Runtime) -> None:
    inner = StateGraph(State).add_node("work", lambda state: {"trail": ["in"]}).add_edge(START, "work").add_edge("work", "work")

    async def outer(state: State) -> State:
        await inner.compile().ainvoke({"trail": []}, {"recursion_limit": 3})
        return {}

    with pytest.raises(NodeFailed, match="Recursion limit of 3"):
        runtime.run(forever(outer), {"trail": []}, budget=PLENTY)
    looping = StateGraph(State, context_schema=Context).add_node("sub", inner.compile()).add_edge(START, "sub")
    with pytest.raises(BudgetSpent, match="its 10 steps are spent"):
        runtime.run(looping, {"trail": []}, budget=replace(PLENTY, steps=10))


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"seconds": float("nan")}, {"tokens": -1}])
def test_a_budget_that_lets_nothing_run_is_refused(runtime: Runtime, wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="lets nothing run"):
        runtime.run(forever(ask), {"trail": []}, budget=replace(PLENTY, **wrong))


@pytest.mark.parametrize(
    ("limit", "said"),
    [
        (NodeBudget(steps=2), "the 2 steps of node work are spent"),
        (NodeBudget(model_calls=2), "the 2 model calls of node work are spent"),
        (NodeBudget(tokens=7), "the 7 tokens of node work are spent"),
    ],
)
def test_a_node_has_a_budget_of_its_own(runtime: Runtime, limit: NodeBudget, said: str) -> None:
    inner = forever(ask).compile()
    graph = StateGraph(State, context_schema=Context).add_node("free", ask).add_node("around", inner)
    graph.add_edge(START, "free").add_edge("free", "around").add_edge("around", END)
    with pytest.raises(BudgetSpent, match=said) as stopped:
        runtime.run(graph, {"trail": []}, budget=replace(PLENTY, nodes={"work": limit}))
    assert stopped.value.node == "work"
    assert "--max-of-node work." in stopped.value.hint
    assert runtime.run(graph_of(ask), {"trail": []}, budget=replace(PLENTY, nodes={"work": limit})).status == "done"
    around = replace(PLENTY, nodes={"around": NodeBudget(model_calls=3)})
    with pytest.raises(BudgetSpent, match=r"the 3 model calls of node around are spent; reached: .* 4 model calls"):
        runtime.run(graph, {"trail": []}, budget=around)


def graph_of(node: Callable[..., Any]) -> StateGraph[Any, Any, Any, Any]:
    return StateGraph(State, context_schema=Context).add_node("work", node).add_edge(START, "work").add_edge("work", END)


def test_a_node_that_takes_too_long_is_stopped_and_the_others_have_time(runtime: Runtime) -> None:
    async def quick(state: State) -> State:
        await asyncio.sleep(0.1)
        return {"trail": ["quick"]}

    async def slow(state: State) -> State:
        await asyncio.sleep(60)
        return {}

    graph = StateGraph(State).add_node(quick).add_node(slow).add_edge(START, "quick").add_edge("quick", "slow")
    limits = {"quick": NodeBudget(seconds=30), "slow": NodeBudget(seconds=0.2)}
    events: deque[Any] = deque(maxlen=1)
    with pytest.raises(BudgetSpent, match=r"the 0\.2 seconds of node slow are spent") as stopped:
        events.extend(runtime.stream(graph, {"trail": []}, budget=replace(PLENTY, nodes=limits)))
    assert (stopped.value.budget, stopped.value.node) == ("seconds", "slow")
    assert events[0].output == {"trail": ["quick"]}


def test_money_is_counted_where_prices_are_known_and_said_where_not(settings: Settings) -> None:
    priced = replace(settings, cost=replace(settings.cost, prices=("scripted=1000/0/100000",)))
    budget = replace(PLENTY, money=1.0)
    with Runtime(priced, engine=ScriptedEngine(lambda request: "yes it is"), embedder=HashEmbedder()) as runtime:
        with pytest.raises(BudgetSpent, match=r"its 1 units of money are spent; reached: .*, 1\.\d+ units of money") as stopped:
            runtime.run(forever(ask), {"trail": []}, budget=budget)
        assert stopped.value.budget == "money"
        node = replace(PLENTY, nodes={"work": NodeBudget(money=0.1)})
        with pytest.raises(BudgetSpent, match=r"the 0\.1 units of money of node work are spent"):
            runtime.run(forever(ask), {"trail": []}, budget=node)
    with Runtime(settings, engine=ScriptedEngine(lambda request: "yes it is"), embedder=HashEmbedder()) as runtime:
        few = replace(budget, model_calls=3)
        with pytest.raises(BudgetSpent, match=r"its 3 model calls .* 0 units of money and 3 model calls of unknown cost"):
            runtime.run(forever(ask), {"trail": []}, budget=few)
    with (
        pytest.raises(SettingsError, match=r"cost\.prices has no price in"),
        Runtime(replace(settings, cost=replace(settings.cost, prices=("scripted=cheap",))), engine=ScriptedEngine()) as runtime,
    ):
        runtime.run(graph_of(ask), {"trail": []})


def test_limits_of_nodes_are_settings(settings: Settings) -> None:
    def with_nodes(*lines: str) -> Settings:
        return replace(settings, budget=replace(settings.budget, nodes=lines))

    found = budget_of(with_nodes("write.tokens=500", "write.seconds=2.5", "a.b.steps=1")).nodes
    assert found == {"write": NodeBudget(tokens=500, seconds=2.5), "a.b": NodeBudget(steps=1)}
    for wrong in ("write=5", "write.words=5", "write.tokens=", "write.tokens=-1", "write.tokens=2.5", ".tokens=1"):
        with pytest.raises(SettingsError, match="is no limit of a node"):
            budget_of(with_nodes(wrong))
