"""Replays of runs that were cut short, of what goes on side by side, and of what is not the runtime's: each a small graph."""

from __future__ import annotations

import asyncio
import operator
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, TypedDict

import pytest
from langchain_core.tools import BaseTool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, StateGraph
from langgraph.runtime import Runtime as Node
from langgraph.store.memory import InMemoryStore
from langgraph.types import RetryPolicy, Send, TimeoutPolicy, interrupt

from agentops import Context, Runtime, ScriptedEngine, Settings
from agentops.engine import generate
from agentops.errors import BudgetSpent, EngineOverloaded, NodeFailed, RecordError, RunCancelled
from agentops.records import Budget, Delta, Generation, Request, ScoreRequest, ToolCall
from agentops.replay import Replayed, replay
from agentops.retrieval.embed import HashEmbedder
from agentops.store import open_store
from agentops.tools import Toolbox, tool
from agentops.tracer import span

Reply = Callable[[Request], str]


class State(TypedDict, total=False):
    said: str
    x: Any
    all: Annotated[list[Any], operator.add]


class Uneven(ScriptedEngine):
    """Is slow with some requests, refuses the first of some, and fails others."""

    def __init__(self, reply: Any = lambda request: f"{request.text} yes", *, delay_s: float = 0.0, **slow: float) -> None:
        super().__init__(reply, delay_s=delay_s)
        self.slow = slow
        self.refuses: set[str] = set()

    async def stream(self, request: Request) -> AsyncIterator[Delta | Generation]:
        await asyncio.sleep(self.slow.get(str(request.text), 0))
        if request.text in self.refuses or request.text == "bad":
            self.refuses.discard(str(request.text))
            raise EngineOverloaded("no", retry_after_s=0.01)
        async for event in super().stream(request):
            yield event


def flow(*chain: Callable[..., Any], **beside: Any) -> StateGraph[Any, Any]:
    """Nodes one after another, by their functions' names, and others beside the first."""
    builder: Any = StateGraph(State, context_schema=Context)
    before = START
    for node in chain:
        builder.add_node(node.__name__, node)
        builder.add_edge(before, node.__name__)
        before = node.__name__
    for name, node in beside.items():
        builder.add_node(name, node)
        builder.add_edge(START, name)
    return builder


async def ask(state: State, runtime: Node[Context]) -> State:
    return {"said": (await generate(runtime.context.engine, Request(text="q"))).text}


async def rest(state: State) -> State:
    await asyncio.sleep(1)
    return {"x": "rested"}


def parts(engine: ScriptedEngine | None = None) -> dict[str, Any]:
    return {"engine": engine or Uneven(), "embedder": HashEmbedder(32)}


def recorded(settings: Settings, graph: Any, engine: ScriptedEngine | None = None, **more: Any) -> str:
    """The id of a run, however it ended."""
    with Runtime(settings, **parts(engine)) as runtime:
        try:
            return runtime.run(graph, {}, **more).run_id
        except (NodeFailed, BudgetSpent, RunCancelled):
            pass
    with open_store(settings) as store:
        return store.run("last").id


def again(settings: Settings, run: str, graph: Any) -> Replayed:
    (found,) = replay(settings, run=run, graph=graph)
    return found


def cancelled(settings: Settings, graph: Any, engine: ScriptedEngine, thread: str = "t") -> str:
    async def go() -> None:
        async with Runtime(settings, **parts(engine)) as runtime:
            going = asyncio.create_task(runtime.arun(graph, {}, thread=thread))
            await asyncio.sleep(0.4)
            going.cancel()
            with suppress(asyncio.CancelledError):
                await going

    asyncio.run(go())
    with open_store(settings) as store:
        return store.run("last").id


# -- runs that were cut short


def test_a_run_that_was_cancelled_in_a_call_is_the_same_up_to_there_and_beyond(settings: Settings) -> None:
    graph = flow(ask).compile()
    run = cancelled(settings, graph, Uneven(delay_s=0.25))
    found = again(settings, run, graph)
    assert (found.same, found.ended_early) == (True, "the record of generate has no end: cancelled")
    with Runtime(settings, **parts()) as runtime:
        assert runtime.resume(run, graph=graph).status == "done"
    found = again(settings, run, graph)
    assert (found.same, found.replayed_status, found.ended_early) == (True, "done", "")


def test_a_run_that_was_cancelled_in_a_nodes_own_code_does_not_get_further(settings: Settings) -> None:
    graph = flow(rest, ask).compile()
    run = cancelled(settings, graph, Uneven())
    found = again(settings, run, graph)
    assert (found.same, found.ended_early) == (True, "the record of rest has no end: cancelled")
    assert found.answered == {}
    later = recorded(settings, graph, thread="t")
    assert again(settings, later, graph).same


DYING = """
    import asyncio, operator, os, signal
    from typing import Annotated, TypedDict
    from langgraph.graph import START, StateGraph
    from langgraph.runtime import Runtime
    from langgraph.types import interrupt
    from agentops import Context
    from agentops.engine import generate
    from agentops.records import Request

    class State(TypedDict, total=False):
        all: Annotated[list[str], operator.add]

    def die(place):
        if os.environ.get("DIE") == place:
            os.kill(os.getpid(), signal.SIGKILL)

    async def say(runtime, text):
        return (await generate(runtime.context.engine, Request(text=text))).text

    async def first(state: State, runtime: Runtime[Context]):
        return {"all": [await say(runtime, "first")]}

    async def second(state: State, runtime: Runtime[Context]):
        await asyncio.sleep(0.3)
        die("in its own code")
        return {"all": [await say(runtime, "second")]}

    async def beside(state: State):
        return {"all": ["one"]}

    def calls_nothing(state: State):
        die("calls_nothing")
        return {"all": ["done"]}

    async def asks(state: State, runtime: Runtime[Context]):
        name = interrupt("name?")
        return {"all": [await say(runtime, f"hello {name}")]}

    def graph_of(*names):
        builder = StateGraph(State, context_schema=Context)
        for name in names:
            builder.add_node(name, globals()[name])
        return builder

    builder = graph_of("first", "second", "beside").add_edge(START, "first")
    graph = builder.add_edge("first", "second").add_edge("first", "beside").compile()
    asking = graph_of("asks").add_edge(START, "asks").compile()
    plain = graph_of("beside", "calls_nothing").add_edge(START, "beside").add_edge("beside", "calls_nothing").compile()
"""


@pytest.fixture
def dying(tmp_path: Path, settings: Settings) -> Callable[..., int]:
    """Runs `graph` (or `asking`) in a process of its own, which dies where it is told to, or goes on with the last run."""
    file = tmp_path / "dying.py"
    file.write_text(textwrap.dedent(DYING))
    code = f"""
        import os, signal, sys
        from agentops import Runtime, ScriptedEngine, load_settings
        from agentops.retrieval.embed import HashEmbedder
        def reply(request):
            if os.environ.get("DIE") == request.text:
                os.kill(os.getpid(), signal.SIGKILL)
            return request.text + " yes"
        verb, *given = sys.argv[1:]
        settings = load_settings({{"paths.home": {str(settings.paths.home)!r}}})
        with Runtime(settings, engine=ScriptedEngine(reply), embedder=HashEmbedder(32)) as runtime:
            if verb == "run":
                runtime.run({str(file)!r} + given[0], {{}})
            else:
                runtime.resume("last", answer=given[0] if given else None)
    """

    def run(*arguments: str, die: str = "") -> int:
        command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
        return subprocess.run(command, env={**os.environ, "DIE": die}, check=False, capture_output=True).returncode

    return run


@pytest.mark.parametrize("place", ["in its own code", "second"])
def test_a_run_whose_process_died_is_the_same_up_to_there_and_beyond(
    dying: Callable[..., int], settings: Settings, tmp_path: Path, place: str
) -> None:
    assert dying("run", ":graph", die=place) == -signal.SIGKILL
    found = again(settings, "last", None)
    end = "generate has no end: crashed" if place == "second" else "second has no end: crashed"
    assert (found.same, found.ended_early) == (True, f"the record of {end}")
    file = tmp_path / "dying.py"
    text = file.read_text()
    file.write_text(text.replace('["one"]', '["TWO"]'))
    found = again(settings, "last", None)
    assert found.difference is not None, "what ended before is compared"
    assert (found.difference.node, found.difference.field, found.difference.two) == ("beside", "output.all[0]", "TWO")
    file.write_text(text)
    assert dying("resume") == 0
    found = again(settings, "last", None)
    assert (found.same, found.replayed_status, found.ended_early) == (True, "done", "")


def test_a_node_without_calls_that_died_and_was_run_again_is_replayed(dying: Callable[..., int], settings: Settings) -> None:
    assert dying("run", ":plain", die="calls_nothing") == -signal.SIGKILL
    found = again(settings, "last", None)
    assert (found.same, found.ended_early) == (True, "the record of calls_nothing has no end: crashed")
    assert dying("resume") == 0
    found = again(settings, "last", None)
    assert (found.difference, found.replayed_status, found.ended_early) == (None, "done", "")


def test_a_run_that_died_after_an_answer_is_replayed_with_it(dying: Callable[..., int], settings: Settings) -> None:
    assert dying("run", ":asking") == 0
    assert dying("resume", "Ada", die="hello Ada") == -signal.SIGKILL
    assert again(settings, "last", None).same
    assert dying("resume") == 0
    found = again(settings, "last", None)
    assert (found.same, found.replayed_status) == (True, "done")


async def in_time(state: State, runtime: Node[Context]) -> State:
    try:
        return {"said": (await asyncio.wait_for(generate(runtime.context.engine, Request(text="q")), 0.2)).text}
    except TimeoutError:
        return {"said": "it took too long"}


async def with_a_sibling(state: State, runtime: Node[Context]) -> State:
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(generate(runtime.context.engine, Request(text="q")))
            group.create_task(generate(runtime.context.engine, Request(text="bad")))
    except* EngineOverloaded:
        pass
    return {"said": "it fell back"}


@pytest.mark.parametrize("node", [in_time, with_a_sibling])
def test_a_call_that_its_node_went_on_without_is_cut_short_again(settings: Settings, node: Any) -> None:
    graph = flow(node).compile()
    run = recorded(settings, graph, Uneven(delay_s=0.3, bad=0.1))
    assert again(settings, run, graph).same


def test_limits_of_time_are_met_again(settings: Settings) -> None:
    builder: Any = StateGraph(State, context_schema=Context)
    limited = builder.add_node("ask", ask, timeout=TimeoutPolicy(run_timeout=0.3)).add_edge(START, "ask").compile()
    found = again(settings, recorded(settings, limited, Uneven(delay_s=0.25)), limited)
    assert (found.same, found.replayed_status, found.ended_early) == (True, "failed", "")
    plain = flow(ask).compile()
    run = recorded(settings, plain, Uneven(delay_s=0.25), budget=Budget(9, 9, 9_999, 0.4))
    found = again(settings, run, plain)
    assert (found.same, found.ended_early) == (True, "the record of generate has no end: cancelled")


# -- side by side, and in what order


def test_what_ran_side_by_side_may_come_in_another_order(settings: Settings) -> None:
    def asks(text: str) -> Callable[..., Any]:
        async def node(state: State, runtime: Node[Context]) -> State:
            return {"all": [(await generate(runtime.context.engine, Request(text=text))).text]}

        return node

    retried: Any = StateGraph(State, context_schema=Context)
    policy = RetryPolicy(initial_interval=0.01, jitter=False, retry_on=EngineOverloaded)
    for name in "ab":
        retried.add_node(name, asks(name), retry_policy=policy).add_edge(START, name)
    graph, engine = retried.compile(), Uneven(a=0.3)
    engine.refuses = {"a", "b"}
    assert again(settings, recorded(settings, graph, engine), graph).same

    async def gathers(state: State, runtime: Node[Context]) -> State:
        async def branch(name: str) -> str:
            await generate(runtime.context.engine, Request(text=f"{name}1"))
            return (await generate(runtime.context.engine, Request(text=f"{name}2"))).text

        return {"all": list(await asyncio.gather(branch("a"), branch("b")))}

    graph = flow(gathers).compile()
    assert again(settings, recorded(settings, graph, Uneven(a1=0.3)), graph).same


def test_values_in_spans_of_a_nodes_own_are_given_where_they_were_drawn(settings: Settings) -> None:
    async def draws(state: State, runtime: Node[Context]) -> State:
        with span("agent", "own"):
            first = runtime.context.random()
        return {"x": [first, runtime.context.random()]}

    graph = flow(draws).compile()
    assert again(settings, recorded(settings, graph), graph).same


def test_answers_reach_the_one_that_asked_where_two_ask_the_same(settings: Settings) -> None:
    def sign(state: State) -> State:
        return {"all": [f"{state['x']} {interrupt('ok?')}"]}

    builder: Any = StateGraph(State).add_node("sign", sign)
    packets = [Send("sign", {"x": "1"}), Send("sign", {"x": "2"})]
    graph = builder.add_conditional_edges(START, lambda state: packets, ["sign"]).compile()
    for together in (True, False):
        with Runtime(settings, **parts()) as runtime:
            run = runtime.run(graph, {})
            first, second = (one.id for one in run.interrupts)
            if together:
                done = runtime.resume(run.run_id, answers={second: "no", first: "yes"}, graph=graph)
            else:
                runtime.resume(run.run_id, answers={second: "no"}, graph=graph)
                done = runtime.resume(run.run_id, answers={first: "yes"}, graph=graph)
        assert done.output["all"] == ["1 yes", "2 no"]
        assert again(settings, run.run_id, graph).same


def test_an_answer_keeps_all_of_its_fields(settings: Settings) -> None:
    graph = flow(what).compile()
    with Runtime(settings, **parts()) as runtime:
        run = runtime.run(graph, {})
        runtime.resume(run.run_id, answer={"of": "tea", "n": 1}, graph=graph)
    assert again(settings, run.run_id, graph).same


def what(state: State) -> State:
    return {"x": interrupt("what?")}


def test_a_run_that_was_resumed_with_other_settings_is_replayed_with_these(settings: Settings) -> None:
    from dataclasses import replace

    def seed(state: State, runtime: Node[Context]) -> State:
        interrupt("go on?")
        return {"x": runtime.context.seed}

    graph = flow(seed).compile()
    with Runtime(settings, **parts()) as runtime:
        run = runtime.run(graph, {})
    other = replace(settings, run=replace(settings.run, seed=9), sources={**settings.sources, "run.seed": "--seed"})
    with Runtime(other, **parts()) as runtime:
        assert runtime.resume(run.run_id, answer="yes", graph=graph).output["x"] == 9
    assert again(settings, run.run_id, graph).same


# -- what is told


async def stopping(state: State, runtime: Node[Context]) -> State:
    return {"said": (await generate(runtime.context.engine, Request(text="q", stop=("end",)))).text}


async def drawing(state: State, runtime: Node[Context]) -> State:
    return {"x": len([runtime.context.random(), runtime.context.random()])}


async def keeping(state: State, runtime: Node[Context]) -> State:
    assert runtime.store is not None
    await runtime.store.aput(("a",), "k", {"v": 1}, index=["v"])
    return {}


@pytest.mark.parametrize(
    ("node", "other", "field"),
    [
        (stopping, lambda node: ask, "generation generate, stop"),
        (drawing, lambda node: draws_once, "random"),
        (keeping, lambda node: keeps_otherwise, "memory put, input.index"),
    ],
)
def test_a_request_that_leaves_something_out_is_another_one(settings: Settings, node: Any, other: Any, field: str) -> None:
    def compiled(made: Any) -> Any:
        builder: Any = StateGraph(State, context_schema=Context).add_node("node", made).add_edge(START, "node")
        return builder.compile(store=InMemoryStore())

    run = recorded(settings, compiled(node))
    assert again(settings, run, compiled(node)).same
    found = again(settings, run, compiled(other(node)))
    assert found.difference is not None
    assert (found.difference.node, found.difference.field) == ("node", field)


async def draws_once(state: State, runtime: Node[Context]) -> State:
    runtime.context.random()
    return {"x": 2}


async def keeps_otherwise(state: State, runtime: Node[Context]) -> State:
    assert runtime.store is not None
    await runtime.store.aput(("a",), "k", {"v": 1}, index=False)
    return {}


def test_the_first_node_that_changed_is_told_and_not_the_request_that_follows(settings: Settings) -> None:
    def chain(text: str) -> Any:
        def gives(state: State) -> State:
            return {"said": text}

        async def asks(state: State, runtime: Node[Context]) -> State:
            return {"x": (await generate(runtime.context.engine, Request(text=state["said"]))).text}

        return flow(gives, asks).compile()

    found = again(settings, recorded(settings, chain("old")), chain("new"))
    assert found.difference is not None
    assert (found.difference.node, found.difference.field) == ("gives", "output.said")


def test_the_same_keys_in_another_order_are_the_same(settings: Settings) -> None:
    made = iter([{"a": 1, "b": 2}, {"b": 2, "a": 1}])

    def gives(state: State) -> State:
        return {"x": next(made)}

    graph = flow(gives).compile()
    assert again(settings, recorded(settings, graph), graph).same


def test_what_came_in_pieces_comes_in_the_same_pieces_and_an_error_with_its_arguments(settings: Settings) -> None:
    class Odd(ScriptedEngine):
        async def score(self, request: Any) -> Any:
            raise KeyError("x")

    async def reads(state: State, runtime: Node[Context]) -> State:
        pieces = [one.text async for one in runtime.context.engine.stream(Request(text="q")) if isinstance(one, Delta)]
        try:
            await runtime.context.engine.score(ScoreRequest((), ("a", "b"), text="q"))
        except KeyError as error:
            pieces.append(str(error))
        return {"all": pieces, "x": list(runtime.context.embedder.embed([]).shape)}

    graph = flow(reads).compile()
    run = recorded(settings, graph, Odd(["some words of it"]))
    assert again(settings, run, graph).same


# -- what is not the runtime's


def test_a_tool_is_answered_from_the_record_whoever_performs_it(settings: Settings) -> None:
    ran: list[str] = []

    @tool(effect="write")
    def pay(to: str) -> str:
        """Pays.

        Args:
            to: who is paid
        """
        ran.append(to)
        return f"paid {to}"

    box = Toolbox([pay], policy={"pay": "allow"})

    async def pays(state: State) -> State:
        return {"said": (await box.perform(ToolCall("pay", {"to": "bob"}, "c1"))).content}

    graph: Any = StateGraph(State).add_node("pays", pays).add_edge(START, "pays").compile()
    assert again(settings, recorded(settings, graph), graph).same
    assert ran == ["bob"]


def test_a_tool_that_asks_by_itself_is_refused(settings: Settings) -> None:
    @tool(effect="none")
    def confirm(what: str) -> str:
        """Asks.

        Args:
            what: what is asked about
        """
        return str(interrupt(f"sure about {what}?"))

    box = Toolbox([confirm])

    async def asks(state: State, runtime: Node[Context]) -> State:
        return {"said": (await runtime.context.perform(box, ToolCall("confirm", {"what": "it"}, "c"))).content}

    graph = flow(asks).compile()
    with Runtime(settings, **parts()) as runtime:
        run = runtime.run(graph, {})
        runtime.resume(run.run_id, answer="yes", graph=graph)
    with pytest.raises(RecordError, match="the tool confirm asks a person by itself"):
        again(settings, run.run_id, graph)


@pytest.mark.parametrize("own", [False, True])
def test_states_of_a_graph_that_is_called_synchronously_are_on_record(settings: Settings, own: bool) -> None:
    inner: Any = StateGraph(State).add_node("i", lambda state: {"x": 1}).add_edge(START, "i").compile()

    def calls(state: State) -> State:
        return {"x": inner.invoke({"x": 0})["x"]}

    graph = flow(calls).compile(checkpointer=InMemorySaver() if own else None)
    found = again(settings, recorded(settings, graph, thread="t"), graph)
    assert found.same
    assert [step.graph for step in found.supersteps].count("calls") == 3


def test_the_source_of_a_tool_that_is_a_class_counts(settings: Settings) -> None:
    from agentops.tools.box import _code

    class One(BaseTool):
        name: str = "t"
        description: str = "d"

        def _run(self, q: str) -> str:
            return "one"

    class Two(One):
        def _run(self, q: str) -> str:
            return "two"

    assert _code(One()) != _code(Two())


def test_a_graph_with_checkpoints_of_its_own_is_left_alone(settings: Settings) -> None:
    saver = InMemorySaver()
    plain: Any = StateGraph(State).add_node("i", lambda state: {"x": 1}).add_edge(START, "i")
    kept, free = plain.compile(checkpointer=saver), plain.compile()

    async def calls_kept(state: State) -> State:
        return {"x": (await kept.ainvoke({"x": 0}, {"configurable": {"thread_id": "inner"}}))["x"]}

    async def calls_free(state: State) -> State:
        return {"x": (await free.ainvoke({"x": 0}, {"configurable": {"user": "u"}}))["x"]}

    graph = flow(calls_kept).compile()
    run = recorded(settings, graph)
    before = len(list(saver.list(None)))
    with pytest.raises(RecordError, match="calls_kept calls a graph that keeps checkpoints of its own"):
        again(settings, run, graph)
    assert len(list(saver.list(None))) == before
    graph = flow(calls_free).compile()
    assert again(settings, recorded(settings, graph), graph).same
