"""The runtime: the only place that builds and wires everything, and the verbs on runs.

A run is one invocation of a graph on a thread. It is on record before it starts, holds the lease of its thread while it
works, writes a checkpoint after every superstep before going on, and ends with a status. What the runtime opens (model,
index, record) it opens when it is first needed and closes in `close`.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import sqlite3
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

from agentops.checkpoint import check_thread_id, lease, open_checkpointer
from agentops.clock import Clock, Ids, SystemClock, UlidSource
from agentops.engine import Engine
from agentops.errors import AgentOpsError, InputTooLarge, JournalFull, NodeFailed, RecordError, ThreadBusy, UsageError
from agentops.graph import Context, LoadedGraph, adopt_graph, load_graph
from agentops.parts import open_embedder, open_engine, open_index
from agentops.records import RunEvent, RunResult, RunStarted, RunStatus
from agentops.retrieval import Embedder, Index
from agentops.settings import Settings, load_settings
from agentops.store import RunRow, open_store
from agentops.sync import iterate_sync, run_sync
from agentops.tracer import RunTrace, TracedEngine, TracedRetriever, catch_up, open_tracer

if TYPE_CHECKING:
    from langchain_core.language_models import BaseChatModel

    from agentops.engine.fetch import Progress
    from agentops.retrieval.ingest import IngestReport


class Runtime:
    """Runs graphs and keeps the record. Safe to use from several threads and event loops.

    Every verb has an asynchronous form (`arun`, `astream`, `aresume`) and a synchronous one (`run`, `stream`, `resume`).
    Parts given to the constructor (`engine`, `index`, `embedder`) are the caller's to close. `progress` is told how far the
    preparing of a model is.
    """

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        engine: Engine | None = None,
        index: Index | None = None,
        embedder: Embedder | None = None,
        clock: Clock | None = None,
        ids: Ids | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.settings = settings or load_settings()
        self._clock = clock or SystemClock()
        self._ids = ids or UlidSource(self._clock)
        self._progress = progress
        self._tracer = open_tracer(self.settings, clock=self._clock, ids=self._ids)
        self._lock = threading.RLock()
        self._own_engine: Engine | None = None
        self._own_index: Index | None = None
        self._engine = TracedEngine(engine, self._tracer) if engine else None
        self._index = index
        self._embedder = embedder
        self._closed = False

    # -- parts, opened when first needed

    @property
    def engine(self) -> Engine:
        """The model engine; every call is recorded when it happens inside a run."""
        with self._lock:
            if self._engine is None:
                self._own_engine = open_engine(self.settings, self._progress)
                self._engine = TracedEngine(self._own_engine, self._tracer)
            return self._engine

    @property
    def embedder(self) -> Embedder:
        with self._lock:
            if self._embedder is None:
                self._embedder = open_embedder(self.settings, self._progress)
            return self._embedder

    @property
    def index(self) -> Index:
        """The document index, for reading and writing."""
        with self._lock:
            if self._index is None:
                self._index = self._own_index = open_index(self.settings, lambda: self.embedder)
            return self._index

    @property
    def chat_model(self) -> BaseChatModel:
        """The engine as a LangChain chat model, for graphs that know LangChain only."""
        from agentops.engine.chat import EngineChatModel

        return EngineChatModel(engine=self.engine)

    # -- verbs

    def ingest(self, *paths: Path | str, collection: str | None = None) -> IngestReport:
        """Makes a collection hold the text of files and folders; what did not change is not embedded again.

        Raises:
            RetrievalError
        """
        from agentops.retrieval.ingest import ingest

        wanted = self.settings.retrieval
        return ingest(
            paths,
            self.index,
            collection or wanted.collection,
            chunk_tokens=wanted.chunk_tokens,
            overlap_tokens=wanted.overlap_tokens,
            count_tokens=self.embedder.count_tokens,
        )

    async def arun(
        self,
        graph: Any,
        input: Any,
        *,
        thread: str | None = None,
        collection: str | None = None,
    ) -> RunResult:
        """Runs a graph to its end or to its next question to a person.

        `graph` is a name, `file.py:attribute`, or a LangGraph graph object. `input` is what the graph takes; a string is
        put where the graph expects text. `thread` goes on with a conversation; without it a new one begins.

        Raises:
            NodeFailed: a node raised; the cause is chained. An `AgentOpsError` out of a node is raised as it is.
            ThreadBusy, GraphError, UsageError
        """
        return await self._finish(self._start(self._load(graph), input, thread, collection))

    async def astream(
        self,
        graph: Any,
        input: Any,
        *,
        thread: str | None = None,
        collection: str | None = None,
    ) -> AsyncIterator[RunEvent]:
        """Like `arun`, but yields what happens while it happens. Leaving the iterator early cancels the run."""
        async with contextlib.aclosing(self._start(self._load(graph), input, thread, collection)) as events:
            async for event in events:
                yield event

    async def aresume(self, run_id: str, *, answer: Any = None, graph: Any = None) -> RunResult:
        """Goes on with a run that crashed, failed, was cancelled or waits, from its last checkpoint.

        `answer` is given to the interrupt of a waiting run. `graph` is needed where the run was of a graph object.

        Raises:
            RunNotFound, UsageError: it is done, or waits for an answer that was not given.  ThreadBusy: it still runs.
        """
        return await self._finish(self._again(run_id, answer, graph))

    async def astream_resume(self, run_id: str, *, answer: Any = None, graph: Any = None) -> AsyncIterator[RunEvent]:
        """Like `aresume`, but yields what happens while it happens."""
        async with contextlib.aclosing(self._again(run_id, answer, graph)) as events:
            async for event in events:
                yield event

    def run(
        self,
        graph: Any,
        input: Any,
        *,
        thread: str | None = None,
        collection: str | None = None,
    ) -> RunResult:
        """`arun` for callers without an event loop."""
        return run_sync(self.arun(graph, input, thread=thread, collection=collection))

    def stream(
        self,
        graph: Any,
        input: Any,
        *,
        thread: str | None = None,
        collection: str | None = None,
    ) -> Iterator[RunEvent]:
        """`astream` for callers without an event loop."""
        return iterate_sync(self.astream(graph, input, thread=thread, collection=collection))

    def resume(self, run_id: str, *, answer: Any = None, graph: Any = None) -> RunResult:
        """`aresume` for callers without an event loop."""
        return run_sync(self.aresume(run_id, answer=answer, graph=graph))

    def stream_resume(self, run_id: str, *, answer: Any = None, graph: Any = None) -> Iterator[RunEvent]:
        """`astream_resume` for callers without an event loop."""
        return iterate_sync(self.astream_resume(run_id, answer=answer, graph=graph))

    async def aclose(self) -> None:
        """Closes what the runtime opened, the record last. Closing twice is harmless."""
        with self._lock:
            closed, self._closed = self._closed, True
        if closed:
            return
        if self._own_engine is not None:
            await self._own_engine.close()
        if self._own_index is not None:
            self._own_index.close()
        await asyncio.to_thread(self._tracer.close)

    def close(self) -> None:
        run_sync(self.aclose())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    # -- one run

    def _load(self, graph: Any) -> LoadedGraph:
        if isinstance(graph, LoadedGraph):
            return graph
        return load_graph(graph) if isinstance(graph, str) else adopt_graph(graph)

    def _start(
        self, graph: LoadedGraph, input: Any, thread: str | None, collection: str | None
    ) -> AsyncGenerator[RunEvent, None]:
        if isinstance(input, str):
            size, limit = len(input.encode(errors="replace")), self.settings.engine.input_bytes
            if size > limit:
                raise InputTooLarge(
                    f"the input has {size:,} bytes, the limit is {limit:,}",
                    hint="put long texts into a collection (agentops ingest), or raise engine.input_bytes",
                )
            input = graph.as_input(input)  # noqa: A001
        thread_id = check_thread_id(thread) if thread else self._ids.new("th")
        details = {"collection": collection or self.settings.retrieval.collection}
        return self._go(graph, input, self._ids.new("run"), thread_id, details, resumed=False)

    async def _again(self, run_id: str, answer: Any, graph: Any) -> AsyncGenerator[RunEvent, None]:
        row = await asyncio.to_thread(self._find, run_id)
        if row.status == "done":
            raise UsageError(f"run {row.id} is done; there is nothing to resume", hint=f"see it with: agentops show {row.id}")
        if row.status in ("running", "queued"):
            raise ThreadBusy(f"run {row.id} is still running", hint="stop it first, or wait for its end")
        if row.status == "waiting" and answer is None:
            raise UsageError(f"run {row.id} waits for an answer", hint="give one with --answer")
        if graph is None and row.graph.startswith("python:"):
            raise UsageError(
                f"run {row.id} is of a graph object made in Python", hint="resume it there: runtime.resume(run, graph=graph)"
            )
        loaded = self._load(graph if graph is not None else row.graph)
        given = await asyncio.to_thread(self._payload, row)
        if row.status == "waiting":
            from langgraph.types import Command

            given = Command(resume=answer)
        async with contextlib.aclosing(
            self._go(loaded, given, row.id, row.thread_id, dict(row.settings), resumed=True)
        ) as events:
            async for event in events:
                yield event

    def _find(self, run_id: str) -> RunRow:
        self._tracer.flush()
        catch_up(self.settings)
        with open_store(self.settings) as store:
            return store.run(run_id)

    def _payload(self, row: RunRow) -> Any:
        with open_store(self.settings) as store:
            return store.payload(row.input_hash) if row.input_hash else None

    async def _finish(self, events: AsyncGenerator[RunEvent, None]) -> RunResult:
        result: RunResult | None = None
        async with contextlib.aclosing(events):
            async for event in events:
                if isinstance(event, RunResult):
                    result = event
        if result is None:
            raise RuntimeError("a run ended without a result")
        return result

    async def _go(
        self,
        graph: LoadedGraph,
        input: Any,
        run_id: str,
        thread_id: str,
        details: dict[str, Any],
        *,
        resumed: bool,
    ) -> AsyncGenerator[RunEvent, None]:
        with lease(self.settings, thread_id):
            context = await asyncio.to_thread(self._context, graph, details) if graph.uses_context else None
            trace = self._tracer.start_run(
                run_id=run_id, thread_id=thread_id, graph=graph.reference, input=input, settings=details, resumed=resumed
            )
            loop = asyncio.get_running_loop()
            queue: asyncio.Queue[RunEvent | None] = asyncio.Queue()
            trace.listen(lambda event: _hand_over(loop, queue, event))
            work = asyncio.create_task(self._work(graph, input, trace, thread_id, context, resumed=resumed))
            work.add_done_callback(lambda _: queue.put_nowait(None))
            try:
                yield RunStarted(run_id, thread_id)
                while (event := await queue.get()) is not None:
                    yield event
                result, cause = await work
            except (asyncio.CancelledError, GeneratorExit):
                work.cancel()
                await asyncio.wait([work])
                raise
            yield result
            if cause is not None:
                raise cause

    async def _work(
        self,
        graph: LoadedGraph,
        input: Any,
        trace: RunTrace,
        thread_id: str,
        context: Context | None,
        *,
        resumed: bool,
    ) -> tuple[RunResult, Exception | None]:
        started = self._clock.monotonic_ns()

        def ended(
            status: RunStatus, output: Any, error: BaseException | None = None, interrupts: tuple[Any, ...] = ()
        ) -> RunResult:
            trace.end(status, output=output, error=error)
            took = (self._clock.monotonic_ns() - started) / 1e6
            said = f"{type(error).__name__}: {error}" if error is not None else None
            return RunResult(trace.run_id, thread_id, status, output, trace.usage, took, said, interrupts)

        try:
            output = await self._invoke(graph, input, trace, thread_id, context, resumed=resumed)
        except asyncio.CancelledError as error:
            ended("cancelled", None, error)
            raise
        except AgentOpsError as error:
            return ended("failed", None, error), error
        except sqlite3.OperationalError as error:
            refused = _unwritable(error, trace.run_id)
            refused.__cause__ = error
            return ended("failed", None, refused), refused
        except Exception as error:
            node = _failed_node(error)
            failed = NodeFailed(f"{node or graph.name}: {type(error).__name__}: {error}", run_id=trace.run_id, node=node)
            if type(error).__name__ == "GraphRecursionError":
                failed.hint = (
                    f"the graph took {self.settings.run.recursion_limit} supersteps; raise run.recursion_limit or mend the loop"
                )
            failed.__cause__ = error
            return ended("failed", None, error), failed
        pending = output.get("__interrupt__") if isinstance(output, dict) else None
        if pending:
            visible = {key: value for key, value in output.items() if key != "__interrupt__"}
            return ended("waiting", visible, interrupts=tuple(pending)), None
        return ended("done", output), None

    async def _invoke(
        self,
        graph: LoadedGraph,
        input: Any,
        trace: RunTrace,
        thread_id: str,
        context: Context | None,
        *,
        resumed: bool,
    ) -> Any:
        config: dict[str, Any] = {
            "configurable": {"thread_id": thread_id},
            "callbacks": [trace.handler],
            "metadata": {"run_id": trace.run_id},
            "recursion_limit": self.settings.run.recursion_limit,
        }
        from langgraph.types import Command

        async with contextlib.AsyncExitStack() as opened:
            compiled = graph.compiled
            if not compiled.checkpointer:
                saver = await opened.enter_async_context(open_checkpointer(self.settings, thread_id, graph.state_types))
                compiled = compiled.copy({"checkpointer": saver})
            if resumed:
                # Where a checkpoint of this run exists, its state is the input: what is on record of the input is text.
                # A task whose writes were saved before its step ended is not in `next` but in `tasks`: it goes on too.
                state = await compiled.aget_state(cast(Any, config))
                mine = (state.metadata or {}).get("run_id") == trace.run_id
                if mine and not state.tasks:
                    return state.values
                if mine and not isinstance(input, Command):
                    input = None  # noqa: A001
            output = await compiled.ainvoke(input, cast(Any, config), context=cast(Any, context), durability="sync")
            trace.check()
            return output

    def _context(self, graph: LoadedGraph, details: dict[str, Any]) -> Context:
        return Context(
            engine=self.engine,
            retriever=TracedRetriever(self.index, self._tracer),
            embedder=self.embedder,
            prompts=graph.prompts,
            collection=str(details["collection"]),
            k=self.settings.retrieval.k,
            seed=self.settings.run.seed,
            trim=self.settings.run.trim,
        )


def _hand_over(loop: asyncio.AbstractEventLoop, queue: asyncio.Queue[RunEvent | None], event: RunEvent) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is gone, and with it whoever listened
        loop.call_soon_threadsafe(queue.put_nowait, event)


def _unwritable(error: sqlite3.OperationalError, run_id: str) -> RecordError:
    """A checkpoint that could not be written: the run ended at the superstep before it."""
    full = "full" in str(error) or "disk I/O" in str(error)
    kind, said = (JournalFull, "the disk is full") if full else (RecordError, str(error))
    return kind(f"no checkpoint could be written: {said}", hint=f"make room, then go on with: agentops resume {run_id}")


def _failed_node(error: BaseException) -> str | None:
    """LangGraph tells where an error came from in a note: "During task with name 'write' and id '...'"."""
    for note in getattr(error, "__notes__", ()):
        if found := re.match(r"During task with name '([^']+)'", note):
            return found[1]
    return None
