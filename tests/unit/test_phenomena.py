"""Everything that can happen in a graph, and the exact tree of spans that is on record of it."""

from __future__ import annotations

import asyncio
import operator
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypedDict

import pytest
from langchain_core.callbacks import adispatch_custom_event
from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from langchain_core.messages import AIMessage
from langchain_core.runnables import RunnableConfig
from langchain_core.tools import tool
from langgraph.cache.memory import InMemoryCache
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.config import get_stream_writer
from langgraph.func import entrypoint, task
from langgraph.graph import START, StateGraph
from langgraph.runtime import Runtime as Node
from langgraph.store.memory import InMemoryStore
from langgraph.types import CachePolicy, Command, RetryPolicy, Send, StreamWriter, TimeoutPolicy, interrupt
from postgres_server import Postgres

from agentops import Context, Runtime, ScriptedEngine, Settings
from agentops.engine import generate
from agentops.errors import NodeFailed, RunDrained
from agentops.records import Message, Request, RunResult
from agentops.store import open_store
from agentops.tracer import carried, catch_up, span

LONG = "one two three"
ASK = Request(messages=(Message("user", "hi"),))


class State(TypedDict, total=False):
    x: Annotated[list[str], operator.add]
    q: str


def flow(*edges: str | tuple[str, ...], **nodes: Any) -> StateGraph[Any, Any]:
    """A graph whose nodes, in order of naming, all follow the start, unless an edge "a>b" says otherwise."""
    builder: Any = StateGraph(State, context_schema=Context)
    after = dict(reversed(str(edge).split(">")) for edge in edges)
    for name, node in nodes.items():
        builder.add_node(name, node)
        builder.add_edge(after.get(name, START), name)
    return builder


def says(text: str) -> Callable[[State], State]:
    def node(state: State) -> State:
        return {"x": [text]}

    return node


async def asays(state: State) -> State:
    await asyncio.sleep(0)
    return {"x": ["a"]}


def fails(state: State) -> State:
    raise ValueError("no")


async def slow(state: State) -> State:
    await asyncio.sleep(30)
    return {}


async def calls(runtime: Node[Context]) -> None:
    await generate(runtime.context.engine, ASK)


def in_a_loop(runtime: Node[Context]) -> None:
    asyncio.run(calls(runtime))


@dataclass
class Row:
    """What happens: `graph` is run once, or `drive` does it and gives the run's id."""

    tree: str
    graph: Callable[[], Any] | None = None
    drive: Callable[[Caller], str] | None = None
    fails: bool = False


@dataclass
class Caller:
    """A runtime, called as a caller without an event loop calls it, or as one with a loop does."""

    runtime: Runtime
    has_loop: bool

    @property
    def settings(self) -> Settings:
        return self.runtime.settings

    def run(self, graph: Any) -> RunResult:
        if self.has_loop:
            return asyncio.run(self.runtime.arun(graph, {"q": "?"}))
        return self.runtime.run(graph, {"q": "?"})

    def resume(self, run_id: str, **how: Any) -> RunResult:
        return asyncio.run(self.runtime.aresume(run_id, **how)) if self.has_loop else self.runtime.resume(run_id, **how)


ROWS: dict[str, Row] = {}


def phenomenon(name: str, tree: str, *, fails: bool = False) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    def kept(graph: Callable[[], Any]) -> Callable[[], Any]:
        ROWS[name] = Row(tree, graph=graph, fails=fails)
        return graph

    return kept


def driven(name: str, tree: str) -> Callable[[Callable[[Caller], str]], Callable[[Caller], str]]:
    def kept(drive: Callable[[Caller], str]) -> Callable[[Caller], str]:
        ROWS[name] = Row(tree, drive=drive)
        return drive

    return kept


@phenomenon("sync nodes in an async graph", "node a 1 | node b 2")
def _() -> Any:
    return flow("a>b", a=says("a"), b=asays).compile()


@phenomenon("a router", "node a 1 → b | node b 2")
def _() -> Any:
    builder: Any = StateGraph(State).add_node("a", asays).add_node("b", asays).add_node("c", asays).add_edge(START, "a")
    return builder.add_conditional_edges("a", lambda state: "b", ["b", "c"]).compile()


@phenomenon("a command", "node a 1 | node b 2")
def _() -> Any:
    builder: Any = StateGraph(State).add_node("a", lambda state: Command(goto="b"), destinations=("b",)).add_node("b", asays)
    return builder.add_edge(START, "a").compile()


@phenomenon("parallel nodes", "node a 1 | node b 1 | node c 2")
def _() -> Any:
    return flow("a>c", a=asays, b=asays, c=asays).compile()


@phenomenon("send", "node a 1 → b x 3 | node b 2 packet 0 | node b 2 packet 1 | node b 2 packet 2")
def _() -> Any:
    builder: Any = StateGraph(State).add_node("a", asays).add_node("b", asays).add_edge(START, "a")
    return builder.add_conditional_edges("a", lambda state: [Send("b", {"q": str(n)}) for n in range(3)], ["b"]).compile()


@phenomenon("subgraphs, nested", "node outer 1 ( agent outer ( node middle 1 ( agent middle ( node inner 1 ) ) ) ) | node last 2")
def _() -> Any:
    middle = flow(middle=flow(inner=asays).compile()).compile()
    return flow("outer>last", outer=middle, last=asays).compile()


@phenomenon("a subgraph with checkpoints of its own", "node outer 1 ( agent outer ( node inner 1 ) )")
def _() -> Any:
    return flow(outer=flow(inner=asays).compile(checkpointer=True)).compile()


@phenomenon("the functional API", "node work 0 ( node one 0 packet 0 | node one 0 packet 1 )")
def _() -> Any:
    @task
    async def one(n: int) -> int:
        return n + 1

    @entrypoint()
    async def work(given: dict[str, str]) -> int:
        return sum(await asyncio.gather(one(1), one(2)))

    return work


@phenomenon("each attempt of a retry", "node a 1 error | node a 1 #2 error | node a 1 #3")
def _() -> Any:
    left = [ConnectionError("one"), ConnectionError("two")]

    def twice(state: State) -> State:
        if left:
            raise left.pop(0)
        return {"x": ["a"]}

    builder: Any = StateGraph(State).add_node("a", twice, retry_policy=RetryPolicy(initial_interval=0.001, jitter=False))
    return builder.add_edge(START, "a").compile()


@phenomenon("a time limit", "node a 1 error", fails=True)
def _() -> Any:
    builder: Any = StateGraph(State).add_node("a", slow, timeout=TimeoutPolicy(run_timeout=0.05))
    return builder.add_edge(START, "a").compile()


@phenomenon("a time limit, tried again", "node a 1 error | node a 1 #2")
def _() -> Any:
    waits = [30.0, 0.0]

    async def once(state: State) -> State:
        await asyncio.sleep(waits.pop(0))
        return {}

    again = RetryPolicy(initial_interval=0.001, jitter=False)
    builder: Any = StateGraph(State).add_node("a", once, timeout=TimeoutPolicy(run_timeout=0.2), retry_policy=again)
    return builder.add_edge(START, "a").compile()


@phenomenon(
    "a time limit beside nodes of the same name",
    "node left 1 error ( agent left error ( node b 1 error ) )"
    " | node right 1 cancelled ( agent right cancelled ( node b 1 cancelled ) )",
    fails=True,
)
def _() -> Any:
    limited: Any = StateGraph(State).add_node("b", slow, timeout=TimeoutPolicy(run_timeout=0.2)).add_edge(START, "b")
    return flow(left=limited.compile(), right=flow(b=slow).compile()).compile()


@phenomenon(
    "a time limit of one of many packets", "node a 1 → b x 2 | node b 2 packet 0 error | node b 2 packet 1 cancelled", fails=True
)
def _() -> Any:
    builder: Any = StateGraph(State).add_node("a", asays).add_edge(START, "a")
    builder.add_node("b", slow, timeout=TimeoutPolicy(run_timeout=0.2))
    return builder.add_conditional_edges("a", lambda state: [Send("b", {}), Send("b", {})], ["b"]).compile()


@phenomenon("an error handler of a node", "node a 1 error | node a (error handler) 1 | node b 2")
def _() -> Any:
    builder: Any = StateGraph(State).add_node("a", fails, error_handler=lambda state: Command(goto="b", update={"x": ["mended"]}))
    return builder.add_node("b", asays).add_edge(START, "a").compile()


@phenomenon("two failures side by side", "node a 1 error | node b 1 error", fails=True)
def _() -> Any:
    return flow(a=fails, b=fails).compile()


@phenomenon("cancelled by a sibling's failure", "node a 1 cancelled | node b 1 error", fails=True)
def _() -> Any:
    async def soon(state: State) -> State:
        await asyncio.sleep(0.05)
        raise ValueError("no")

    return flow(a=slow, b=soon).compile()


@phenomenon("operations on a store", "node a 1 ( memory put | memory get | memory search | memory list | memory delete )")
def _() -> Any:
    async def a(state: State, runtime: Node[Context]) -> State:
        store = runtime.store
        assert store is not None
        await store.aput(("n",), "k", {"v": 1})
        await store.aget(("n",), "k")
        await store.asearch(("n",))
        await store.alist_namespaces()
        await store.adelete(("n",), "k")
        return {}

    return flow(a=a).compile(store=InMemoryStore())


@phenomenon("operations on a store, sync", "node a 1 ( memory put | memory get )")
def _() -> Any:
    def a(state: State, runtime: Node[Context]) -> State:
        store = runtime.store
        assert store is not None
        store.put(("n",), "k", {"v": 1})
        store.get(("n",), "k")
        return {}

    return flow(a=a).compile(store=InMemoryStore())


@phenomenon("a tool with a tool inside", "node a 1 ( tool outer ( tool inner ) )")
def _() -> Any:
    @tool
    async def inner(x: int) -> int:
        """Adds."""
        return x + 1

    @tool
    async def outer(x: int) -> int:
        """Adds."""
        found: int = await inner.ainvoke({"x": x})
        return found

    async def a(state: State) -> State:
        await outer.ainvoke({"x": 1})
        return {}

    return flow(a=a).compile()


@phenomenon("gather", "node a 1 ( generation generate | generation generate )")
def _() -> Any:
    async def a(state: State, runtime: Node[Context]) -> State:
        await asyncio.gather(calls(runtime), calls(runtime))
        return {}

    return flow(a=a).compile()


@phenomenon("to_thread", "node a 1 ( generation generate )")
def _() -> Any:
    async def a(state: State, runtime: Node[Context]) -> State:
        await asyncio.to_thread(in_a_loop, runtime)
        return {}

    return flow(a=a).compile()


@phenomenon("a thread and a pool", "node a 1 | generation generate orphan | generation generate orphan")
def _() -> Any:
    def a(state: State, runtime: Node[Context]) -> State:
        beside = threading.Thread(target=in_a_loop, args=(runtime,))
        beside.start()
        beside.join()
        with ThreadPoolExecutor(1) as pool:
            pool.submit(in_a_loop, runtime).result()
        return {}

    return flow(a=a).compile()


@phenomenon("a thread and a pool, carried", "node a 1 ( generation generate | generation generate | generation generate )")
def _() -> Any:
    def a(state: State, runtime: Node[Context]) -> State:
        beside = threading.Thread(target=carried(in_a_loop), args=(runtime,))
        beside.start()
        beside.join()
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(carried(in_a_loop), [runtime, runtime]))
        return {}

    return flow(a=a).compile()


@phenomenon(
    "what is told to the custom stream",
    "node a 1 ( event custom | event custom ) | node b 1 ( agent b ( node c 1 ( event custom ) ) )",
)
def _() -> Any:
    def a(state: State, runtime: Node[Context]) -> State:
        runtime.stream_writer({"at": 1})
        get_stream_writer()({"at": 2})
        return {}

    async def c(state: State, writer: StreamWriter) -> State:
        writer({"at": 3})
        return {}

    return flow(a=a, b=flow(c=c).compile()).compile()


@phenomenon("an event of one's own", "node a 1 ( event arrived )")
def _() -> Any:
    async def a(state: State, config: RunnableConfig) -> State:
        await adispatch_custom_event("arrived", {"at": 1}, config=config)
        return {}

    return flow(a=a).compile()


@driven("a node answered from a cache", "node a 1 cached | node b 2")
def _(caller: Caller) -> str:
    builder: Any = StateGraph(State).add_node("a", asays, cache_policy=CachePolicy()).add_node("b", asays)
    graph = builder.add_edge(START, "a").add_edge("a", "b").compile(cache=InMemoryCache())
    caller.run(graph)
    return caller.run(graph).run_id


@driven("an interrupt and its answer", "node a 1 interrupted || node a 1 | node b 2")
def _(caller: Caller) -> str:
    graph = flow("a>b", a=lambda state: {"x": [str(interrupt("sure?"))]}, b=asays).compile()
    run = caller.run(graph)
    return caller.resume(run.run_id, answer="yes", graph=graph).run_id


@driven("two interrupts at once", "node a 1 interrupted | node b 1 interrupted | node c 1 || node a 1 | node b 1")
def _(caller: Caller) -> str:
    def asks(state: State) -> State:
        return {"x": [str(interrupt("sure?"))]}

    graph = flow(a=asks, b=asks, c=asays).compile()
    run = caller.run(graph)
    return caller.resume(run.run_id, answers={one.id: "yes" for one in run.interrupts}, graph=graph).run_id


@driven("a breakpoint", "node a 1 || node b 2")
def _(caller: Caller) -> str:
    graph = flow("a>b", a=asays, b=asays).compile(interrupt_before=["b"])
    return caller.resume(caller.run(graph).run_id, graph=graph).run_id


@driven("cancelled by its user", "node a 1 | node b 2 cancelled")
def _(caller: Caller) -> str:
    graph, found = flow("a>b", a=asays, b=slow).compile(), []

    async def go() -> None:
        async for event in caller.runtime.astream(graph, {"q": "?"}):
            found.append(event)  # noqa: PERF401 - they are looked at meanwhile

    async def cancelled() -> None:
        going = asyncio.create_task(go())
        while not any(getattr(event, "node", "") == "b" for event in found):
            await asyncio.sleep(0.01)
        going.cancel()
        with pytest.raises(asyncio.CancelledError):
            await going

    asyncio.run(cancelled())
    return str(found[0].run_id)


@driven("the reader of the stream leaves", "node a 1 | node b 2 cancelled")
def _(caller: Caller) -> str:
    graph, found = flow("a>b", a=asays, b=slow).compile(), []

    async def go() -> None:
        events = caller.runtime.astream(graph, {"q": "?"})
        async for event in events:
            found.append(event)
            if getattr(event, "node", "") == "b":
                break
        await events.aclose()

    asyncio.run(go())
    return str(found[0].run_id)


@driven("what is called after the run has ended", "node a 1 | generation generate orphan")
def _(caller: Caller) -> str:
    ended = threading.Event()

    def a(state: State, runtime: Node[Context]) -> State:
        def later() -> None:
            ended.wait(10)
            in_a_loop(runtime)
            done.set()

        threading.Thread(target=later).start()
        return {}

    done = threading.Event()
    run = caller.run(flow(a=a).compile())
    ended.set()
    assert done.wait(10)
    return run.run_id


@phenomenon("a stream", "node a 1 ( generation generate in 3 chunks | generation generate in 5 chunks )")
def _() -> Any:
    async def a(state: State, runtime: Node[Context]) -> State:
        async for _ in runtime.context.engine.stream(replace(ASK, messages=(Message("user", "at length"),))):
            pass
        model = GenericFakeChatModel(messages=iter([AIMessage(LONG)]))
        async for _ in model.astream("?"):
            pass
        return {}

    return flow(a=a).compile()


@phenomenon("what is too large for the record", "node a 1 cut ( tool big cut ) | node b 2 cut")
def _() -> Any:
    def a(state: State) -> State:
        with span("tool", "big", input="x" * 1_000_001):
            return {"q": "y" * 1_000_001}

    return flow("a>b", a=a, b=lambda state: {"x": [str(len(state["q"]))], "q": ""}).compile()


@driven("a fork, with another state", "node b 2")
def _(caller: Caller) -> str:
    graph = flow("a>b", a=asays, b=asays).compile()
    run = caller.run(graph)
    forked = caller.runtime.fork(run.run_id, step=1, changes={"q": "!"}, graph=graph)
    assert forked.output == {"x": ["a", "a"], "q": "!"}
    return forked.run_id


@driven("update_state", "node a 1 || node c 3")
def _(caller: Caller) -> str:
    saver = InMemorySaver()
    graph = flow("a>b", "b>c", a=asays, b=asays, c=asays).compile(checkpointer=saver, interrupt_before=["b"])
    run = caller.run(graph)
    # As if it came from b: the run goes on behind it.
    graph.update_state({"configurable": {"thread_id": run.thread_id}}, {"x": ["by hand"]}, as_node="b")
    ended = caller.resume(run.run_id, graph=graph)
    assert ended.output["x"] == ["a", "by hand", "a"]
    return ended.run_id


@driven("a breakpoint behind a node", "node a 1 || node b 2")
def _(caller: Caller) -> str:
    graph = flow("a>b", a=asays, b=asays).compile(interrupt_after=["a"])
    return caller.resume(caller.run(graph).run_id, graph=graph).run_id


@driven("drained", "node a 1 || node b 2")
def _(caller: Caller) -> str:
    def a(state: State, runtime: Node[Context]) -> State:
        assert runtime.control is not None
        runtime.control.request_drain()
        return {}

    graph = flow("a>b", a=a, b=asays).compile()
    with pytest.raises(RunDrained) as drained:
        caller.run(graph)
    return caller.resume(drained.value.run_id, graph=graph).run_id


@driven("killed in a node", "node a 1 | node b 2 crashed ( tool slow crashed ) || node b 2 ( tool slow )")
def _(caller: Caller) -> str:
    file = caller.settings.paths.home / f"killed_{caller.has_loop}.py"
    file.write_text(KILLED)
    url = caller.settings.record.url
    environment = (
        os.environ | {"AGENTOPS_PATHS_HOME": str(caller.settings.paths.home)} | ({"AGENTOPS_RECORD_URL": url} if url else {})
    )
    child = subprocess.run([sys.executable, file], env=environment, capture_output=True, text=True)
    assert child.returncode == -signal.SIGKILL, child.stderr
    return caller.resume(child.stdout.strip(), graph=f"{file}:graph").run_id


KILLED = """
import os, signal
from pathlib import Path
from typing import TypedDict
from langgraph.graph import START, StateGraph
from agentops.tracer import span

class State(TypedDict, total=False):
    q: str

async def a(state: State) -> State:
    return {}

async def b(state: State) -> State:
    with span("tool", "slow"):
        if not (mark := Path(__file__).with_suffix(".mark")).exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
    return {}

graph = StateGraph(State).add_node("a", a).add_node("b", b).add_edge(START, "a").add_edge("a", "b").compile()

if __name__ == "__main__":
    from agentops import Runtime
    for event in Runtime().stream(f"{__file__}:graph", {"q": "?"}):
        if type(event).__name__ == "RunStarted":
            print(event.run_id, flush=True)
"""


OWN = [name for name, row in ROWS.items() if row.graph is not None and "API" not in name]


@contextmanager
def opened(settings: Settings, home: Path, url: str = "") -> Iterator[Runtime]:
    kept = replace(settings, paths=replace(settings.paths, home=home), record=replace(settings.record, url=url))
    with Runtime(kept, engine=ScriptedEngine({"length": LONG, "": "ok"})) as runtime:
        yield runtime
    assert (home / "record.db").exists() == (not url)


@pytest.fixture(scope="module")
def on_sqlite(session_settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runtime]:
    with opened(session_settings, tmp_path_factory.mktemp("sqlite") / "home") as runtime:
        yield runtime


@pytest.fixture(scope="module")
def on_postgres(
    session_settings: Settings, tmp_path_factory: pytest.TempPathFactory, postgres_server: Postgres
) -> Iterator[Runtime]:
    with opened(session_settings, tmp_path_factory.mktemp("postgres") / "home", postgres_server.database()) as runtime:
        yield runtime


@pytest.mark.parametrize("name", ROWS)
def test_the_tree_of_spans(on_sqlite: Runtime, name: str) -> None:
    assert recorded(Caller(on_sqlite, has_loop=False), name) == ROWS[name].tree


@pytest.mark.parametrize("name", OWN)
def test_the_tree_of_spans_where_the_graph_has_a_checkpointer(on_sqlite: Runtime, name: str) -> None:
    assert recorded(Caller(on_sqlite, has_loop=True), name, checkpointer=InMemorySaver()) == ROWS[name].tree


@pytest.mark.parametrize("name", ROWS)
def test_the_tree_of_spans_in_postgres(on_postgres: Runtime, name: str) -> None:
    assert recorded(Caller(on_postgres, has_loop=True), name) == ROWS[name].tree


def recorded(caller: Caller, name: str, checkpointer: Any = None) -> str:
    row = ROWS[name]
    if row.drive is not None:
        return drawn(caller.settings, row.drive(caller))
    assert row.graph is not None
    graph = row.graph()
    try:
        run_id = caller.run(graph.copy({"checkpointer": checkpointer}) if checkpointer else graph).run_id
        assert not row.fails
    except NodeFailed as error:
        assert row.fails
        run_id = error.run_id
    return drawn(caller.settings, run_id)


def drawn(settings: Settings, run_id: str) -> str:
    """The spans under each workflow span, `||` between sittings, siblings in the order of their start."""
    catch_up(settings, wait=True)
    with open_store(settings) as store:
        spans, balance = store.spans(run_id), store.balance(run_id)
        named = {key for one in spans for key in (one.input_hash, one.output_hash) if key}
        cut = {key for key in named if "…[cut: " in str(store.payload(key))}
    assert balance.balanced
    assert balance.truncated == len(cut)
    assert balance.orphans == sum(bool(one.attributes.get("orphan")) for one in spans)

    def under(parent: str) -> str:
        return " | ".join(
            line(one) + (f" ( {below} )" if (below := under(one.id)) else "") for one in spans if one.parent_id == parent
        )

    def line(one: Any) -> str:
        parts = [one.kind, one.name]
        if one.kind == "node":
            parts.append(str(one.step))
        if (one.attempt or 1) > 1:
            parts.append(f"#{one.attempt}")
        notes = one.attributes
        parts += [word for word in ("cached", "orphan") if notes.get(word)]
        if "packet" in notes:
            parts.append(f"packet {str(notes['packet']).rpartition('/')[2]}")
        if "route" in notes:
            parts.append(f"→ {notes['route']}")
        if notes.get("chunks", 0) > 1:
            assert one.timing.first_token_ms > 0
            parts.append(f"in {notes['chunks']} chunks")
        if cut & {one.input_hash, one.output_hash}:
            parts.append("cut")
        if one.status != "ok":
            parts.append(one.status)
        return " ".join(parts)

    return " || ".join(under(one.id) for one in spans if one.parent_id is None)
