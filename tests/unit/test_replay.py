"""A replay gives what was recorded with nothing outside called, and says where a changed graph goes another way."""

from __future__ import annotations

import json
import operator
import os
import random
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, TypedDict

import pytest
from langchain_core.documents import Document as LangChainDocument
from langchain_core.language_models.fake_chat_models import FakeListChatModel
from langchain_core.retrievers import BaseRetriever
from langchain_core.tools import tool as langchain_tool
from langgraph.cache.memory import InMemoryCache
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, StateGraph
from langgraph.runtime import Runtime as Node
from langgraph.store.memory import InMemoryStore
from langgraph.types import CachePolicy
from tea import TEXTS

from agentops import Context, Document, Runtime, ScriptedEngine, Settings, load_settings
from agentops.engine import generate
from agentops.errors import EngineOverloaded, NodeFailed, RecordError, RetrievalError, UsageError
from agentops.graph import adopt_graph
from agentops.prompts import Prompt, PromptLibrary
from agentops.records import Decision, Message, Query, Request, RunResult, ScoreRequest, content_hash
from agentops.replay import Replayed, replay
from agentops.retrieval.embed import HashEmbedder
from agentops.store import open_store

FLOW = '''
import asyncio, operator, re
from typing import Annotated, Any, TypedDict

from langgraph.graph import END, START, StateGraph
from langgraph.runtime import Runtime
from langgraph.types import RetryPolicy, Send

from agentops import Context, people
from agentops.engine import generate
from agentops.errors import EngineOverloaded
from agentops.records import Request, ToolCall
from agentops.tools import Toolbox, tool

class State(TypedDict, total=False):
    question: str
    draws: list[Any]
    found: Annotated[list[str], operator.add]
    said: Annotated[list[str], operator.add]
    results: list[Any]
    approved: str
    name: str

RAN = []

@tool(effect="write")
def book(place: str) -> str:
    """Books a table."""
    RAN.append(place)
    return f"booked {place}"

@tool(effect="none")
def burn(place: str) -> str:
    """Fails."""
    RAN.append(place)
    raise OSError(f"no {place}")

box = Toolbox([book, burn])

async def draw(state: State, runtime: Runtime[Context]) -> State:
    context = runtime.context
    await asyncio.sleep(0)
    draws = [context.random(), context.random(), context.clock.now_ns(), context.new_id("x"), context.clock.monotonic_ns()]
    return {"draws": draws, "said": [], "found": []}

async def look(state: State, runtime: Runtime[Context]) -> State:
    found = await runtime.context.search(state["question"])
    vectors = await asyncio.to_thread(runtime.context.embedder.embed, [state["question"], "tea"])
    return {"found": [hit.document.id for hit in found.hits] + [str(float(vectors[0] @ vectors[1]))] + [found.error]}

def fan(state: State) -> list[Send]:
    return [Send("work", {"question": "same"}) for _ in range(3)] + [Send("work", {"question": "other"})]

async def speak(state: State, runtime: Runtime[Context]) -> State:
    made = await generate(runtime.context.engine, Request(text=state["question"], temperature=1.0, seed=7))
    return {"said": [made.text + str(len(made.tokens))]}

inner = StateGraph(State, context_schema=Context)
inner.add_node("speak", speak, retry_policy=RetryPolicy(initial_interval=0.01, retry_on=EngineOverloaded))
inner.add_edge(START, "speak")
inner = inner.compile()

async def work(state: State) -> State:
    done = await inner.ainvoke({"question": state["question"]})
    return {"said": done["said"]}

async def act(state: State, runtime: Runtime[Context]) -> State:
    asked = [("burn", "toast"), ("book", "here"), ("book", "there")]
    calls = [ToolCall(name, {"place": place}, name + place) for name, place in asked]
    return {"results": [await runtime.context.perform(box, call) for call in calls]}

async def part(state: State, runtime: Runtime[Context]) -> State:
    text = ""
    stream = runtime.context.engine.stream(Request(text="long"))
    async for event in stream:
        text += event.text
        if len(text) > 5:
            break
    await stream.aclose()
    return {"said": [text]}

def sign(state: State) -> State:
    name = people.ask("your name?", schema={"type": "string"})
    decision = people.approve("send it?", " ".join(state["said"]))
    return {"name": name, "approved": f"{decision.kind}: {decision.content}"}

graph = StateGraph(State, context_schema=Context)
for node in (draw, look, work, act, part, sign):
    graph.add_node(node.__name__, node)
graph.add_edge(START, "draw")
graph.add_edge("draw", "look")
graph.add_conditional_edges("look", fan, ["work"])
graph.add_edge("work", "act")
graph.add_edge("act", "part")
graph.add_edge("part", "sign")
graph.add_edge("sign", END)
'''


class Wordy(ScriptedEngine):
    """Says something else each time it is asked, and is now and then overloaded."""

    def __init__(self) -> None:
        self.random = random.Random(1)
        self.asked = 0
        super().__init__(lambda request: self.say(request.text or request.messages[-1].content))

    def say(self, text: str) -> Any:
        self.asked += 1
        if text == "other" and self.asked < 6:
            return EngineOverloaded("too much at once", retry_after_s=0.01)
        return " ".join(str(self.random.randrange(100)) for _ in range(9))


@pytest.fixture
def flow(tmp_path: Path) -> Path:
    (tmp_path / "flow.py").write_text(FLOW)
    return tmp_path / "flow.py"


@contextmanager
def opened(settings: Settings) -> Iterator[Runtime]:
    with Runtime(settings, engine=Wordy(), embedder=HashEmbedder(32)) as runtime:
        documents = [Document(source, text, content_hash(text), {"source": source}) for source, (_, text) in TEXTS.items()]
        runtime.index.upsert("tea", documents)
        yield runtime


@pytest.fixture
def runtime(settings: Settings) -> Iterator[Runtime]:
    with opened(replace(settings, retrieval=replace(settings.retrieval, collection="tea"))) as runtime:
        yield runtime


def answered(runtime: Runtime, flow: Path, thread: str = "th_flow") -> RunResult:
    """A run with everything in it: a refused and an approved tool, an edit, a question."""
    said: list[Any] = [Decision("reject", reason="no"), Decision("approve"), "Ada", Decision("edit", "mine")]
    result = runtime.run(str(flow), "how is green tea brewed?", thread=thread)
    while result.status == "waiting":
        result = runtime.resume(result.run_id, answer=said.pop(0))
    assert (result.status, said) == ("done", [])
    return result


def again(settings: Settings, run: str, **more: Any) -> Replayed:
    (found,) = replay(settings, run=run, **more)
    return found


def test_everything_from_outside_comes_from_the_record(runtime: Runtime, settings: Settings, flow: Path) -> None:
    done = answered(runtime, flow)
    found = again(settings, done.run_id)
    assert found.difference is None
    assert found.same
    assert (found.recorded_status, found.replayed_status, found.output_same) == ("done", "done", True)
    # The node with the tools ran three times, as a person was asked twice: burn each time, and book once. One of the four
    # packets was worked on twice, after an error, and one stream was left half-way.
    assert found.answered == {"noted": 5, "embedding": 1, "retrieval": 1, "tool": 4, "generation": 4 + 2 + 1}
    assert [step.graph for step in found.supersteps].count("work") == 4 * 3
    assert all(step.recorded and step.recorded == step.replayed for step in found.supersteps)
    assert done.output["approved"] == "edit: mine"


def test_a_thread_is_replayed_run_by_run_and_a_run_with_what_came_before(
    runtime: Runtime, settings: Settings, flow: Path
) -> None:
    first, second = answered(runtime, flow), answered(runtime, flow)
    assert len(second.output["said"]) == 2 * len(first.output["said"])
    found = list(replay(settings, thread="th_flow"))
    assert [(one.run_id, one.same) for one in found] == [(first.run_id, True), (second.run_id, True)]
    assert again(settings, second.run_id).same


def test_a_replay_loads_no_model_and_calls_nothing(runtime: Runtime, settings: Settings, flow: Path) -> None:
    done = answered(runtime, flow)
    runtime.close()
    probe = f"""
        import socket, sys, time
        def refused(*_): raise AssertionError("called")
        socket.socket.connect = refused
        from agentops.replay import replay
        from agentops.settings import load_settings
        (found,) = replay(load_settings({{"paths.home": {str(settings.paths.home)!r}}}), run={done.run_id!r})
        module = next(m for name, m in sys.modules.items() if name.startswith("agentops_graph_"))
        print(found.same, module.RAN, "torch" in sys.modules)
    """
    told = subprocess.run([sys.executable, "-c", textwrap.dedent(probe)], capture_output=True, text=True, check=True)
    assert told.stdout.split("\n")[0] == "True [] False"


CHANGES = [
    ('"tea"])', '"coffee"])', "look", "embedding embed, input[1]", "tea", "coffee"),
    ("for _ in range(3)", "for _ in range(2)", "look", "route", "work x 4", "work x 3"),
    ("temperature=1.0", "temperature=0.5", "work / speak", "generation generate, temperature", 1.0, 0.5),
    ('Request(text="long")', 'Request(text="short")', "part", "generation generate, input.text", "long", "short"),
    ('return {"draws": draws,', 'return {"draws": draws[:4],', "draw", "output.draws[4]", ..., None),
    ("    RAN.append(place)\n    return", "    return", "act", "tool book, its code", ..., ...),
    ('("book", "there")', '("book", "elsewhere")', "act", "interrupt.content.place", "there", "elsewhere"),
    ("context.random(), context.random()", "context.random()", "draw", "output.draws[1]", ..., ...),
    ("context.random(), context.random()", "context.random(), context.random(), context.random()", "draw", "random", ..., ...),
    ('"send it?"', '"send this?"', "sign", "interrupt.question", "send it?", "send this?"),
    ('"name": name', '"name": name.upper()', "sign", "output.name", "Ada", "ADA"),
]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Settings, str]:
    """A record with one run that has everything in it."""
    folder = tmp_path_factory.mktemp("recorded")
    (folder / "flow.py").write_text(FLOW)
    settings = load_settings({"paths.home": folder / "home", "retrieval.collection": "tea"})
    with opened(settings) as runtime:
        return settings, answered(runtime, folder / "flow.py").run_id


@pytest.mark.parametrize(("old", "new", "node", "field", "was", "now"), CHANGES)
def test_a_changed_graph_is_told_where_it_diverges_first(
    recorded: tuple[Settings, str], tmp_path: Path, old: str, new: str, node: str, field: str, was: Any, now: Any
) -> None:
    assert old in FLOW
    (tmp_path / "flow.py").write_text(FLOW.replace(old, new))
    found = again(*recorded, graph=str(tmp_path / "flow.py"))
    assert not found.same
    assert found.difference is not None
    assert (found.difference.field, found.difference.node) == (field, node)
    for value, wanted in ((found.difference.one, was), (found.difference.two, now)):
        assert wanted is ... or value == wanted


def test_a_changed_prompt_is_told_with_both_versions(runtime: Runtime, settings: Settings, tmp_path: Path) -> None:
    run = runtime.run("review", "how is green tea brewed?", thread="th_1").run_id
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    for file in (Path(__file__).resolve().parents[2] / "graphs" / "prompts").glob("*.md"):
        (prompts / file.name).write_text(file.read_text().replace("{text}", "{text} indeed"))
    assert again(settings, run).same
    found = again(settings, run, prompts=prompts)
    assert found.difference is not None
    assert found.difference.node == "draft / retrieve"
    assert (
        str(found.difference.two).endswith("indeed")
        or "version" in found.difference.field
        or "indeed" in str(found.difference.two)
    )


def test_a_run_that_failed_fails_the_same_way(runtime: Runtime, settings: Settings, tmp_path: Path) -> None:
    file = tmp_path / "failing.py"
    file.write_text(FLOW.replace('return {"said": [text]}', "raise KeyError(text)"))
    waiting = runtime.run(str(file), "how is green tea brewed?")
    waiting = runtime.resume(waiting.run_id, answer=Decision("approve"))
    with pytest.raises(Exception, match="KeyError"):
        runtime.resume(waiting.run_id, answer=Decision("approve"))
    found = again(settings, waiting.run_id)
    assert (found.same, found.recorded_status, found.replayed_status) == (True, "failed", "failed")


def test_an_error_of_a_model_or_a_search_is_raised_again_with_its_class(settings: Settings, tmp_path: Path) -> None:
    class Gone:
        async def search(self, query: Query) -> Any:
            raise RetrievalError("nobody there", hint="look")

        def __getattr__(self, name: str) -> Any:
            return lambda *_: []

    file = tmp_path / "catching.py"
    file.write_text(
        "from agentops import Context\nfrom agentops.records import ScoreRequest\nfrom agentops.errors import RetrievalError\n"
        "from typing import TypedDict\nfrom langgraph.graph import START, StateGraph\nfrom langgraph.runtime import Runtime\n"
        "class State(TypedDict, total=False):\n    question: str\n    said: list[str]\n"
        "async def node(state: State, runtime: Runtime[Context]) -> State:\n    said = []\n"
        "    try:\n        await runtime.context.search('x')\n"
        "    except RetrievalError as error:\n        said.append(str(error))\n"
        "    try:\n        await runtime.context.engine.score(ScoreRequest(('a',), text='b'))\n"
        "    except LookupError as error:\n        said.append(repr(error))\n"
        "    return {'said': said}\n"
        "graph = StateGraph(State, context_schema=Context).add_node(node).add_edge(START, 'node')\n"
    )

    def scores(_: Any) -> Sequence[float]:
        raise LookupError("no such score")

    index: Any = Gone()
    with Runtime(settings, engine=ScriptedEngine(scores=scores), index=index, embedder=HashEmbedder()) as runtime:
        done = runtime.run(str(file), "q")
    assert done.output["said"] == ["nobody there", "LookupError('no such score')"]
    assert again(settings, done.run_id).same


def test_a_search_that_went_on_without_a_server_is_replayed_as_that(settings: Settings, flow: Path) -> None:
    down = replace(settings, elasticsearch=replace(settings.elasticsearch, url="http://127.0.0.1:9"))
    down = replace(down, retrieval=replace(down.retrieval, retriever="elasticsearch", on_error="empty"))
    with Runtime(down, engine=Wordy(), embedder=HashEmbedder(32)) as runtime:
        waiting = runtime.run(str(flow), "how is green tea brewed?")
    assert waiting.output["found"][-1]
    found = again(settings, waiting.run_id)
    assert (found.same, found.replayed_status) == (True, "waiting")


def test_a_budget_ends_the_replay_where_it_ended_the_run(runtime: Runtime, settings: Settings, flow: Path) -> None:
    from agentops.errors import BudgetSpent
    from agentops.records import Budget

    with pytest.raises(BudgetSpent):
        runtime.run(str(flow), "how is green tea brewed?", budget=Budget(steps=3, model_calls=99, tokens=9_999, seconds=99))
    runtime.close()
    with open_store(settings) as store:
        run = store.run("last").id
    found = again(settings, run)
    assert (found.same, found.replayed_status) == (True, "failed")


def test_a_graph_object_is_replayed_where_it_is(runtime: Runtime, settings: Settings, flow: Path) -> None:
    from agentops.graph import load_graph

    made = load_graph(str(flow)).compiled
    waiting = runtime.run(made, {"question": "how is green tea brewed?"})
    with pytest.raises(UsageError, match="made in Python"):
        again(settings, waiting.run_id)
    assert again(settings, waiting.run_id, graph=made).same


def test_every_parameter_of_a_request_is_on_record_and_several_answers_come_again(settings: Settings) -> None:
    def asking(**asked: Any) -> Any:
        class State(TypedDict, total=False):
            said: Annotated[list[Any], operator.add]

        async def ask(state: State, runtime: Node[Context]) -> State:
            done = await generate(runtime.context.engine, Request(text="tea?", max_tokens=8, **asked))
            return {"said": [repr(done)]}

        return StateGraph(State, context_schema=Context).add_node("ask", ask).add_edge(START, "ask").compile()

    how: dict[str, Any] = {"n": 2, "top_logprobs": 1, "min_p": 0.1, "logit_bias": {5: 1.5}, "stop_tokens": (7,)}
    with Runtime(settings, engine=ScriptedEngine(["green tea", "black tea"])) as runtime:
        done = runtime.run(asking(**how), {"said": []})
    assert "black" in done.output["said"][0]
    assert again(settings, done.run_id, graph=asking(**how)).same
    for changed in ({"n": 1}, {"min_p": 0.2}, {"logit_bias": {5: 2.0}}, {"presence_penalty": 1.0}):
        assert not again(settings, done.run_id, graph=asking(**{**how, **changed})).same


def test_what_was_cut_for_its_size_cannot_be_replayed_and_says_so(settings: Settings, flow: Path) -> None:
    small = replace(settings, record=replace(settings.record, payload_bytes=1024))
    with Runtime(small, engine=ScriptedEngine(["x" * 5_000] * 9), embedder=HashEmbedder(32)) as runtime:
        runtime.index.upsert(settings.retrieval.collection, [Document("a", "tea", content_hash("tea"), {"source": "a"})])
        waiting = runtime.run(str(flow), "q")
    with pytest.raises(RecordError, match="cut for its size") as refused:
        again(settings, waiting.run_id)
    assert "record.payload_bytes" in refused.value.hint


def test_a_run_that_died_is_replayed_up_to_there_and_beyond(settings: Settings, tmp_path: Path) -> None:
    """Killed while a model call was under way beside another that had ended, then taken up again."""
    file = tmp_path / "dying.py"
    file.write_text(
        FLOW.replace(
            "    made = await generate",
            '    if state["question"] == "other":\n        await asyncio.sleep(0.3)\n    made = await generate',
        )
    )
    code = f"""
        import asyncio, os, signal, sys, time
        from agentops import Runtime, ScriptedEngine, Document, load_settings
        from agentops.records import content_hash
        from agentops.retrieval.embed import HashEmbedder
        def say(request):
            if request.text == "other" and "kill" in sys.argv:
                time.sleep(0.3)
                os.kill(os.getpid(), signal.SIGKILL)
            return "fine " * 3
        settings = load_settings({{"paths.home": {str(settings.paths.home)!r}}})
        with Runtime(settings, engine=ScriptedEngine(say), embedder=HashEmbedder(32)) as runtime:
            runtime.index.upsert(settings.retrieval.collection, [Document("a", "tea", content_hash("tea"), {{"source": "a"}})])
            result = runtime.run({str(file)!r}, "q") if "kill" in sys.argv else runtime.resume("last")
            print(result.status)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    died = subprocess.run([*command, "kill"], capture_output=True, check=False)
    assert died.returncode == -signal.SIGKILL
    (found,) = replay(settings, run="last")
    assert found.recorded_status == "crashed"
    assert found.difference is None
    assert (found.same, bool(found.ended_early)) == (True, True)
    subprocess.run(command, check=True, capture_output=True, env=dict(os.environ))
    (found,) = replay(settings, run="last")
    assert (found.same, found.replayed_status) == (True, "waiting")


def test_json_tells_all_of_it(runtime: Runtime, settings: Settings, flow: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from agentops.cli import app

    done = answered(runtime, flow)
    runtime.close()
    os.environ["AGENTOPS_PATHS_HOME"], before = str(settings.paths.home), os.environ["AGENTOPS_PATHS_HOME"]
    try:
        app(["replay", done.run_id, "--json"], standalone_mode=False)
        told = json.loads(capsys.readouterr().out)
        assert told["same"]
        flow.write_text(FLOW.replace('"name": name', '"name": name.upper()'))
        assert app(["replay", done.run_id], standalone_mode=False) == 1
        out = capsys.readouterr().out
        assert "node sign, output.name" in out
        assert "Ada" in out
        app(["diff", done.run_id, done.run_id], standalone_mode=False)
        assert "0 changed" in capsys.readouterr().out
    finally:
        os.environ["AGENTOPS_PATHS_HOME"] = before


calls: list[str] = []


class State(TypedDict, total=False):
    said: str
    wait: float
    count: Annotated[int, operator.add]


class Own(FakeListChatModel):
    def _call(self, *args: Any, **kwargs: Any) -> str:
        calls.append("model")
        return super()._call(*args, **kwargs)


class Library(BaseRetriever):
    def _get_relevant_documents(self, query: str, *, run_manager: Any) -> list[LangChainDocument]:
        calls.append("retriever")
        return [LangChainDocument("tea")]


@pytest.mark.parametrize("kind", ["model", "retriever", "tool"])
def test_what_a_graph_brings_itself_is_not_called_again(runtime: Runtime, settings: Settings, kind: str) -> None:
    calls.clear()

    @langchain_tool
    def send(text: str) -> str:
        """Sends a letter."""
        calls.append("tool")
        return "sent"

    def say(state: State) -> State:
        match kind:
            case "model":
                return {"said": str(Own(responses=["yes"]).invoke("hi").content)}
            case "tool":
                return {"said": send.invoke({"text": "hi"})}
        try:
            return {"said": Library().invoke("hi")[0].page_content}
        except RecordError:
            return {"said": "tea"}

    graph = StateGraph(State).add_node("say", say).add_edge(START, "say").compile()
    run = runtime.run(graph, {})
    assert run.status == "done"
    assert calls == [kind]
    with pytest.raises(RecordError, match=f"say calls a {kind} of its own.*was not called"):
        list(replay(settings, run=run.run_id, graph=graph))
    assert calls == [kind]


def test_a_graph_with_checkpoints_of_its_own_leaves_them_alone(runtime: Runtime, settings: Settings) -> None:
    async def add(state: State, runtime: Node[Context]) -> State:
        return {"count": 1 + int(runtime.context.random() > 2)}

    keeper = InMemorySaver()
    graph = StateGraph(State, context_schema=Context).add_node("add", add).add_edge(START, "add").compile(keeper)
    first = runtime.run(graph, {"count": 1}, thread="t")
    second = runtime.run(graph, {"count": 1}, thread="t")
    assert (first.output, second.output) == ({"count": 2}, {"count": 4})
    before = [kept.config for kept in keeper.list(None)]
    found = list(replay(settings, thread="t", graph=graph))
    assert [one.same for one in found] == [True, True]
    assert all(step.recorded and step.recorded == step.replayed for one in found for step in one.supersteps)
    assert sum(len(one.supersteps) for one in found) == len(before) == 6
    assert [kept.config for kept in keeper.list(None)] == before


def test_a_graphs_store_is_not_asked_again(runtime: Runtime, settings: Settings) -> None:
    async def remember(state: State, runtime: Node[Context]) -> State:
        store = runtime.store
        assert store is not None
        before = await store.aget(("people", "u1"), "visits")
        await store.aput(("people", "u1"), "visits", {"count": 1 + (before.value["count"] if before else 0)})
        found = await store.asearch(("people",))
        names = await store.alist_namespaces()
        await store.adelete(("people", "u1"), "other")
        return {"said": f"{before and before.value} {[(one.namespace, one.value) for one in found]} {names}"}

    store = InMemoryStore()
    builder = StateGraph(State, context_schema=Context).add_node("remember", remember).add_edge(START, "remember")
    graph = builder.compile(store=store)
    for _ in range(2):
        run = runtime.run(graph, {}, thread="t")
    assert run.output["said"] == "{'count': 1} [(('people', 'u1'), {'count': 2})] [('people', 'u1')]"
    first, second = replay(settings, thread="t", graph=graph)
    assert first.same
    assert second.same
    assert second.answered == {"memory": 5}
    kept = store.get(("people", "u1"), "visits")
    assert kept is not None
    assert kept.value == {"count": 2}


def test_a_store_that_was_never_heard_from_again_is_not_answered_for(runtime: Runtime, settings: Settings) -> None:
    class Dies(InMemoryStore):
        def batch(self, ops: Any) -> Any:
            raise KeyboardInterrupt

    def remember(state: State, runtime: Node[Context]) -> State:
        assert runtime.store is not None
        return {"said": str(runtime.store.search(("people",)))}

    graph = StateGraph(State, context_schema=Context).add_node("remember", remember).add_edge(START, "remember")
    with pytest.raises(NodeFailed):
        runtime.run(graph.compile(store=Dies()), {}, thread="t")
    (found,) = replay(settings, thread="t", graph=graph.compile(store=InMemoryStore()))
    assert (found.same, found.ended_early) == (True, "the record of search has no end: cancelled")


def test_a_node_that_was_answered_from_the_cache_is_so_again(runtime: Runtime, settings: Settings) -> None:
    def think(state: State) -> State:
        calls.append("think")
        return {"said": "tea"}

    calls.clear()
    builder = (
        StateGraph(State)
        .add_node("think", think, cache_policy=CachePolicy(key_func=lambda state: "same"))
        .add_edge(START, "think")
    )
    graph = builder.compile(cache=InMemoryCache())
    for _ in range(2):
        runtime.run(graph, {"wait": 1.0}, thread="t")
    assert len(calls) == 1
    assert [one.same for one in replay(settings, thread="t", graph=graph)] == [True, True]
    assert len(calls) == 2


def test_an_error_of_ours_keeps_its_fields(runtime: Runtime, settings: Settings) -> None:
    class Busy(ScriptedEngine):
        async def score(self, request: Any) -> Any:
            raise EngineOverloaded("full", retry_after_s=7.5)

    async def ask(state: State, runtime: Node[Context]) -> State:
        try:
            await runtime.context.engine.score(ScoreRequest((Message("user", "?"),), ("a", "b")))
        except EngineOverloaded as error:
            return {"wait": error.retry_after_s}
        return {}

    graph = StateGraph(State, context_schema=Context).add_node("ask", ask).add_edge(START, "ask").compile()
    with Runtime(settings, engine=Busy()) as busy:
        run = busy.run(graph, {})
    assert run.output["wait"] == 7.5
    assert next(iter(replay(settings, run=run.run_id, graph=graph))).same


def test_a_prompt_put_in_the_place_of_the_graphs_is_put_there_again(runtime: Runtime, settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "ask.md").write_text("## user\nSay {word}.", encoding="utf-8")

    async def ask(state: State, runtime: Node[Context]) -> State:
        return {"said": (await runtime.context.ask("ask", word="hello")).text}

    compiled = StateGraph(State, context_schema=Context).add_node("ask", ask).add_edge(START, "ask").compile()
    own = replace(adopt_graph(compiled, "asker"), prompts=PromptLibrary(tmp_path / "prompts"))
    other = replace(own, prompts=own.prompts.replaced([Prompt("ask", "## user\nPlease say {word}!")]))
    with Runtime(settings, engine=ScriptedEngine(["Hello."])) as scripted:
        run = scripted.run(other, {})
    assert next(iter(replay(settings, run=run.run_id, graph=own))).same
    found = next(iter(replay(settings, run=run.run_id, graph=own, prompts=tmp_path / "prompts")))
    assert found.difference is not None
    assert (found.difference.one, found.difference.two) == ("Please say hello!", "Say hello.")
