"""Stopping runs: from another process within a token, whatever else is locked, and at a step boundary when told to end."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, TypedDict

import pytest
from langgraph.graph import END, START, StateGraph
from langgraph.runtime import Runtime as Given

from agentops import Context, Runtime, ScriptedEngine, Settings
from agentops.cancelling import cancel, is_at_work
from agentops.checkpoints import lease
from agentops.engine import generate
from agentops.errors import RecordError, RunCancelled, RunDrained, RunNotFound, ThreadBusy, UsageError
from agentops.people import ask
from agentops.records import Message, Request, RunResult, RunStarted, StepStarted, Token
from agentops.replay import replay
from agentops.retrieval.embed import HashEmbedder
from agentops.store import RunRow, open_store
from agentops.tracer import catch_up

SLOW = """
import asyncio, time
from pathlib import Path
from typing import Annotated, TypedDict
import operator
from langgraph.graph import START, END, StateGraph

class State(TypedDict, total=False):
    how: str
    trail: Annotated[list[str], operator.add]

async def first(state):
    Path("begun").touch()
    if state["how"] == "block":
        await asyncio.to_thread(time.sleep, 60)
    while state["how"] == "steps" and not Path("go").exists():
        await asyncio.sleep(0.01)
    return {"trail": ["first"]}

def second(state):
    return {"trail": ["second"]}

graph = StateGraph(State).add_node("first", first).add_node("second", second)
graph.add_edge(START, "first").add_edge("first", "second").add_edge("second", END)
"""


class State(TypedDict, total=False):
    trail: Annotated[list[str], lambda left, right: left + right]


def row(settings: Settings, run_id: str) -> RunRow:
    catch_up(settings)
    with open_store(settings) as store:
        return store.run(run_id)


def chain(*nodes: Callable[..., Any]) -> StateGraph[Any, Any, Any, Any]:
    graph: StateGraph[Any, Any, Any, Any] = StateGraph(State, context_schema=Context)
    for node, after in zip(nodes, (*(one.__name__ for one in nodes[1:]), END), strict=True):
        graph.add_node(node.__name__, node).add_edge(node.__name__, after)
    return graph.add_edge(START, nodes[0].__name__)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "slow.py").write_text(SLOW)
    return tmp_path


def start(folder: Path, environment: dict[str, str], *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "agentops", *words]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True)


def begun(folder: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not (folder / "begun").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_run_is_cancelled_from_another_process_while_the_record_is_locked(
    folder: Path, environment: dict[str, str], settings: Settings
) -> None:
    process = start(folder, environment, "run", "slow.py", '{"how": "block"}')
    begun(folder, process)
    with sqlite3.connect(settings.paths.home / "record.db", isolation_level=None) as lock:
        lock.execute("BEGIN EXCLUSIVE")
        said, _ = start(folder, environment, "cancel", "last", "--json").communicate(timeout=60)
        told = json.loads(said)
        assert told["stopped"]
        lock.execute("ROLLBACK")
    lock.close()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert f"agentops resume {told['run_id']}" in errors
    assert row(settings, told["run_id"]).status == "cancelled"
    with pytest.raises(RunNotFound, match="at work"):
        cancel(settings, told["run_id"])


def test_cancelling_stops_one_run_within_a_token_and_no_other(settings: Settings) -> None:
    async def ask(state: State, runtime: Given[Context]) -> State:
        made = await generate(runtime.context.engine, Request(messages=(Message("user", "go"),), max_tokens=4_000))
        return {"trail": [made.text]}

    words = "word " * 300
    engine = ScriptedEngine(lambda request: words, delay_s=0.01)
    graph = chain(ask)
    with Runtime(settings, engine=engine, embedder=HashEmbedder()) as runtime:

        async def until(number: int, seen: list[Any]) -> None:
            async for event in runtime.astream(graph, {"trail": []}, thread=f"t{number}"):
                seen.append(event)
                if number == 0 and isinstance(event, Token) and sum(isinstance(one, Token) for one in seen) == 5:
                    runtime.cancel(event.run_id)

        async def both() -> tuple[list[Any], list[Any], Any]:
            stopped: list[Any] = []
            going: list[Any] = []
            other = asyncio.create_task(until(1, going))
            with pytest.raises(RunCancelled, match="was cancelled") as told:
                await until(0, stopped)
            assert not other.done()
            await other
            return stopped, going, told

        stopped, going, told = asyncio.run(both())
    assert sum(isinstance(one, Token) for one in stopped) <= 7
    assert engine.cancelled == 1, "the engine was told"
    assert going[-1].status == "done"
    assert isinstance(going[-1], RunResult)
    recorded = row(settings, told.value.run_id)
    assert recorded.status == "cancelled"
    assert recorded.usage.output_tokens == 0
    assert list((settings.paths.home / "running").iterdir()) == []


def test_a_cancelled_run_goes_on_where_it_was(settings: Settings) -> None:
    done: list[str] = []
    waits = True

    def first(state: State) -> State:
        done.append("first")
        return {"trail": ["first"]}

    async def second(state: State) -> State:
        while waits:
            await asyncio.sleep(0.01)
        return {"trail": ["second"]}

    graph = chain(first, second)
    with Runtime(settings, engine=ScriptedEngine(), embedder=HashEmbedder()) as runtime:

        def follow() -> None:
            for event in runtime.stream(graph, {"trail": []}):
                if isinstance(event, StepStarted) and event.node == "second":
                    threading.Thread(target=cancel, args=(settings, event.run_id[:12])).start()

        with pytest.raises(RunCancelled) as told:
            follow()
        waits = False
        assert runtime.resume(told.value.run_id, graph=graph).output == {"trail": ["first", "second"]}
    assert done == ["first"]


def test_what_is_not_at_work_cannot_be_cancelled(settings: Settings) -> None:
    with pytest.raises(RunNotFound, match="no run called 'last' is at work"):
        cancel(settings, "last")
    folder = settings.paths.home / "running"
    folder.mkdir(parents=True)
    os.mkfifo(folder / "run_dead")
    assert is_at_work(settings, "run_dead")
    with pytest.raises(RunNotFound, match="run_dead is no longer at work"):
        cancel(settings, "run_dea")
    assert not is_at_work(settings, "run_dead"), "what a dead process has left is cleared away"
    os.mkfifo(folder / "run_1A")
    os.mkfifo(folder / "run_1B")
    with pytest.raises(RunNotFound, match="more than one"):
        cancel(settings, "run_1")
    for name in ("", "../running", "."):
        with pytest.raises(RunNotFound):
            cancel(settings, name)


def test_a_home_that_holds_no_pipes_stops_no_run(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("no pipes here")

    monkeypatch.setattr(os, "mkfifo", refuse)

    def only(state: State) -> State:
        return {"trail": ["done"]}

    with Runtime(settings, engine=ScriptedEngine(), embedder=HashEmbedder()) as runtime:
        assert runtime.run(chain(only), {"trail": []}).status == "done"


def test_a_process_told_to_end_stops_at_a_step_boundary_and_the_next_goes_on(
    folder: Path, environment: dict[str, str], settings: Settings
) -> None:
    process = start(folder, environment, "run", "slow.py:graph", '{"how": "steps"}', "--json")
    begun(folder, process)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert process.poll() is None, "the step under way is finished first"
    (folder / "go").touch()
    said, errors = process.communicate(timeout=60)
    result = json.loads(said)
    assert process.returncode == 143, errors
    assert result["status"] == "queued"
    assert f"agentops resume {result['run_id']}" in errors
    assert "Traceback" not in errors
    assert row(settings, result["run_id"]).status == "queued", "also now that its process is gone"
    assert result["output"]["trail"] == ["first"]
    (folder / "begun").unlink()
    again = start(folder, environment, "resume", result["run_id"], "--json")
    said, errors = again.communicate(timeout=60)
    assert again.returncode == 0, errors
    assert json.loads(said)["output"]["trail"] == ["first", "second"]
    assert not (folder / "begun").exists(), "what was finished was not done again"
    assert row(settings, result["run_id"]).status == "done"


def test_a_drained_runtime_stops_all_its_runs_and_those_that_come(settings: Settings) -> None:
    go = threading.Event()

    async def first(state: State) -> State:
        await asyncio.to_thread(go.wait, 30)
        return {"trail": ["first"]}

    def second(state: State) -> State:
        return {"trail": ["second"]}

    graph = chain(first, second)
    with Runtime(settings, engine=ScriptedEngine(), embedder=HashEmbedder()) as runtime:
        assert not runtime.drain()
    started: set[str] = set()
    with Runtime(settings, engine=ScriptedEngine(), embedder=HashEmbedder()) as runtime:

        async def one(number: int) -> None:
            nonlocal started
            async for event in runtime.astream(graph, {"trail": []}, thread=f"t{number}"):
                started |= {event.run_id} if isinstance(event, RunStarted) else set()

        async def all_at_once() -> None:
            running = [asyncio.create_task(one(number)) for number in range(5)]
            while len(started) < 5:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            assert runtime.drain()
            go.set()
            ends = await asyncio.gather(*running, return_exceptions=True)
            assert [type(end) for end in ends] == [RunDrained] * 5

        asyncio.run(all_at_once())
        with pytest.raises(RunDrained):
            runtime.run(graph, {"trail": []}, thread="late")
    assert {row(settings, run_id).status for run_id in started} == {"queued"}
    run_id = started.pop()
    with open_store(settings) as store:
        roots = [span for span in store.spans(run_id) if span.kind == "workflow"]
        assert [(span.status, span.error) for span in roots] == [("interrupted", None)]
        assert store.balance(run_id).balanced
    with Runtime(settings, engine=ScriptedEngine(), embedder=HashEmbedder()) as runtime:
        assert runtime.resume(run_id, graph=graph).output == {"trail": ["first", "second"]}
        with pytest.raises(UsageError, match="is done"):
            runtime.resume(run_id, graph=graph)


def test_a_run_drained_in_a_subgraph_goes_on_inside_it(settings: Settings) -> None:
    done: list[str] = []

    def step(name: str) -> Callable[[State], State]:
        def node(state: State) -> State:
            done.append(name)
            if name == "b":
                runtime.drain()
            return {"trail": [name]}

        node.__name__ = name
        return node

    inner = chain(step("a"), step("b"), step("c")).compile()
    graph = StateGraph(State, context_schema=Context).add_node("inner", inner).add_node("after", step("after"))
    graph.add_edge(START, "inner").add_edge("inner", "after").add_edge("after", END)
    with Runtime(settings, engine=ScriptedEngine(), embedder=HashEmbedder()) as runtime, pytest.raises(RunDrained) as told:
        runtime.run(graph, {"trail": []})
    assert done == ["a", "b"]
    with Runtime(settings, engine=ScriptedEngine(), embedder=HashEmbedder()) as runtime:
        assert runtime.resume(told.value.run_id, graph=graph).output == {"trail": ["a", "b", "c", "after"]}
    assert done == ["a", "b", "c", "after"]


def sign(state: State) -> State:
    return {"trail": [ask("your name?")]}


def test_a_run_that_waits_for_an_answer_is_cancelled_and_takes_none(either_settings: Settings) -> None:
    graph = chain(sign)
    with Runtime(either_settings, engine=ScriptedEngine(), embedder=HashEmbedder()) as runtime:
        run = runtime.run(graph, {"trail": []})
    with Runtime(either_settings, engine=ScriptedEngine(), embedder=HashEmbedder()) as runtime:
        assert runtime.cancel(run.run_id[:12]) == run.run_id
        with pytest.raises(RunNotFound, match="is cancelled; there is nothing to cancel"):
            runtime.cancel(run.run_id)
        found = row(either_settings, run.run_id)
        assert (found.status, found.pending_hash, found.error) == (
            "cancelled",
            None,
            "RunCancelled: cancelled while it was waiting",
        )
        with open_store(either_settings) as store:
            roots = [span for span in store.spans(run.run_id) if span.kind == "workflow"]
            assert [span.status for span in roots] == ["interrupted", "cancelled"]
            assert store.balance(run.run_id).balanced
        with pytest.raises(UsageError, match="was cancelled, it waits for no answer"):
            runtime.resume(run.run_id, answer="Ann", graph=graph)
        assert row(either_settings, run.run_id).status == "cancelled", "a late answer changes nothing"
        again = runtime.resume(run.run_id, graph=graph)
        assert [one.question for one in again.interrupts] == ["your name?"]
        assert runtime.resume(run.run_id, answer="Ann", graph=graph).output == {"trail": ["Ann"]}
        (again_so,) = replay(either_settings, run=run.run_id, graph=graph)
        assert again_so.difference is None
        with pytest.raises(RunNotFound, match="is done; there is nothing to cancel"):
            runtime.cancel(run.run_id)


async def test_a_run_that_is_being_answered_is_not_cancelled_beside_that(either_settings: Settings) -> None:
    async with Runtime(either_settings, engine=ScriptedEngine(), embedder=HashEmbedder()) as runtime:
        run = await runtime.arun(chain(sign), {"trail": []})
        async with lease(either_settings, run.thread_id):
            with pytest.raises(ThreadBusy):
                await runtime.acancel(run.run_id)
        assert row(either_settings, run.run_id).status == "waiting"
        assert await runtime.acancel(run.run_id) == run.run_id


async def test_a_run_in_line_for_a_place_is_cancelled_before_it_begins(either_settings: Settings) -> None:
    go, done = asyncio.Event(), []

    async def only(state: State) -> State:
        done.append(state["trail"])
        await go.wait()
        return {"trail": ["done"]}

    graph, settings = chain(only), replace(either_settings, run=replace(either_settings.run, at_once=1))
    async with Runtime(settings, engine=ScriptedEngine(), embedder=HashEmbedder()) as runtime:
        first = asyncio.create_task(runtime.arun(graph, {"trail": ["a"]}, run_id="first"))
        while not done:
            await asyncio.sleep(0.01)
        others = [asyncio.create_task(runtime.arun(graph, {"trail": [name]}, run_id=name)) for name in ("second", "third")]
        while not (is_at_work(settings, "second") and is_at_work(settings, "third")):
            await asyncio.sleep(0.01)
        code = "import sys; from agentops.cancelling import cancel; from agentops import load_settings; "
        code += "cancel(load_settings({'paths.home': sys.argv[1]}), 'second')"
        other = await asyncio.create_subprocess_exec(sys.executable, "-c", code, str(settings.paths.home))
        assert await other.wait() == 0
        with pytest.raises(RunCancelled, match="before it had a place"):
            await others[0]
        assert not first.done()
        go.set()
        assert (await first).status == (await others[1]).status == "done"
        assert done == [["a"], ["third"]]
        found = row(settings, "second")
        assert (found.status, found.error) == ("cancelled", "RunCancelled: cancelled in line for a place")
        with open_store(settings) as store:
            assert [(span.kind, span.status) for span in store.spans("second")] == [("workflow", "cancelled")]
        with pytest.raises(RecordError, match="it was cancelled before it began"):
            await asyncio.to_thread(lambda: list(replay(settings, run="second", graph=graph)))
        assert (await runtime.aresume("second", graph=graph)).output == {"trail": ["second", "done"]}
    assert list((settings.paths.home / "running").iterdir()) == []


async def test_an_answer_and_a_fork_in_line_are_cancelled_too(settings: Settings) -> None:
    go, done = asyncio.Event(), []

    async def hold(state: State) -> State:
        done.append("held")
        await go.wait()
        return {}

    asks, settings = chain(sign), replace(settings, run=replace(settings.run, at_once=1))
    async with Runtime(settings, engine=ScriptedEngine(), embedder=HashEmbedder()) as runtime:
        asked = await runtime.arun(asks, {"trail": []})
        first = asyncio.create_task(runtime.arun(chain(hold), {"trail": []}, run_id="first"))
        while not done:
            await asyncio.sleep(0.01)
        answer = asyncio.create_task(runtime.aresume(asked.run_id, answer="Ann", graph=asks))
        while not is_at_work(settings, asked.run_id):
            await asyncio.sleep(0.01)
        assert await runtime.acancel(asked.run_id) == asked.run_id
        with pytest.raises(RunCancelled):
            await answer
        assert row(settings, asked.run_id).status == "cancelled"
        fork = asyncio.create_task(runtime.afork(asked.run_id, graph=asks))
        known = {"first", asked.run_id}
        while not (new := {file.name for file in (settings.paths.home / "running").glob("run_*")} - known):
            await asyncio.sleep(0.01)
        assert await runtime.acancel(new.pop())
        with pytest.raises(RunCancelled, match="before it had a place"):
            await fork
        go.set()
        assert (await first).status == "done"
    with open_store(settings) as store:
        assert {one.id for one in store.runs()} == known


@pytest.mark.parametrize("where", ["sqlite", pytest.param("postgres", marks=pytest.mark.long)])
def test_the_command_line_cancels_what_waits(
    where: str, tmp_path: Path, environment: dict[str, str], request: pytest.FixtureRequest
) -> None:
    if where == "postgres":
        environment["AGENTOPS_RECORD_URL"] = request.getfixturevalue("postgres_settings").record.url
    words = "from typing import TypedDict\nfrom langgraph.graph import START, StateGraph\nfrom agentops.people import ask\n"
    words += "class State(TypedDict, total=False):\n    name: str\n"
    words += "graph = StateGraph(State).add_node('sign', lambda _: {'name': ask('your name?')}).add_edge(START, 'sign')\n"
    (tmp_path / "sign.py").write_text(words)

    def console(*arguments: str, fails: int = 0) -> str:
        process = start(tmp_path, environment, *arguments)
        said, errors = process.communicate(timeout=60)
        assert process.returncode == fails, errors
        return errors if fails else said

    run = json.loads(console("run", "sign.py", "{}", "--json"))["run_id"]
    assert json.loads(console("cancel", run, "--json")) == {"run_id": run, "stopped": True}
    assert [one["status"] for one in json.loads(console("runs", "--json"))] == ["cancelled"]
    assert "was cancelled, it waits for no answer" in console("resume", run, "--answer", "Ann", fails=2)
