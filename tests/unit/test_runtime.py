"""Runs of small real graphs: what is on record, what can be resumed, and what ends how."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import operator
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, TypedDict

import pytest
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, StateGraph
from langgraph.types import interrupt

from agentops import Runtime, ScriptedEngine, Settings, load_settings
from agentops.errors import (
    BudgetSpent,
    CollectionNotFound,
    JournalFull,
    NodeFailed,
    RecordError,
    RunCancelled,
    RunNotFound,
    ThreadBusy,
    UsageError,
)
from agentops.records import RunEvent, RunResult, RunStarted, StepEnded, StepStarted
from agentops.store import RunRow, SpanRow, open_store
from agentops.tracer import catch_up


class State(TypedDict):
    trail: Annotated[list[str], operator.add]


def chain(*nodes: Any) -> StateGraph[Any]:
    graph = StateGraph(State)
    before = START
    for node in nodes:
        graph.add_node(node.__name__, node)
        graph.add_edge(before, node.__name__)
        before = node.__name__
    graph.add_edge(before, END)
    return graph


def one(state: State) -> State:
    return {"trail": ["one"]}


async def two(state: State) -> State:
    return {"trail": ["two"]}


@pytest.fixture
def runtime(settings: Settings) -> Any:
    with Runtime(settings, engine=ScriptedEngine(["an answer"])) as opened:
        yield opened


def record(settings: Settings, run_id: str) -> tuple[RunRow, list[SpanRow]]:
    catch_up(settings)
    with open_store(settings) as store:
        return store.run(run_id), store.spans(run_id)


def test_a_graph_that_knows_nothing_of_us_runs_and_is_recorded(settings: Settings) -> None:
    compiled = chain(one, two).compile()
    with Runtime(settings) as runtime:
        result = runtime.run(compiled, {"trail": ["start"]})
    assert result.status == "done"
    assert result.output == {"trail": ["start", "one", "two"]}
    assert compiled.checkpointer is None
    row, spans = record(settings, result.run_id)
    assert row.status == "done"
    assert [(span.kind, span.name) for span in spans] == [("workflow", "python:LangGraph"), ("node", "one"), ("node", "two")]
    assert all(span.parent_id == spans[0].id for span in spans[1:])


def test_a_graph_with_its_own_checkpointer_keeps_it(runtime: Runtime) -> None:
    saver = InMemorySaver()
    compiled = chain(one).compile(checkpointer=saver)
    runtime.run(compiled, {"trail": []}, thread="mine")
    assert saver.get({"configurable": {"thread_id": "mine"}}) is not None


def test_a_thread_goes_on_in_another_process(settings: Settings) -> None:
    graph = chain(one)
    with Runtime(settings) as first:
        first.run(graph, {"trail": ["a"]}, thread="talk")
    with Runtime(settings) as second:
        assert second.run(graph, {"trail": ["b"]}, thread="talk").output == {"trail": ["a", "one", "b", "one"]}


def test_events_come_in_order(runtime: Runtime) -> None:
    events: list[RunEvent] = list(runtime.stream(chain(one, two), {"trail": []}))
    kinds = [type(event) for event in events]
    assert kinds == [RunStarted, StepStarted, StepEnded, StepStarted, StepEnded, RunResult]


async def test_the_asynchronous_form_runs_on_the_callers_loop(settings: Settings) -> None:
    loops: list[object] = []

    async def where(state: State) -> State:
        loops.append(asyncio.get_running_loop())
        return {"trail": []}

    async with Runtime(settings) as runtime:
        await runtime.arun(chain(where), {"trail": []})
    assert loops == [asyncio.get_running_loop()]


def test_a_node_that_raises_ends_the_run_as_failed_and_it_can_be_resumed(settings: Settings) -> None:
    broken = True

    def fragile(state: State) -> State:
        if broken:
            raise ValueError("no luck")
        return {"trail": ["fragile"]}

    graph = chain(one, fragile)
    with Runtime(settings) as runtime:
        with pytest.raises(NodeFailed, match="fragile: ValueError: no luck") as failed:
            runtime.run(graph, {"trail": []})
        assert isinstance(failed.value.__cause__, ValueError)
        row, spans = record(settings, failed.value.run_id)
        assert row.status == "failed"
        assert [span.status for span in spans] == ["error", "ok", "error"]
        broken = False
        result = runtime.resume(failed.value.run_id, graph=graph)
    assert result.output == {"trail": ["one", "fragile"]}
    assert record(settings, result.run_id)[0].status == "done"


def test_an_endless_graph_is_stopped(settings: Settings) -> None:
    graph = StateGraph(State).add_node("one", one).add_edge(START, "one").add_edge("one", "one")
    with Runtime(settings) as runtime, pytest.raises(BudgetSpent, match="its 60 steps are spent; reached: 60 steps") as failed:
        runtime.run(graph, {"trail": []})
    assert failed.value.budget == "steps"
    assert "budget.steps" in failed.value.hint


def test_an_interrupt_is_a_pause_and_an_answer_goes_on(settings: Settings) -> None:
    def ask(state: State) -> State:
        return {"trail": [interrupt("your name?")]}

    graph = chain(one, ask)
    with Runtime(settings) as runtime:
        waiting = runtime.run(graph, {"trail": []})
        assert waiting.status == "waiting"
        assert waiting.interrupts[0].question == "your name?"
        assert record(settings, waiting.run_id)[0].status == "waiting"
        with pytest.raises(UsageError, match="waits for an answer"):
            runtime.resume(waiting.run_id, graph=graph)
        done = runtime.resume(waiting.run_id, answer="Ada", graph=graph)
    assert done.output["trail"] == ["one", "Ada"]
    row, spans = record(settings, waiting.run_id)
    assert row.status == "done"
    assert row.error is None
    assert [span.status for span in spans if span.name == "ask"] == ["interrupted", "ok"]


def test_leaving_a_stream_cancels_the_run(settings: Settings) -> None:
    left = threading.Event()

    async def slow(state: State) -> State:
        try:
            await asyncio.sleep(60)
        finally:
            left.set()
        return {"trail": []}

    graph = chain(one, slow)
    with Runtime(settings) as runtime:
        for event in runtime.stream(graph, {"trail": []}):
            if isinstance(event, RunStarted):
                run_id = event.run_id
            if isinstance(event, StepStarted) and event.node == "slow":
                break
        assert left.wait(5)
    row, spans = record(settings, run_id)
    assert row.status == "cancelled"
    assert [span.status for span in spans if span.name == "slow"] == ["cancelled"]


def test_a_thread_is_used_by_one_run_at_a_time(settings: Settings) -> None:
    inside, leave = threading.Event(), threading.Event()

    def hold(state: State) -> State:
        inside.set()
        assert leave.wait(20)
        return {"trail": ["held"]}

    with Runtime(settings) as runtime, Runtime(settings) as other:
        worker = threading.Thread(target=lambda: runtime.run(chain(hold), {"trail": []}, thread="t"))
        worker.start()
        assert inside.wait(10)
        with pytest.raises(ThreadBusy, match="thread t is in use"):
            other.run(chain(one), {"trail": []}, thread="t")
        assert other.run(chain(one), {"trail": []}, thread="u").status == "done"
        leave.set()
        worker.join(20)
        assert other.run(chain(one), {"trail": []}, thread="t").output == {"trail": ["held", "one"]}


def _hold_lease(home: str, url: str, ready: Any) -> None:
    from agentops.checkpoints import lease
    from agentops.settings import load_settings

    async def hold() -> None:
        async with lease(load_settings({"paths.home": home, **({"record.url": url} if url else {})}), "shared"):
            ready.set()
            await asyncio.sleep(60)

    asyncio.run(hold())


def test_the_lease_of_a_dead_process_is_free(either_settings: Settings) -> None:
    settings = either_settings
    spawn = multiprocessing.get_context("spawn")
    ready = spawn.Event()
    holder = spawn.Process(target=_hold_lease, args=(str(settings.paths.home), settings.record.url, ready))
    holder.start()
    assert ready.wait(30)
    with Runtime(settings) as runtime:
        with pytest.raises(ThreadBusy):
            runtime.run(chain(one), {"trail": []}, thread="shared")
        holder.kill()
        holder.join()
        assert runtime.run(chain(one), {"trail": []}, thread="shared").status == "done"


@pytest.mark.parametrize("name", ["", "../up", "a/b", "x" * 200, ".hidden", "a b"])
def test_a_thread_name_cannot_be_a_path(runtime: Runtime, name: str) -> None:
    if name:
        with pytest.raises(UsageError, match="cannot name a thread"):
            runtime.run(chain(one), {"trail": []}, thread=name)
    else:
        assert runtime.run(chain(one), {"trail": []}, thread=name).thread_id.startswith("th_")


def test_what_cannot_be_resumed_says_why(settings: Settings) -> None:
    with Runtime(settings) as runtime:
        done = runtime.run(chain(one), {"trail": []})
        with pytest.raises(UsageError, match="is done"):
            runtime.resume(done.run_id)
        with pytest.raises(RunNotFound):
            runtime.resume("run_nowhere")


MINE = """
import operator, os, time
from pathlib import Path
from typing import Annotated, TypedDict
from langgraph.graph import START, END, StateGraph

class State(TypedDict):
    text: Annotated[list[str], operator.add]

def first(state):
    with open(os.environ["COUNTER"], "a") as file:
        file.write("first\\n")
    return {"text": ["first"]}

def second(state):
    if not Path(os.environ["GO"]).exists():
        Path(os.environ["GO"]).touch()
        time.sleep(60)
    return {"text": ["second"]}

graph = (StateGraph(State).add_node(first).add_node(second)
         .add_edge(START, "first").add_edge("first", "second").add_edge("second", END))
"""


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGKILL, "crashed"), (signal.SIGINT, "cancelled")])
def test_a_run_whose_process_is_stopped_is_resumed_without_repeating(
    settings: Settings, environment: dict[str, str], tmp_path: Path, sent: signal.Signals, status: str
) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    environment |= {"COUNTER": str(tmp_path / "count"), "GO": str(tmp_path / "go")}
    command = [sys.executable, "-m", "agentops", "run", "mine.py:graph", '{"text": ["start"]}', "--json"]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not (tmp_path / "go").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(sent)
    _, errors = process.communicate(timeout=30)
    if sent == signal.SIGINT:
        assert process.returncode == 130
        assert b"agentops resume run_" in errors
        assert b"Traceback" not in errors
    listed = subprocess.run(
        [sys.executable, "-m", "agentops", "runs", "--json"], env=environment, capture_output=True, check=True
    )
    (run,) = json.loads(listed.stdout)
    assert run["status"] == status
    resumed = subprocess.run(
        [sys.executable, "-m", "agentops", "resume", run["id"], "--json"],
        cwd=os.sep,
        env=environment,
        capture_output=True,
        check=True,
    )
    assert json.loads(resumed.stdout)["output"] == {"text": ["start", "first", "second"]}
    assert (tmp_path / "count").read_text() == "first\n"
    assert record(settings, run["id"])[0].status == "done"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("a small disk needs the right to mount one; this test did not run")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_stops_the_run_at_a_step_and_it_goes_on_when_there_is_room(settings: Settings, small_disk: Path) -> None:
    settings = replace(settings, paths=replace(settings.paths, home=small_disk / "home"))
    steps: list[int] = []

    def grow(state: State) -> State:
        steps.append(len(state["trail"]))
        return {"trail": [os.urandom(30_000).hex()]}

    graph = StateGraph(State).add_node(grow).add_edge(START, "grow")
    graph.add_conditional_edges("grow", lambda state: "grow" if len(state["trail"]) < 20 else END, ["grow", END])
    with Runtime(settings) as runtime:
        with pytest.raises(RecordError, match="full") as stopped:
            runtime.run(graph, {"trail": []}, thread="t")
        assert "agentops" in stopped.value.hint or "room" in stopped.value.hint
        assert len(steps) < 20
        seen = steps[-1]
    subprocess.run(["mount", "-o", "remount,size=200m", str(small_disk)], check=True)
    catch_up(settings)
    with open_store(settings) as store:
        (row,) = store.runs()
    assert row.status in ("failed", "crashed")
    with Runtime(settings) as runtime:
        result = runtime.resume(row.id, graph=graph)
    assert len(result.output["trail"]) == 20
    assert sorted(set(steps)) == list(range(20))
    assert steps.count(seen) <= 2


def test_a_run_that_a_full_disk_does_not_let_begin_says_so_and_begins_when_there_is_room(
    settings: Settings, small_disk: Path
) -> None:
    settings = replace(settings, paths=replace(settings.paths, home=small_disk / "home"))
    graph, filler = chain(one), small_disk / "filler"
    with Runtime(settings) as runtime:
        with suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4_096))
        with pytest.raises(JournalFull, match=r"full|space"):
            runtime.run(graph, {"trail": []}, thread="t")
        filler.unlink()
        assert runtime.run(graph, {"trail": []}, thread="t").status == "done"


def test_a_node_that_exits_ends_its_run_and_nothing_else(settings: Settings) -> None:
    def leave(state: State) -> State:
        sys.exit(3)

    async def leave_too(state: State) -> State:
        raise SystemExit(4)

    with Runtime(settings) as runtime:
        for node in (leave, leave_too):
            with pytest.raises(NodeFailed, match="SystemExit"):
                runtime.run(chain(node), {"trail": []})
        assert runtime.run(chain(one), {"trail": []}).status == "done"


def test_a_node_that_fails_on_a_database_of_its_own_is_told_as_such(settings: Settings) -> None:
    def ask_database(state: State) -> State:
        raise sqlite3.OperationalError("no such table: users")

    with Runtime(settings) as runtime, pytest.raises(NodeFailed, match="ask_database: OperationalError: no such table"):
        runtime.run(chain(ask_database), {"trail": []})


def test_a_run_is_not_resumed_on_top_of_a_later_one(settings: Settings) -> None:
    def ask(state: State) -> State:
        return {"trail": [interrupt("name?")]}

    graph = chain(one, ask)
    with Runtime(settings) as runtime:
        first = runtime.run(graph, {"trail": []}, thread="t")
        second = runtime.run(graph, {"trail": []}, thread="t")
        with pytest.raises(UsageError, match="another run went on with thread t"):
            runtime.resume(first.run_id, answer="Ada", graph=graph)
        assert record(settings, first.run_id)[0].status == "waiting"
        done = runtime.resume(second.run_id, answer="Bob", graph=graph)
    assert done.status == "done"
    assert done.output["trail"][-1] == "Bob"


def test_a_resumed_run_keeps_the_settings_it_began_with(settings: Settings) -> None:
    def ask(state: State) -> State:
        return {"trail": [interrupt("name?")]}

    seeded = load_settings({"paths.home": settings.paths.home, "run.seed": 7, "retrieval.k": 3})
    with Runtime(seeded) as runtime:
        waiting = runtime.run(chain(ask), {"trail": []}, collection="mine")
    with Runtime(settings) as runtime:
        runtime.resume(waiting.run_id, answer="Ada", graph=chain(ask))
    kept = record(settings, waiting.run_id)[0].settings
    assert (kept["run.seed"], kept["retrieval.k"], kept["retrieval.collection"]) == (7, 3, "mine")


def test_closing_cancels_what_still_runs(settings: Settings) -> None:
    async def slow(state: State) -> State:
        await asyncio.sleep(60)
        return {"trail": []}

    runtime = Runtime(settings)
    events = runtime.stream(chain(slow), {"trail": []})
    run_id = next(event.run_id for event in events if isinstance(event, StepStarted))
    runtime.close()
    assert record(settings, run_id)[0].status == "cancelled"
    with pytest.raises(RunCancelled, match=run_id):
        list(events)


def test_closing_does_not_wait_for_a_model_that_is_being_prepared(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    began, release = threading.Event(), threading.Event()

    def open_slowly(*_: object) -> ScriptedEngine:
        began.set()
        release.wait(30)
        return ScriptedEngine([])

    monkeypatch.setattr("agentops.runtime.open_engine", open_slowly)
    runtime = Runtime(settings)
    worker = threading.Thread(target=lambda: runtime.engine, daemon=True)
    worker.start()
    assert began.wait(5)
    started = time.monotonic()
    runtime.close()
    assert time.monotonic() - started < 5
    release.set()
    worker.join(5)


def test_the_bridge_works_after_a_fork(settings: Settings) -> None:
    code = """
import asyncio, os
from agentops.sync import run_sync
run_sync(asyncio.sleep(0))
child = os.fork()
if child == 0:
    run_sync(asyncio.sleep(0))
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=30)


def test_empty_input_and_a_missing_collection_are_refused_before_anything_is_loaded(settings: Settings) -> None:
    with Runtime(settings) as runtime:
        with pytest.raises(UsageError, match="empty"):
            runtime.run("rag", "  ")
        with pytest.raises(CollectionNotFound, match="nowhere"):
            runtime.run("rag", "why?", collection="nowhere")
        assert runtime._own_engine is None
    with open_store(settings) as store:
        assert store.runs() == []


def test_a_failed_node_names_the_line_of_the_user(settings: Settings) -> None:
    def fragile(state: State) -> State:
        return {"trail": [state["nope"]]}  # type: ignore[typeddict-item]

    with Runtime(settings) as runtime, pytest.raises(NodeFailed, match=r"test_runtime.py, line \d+ \| return .*nope"):
        runtime.run(chain(fragile), {"trail": []})
