"""Real LangGraph graphs, recorded: the exact tree of spans for every way in which work can nest, repeat, wait and fail."""

from __future__ import annotations

import asyncio
import operator
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Annotated, Any, TypedDict

import pytest
from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document as LangChainDocument
from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from langchain_core.messages import AIMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.retrievers import BaseRetriever
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, StateGraph
from langgraph.prebuilt import ToolNode
from langgraph.types import Command, RetryPolicy, Send, interrupt

from agentops.clock import CountingIds, SystemClock
from agentops.engine import generate
from agentops.engine.scripted import ScriptedEngine
from agentops.errors import EngineClosed
from agentops.records import (
    Document,
    Hit,
    Leg,
    Message,
    PromptVersion,
    Query,
    Request,
    Retrieval,
    ScoreRequest,
    StepEnded,
    StepStarted,
    Token,
    content_hash,
)
from agentops.settings import Settings
from agentops.store import SpanRow, Store, open_store
from agentops.tracer import RunTrace, TracedEngine, TracedRetriever, Tracer, open_tracer, span, tagged


class State(TypedDict, total=False):
    x: int
    log: Annotated[list[str], operator.add]
    messages: Annotated[list[Any], operator.add]


Node = Callable[..., Any]
ASK = Request(messages=(Message("user", "what is it"),))


@pytest.fixture
def tracer(settings: Settings) -> Iterator[Tracer]:
    opened = open_tracer(settings, clock=SystemClock(), ids=CountingIds())
    yield opened
    opened.close()
    assert opened.faults == 0


def begin(tracer: Tracer, run_id: str = "run_1", **more: Any) -> RunTrace:
    return tracer.start_run(run_id=run_id, thread_id="th_1", graph="test", input={"x": 0}, **more)


def config(run: RunTrace, **more: Any) -> Any:
    return {"configurable": {"thread_id": run.thread_id}, "callbacks": [run.handler], **more}


def chain(**nodes: Node) -> Any:
    """The nodes one after the other."""
    builder = StateGraph(State)
    before = START
    for name, node in nodes.items():
        builder.add_node(name, node)
        builder.add_edge(before, name)
        before = name
    return builder


def stored(tracer: Tracer) -> Store:
    assert tracer.flush()
    return open_store(tracer.settings)


def tree(tracer: Tracer, run_id: str = "run_1") -> list[str]:
    """The spans of a run, indented by depth, children in the order of their start; siblings' ties do not occur."""
    with stored(tracer) as store:
        spans = store.spans(run_id)
        balance = store.balance(run_id)
    assert balance.balanced, balance
    lines: list[str] = []

    def walk(parent: str | None, depth: int) -> None:
        for one in spans:
            if one.parent_id == parent:
                attempt = f" #{one.attempt}" if (one.attempt or 1) > 1 else ""
                status = "" if one.status == "ok" else f" {one.status}"
                lines.append(f"{'  ' * depth}{one.kind} {one.name}{attempt}{status}")
                walk(one.id, depth + 1)

    walk(None, 0)
    assert len(lines) == len(spans), "a span hangs in the air"
    return lines


def one_span(tracer: Tracer, kind: str, run_id: str = "run_1") -> tuple[SpanRow, Any, Any]:
    """The only span of its kind, with its input and output."""
    with stored(tracer) as store:
        (found,) = [one for one in store.spans(run_id) if one.kind == kind]
        contents = [store.payload(name) if name else None for name in (found.input_hash, found.output_hash)]
    return found, contents[0], contents[1]


def step(name: str) -> Node:
    return lambda state: {"log": [name]}


# Shapes of graphs


def test_a_sync_graph_with_its_states(tracer: Tracer) -> None:
    run = begin(tracer)
    output = chain(a=step("a"), b=step("b")).compile().invoke({"x": 1}, config(run))
    run.end("done", output)
    assert tree(tracer) == ["workflow test", "  node a", "  node b"]
    with stored(tracer) as store:
        row = store.run("run_1")
        root, a, b = store.spans("run_1")
        assert (row.status, row.graph, row.thread_id, row.error) == ("done", "test", "th_1", None)
        assert store.payload(str(row.input_hash)) == {"x": 0}
        assert store.payload(str(row.output_hash)) == {"x": 1, "log": ["a", "b"], "messages": []}
        assert store.payload(str(b.input_hash)) == {"x": 1, "log": ["a"], "messages": []}
        assert store.payload(str(b.output_hash)) == {"log": ["b"]}
    assert (a.node, a.step, a.attempt, b.step) == ("a", 1, 1, 2)
    assert a.checkpoint_ns == f"a:{a.task}"
    assert root.start_ns <= a.start_ns <= b.start_ns
    assert (a.duration_ns or 0) + (b.duration_ns or 0) <= (root.duration_ns or 0) <= (row.duration_ns or 0) + 10_000_000


async def test_async_nodes_in_parallel_and_by_send(tracer: Tracer) -> None:
    async def left(state: State) -> State:
        await asyncio.sleep(0.01)
        return {"log": ["left"]}

    async def worker(state: State) -> State:
        await asyncio.sleep(0)
        return {"log": [str(state["x"])]}

    builder = StateGraph(State)
    builder.add_node("left", left)
    builder.add_node("right", step("right"))
    builder.add_node("worker", worker)
    builder.add_edge(START, "left")
    builder.add_edge(START, "right")
    builder.add_conditional_edges("right", lambda state: [Send("worker", {"x": number}) for number in range(3)], ["worker"])
    run = begin(tracer)
    await builder.compile().ainvoke({"x": 0}, config(run))
    run.end("done")
    assert tree(tracer) == ["workflow test", "  node left", "  node right", *["  node worker"] * 3]
    with stored(tracer) as store:
        spans = store.spans("run_1")
        assert sorted(store.payload(str(one.input_hash))["x"] for one in spans if one.name == "worker") == [0, 1, 2]
    assert len({one.checkpoint_ns for one in spans if one.name == "worker"}) == 3
    assert [one.attributes["route"] for one in spans if one.name == "right"] == ["worker x 3"]


def test_subgraphs_as_nodes_and_called_inside_a_node(tracer: Tracer) -> None:
    inner = chain(deep=step("deep")).compile()
    named = chain(deeper=step("deeper")).compile(name="helper")
    run = begin(tracer)
    seen: list[Any] = []
    run.listen(seen.append)
    graph = chain(sub=inner, caller=lambda state: named.invoke({"x": 2}), last=step("last")).compile()
    graph.invoke({"x": 0}, config(run))
    run.end("done")
    assert tree(tracer) == [
        "workflow test",
        "  node sub",
        "    agent sub",
        "      node deep",
        "  node caller",
        "    agent helper",
        "      node deeper",
        "  node last",
    ]
    assert [(event.node, event.path) for event in seen if isinstance(event, StepStarted)][1] == ("deep", ("sub",))


def test_routers_and_sequences_are_not_spans_but_the_route_is_told(tracer: Tracer) -> None:
    builder = chain(a=step("a"))
    builder.add_node("b", step("b"))
    builder.add_conditional_edges("a", lambda state: "b", ["b", END])
    prompt = ChatPromptTemplate.from_messages([("user", "{x}")])
    builder.add_node("lcel", prompt | GenericFakeChatModel(messages=iter(["hi"])) | (lambda answer: {"log": [answer.content]}))
    builder.add_edge("b", "lcel")
    run = begin(tracer)
    run.handler  # noqa: B018 - made on demand, and only once
    builder.compile().invoke({"x": 0}, config(run))
    run.end("done")
    assert tree(tracer) == ["workflow test", "  node a", "  node b", "  node lcel", "    generation generate"]
    with stored(tracer) as store:
        assert [one.attributes.get("route") for one in store.spans("run_1") if one.name == "a"] == ["b"]


def test_what_a_sequence_says_is_not_taken_for_a_route(tracer: Tracer) -> None:
    def said() -> Any:
        model = GenericFakeChatModel(messages=iter(["a secret"]))
        return ChatPromptTemplate.from_messages([("user", "{x}")]) | model | StrOutputParser()

    builder = chain(inside=lambda state: {"log": [said().invoke({"x": 1})]})
    builder.add_node("itself", said() | (lambda text: {"log": [text]}))
    builder.add_edge("inside", "itself")
    run = begin(tracer)
    builder.compile().invoke({"x": 0}, config(run))
    run.end("done")
    with stored(tracer) as store:
        assert [one.attributes.get("route") for one in store.spans("run_1") if one.kind == "node"] == [None, None]


# Repeating, failing, waiting, being stopped


def test_every_attempt_of_a_retried_node_is_a_span(tracer: Tracer) -> None:
    tries = iter([ConnectionError("down"), ConnectionError("still down"), None])

    def flaky(state: State) -> State:
        if (error := next(tries)) is not None:
            raise error
        return {"log": ["up"]}

    builder = StateGraph(State)
    builder.add_node("flaky", flaky, retry_policy=RetryPolicy(initial_interval=0.001, retry_on=ConnectionError))
    builder.add_edge(START, "flaky")
    run = begin(tracer)
    builder.compile().invoke({"x": 0}, config(run))
    run.end("done")
    assert tree(tracer) == ["workflow test", "  node flaky error", "  node flaky #2 error", "  node flaky #3"]


def test_an_error_is_told_with_its_stack_where_it_happened(tracer: Tracer) -> None:
    def broken(state: State) -> State:
        raise ValueError("the number is \x1b[31mwrong")

    run = begin(tracer)
    seen: list[Any] = []
    run.listen(seen.append)
    with pytest.raises(ValueError, match="wrong") as caught:
        chain(a=step("a"), broken=broken).compile().invoke({"x": 0}, config(run))
    run.end("failed", error=caught.value)
    assert tree(tracer) == ["workflow test error", "  node a", "  node broken error"]
    with stored(tracer) as store:
        assert store.run("run_1").error == "ValueError: the number is \x1b[31mwrong"
        assert store.run("run_1").status == "failed"
        assert "in broken" in store.spans("run_1")[2].attributes["stack"]
    ended = [event for event in seen if isinstance(event, StepEnded)]
    assert [(event.node, event.status, event.detail[:10]) for event in ended] == [
        ("a", "ok", ""),
        ("broken", "error", "ValueError"),
    ]


def test_waiting_for_a_person_is_no_error_and_the_run_goes_on_under_its_id(tracer: Tracer) -> None:
    inner = chain(ask=lambda state: {"x": interrupt("how many?")}).compile()
    graph = chain(sub=inner, after=step("after")).compile(checkpointer=InMemorySaver())
    run = begin(tracer)
    graph.invoke({"x": 0}, config(run))
    run.end("waiting")
    waiting = ["workflow test interrupted", "  node sub interrupted", "    agent sub interrupted", "      node ask interrupted"]
    assert tree(tracer) == waiting
    with stored(tracer) as store:
        started_ns = store.run("run_1").started_ns
        assert store.run("run_1").status == "waiting"
        assert all(one.error is None for one in store.spans("run_1"))
    again = tracer.start_run(run_id="run_1", thread_id="th_1", graph="other", input="7", resumed=True)
    with stored(tracer) as store:
        assert store.run("run_1").status == "running"
    output = graph.invoke(Command(resume=7), config(again))
    again.end("done", output)
    assert tree(tracer) == [
        *waiting,
        "workflow other (resumed)",
        "  node sub",
        "    agent sub",
        "      node ask",
        "  node after",
    ]
    with stored(tracer) as store:
        row = store.run("run_1")
        assert (row.status, row.graph, row.started_ns) == ("done", "test", started_ns)
        assert store.payload(str(row.input_hash)) == {"x": 0}
        assert store.payload(str(row.output_hash)) == {"x": 7, "log": ["after"], "messages": []}
        assert store.thread("th_1").runs == 1


def test_a_command_to_the_parent_graph_is_no_error(tracer: Tracer) -> None:
    inner = chain(leave=lambda state: Command(graph=Command.PARENT, goto="target")).compile()
    builder = chain(sub=inner)
    builder.add_node("target", step("target"))
    run = begin(tracer)
    builder.compile().invoke({"x": 0}, config(run))
    run.end("done")
    assert tree(tracer) == ["workflow test", "  node sub", "    agent sub", "      node leave", "  node target"]


async def test_a_cancelled_run_leaves_cancelled_spans(tracer: Tracer) -> None:
    entered = asyncio.Event()

    async def slow(state: State) -> State:
        entered.set()
        await asyncio.sleep(60)
        return {}

    run = begin(tracer)
    work = asyncio.create_task(chain(slow=slow).compile().ainvoke({"x": 0}, config(run)))
    await entered.wait()
    work.cancel()
    with suppress(asyncio.CancelledError):
        await work
    run.end("cancelled")
    assert tree(tracer) == ["workflow test cancelled", "  node slow cancelled"]
    with stored(tracer) as store:
        assert store.run("run_1").status == "cancelled"


def test_what_is_still_open_when_a_run_ends_is_closed(tracer: Tracer) -> None:
    go = threading.Event()

    def slow(state: State) -> State:
        go.wait(10)
        return {}

    def broken(state: State) -> State:
        time.sleep(0.05)
        raise ValueError("no")

    builder = StateGraph(State)
    for name, node in (("slow", slow), ("broken", broken)):
        builder.add_node(name, node)
        builder.add_edge(START, name)
    run = begin(tracer)
    stream = builder.compile().stream({"x": 0}, config(run))
    threading.Timer(0.3, go.set).start()
    with pytest.raises(ValueError, match="no"):
        list(stream)
    run.end("failed", error="no")
    assert sorted(line.split()[1] for line in tree(tracer)) == ["broken", "slow", "test"]
    with stored(tracer) as store:
        assert all(one.status != "open" for one in store.spans("run_1"))


# What nodes call


async def test_model_calls_find_their_node_from_gather_threads_and_nested_graphs(tracer: Tracer) -> None:
    engine = TracedEngine(ScriptedEngine({"": "four words of answer"}))

    async def together(state: State) -> State:
        await asyncio.gather(generate(engine, ASK), generate(engine, ASK))
        return {}

    async def threaded(state: State) -> State:
        await asyncio.to_thread(lambda: asyncio.run(generate(engine, ASK)))
        return {}

    async def nested(state: State) -> State:
        await chain(inside=plain).compile().ainvoke({"x": 1})
        return {}

    async def plain(state: State) -> State:
        await generate(engine, ASK)
        return {}

    run = begin(tracer)
    seen: list[Any] = []
    run.listen(seen.append)
    await chain(together=together, threaded=threaded, nested=nested, plain=plain).compile().ainvoke({"x": 0}, config(run))
    run.end("done")
    assert tree(tracer) == [
        "workflow test",
        "  node together",
        "    generation generate",
        "    generation generate",
        "  node threaded",
        "    generation generate",
        "  node nested",
        "    agent nested",
        "      node inside",
        "        generation generate",
        "  node plain",
        "    generation generate",
    ]
    with stored(tracer) as store:
        calls = [one for one in store.spans("run_1") if one.kind == "generation"]
        usage = store.run("run_1").usage
    assert [one.node for one in calls] == ["together", "together", "threaded", "inside", "plain"]
    assert usage == run.usage
    assert usage.cached_tokens + usage.computed_tokens == usage.input_tokens == sum(one.usage.input_tokens for one in calls)
    assert usage.output_tokens == 5 * 4
    assert usage.cached_tokens > 0
    assert "".join(event.text for event in seen if isinstance(event, Token) and event.node == "plain") == "four words of answer"
    assert [event.node for event in seen if isinstance(event, StepStarted)] == [
        "together",
        "threaded",
        "nested",
        "inside",
        "plain",
    ]


async def test_a_generation_says_all_about_the_call(tracer: Tracer) -> None:
    engine = TracedEngine(ScriptedEngine(["one two three"]))
    prompt = PromptVersion("write", content_hash("Write about {x}"), "Write about {x}")

    async def node(state: State) -> State:
        with tagged(prompt=prompt, audience="children"):
            await generate(engine, Request(messages=ASK.messages, max_tokens=9, temperature=0.5, seed=3, stop=("\n",)))
        return {}

    run = begin(tracer)
    await chain(node=node).compile().ainvoke({"x": 0}, config(run))
    run.end("done")
    found, asked, answer = one_span(tracer, "generation")
    assert asked == {"messages": [{"role": "user", "content": "what is it"}]}
    assert answer == "one two three"
    assert (found.model, found.prompt_name, found.prompt_version) == ("scripted", "write", prompt.version)
    expected = {
        "max_tokens": 9,
        "temperature": 0.5,
        "seed": 3,
        "stop": ["\n"],
        "finish_reason": "stop",
        "chunks": 3,
        "audience": "children",
    }
    assert expected.items() <= found.attributes.items()
    assert found.timing.first_token_ms > 0
    with stored(tracer) as store:
        assert store.prompt(prompt.version) == prompt


async def test_failed_cancelled_and_abandoned_model_calls(tracer: Tracer) -> None:
    engine = TracedEngine(ScriptedEngine([EngineClosed("gone"), "a b c d e f", "a b c d e f"], delay_s=0.01))

    async def node(state: State) -> State:
        with suppress(EngineClosed):
            await generate(engine, ASK)
        call = asyncio.create_task(generate(engine, ASK))
        await asyncio.sleep(0.025)
        call.cancel()
        with suppress(asyncio.CancelledError):
            await call
        events = engine.stream(ASK)
        await anext(events)
        await events.aclose()
        return {}

    run = begin(tracer)
    await chain(node=node).compile().ainvoke({"x": 0}, config(run))
    run.end("done")
    statuses = ["error", "cancelled", "cancelled"]
    assert tree(tracer) == ["workflow test", "  node node", *[f"    generation generate {status}" for status in statuses]]


async def test_scores_and_searches_are_recorded(tracer: Tracer) -> None:
    document = Document("d1", "the text", content_hash("the text"), {"source": "a.md", "heading": "Intro"})

    class Shelf:
        async def search(self, query: Query) -> Retrieval:
            if query.k == 1:
                raise LookupError("no such shelf")
            return Retrieval(query, (Hit(document, 0.9, vector=Leg(1, 0.8)),), generation=4, embed_ms=1.5, search_ms=2.5)

    engine = TracedEngine(ScriptedEngine(scores=lambda request: [-1.0, -5.0]))
    shelf = TracedRetriever(Shelf())

    async def node(state: State) -> State:
        await engine.score(ScoreRequest(("yes", "no"), text="is it"))
        await shelf.search(Query("where", "docs"))
        with suppress(LookupError):
            await shelf.search(Query("where", "docs", k=1))
        return {}

    run = begin(tracer)
    await chain(node=node).compile().ainvoke({"x": 0}, config(run))
    run.end("done")
    assert tree(tracer) == [
        "workflow test",
        "  node node",
        "    generation score",
        "    retrieval search",
        "    retrieval search error",
    ]
    _, asked, answer = one_span(tracer, "generation")
    assert asked == {"text": "is it", "choices": ["yes", "no"]}
    assert [(row["text"], row["total"]) for row in answer] == [("yes", -1.0), ("no", -5.0)]
    with stored(tracer) as store:
        found = next(one for one in store.spans("run_1") if one.kind == "retrieval")
        (hit,) = store.payload(str(found.output_hash))
    assert hit["vector"] == {"rank": 1, "score": 0.8}
    assert (hit["id"], hit["source"], hit["text"], hit["hash"]) == ("d1", "a.md", "the text", document.hash)
    assert {"collection": "docs", "hits": 1, "generation": 4, "embed_ms": 1.5}.items() <= found.attributes.items()


def test_a_foreign_graph_with_its_own_model_tools_and_retriever(tracer: Tracer) -> None:
    class Library(BaseRetriever):
        def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[LangChainDocument]:
            return [LangChainDocument(page_content="found", metadata={"source": "b.md"})]

    @tool
    def add(a: int, b: int) -> int:
        """Adds."""
        return a + b

    calls = [{"name": "add", "args": {"a": 1, "b": 2}, "id": "c1"}]
    usage = {"input_tokens": 10, "output_tokens": 4, "total_tokens": 14, "input_token_details": {"cache_read": 6}}
    answer = AIMessage("let me add", tool_calls=calls, usage_metadata=usage)  # type: ignore[arg-type]
    model = GenericFakeChatModel(messages=iter([answer, answer]))

    def think(state: State) -> State:
        Library().invoke("what is added")
        list(model.stream("add them"))
        return {"messages": [model.invoke("add them")]}

    run = begin(tracer)
    seen: list[Any] = []
    run.listen(seen.append)
    chain(think=think, tools=ToolNode([add])).compile().invoke({"x": 0}, config(run))
    run.end("done")
    assert tree(tracer) == [
        "workflow test",
        "  node think",
        "    retrieval Library",
        "    generation generate",
        "    generation generate",
        "  node tools",
        "    tool add",
    ]
    with stored(tracer) as store:
        call = [one for one in store.spans("run_1") if one.kind == "generation"][1]
        asked, said = store.payload(str(call.input_hash)), store.payload(str(call.output_hash))
    assert asked == {"messages": [{"role": "user", "content": "add them"}]}
    assert said["tool_calls"][0]["args"] == {"a": 1, "b": 2}
    assert (call.usage.input_tokens, call.usage.cached_tokens, call.usage.computed_tokens, call.usage.output_tokens) == (
        10,
        6,
        4,
        4,
    )
    assert "".join(event.text for event in seen if isinstance(event, Token)) == "let me add"
    _, given, result = one_span(tracer, "tool")
    assert given == {"a": 1, "b": 2}
    assert (result["role"], result["content"]) == ("tool", "3")
    assert one_span(tracer, "retrieval")[2][0]["text"] == "found"


async def test_our_chat_model_is_recorded_once_by_the_engine_beneath_it(tracer: Tracer) -> None:
    from agentops.engine.chat import EngineChatModel

    model = EngineChatModel(engine=TracedEngine(ScriptedEngine({"": "hello you"})))

    async def node(state: State) -> State:
        await model.ainvoke("hi")
        return {"messages": [model.bind(stop=["x"]).invoke("hi")]} if state["x"] else {}

    run = begin(tracer)
    seen: list[Any] = []
    run.listen(seen.append)
    await chain(node=node).compile().ainvoke({"x": 0}, config(run))
    run.end("done")
    assert tree(tracer) == ["workflow test", "  node node", "    generation generate"]
    assert "".join(event.text for event in seen if isinstance(event, Token)) == "hello you"


# Own spans, own threads, no run at all


async def test_own_spans_nest_with_everything_else(tracer: Tracer) -> None:
    engine = TracedEngine(ScriptedEngine({"": "x"}))

    async def node(state: State) -> State:
        with span("rerank", "outer", input=[1, 2]) as outer:
            await generate(engine, ASK)
            with span("embedding", "inner"):
                await asyncio.gather(generate(engine, ASK))
            await chain(inside=step("inside")).compile().ainvoke({"x": 1})
            outer.output = [2, 1]
            outer.set(size=2)
        await generate(engine, ASK)
        return {}

    run = begin(tracer)
    with run.active(), span("evaluator", "before"):
        pass
    await chain(node=node).compile().ainvoke({"x": 0}, config(run))
    run.end("done")
    assert tree(tracer) == [
        "workflow test",
        "  evaluator before",
        "  node node",
        "    rerank outer",
        "      generation generate",
        "      embedding inner",
        "        generation generate",
        "      agent outer",
        "        node inside",
        "    generation generate",
    ]
    found, given, output = one_span(tracer, "rerank")
    assert (given, output, found.attributes) == ([1, 2], [2, 1], {"size": 2})


async def test_outside_a_run_everything_passes_through(tracer: Tracer) -> None:
    engine = TracedEngine(ScriptedEngine(["an answer"]))
    with span("tool", "nothing") as handle, tagged(a=1):
        handle.set(b=2)
        handle.output = 3
        assert (await generate(engine, ASK)).text == "an answer"
    assert tracer.journal.size == 0


async def test_two_runs_at_once_do_not_mix(tracer: Tracer) -> None:
    engine = TracedEngine(ScriptedEngine({"": "a b c"}, delay_s=0.002))

    async def node(state: State) -> State:
        await generate(engine, ASK)
        return {}

    async def whole(run_id: str) -> None:
        run = begin(tracer, run_id)
        await chain(one=node, two=node).compile().ainvoke({"x": 0}, config(run))
        run.end("done")

    names = [f"run_{number}" for number in range(8)]
    await asyncio.gather(*(whole(name) for name in names))
    for name in names:
        assert tree(tracer, name) == [
            "workflow test",
            *["  node one", "    generation generate", "  node two", "    generation generate"],
        ]


def test_a_fault_of_the_recording_is_counted_and_never_hurts_the_run(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    tracer = open_tracer(settings, clock=SystemClock(), ids=CountingIds())
    run = begin(tracer)
    run.listen(lambda event: 1 / 0)  # type: ignore[arg-type, return-value]
    assert chain(a=step("a")).compile().invoke({"x": 0}, config(run))["log"] == ["a"]
    assert tracer.faults == 2
    monkeypatch.setattr(run, "_begin", lambda *_: 1 / 0)
    assert chain(a=step("a")).compile().invoke({"x": 0}, config(run))["log"] == ["a"]
    run.end("done")
    with stored(tracer) as store:
        balance = store.balance("run_1")
    assert not balance.balanced, "what was lost must show"
    assert (balance.emitted, balance.stored) == (3, 2)
    tracer.close()


async def test_a_long_trace_is_whole(tracer: Tracer) -> None:
    async def worker(state: State) -> State:
        return {}

    builder = StateGraph(State)
    builder.add_node("worker", worker)
    builder.add_conditional_edges(START, lambda state: [Send("worker", {"x": number}) for number in range(1_500)], ["worker"])
    run = begin(tracer)
    await builder.compile().ainvoke({"x": 0}, config(run))
    run.end("done")
    assert len(tree(tracer)) == 1_501
