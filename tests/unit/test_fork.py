"""Time travel: what a thread went through, and new runs from any point of it, with other values, prompts, models or code."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, TypedDict

import pytest
from langchain_core.messages import AnyMessage
from langgraph.graph import END, START, StateGraph
from langgraph.graph.message import add_messages
from langgraph.runtime import Runtime as Given
from langgraph.types import Send

from agentops import Context, Runtime, ScriptedEngine, Settings, load_settings
from agentops.checkpoints import lease
from agentops.engine import generate
from agentops.errors import NodeFailed, RecordError, ThreadBusy, UsageError
from agentops.history import Snapshot
from agentops.people import ask
from agentops.records import Message, Request
from agentops.replay import replay
from agentops.retrieval.embed import HashEmbedder
from agentops.store import SpanRow, open_store
from agentops.tracer import catch_up


class State(TypedDict, total=False):
    topic: str
    trail: Annotated[list[str], lambda left, right: left + [one for one in right if one not in left]]
    messages: Annotated[list[AnyMessage], add_messages]


class Trail(TypedDict, total=False):
    trail: list[str]


@pytest.fixture
def runtime(either_settings: Settings) -> Iterator[Runtime]:
    with Runtime(either_settings, engine=ScriptedEngine(), embedder=HashEmbedder()) as opened:
        yield opened


class Deep:
    """A graph `plan -> work (draft -> check) -> end`, which counts what it does."""

    def __init__(self) -> None:
        self.done: list[str] = []
        inner = StateGraph(State)
        for name in ("draft", "check"):
            inner.add_node(name, self.step(name))
        inner.add_edge(START, "draft").add_edge("draft", "check").add_edge("check", END)
        self.graph = StateGraph(State).add_node("plan", self.step("plan")).add_node("work", inner.compile())
        self.graph.add_node("end", self.step("end"))
        self.graph.add_edge(START, "plan").add_edge("plan", "work").add_edge("work", "end").add_edge("end", END)

    def step(self, name: str) -> Any:
        def node(state: State) -> State:
            self.done.append(name)
            return {"trail": [f"{name} {state.get('topic', '')}"]}

        return node


def root(settings: Settings, run_id: str) -> SpanRow:
    catch_up(settings)
    with open_store(settings) as store:
        return next(span for span in store.spans(run_id) if span.kind == "workflow")


def told(snapshot: Snapshot) -> tuple[Any, ...]:
    return snapshot.graph, snapshot.step, snapshot.source, snapshot.by, snapshot.next


def test_the_history_of_a_run_names_what_made_each_checkpoint_and_what_comes_next(runtime: Runtime) -> None:
    deep = Deep()
    run = runtime.run(deep.graph, {"topic": "tea"}, thread="mine")
    second = runtime.run(deep.graph, {"topic": "cups"}, thread="mine")
    found = runtime.history(run.run_id, graph=deep.graph)
    assert [told(one) for one in found] == [
        ("", -1, "input", (), ("__start__",)),
        ("", 0, "loop", ("__start__",), ("plan",)),
        ("", 1, "loop", ("plan",), ("work",)),
        ("work", -1, "input", (), ("__start__",)),
        ("work", 0, "loop", ("__start__",), ("draft",)),
        ("work", 1, "loop", ("draft",), ("check",)),
        ("work", 2, "loop", ("check",), ()),
        ("", 2, "loop", ("work",), ("end",)),
        ("", 3, "loop", ("end",), ()),
    ]
    assert found[5].values["trail"] == ["plan tea", "draft tea"]
    everything = runtime.history(thread="mine", graph=deep.graph)
    assert [one.run_id for one in everything] == [run.run_id] * 9 + [second.run_id] * 9
    assert runtime.state(run.run_id, graph=deep.graph).values["trail"][-1] == "end tea"
    assert runtime.state(thread="mine", graph=deep.graph).values["trail"][-1] == "end cups"
    assert runtime.state(run.run_id, step=1, graph=deep.graph).values["trail"] == ["plan tea"]
    assert runtime.state(run.run_id, at=found[5].id, graph=deep.graph) == found[5]
    with pytest.raises(UsageError, match="step 17"):
        runtime.state(run.run_id, step=17, graph=deep.graph)
    with pytest.raises(UsageError, match="more than one checkpoint"):
        runtime.state(run.run_id, at=found[0].id[:4], graph=deep.graph)
    with pytest.raises(UsageError, match="give a run or a thread"):
        runtime.history(graph=deep.graph)
    with pytest.raises(RecordError, match="no thread"):
        runtime.history(thread="nobodys", graph=deep.graph)


def test_a_fork_goes_on_from_a_step_with_other_values_and_leaves_the_run_as_it_was(runtime: Runtime) -> None:
    deep = Deep()
    run = runtime.run(deep.graph, {"topic": "tea"})
    before = runtime.history(run.run_id, graph=deep.graph)
    deep.done.clear()
    forked = runtime.fork(run.run_id, step=1, changes={"topic": "cups", "trail": ["changed"]}, graph=deep.graph)
    assert deep.done == ["draft", "check", "end"], "what came before is not done again"
    assert forked.output["trail"] == ["changed", "draft cups", "check cups", "end cups"]
    assert forked.run_id != run.run_id
    assert forked.thread_id != run.thread_id
    assert runtime.history(run.run_id, graph=deep.graph) == before
    told = root(runtime.settings, forked.run_id).attributes
    assert (told["forked_from"], told["forked_at"], told["forked_step"]) == (run.run_id, before[2].id, 1)
    again = runtime.fork(forked.run_id, graph=deep.graph)
    assert again.output == forked.output
    assert deep.done[3:] == ["end"], "without a place it begins at the last that has something after it"
    with pytest.raises(UsageError, match="is a fork"):
        list(replay(runtime.settings, run=forked.run_id, graph=deep.graph))


def test_a_fork_begins_inside_a_subgraph(runtime: Runtime) -> None:
    deep = Deep()
    run = runtime.run(deep.graph, {"topic": "tea"})
    (inside,) = (one for one in runtime.history(run.run_id, graph=deep.graph) if (one.graph, one.step) == ("work", 1))
    deep.done.clear()
    forked = runtime.fork(run.run_id, at=inside.id, changes={"topic": "cups"}, graph=deep.graph)
    assert deep.done == ["check", "end"]
    assert forked.output["trail"][-2:] == ["check cups", "end cups"]
    assert root(runtime.settings, forked.run_id).attributes["forked_in"] == "work"
    places = [(one.graph, one.step, one.run_id) for one in runtime.history(thread=forked.thread_id, graph=deep.graph)]
    assert ("", 1, forked.run_id) in places
    assert ("work", 1, forked.run_id) in places
    assert ("work", 2, run.run_id) not in places, "what came later never happened there"


def test_tasks_beside_the_subgraph_that_is_forked_keep_what_they_gave(runtime: Runtime) -> None:
    done: list[str] = []

    def step(name: str) -> Any:
        def node(state: State) -> State:
            done.append(f"{name} {state['topic']}")
            return {"trail": [f"{name} {state['topic']}"]}

        return node

    inner = StateGraph(State, output_schema=Trail).add_node("draft", step("draft")).add_node("check", step("check"))
    inner.add_edge(START, "draft").add_edge("draft", "check").add_edge("check", END)
    graph = StateGraph(State).add_node("work", inner.compile())
    graph.add_conditional_edges(START, lambda _: [Send("work", {"topic": name}) for name in "abc"], ["work"])
    run = runtime.run(graph, {"topic": "all"})
    inside = [one for one in runtime.history(run.run_id, graph=graph) if (one.graph, one.step) == ("work", 1)]
    (of_b,) = (one for one in inside if one.values["topic"] == "b")
    done.clear()
    forked = runtime.fork(run.run_id, at=of_b.id, graph=graph)
    assert done == ["check b"]
    assert forked.output == run.output


def test_a_fork_begins_at_the_input_and_changes_it(runtime: Runtime) -> None:
    deep = Deep()
    run = runtime.run(deep.graph, {"topic": "tea"})
    forked = runtime.fork(run.run_id, step=-1, changes={"topic": "cups"}, graph=deep.graph)
    assert forked.output["trail"] == ["plan cups", "draft cups", "check cups", "end cups"]
    chat = StateGraph(State).add_node("say", lambda state: {"messages": [("ai", state["messages"][-1].content.upper())]})
    chat.add_edge(START, "say").add_edge("say", END)
    talked = runtime.run(chat, {"messages": [("user", "hello")]})
    changed = runtime.fork(talked.run_id, step=0, changes={"messages": [{"role": "user", "content": "bye"}]}, graph=chat)
    assert [message.content for message in changed.output["messages"]] == ["bye", "BYE"]


def test_a_run_that_failed_is_forked_with_other_code(runtime: Runtime) -> None:
    def graph(second: Any) -> Any:
        builder = StateGraph(State).add_node("first", lambda _: {"trail": ["first"]}).add_node("second", second)
        return builder.add_edge(START, "first").add_edge("first", "second").add_edge("second", END)

    def fail(state: State) -> State:
        raise ValueError("a defect")

    with pytest.raises(NodeFailed):
        runtime.run(graph(fail), {"topic": "tea"})
    assert runtime.fork("last", graph=graph(lambda _: {"trail": ["mended"]})).output["trail"] == ["first", "mended"]
    other = StateGraph(State).add_node("elsewhere", lambda _: {}).add_edge(START, "elsewhere").add_edge("elsewhere", END)
    with pytest.raises(UsageError, match="nothing comes after"):
        runtime.fork("last", step=1, graph=other)


def test_a_fork_of_a_run_that_waits_asks_anew_and_is_answered_by_itself(runtime: Runtime) -> None:
    def sign(state: State) -> State:
        return {"trail": [str(ask("your name?"))]}

    graph = StateGraph(State).add_node(sign).add_edge(START, "sign").add_edge("sign", END)
    run = runtime.run(graph, {"topic": "tea"})
    forked = runtime.fork(run.run_id, graph=graph)
    assert forked.status == "waiting"
    assert runtime.resume(forked.run_id, answer="Ann", graph=graph).output["trail"] == ["Ann"]
    assert runtime.resume(run.run_id, answer="Bob", graph=graph).output["trail"] == ["Bob"]


def test_a_fork_that_ended_early_goes_on_with_what_it_began_with(runtime: Runtime, tmp_path: Path) -> None:
    broken = False

    async def write(state: State, runtime: Given[Context]) -> State:
        said = runtime.context.prompts.get("greet").template
        if broken:
            raise OSError("no network")
        return {"trail": [said.splitlines()[-1]]}

    def before(state: State) -> State:
        return {"trail": ["before"]}

    builder = StateGraph(State, context_schema=Context).add_node(before).add_node(write)
    compiled = builder.add_edge(START, "before").add_edge("before", "write").add_edge("write", END).compile()
    for folder, word in (("own", "Hello"), ("other", "Good morning")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "greet.md").write_text(f"## user\n{word}")
    from agentops.graph import LoadedGraph
    from agentops.prompts import PromptLibrary

    graph = LoadedGraph("greeter", "python:greeter", compiled, PromptLibrary(tmp_path / "own"))
    run = runtime.run(graph, {"topic": "tea"})
    assert run.output["trail"] == ["before", "Hello"]
    broken = True
    with pytest.raises(NodeFailed):
        runtime.fork(run.run_id, prompts=tmp_path / "other", graph=graph)
    broken = False
    assert runtime.resume("last", graph=graph).output["trail"] == ["before", "Good morning"]
    with pytest.raises(UsageError, match="no field 'nothing'"):
        runtime.fork(run.run_id, changes={"nothing": 1}, graph=graph)


async def test_a_thread_in_use_cannot_be_forked_or_read(runtime: Runtime) -> None:
    deep = Deep()
    run = await runtime.arun(deep.graph, {"topic": "tea"})
    async with lease(runtime.settings, run.thread_id):
        with pytest.raises(ThreadBusy):
            await runtime.afork(run.run_id, graph=deep.graph)
        with pytest.raises(ThreadBusy):
            await runtime.ahistory(run.run_id, graph=deep.graph)


def test_a_fork_may_have_another_model_and_keeps_it(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def by_name(settings: Settings, progress: Any) -> ScriptedEngine:
        name = settings.model.name
        return ScriptedEngine(lambda request: f"by {name}")

    async def write(state: State, runtime: Given[Context]) -> State:
        made = await generate(runtime.context.engine, Request(messages=(Message("user", "go"),), max_tokens=8))
        return {"trail": [made.text]}

    monkeypatch.setattr("agentops.runtime.open_engine", by_name)
    builder = StateGraph(State, context_schema=Context).add_node("before", lambda state: {"trail": ["before"]}).add_node(write)
    graph = builder.add_edge(START, "before").add_edge("before", "write").add_edge("write", END).compile()

    def opened(**more: str) -> Runtime:
        paths = {"paths.home": settings.paths.home, "paths.cache": settings.paths.cache}
        return Runtime(load_settings({**paths, **more}), embedder=HashEmbedder())

    with opened() as runtime:
        run = runtime.run(graph, {"topic": "tea"})
    assert run.output["trail"] == ["before", f"by {settings.model.name}"]
    with opened(**{"model.name": "another"}) as runtime:
        forked = runtime.fork(run.run_id, graph=graph)
        assert forked.output["trail"] == ["before", "by another"]
    with opened() as runtime:
        assert runtime.fork(forked.run_id, graph=graph).output["trail"] == ["before", "by another"]
        assert runtime.fork(run.run_id, graph=graph).status == "done"
        with open_store(settings) as store:
            assert store.run(run.run_id).settings["model.name"] == settings.model.name
            assert store.run(forked.run_id).settings["model.name"] == "another"


CHAIN = """
from typing import TypedDict
from langgraph.graph import END, START, StateGraph

class State(TypedDict, total=False):
    topic: str
    text: str

def plan(state):
    return {"text": "plan for " + state["topic"]}

def write(state):
    return {"text": state["text"] + ", WORD"}

graph = StateGraph(State).add_node("plan", plan).add_node("write", write)
graph.add_edge(START, "plan").add_edge("plan", "write").add_edge("write", END)
"""


def test_the_command_line_forks_and_shows(settings: Settings, environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text(CHAIN.replace("WORD", "written"))
    (tmp_path / "two.py").write_text(CHAIN.replace("WORD", "rewritten"))
    from agentops.cli.run import _change

    assert _change("a=[1]") == ("a", [1])
    for wrong in ("a", "a=", "a=b"):
        with pytest.raises(UsageError, match="is no FIELD=JSON"):
            _change(wrong)

    def console(*words: str) -> str:
        command = [sys.executable, "-m", "agentops", *words]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run = json.loads(console("run", "one.py", '{"topic": "tea"}', "--json"))
    listed = console("history", run["run_id"])
    assert [line.split()[1:] for line in listed.splitlines()][3] == ["1", "loop", "plan", "->", "write"]
    forked = json.loads(console("fork", run["run_id"], "--step", "1", "--set", 'text="mine"', "--graph", "two.py", "--json"))
    assert forked["output"]["text"] == "mine, rewritten"
    assert f"fork of  {run['run_id']}, after step 1 (checkpoint " in console("show", "last")
    state = json.loads(console("state", "last", "--step", "1", "--json"))
    assert state["values"] == {"topic": "tea", "text": "mine"}
