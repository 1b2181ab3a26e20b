"""The runtime: the only place that builds and wires everything, and the verbs on runs.

A run is one invocation of a graph on a thread. It is on record before it starts, holds the lease of its thread while it
works, writes a checkpoint after every superstep before going on, and ends with a status. What the runtime opens (model,
index, record) it opens when it is first needed and closes in `close`.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, cast

from langgraph.runtime import RunControl

from agentops import cancelling
from agentops.checkpoint import check_thread_id, lease
from agentops.clock import Clock, Ids, SystemClock, UlidSource
from agentops.engine import Engine
from agentops.errors import InputTooLarge, RetrieverUnavailable, RunCancelled, RunNotFound, UsageError
from agentops.execution import Outcome, Standing, execute, standing
from agentops.graph import Context, LoadedGraph, adopt_graph, load_graph
from agentops.history import Origin, Snapshot, history, origin, plant
from agentops.history import chosen as chosen_snapshot
from agentops.parts import open_embedder, open_engine, open_index
from agentops.people import Answers
from agentops.prices import load_prices
from agentops.prompts import read_prompts
from agentops.records import Budget, Labels, RunEvent, RunResult, RunStarted
from agentops.resumption import as_recorded, check_run_id, check_same, passed, result_of, resumable, taken_up
from agentops.retrieval import Embedder, Index, LenientRetriever, collection_not_found
from agentops.run_settings import budget_of, check_tools, chosen, sound
from agentops.settings import Settings, load_settings
from agentops.store import RunRow, open_store
from agentops.sync import iterate_sync, run_sync
from agentops.tracer import (
    Effects,
    Meter,
    NotedClock,
    RunTrace,
    TracedEmbedder,
    TracedEngine,
    TracedRetriever,
    catch_up,
    open_tracer,
)

if TYPE_CHECKING:
    from langchain_core.language_models import BaseChatModel

    from agentops.engine.fetch import Progress
    from agentops.retrieval.ingest import IngestReport


_PATIENCE_S = 10.0
"""How long closing waits for cancelled runs to be on record as such."""


class Runtime:
    """Runs graphs and keeps the record. Safe to use from several threads and event loops.

    Every verb has an asynchronous form (`arun`, `astream`, `aresume`) and a synchronous one (`run`, `stream`, `resume`).
    Parts given to the constructor (`engine`, `index`, `embedder`) are the caller's to close. `progress` is told how far the
    preparing of a model is. `effects` are what nodes get from outside otherwise: those that happen, where none are given.
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
        effects: Effects | None = None,
    ) -> None:
        self.settings = settings or load_settings()
        self._clock = clock or SystemClock()
        self._ids = ids or UlidSource(self._clock)
        self._progress = progress
        self._effects = effects or Effects()
        self._tracer = open_tracer(self.settings, clock=self._clock, ids=self._ids)
        self._lock = threading.RLock()
        self._own_engine: Engine | None = None
        self._own_index: Index | None = None
        self._engine = TracedEngine(engine) if engine else None
        self._index = index
        self._embedder = embedder
        self._working: dict[asyncio.Task[Outcome], RunControl] = {}
        self._draining = False
        self._closed = threading.Event()

    # -- parts, opened when first needed

    @property
    def engine(self) -> Engine:
        """The model engine; every call is recorded when it happens inside a run."""
        return self._open_engine(self.settings.model.name)

    def _open_engine(self, model: str) -> Engine:
        with self._lock:
            if self._engine is None:
                settings = replace(self.settings, model=replace(self.settings.model, name=model))
                self._own_engine = open_engine(settings, self._progress)
                self._engine = TracedEngine(self._own_engine)
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
        return self._open_index(self.settings.retrieval.retriever)

    def _open_index(self, retriever: Literal["embedded", "elasticsearch"]) -> Index:
        with self._lock:
            if self._index is None:
                settings = replace(self.settings, retrieval=replace(self.settings.retrieval, retriever=retriever))
                self._index = self._own_index = open_index(settings, lambda: self.embedder)
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
        budget: Budget | None = None,
        run_id: str | None = None,
        labels: Labels | None = None,
    ) -> RunResult:
        """Runs a graph to its end or to its next question to a person.

        `graph` is a name, `file.py:attribute`, or a LangGraph graph object. `input` is what the graph takes; a string is
        put where the graph expects text. `thread` goes on with a conversation; without it a new one begins. `budget` is what
        the run may cost, the settings say otherwise. `run_id` names the run: one that is on record already goes on instead of
        beginning again, and where it is done or waits its recorded result is told. `labels` are kept with it.

        Raises:
            NodeFailed: a node raised; the cause is chained. An `AgentOpsError` out of a node is raised as it is.
            BudgetSpent: it needed more; what was reached is on record, and it can be resumed.
            RunCancelled: it was, or the runtime was closed meanwhile.
            RunDrained: the runtime was, and the run stopped at a step boundary; it can be resumed.
            ThreadBusy, GraphError, UsageError
        """
        return await self._finish(self._start(self._load(graph), input, thread, collection, budget, run_id, labels))

    async def astream(
        self,
        graph: Any,
        input: Any,
        *,
        thread: str | None = None,
        collection: str | None = None,
        budget: Budget | None = None,
        run_id: str | None = None,
        labels: Labels | None = None,
    ) -> AsyncIterator[RunEvent]:
        """Like `arun`, but yields what happens while it happens. Leaving the iterator early cancels the run."""
        async with contextlib.aclosing(
            self._start(self._load(graph), input, thread, collection, budget, run_id, labels)
        ) as events:
            async for event in events:
                yield event

    async def aresume(
        self,
        run_id: str,
        *,
        answer: Any = None,
        answers: Mapping[str, Any] | None = None,
        graph: Any = None,
        budget: Budget | None = None,
    ) -> RunResult:
        """Goes on with a run that crashed, failed, was cancelled or drained, or waits, from its last checkpoint.

        `answer` is for the one interrupt of a waiting run, `answers` for several by their ids (or unique beginnings of them);
        those that are not answered go on waiting. An approval is answered with a `Decision`. `graph` is needed where the run
        was of a graph object.

        Raises:
            AnswerUnfit: an answer is not what was asked for, or nothing of that id waits; the run still waits.
            RunNotFound, UsageError: it is done, or waits for an answer that was not given.  ThreadBusy: it still runs.
        """
        return await self._finish(self._again(run_id, Answers(answer, answers), graph, budget))

    async def astream_resume(
        self,
        run_id: str,
        *,
        answer: Any = None,
        answers: Mapping[str, Any] | None = None,
        graph: Any = None,
        budget: Budget | None = None,
    ) -> AsyncIterator[RunEvent]:
        """Like `aresume`, but yields what happens while it happens."""
        async with contextlib.aclosing(self._again(run_id, Answers(answer, answers), graph, budget)) as events:
            async for event in events:
                yield event

    def run(
        self,
        graph: Any,
        input: Any,
        *,
        thread: str | None = None,
        collection: str | None = None,
        budget: Budget | None = None,
        run_id: str | None = None,
        labels: Labels | None = None,
    ) -> RunResult:
        """`arun` for callers without an event loop."""
        return run_sync(
            self.arun(graph, input, thread=thread, collection=collection, budget=budget, run_id=run_id, labels=labels)
        )

    def stream(self, graph: Any, input: Any, **how: Any) -> Generator[RunEvent, None, None]:
        """`astream` for callers without an event loop; it takes the same."""
        return iterate_sync(self.astream(graph, input, **how))

    def resume(
        self,
        run_id: str,
        *,
        answer: Any = None,
        answers: Mapping[str, Any] | None = None,
        graph: Any = None,
        budget: Budget | None = None,
    ) -> RunResult:
        """`aresume` for callers without an event loop."""
        return run_sync(self.aresume(run_id, answer=answer, answers=answers, graph=graph, budget=budget))

    def stream_resume(self, run_id: str, **how: Any) -> Generator[RunEvent, None, None]:
        """`astream_resume` for callers without an event loop; it takes the same."""
        return iterate_sync(self.astream_resume(run_id, **how))

    async def afork(
        self,
        run_id: str,
        *,
        at: str | None = None,
        step: int | None = None,
        changes: Mapping[str, Any] | None = None,
        prompts: Path | None = None,
        graph: Any = None,
        budget: Budget | None = None,
    ) -> RunResult:
        """A new run, on a new thread, that begins from a copy of a checkpoint of another run; models are called.

        `at` is a checkpoint's id (see `history`), of a subgraph too; `step` a step of the graph itself; without them it is the
        last one that has something after it. `changes` are new values of fields of the state there, in place of what their
        reducers had made. `prompts` is a folder whose prompts replace the graph's of their names, `graph` the code to go on with.

        Raises:
            UsageError: there is no such checkpoint, nothing comes after it, or a field is none of the graph's.
            ThreadBusy: the thread is in use.  PromptError.  Else as `arun`.
        """
        return await self._finish(self._fork(run_id, at, step, changes, prompts, graph, budget))

    async def astream_fork(
        self,
        run_id: str,
        *,
        at: str | None = None,
        step: int | None = None,
        changes: Mapping[str, Any] | None = None,
        prompts: Path | None = None,
        graph: Any = None,
        budget: Budget | None = None,
    ) -> AsyncIterator[RunEvent]:
        """Like `afork`, but yields what happens while it happens."""
        async with contextlib.aclosing(self._fork(run_id, at, step, changes, prompts, graph, budget)) as events:
            async for event in events:
                yield event

    async def ahistory(self, run_id: str | None = None, *, thread: str | None = None, graph: Any = None) -> list[Snapshot]:
        """The checkpoints that a run wrote, or all of a thread, those of its subgraphs too, oldest first.

        Raises:
            RunNotFound, RecordError: there is none.  ThreadBusy: the thread is in use.
        """
        return (await self._thread(run_id, thread, graph))[1]

    async def astate(
        self,
        run_id: str | None = None,
        *,
        thread: str | None = None,
        at: str | None = None,
        step: int | None = None,
        graph: Any = None,
    ) -> Snapshot:
        """One checkpoint of a run or a thread, with its values: the newest of the graph itself, or `at` an id, or after a `step`.

        Raises:
            UsageError: there is none.  Else as `ahistory`.
        """
        name, found = await self._thread(run_id, thread, graph)
        return chosen_snapshot(found, at=at, step=step, where=name)

    def fork(self, run_id: str, **how: Any) -> RunResult:
        """`afork` for callers without an event loop; it takes the same."""
        return run_sync(self.afork(run_id, **how))

    def stream_fork(self, run_id: str, **how: Any) -> Generator[RunEvent, None, None]:
        """`astream_fork` for callers without an event loop; it takes the same."""
        return iterate_sync(self.astream_fork(run_id, **how))

    def history(self, run_id: str | None = None, *, thread: str | None = None, graph: Any = None) -> list[Snapshot]:
        """`ahistory` for callers without an event loop."""
        return run_sync(self.ahistory(run_id, thread=thread, graph=graph))

    def state(self, run_id: str | None = None, **which: Any) -> Snapshot:
        """`astate` for callers without an event loop; it takes the same."""
        return run_sync(self.astate(run_id, **which))

    def cancel(self, run_id: str) -> str:
        """Asks a run at work to stop, in whatever process of this machine it is; returns its id at once. It stops within a token
        and is on record as cancelled; it can be resumed.

        Raises:
            RunNotFound: no run of that name is at work, or more than one.
        """
        return cancelling.cancel(self.settings, run_id)

    def drain(self) -> bool:
        """Asks every run of this runtime, and those that it is still given, to stop at their next step boundary; they are
        `queued` then and go on when they are resumed. Returns whether any is at work. May be called from a signal's handler.
        """
        self._draining = True
        for control in list(self._working.values()):
            control.request_drain()
        return bool(self._working)

    async def aclose(self) -> None:
        """Cancels what still runs and closes what the runtime opened, the record last. Closing twice is harmless."""
        if self._closed.is_set():
            return
        self._closed.set()
        deadline = self._clock.monotonic_ns() + int(_PATIENCE_S * 1e9)
        for work in list(self._working):
            with contextlib.suppress(RuntimeError):  # its loop is gone, and it with the loop
                work.get_loop().call_soon_threadsafe(work.cancel)
        while self._working and self._clock.monotonic_ns() < deadline:
            await asyncio.sleep(0.01)
        # While another thread prepares a model, which takes minutes, there is nothing to close yet.
        if self._lock.acquire(blocking=False):
            try:
                if self._own_engine is not None:
                    await self._own_engine.close()
                if self._own_index is not None:
                    self._own_index.close()
            finally:
                self._lock.release()
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
        self,
        graph: LoadedGraph,
        input: Any,
        thread: str | None,
        collection: str | None,
        budget: Budget | None,
        run_id: str | None,
        labels: Labels | None,
    ) -> AsyncGenerator[RunEvent, None]:
        if isinstance(input, str):
            if not input.strip():
                raise UsageError("the input is empty", hint="ask something: agentops run rag 'a question'")
            size, limit = len(input.encode(errors="replace")), self.settings.engine.input_bytes
            if size > limit:
                raise InputTooLarge(
                    f"the input has {size:,} bytes, the limit is {limit:,}",
                    hint="put long texts into a collection (agentops ingest), or raise engine.input_bytes",
                )
            input = graph.as_input(input)  # noqa: A001
        if self.settings.tools.mcp is not None and self.settings.source("tools.mcp").startswith("--") and not graph.uses_context:
            raise UsageError(
                f"graph '{graph.name}' takes no tools of servers",
                hint="build it with context_schema=agentops.Context, or drop --mcp",
            )
        if run_id is not None:
            check_run_id(run_id)
            thread = thread or f"th_{run_id.removeprefix('run_')}"  # the same whenever it is delivered
        thread_id = check_thread_id(thread) if thread else self._ids.new("th")
        details = chosen(self.settings, {}, {"retrieval.collection": collection, "labels": labels})
        check_tools(self.settings, graph, details)
        if run_id is not None:
            return self._deliver(graph, input, run_id, thread_id, details, budget, collection)
        return self._go(graph, input, self._ids.new("run"), thread_id, details, budget, collection)

    async def _deliver(
        self,
        graph: LoadedGraph,
        input: Any,
        run_id: str,
        thread_id: str,
        details: dict[str, Any],
        budget: Budget | None,
        collection: str | None,
    ) -> AsyncGenerator[RunEvent, None]:
        """A run that its caller has named, for the first time or again."""
        row = await asyncio.to_thread(self._recorded, run_id)
        if row is None:
            events = self._go(graph, input, run_id, thread_id, details, budget, collection, delivered=True)
        else:
            check_same(row, graph, thread_id, input, self.settings)
            if row.status in ("done", "waiting"):
                yield RunStarted(row.id, row.thread_id)
                yield await asyncio.to_thread(result_of, row, self.settings)
                return
            events = self._again(row.id, Answers(), graph, budget)
        async with contextlib.aclosing(events):
            async for event in events:
                yield event

    def _recorded(self, run_id: str) -> RunRow | None:
        try:
            row = self._find(run_id)
        except RunNotFound:
            return None
        return row if row.id == run_id else None

    def _check_collection(self, collection: str) -> None:
        """Says that a collection is not there before a model is loaded for nothing."""
        try:
            known = [one.name for one in self.index.collections()]
        except RetrieverUnavailable:
            if self.settings.retrieval.on_error == "empty":
                return
            raise
        if collection not in known:
            raise collection_not_found(collection, known)

    async def _again(self, run_id: str, answers: Answers, graph: Any, budget: Budget | None) -> AsyncGenerator[RunEvent, None]:
        row = resumable(await asyncio.to_thread(self._find, run_id))
        loaded = as_recorded(self._graph_of(row, graph), row, self.settings)
        details = chosen(self.settings, row.settings, {})
        check_tools(self.settings, loaded, details)
        async with contextlib.aclosing(self._go(loaded, answers, row.id, row.thread_id, details, budget)) as events:
            async for event in events:
                yield event

    async def _fork(
        self,
        run_id: str,
        at: str | None,
        step: int | None,
        changes: Mapping[str, Any] | None,
        prompts: Path | None,
        graph: Any,
        budget: Budget | None,
    ) -> AsyncGenerator[RunEvent, None]:
        row = await asyncio.to_thread(self._find, run_id)
        loaded = as_recorded(self._graph_of(row, graph), row, self.settings)
        if prompts is not None:
            loaded = replace(loaded, prompts=loaded.prompts.replaced(read_prompts(prompts)))
        with lease(self.settings, row.thread_id):
            begin = await origin(loaded, self.settings, row.thread_id, row.id, at=at, step=step, changes=changes)
        details = chosen(self.settings, row.settings, {})
        check_tools(self.settings, loaded, details)
        new = self._ids.new("run"), self._ids.new("th")
        async with contextlib.aclosing(self._go(loaded, begin, *new, details, budget)) as events:
            async for event in events:
                yield event

    async def _thread(self, run_id: str | None, thread: str | None, graph: Any) -> tuple[str, list[Snapshot]]:
        """What a run or a thread is called, and its checkpoints."""
        if (run_id is None) == (thread is None):
            raise UsageError("give a run or a thread", hint="agentops history RUN, or agentops history --thread THREAD")
        row = await asyncio.to_thread(self._find, run_id) if run_id else await asyncio.to_thread(self._newest, str(thread))
        loaded = self._graph_of(row, graph)
        with lease(self.settings, row.thread_id):
            found = await history(loaded, self.settings, row.thread_id)
        if run_id is None:
            return f"thread {thread}", found
        return f"run {row.id}", [one for one in found if one.run_id == row.id]

    def _newest(self, thread: str) -> RunRow:
        catch_up(self.settings)
        with open_store(self.settings) as store:
            store.thread(thread)
            return store.runs(thread=thread, limit=1)[0]

    def _graph_of(self, row: RunRow, graph: Any) -> LoadedGraph:
        if graph is not None:
            return self._load(graph)
        if row.graph.startswith("python:"):
            raise UsageError(f"run {row.id} is of a graph object made in Python", hint="do it there, and give the graph=")
        return load_graph(row.graph, recorded=True)

    def _find(self, run_id: str) -> RunRow:
        self._tracer.flush()
        catch_up(self.settings)
        with open_store(self.settings) as store:
            return store.run(run_id)

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
        budget: Budget | None,
        collection: str | None = None,
        *,
        delivered: bool = False,
    ) -> AsyncGenerator[RunEvent, None]:
        budget = sound(budget or budget_of(self.settings))
        if collection is not None and graph.uses_context:
            await asyncio.to_thread(self._check_collection, collection)
        resumed = isinstance(input, Answers)
        with lease(self.settings, thread_id):
            at: Standing = "unborn"
            told, about = input, {}
            if isinstance(input, Answers):
                # Only under the lease is it sure how the run ended.
                row = resumable(await asyncio.to_thread(self._find, run_id))
                input, told, at = await taken_up(graph, self.settings, row, input)  # noqa: A001
            elif isinstance(input, Origin):
                await plant(input, graph, self.settings, run_id, thread_id)
                about, told, at = input.told, {**input.told, "changes": dict(input.changes)}, "open"
            elif delivered:
                # Another process may have begun it since the record was asked, or could not put that into the store.
                resumed = (at := await standing(graph, self.settings, run_id, thread_id)) != "unborn"
                if at == "passed":
                    raise passed(run_id, thread_id)
            context = await asyncio.to_thread(self._context, graph, details) if graph.uses_context else None
            meter = Meter(budget, self._clock, load_prices(self.settings))
            trace = self._tracer.start_run(
                run_id=run_id,
                thread_id=thread_id,
                graph=graph.reference,
                input=told,
                settings=details,
                resumed=resumed,
                tags=tuple(details.get("labels", {}).get("tags", ())),
                meter=meter,
                effects=self._effects,
            )
            trace.annotate(settings=details, **about)
            if context is not None:
                context = _within(context, trace)
            loop = asyncio.get_running_loop()
            queue: asyncio.Queue[RunEvent | None] = asyncio.Queue()
            trace.listen(lambda event: _hand_over(loop, queue, event))
            control = RunControl()
            work = asyncio.create_task(
                execute(
                    graph,
                    input,
                    trace,
                    settings=self.settings,
                    clock=self._clock,
                    context=context,
                    at=at,
                    meter=meter,
                    control=control,
                )
            )
            self._working[work] = control
            work.add_done_callback(lambda over: self._working.pop(over, None))
            work.add_done_callback(lambda _: queue.put_nowait(None))
            if self._draining:
                control.request_drain()
            with cancelling.cancellable(self.settings, run_id, work.cancel):
                try:
                    yield RunStarted(run_id, thread_id)
                    while (event := await queue.get()) is not None:
                        yield event
                    if work.cancelled():
                        raise RunCancelled(f"run {run_id} was cancelled", run_id=run_id)
                    result, cause = await work
                except (asyncio.CancelledError, GeneratorExit):
                    work.cancel()
                    await asyncio.wait([work])
                    raise
            yield result
            if cause is not None:
                raise cause

    def _context(self, graph: LoadedGraph, details: dict[str, Any]) -> Context:
        index = self._open_index(details["retrieval.retriever"])
        searched = LenientRetriever(index) if self.settings.retrieval.on_error == "empty" else index
        return Context(
            engine=self._open_engine(details["model.name"]),
            retriever=TracedRetriever(searched),
            embedder=TracedEmbedder(self.embedder),
            prompts=graph.prompts,
            collection=details["retrieval.collection"],
            k=details["retrieval.k"],
            seed=details["run.seed"],
            trim=details["run.trim"],
            files=self.settings.files,
            tool_settings=replace(
                self.settings.tools,
                allow=tuple(details["tools.allow"]),
                ask=tuple(details["tools.ask"]),
                deny=tuple(details["tools.deny"]),
                mcp=Path(details["tools.mcp"]) if details["tools.mcp"] else None,
            ),
            clock=NotedClock(self._clock, self._effects),
            effects=self._effects,
        )


def _within(context: Context, trace: RunTrace) -> Context:
    """The context with what it records, in whatever thread it is called, belonging to the run."""
    engine, retriever, embedder = cast(TracedEngine, context.engine), cast(TracedRetriever, context.retriever), context.embedder
    return replace(
        context,
        engine=engine.within(trace),
        retriever=retriever.within(trace),
        embedder=cast(TracedEmbedder, embedder).within(trace),
    )


def _hand_over(loop: asyncio.AbstractEventLoop, queue: asyncio.Queue[RunEvent | None], event: RunEvent) -> None:
    with contextlib.suppress(RuntimeError):  # no loop runs here
        if asyncio.get_running_loop() is loop:
            queue.put_nowait(event)  # waking the loop from outside costs a system call
            return
    with contextlib.suppress(RuntimeError):  # the loop is gone, and with it whoever listened
        loop.call_soon_threadsafe(queue.put_nowait, event)
