"""What is too big, too many, too deep or out of order: runs end well or are told why not, and the record is whole.

Locked, slow and full stores, full disks and damaged files are in `test_tracer_crash.py`, `test_store.py` and
`test_runtime.py`; values that a checkpoint cannot keep in `test_checkpoint_types.py`.
"""

from __future__ import annotations

import asyncio
import json
import operator
import resource
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, TypedDict

import pytest
from langgraph.graph import START, StateGraph

from agentops import Runtime, Settings
from agentops.clock import SystemClock
from agentops.errors import StateUnfit
from agentops.store import open_store
from agentops.tracer import catch_up, span


class State(TypedDict, total=False):
    x: Annotated[list[Any], operator.add]
    y: Any


def line(**nodes: Callable[[Any], Any]) -> Any:
    """A graph of one node after the other."""
    builder: Any = StateGraph(State)
    before = START
    for name, node in nodes.items():
        builder.add_node(name, node)
        builder.add_edge(before, name)
        before = name
    return builder.compile()


def says(value: Any) -> Callable[[State], State]:
    return lambda state: {"y": value}


def holding_itself(kind: type) -> Any:
    value: Any = kind()
    value.append(value) if kind is list else value.update(me=value)
    return value


def nested(levels: int) -> Any:
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


UNFIT = {"list": lambda: holding_itself(list), "dict": lambda: holding_itself(dict), "deep": lambda: nested(10_000)}


@pytest.mark.parametrize("kind", UNFIT)
def test_a_state_that_holds_itself_or_has_no_bottom_is_told_with_its_node_and_field(settings: Settings, kind: str) -> None:
    with Runtime(settings) as runtime:
        with pytest.raises(StateUnfit, match="node a, field y: it holds itself"):
            runtime.run(line(a=says(UNFIT[kind]()), b=says(1)), {"x": []})
        with pytest.raises(StateUnfit, match="the input, field y: it holds itself"):
            runtime.run(line(a=says(1)), {"x": [], "y": UNFIT[kind]()})
        mended = runtime.resume("last", graph=line(a=says(1)))
        assert (mended.status, mended.output["y"]) == ("done", 1)
    with open_store(settings) as store:
        assert [store.balance(run.id).balanced for run in store.runs()] == [True, True]


@pytest.mark.parametrize("kind", UNFIT)
def test_what_a_span_is_given_may_hold_itself_and_have_no_bottom(settings: Settings, kind: str) -> None:
    def node(state: State) -> State:
        with span("tool", "odd", input=UNFIT[kind]()) as one:
            one.output = UNFIT[kind]()
        return {"y": 1}

    with Runtime(settings) as runtime:
        done = runtime.run(line(a=node), {"x": []})
    with open_store(settings) as store:
        odd = next(one for one in store.spans(done.run_id) if one.name == "odd")
        assert odd.input_hash is not None
        assert "$" in json.dumps(store.payload(odd.input_hash))
        assert store.balance(done.run_id).balanced


def test_nul_is_kept_as_it_is(settings: Settings) -> None:
    odd = "a\x00c\U0001f600"
    with Runtime(settings) as runtime:
        done = runtime.run(line(a=says(odd), b=lambda state: {"x": [state["y"]]}), {"x": ["\x00"]})
        assert done.output == {"x": ["\x00", odd], "y": odd}
        assert runtime.state(done.run_id, graph=line(a=says(odd), b=says(1))).values["y"] == odd
    with open_store(settings) as store:
        run = store.run(done.run_id)
        assert run.output_hash is not None
        assert store.payload(run.output_hash) == {"x": ["\x00", odd], "y": odd}
        assert store.balance(run.id).balanced


def test_fifty_megabytes_from_a_node_are_kept_in_the_state_and_cut_on_record(settings: Settings) -> None:
    size = 50_000_000
    with Runtime(settings) as runtime:
        done = runtime.run(line(a=says("x" * size), b=lambda state: {"x": [len(state["y"])]}), {"x": []})
        assert done.output["x"] == [size]
        assert len(done.output["y"]) == size
    with open_store(settings) as store:
        balance = store.balance(done.run_id)
        assert (balance.balanced, balance.truncated > 0) == (True, True)
        whole = next(one for one in store.spans(done.run_id) if one.name == "a")
        assert whole.output_hash is not None
        assert f"[cut: {size:,} characters in all]" in store.payload(whole.output_hash)["y"]


class Jumping(SystemClock):
    """A wall clock that is set back by a day each time it is read."""

    def __init__(self) -> None:
        super().__init__()
        self.read = 0

    def now_ns(self) -> int:
        self.read += 1
        return super().now_ns() - self.read * 86_400 * 10**9


def test_a_clock_that_jumps_backwards_harms_no_duration_and_no_order(settings: Settings) -> None:
    clock = Jumping()
    with Runtime(settings, clock=clock) as runtime:
        done = runtime.run(line(a=says(1), b=says(2), c=says(3)), {"x": []})
    assert clock.read > 3
    with open_store(settings) as store:
        spans = store.spans(done.run_id)
        assert all(one.status == "ok" and one.duration_ns is not None and 0 <= one.duration_ns < 60 * 10**9 for one in spans)
        assert [one.name for one in spans if one.kind == "node"] == ["a", "b", "c"]
        assert store.run(done.run_id).status == "done"
        assert store.balance(done.run_id).balanced


async def crowd(settings: Settings, count: int) -> None:
    async def node(state: State) -> State:
        await asyncio.sleep(0.01)
        return {"x": [1]}

    graph = line(a=node, b=node)
    async with Runtime(settings) as runtime:
        results = await asyncio.gather(*(runtime.arun(graph, {"x": [number]}) for number in range(count)))
    assert [one.output["x"] for one in results] == [[number, 1, 1] for number in range(count)]
    await asyncio.to_thread(catch_up, settings)
    with open_store(settings) as store:
        runs = store.runs(limit=count + 1)
        assert {run.id for run in runs} == {one.run_id for one in results}
        assert all(run.status == "done" for run in runs)
        balances = [store.balance(run.id) for run in runs]
        assert all((one.emitted, one.stored, one.faults) == (3, 3, 0) for one in balances)


@pytest.mark.long
async def test_a_thousand_runs_at_once(settings: Settings) -> None:
    await crowd(settings, 1_000)


async def test_more_runs_than_files_may_be_open_wait_for_each_other(settings: Settings) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = sum(1 for _ in Path("/proc/self/fd").iterdir())
    resource.setrlimit(resource.RLIMIT_NOFILE, (held + 200, limits[1]))
    try:
        await crowd(settings, 80)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_run_inside_a_run_does_not_wait_for_it(settings: Settings) -> None:
    one = replace(settings, run=replace(settings.run, at_once=1))
    with Runtime(one) as runtime:
        inner = line(a=says("inner"))
        done = runtime.run(line(outer=lambda state: {"y": runtime.run(inner, {"x": []}).output["y"]}), {"x": []})
    assert done.output["y"] == "inner"


@pytest.mark.long
def test_a_run_of_a_hundred_thousand_spans_is_recorded_and_shown(settings: Settings, environment: dict[str, str]) -> None:
    def node(state: State) -> State:
        for number in range(100_000):
            with span("tool", f"tool {number % 100}", input={"n": number}) as one:
                one.output = "done"
        return {"y": 1}

    with Runtime(settings) as runtime:
        done = runtime.run(line(a=node), {"x": []})
    catch_up(settings, wait=True)
    with open_store(settings) as store:
        balance = store.balance(done.run_id)
        assert (balance.emitted, balance.stored, balance.truncated, balance.faults) == (100_002, 100_002, 0, 0)
    shown = subprocess.run(["agentops", "show", done.run_id], capture_output=True, text=True, env=environment, check=True)
    assert "99,002 more spans" in shown.stdout
    assert len(shown.stdout.splitlines()) < 1_050
