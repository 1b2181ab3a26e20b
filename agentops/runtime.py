"""The runtime: the only place that builds and wires everything, and the verbs on runs in both their forms.

A run is one invocation of a graph on a thread. It is on record before it starts, holds the lease of its thread while it
works, writes a checkpoint after every superstep before going on, and ends with a status (see `runs`). What the runtime opens
(model, index, record) it opens when it is first needed and closes in `close`.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from agentops import cancelling
from agentops.clock import Clock, Ids, SystemClock, UlidSource
from agentops.engine import Engine
from agentops.errors import RetrieverUnavailable, RunNotFound
from agentops.graph import Context, LoadedGraph
from agentops.history import Snapshot
from agentops.history import chosen as chosen_snapshot
from agentops.parts import open_embedder, open_engine, open_index
from agentops.people import Answers
from agentops.records import Budget, Labels, RunEvent, RunResult
from agentops.retrieval import Embedder, Index, LenientRetriever, collection_not_found
from agentops.runs import Runs
from agentops.settings import Settings, load_settings
from agentops.sync import iterate_sync, run_sync
from agentops.tracer import Effects, NotedClock, TracedEmbedder, TracedEngine, TracedRetriever, open_tracer

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
        self._runs = Runs(
            self.settings,
            tracer=self._tracer,
            clock=self._clock,
            ids=self._ids,
            effects=self._effects,
            context=lambda graph, details: self._context(graph, details),
            check_collection=self._check_collection,
        )
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
        return await self._finish(self._runs.start(graph, input, thread, collection, budget, run_id, labels))

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
        async with contextlib.aclosing(self._runs.start(graph, input, thread, collection, budget, run_id, labels)) as events:
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
        return await self._finish(self._runs.resume(run_id, Answers(answer, answers), graph, budget))

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
        async with contextlib.aclosing(self._runs.resume(run_id, Answers(answer, answers), graph, budget)) as events:
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
        return await self._finish(self._runs.fork(run_id, at, step, changes, prompts, graph, budget))

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
        async with contextlib.aclosing(self._runs.fork(run_id, at, step, changes, prompts, graph, budget)) as events:
            async for event in events:
                yield event

    async def ahistory(self, run_id: str | None = None, *, thread: str | None = None, graph: Any = None) -> list[Snapshot]:
        """The checkpoints that a run wrote, or all of a thread, those of its subgraphs too, oldest first.

        Raises:
            RunNotFound, RecordError: there is none.  ThreadBusy: the thread is in use.
        """
        return (await self._runs.snapshots(run_id, thread, graph))[1]

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
        name, found = await self._runs.snapshots(run_id, thread, graph)
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

    async def acancel(self, run_id: str) -> str:
        """Stops a run, in whatever process of this machine it is, and returns its id at once. One at work is asked to stop, and
        does within a token; one in line for a place leaves the line; one that waits for an answer, or was drained, ends here and
        now. It is on record as cancelled and can be resumed; it takes no answer before that, and asks anew.

        Raises:
            RunNotFound: no run of that name is at work or waits, or more than one.
            ThreadBusy: it is being taken up in this moment.
        """
        return await self._runs.cancel(run_id)

    def cancel(self, run_id: str) -> str:
        """`acancel` for callers without an event loop; one at work may be cancelled from anywhere."""
        try:
            return cancelling.cancel(self.settings, run_id)
        except RunNotFound:
            return run_sync(self.acancel(run_id))

    def drain(self) -> bool:
        """Asks every run of this runtime, and those that it is still given, to stop at their next step boundary; they are
        `queued` then and go on when they are resumed. Returns whether any is at work. May be called from a signal's handler.
        """
        return self._runs.drain()

    async def aclose(self) -> None:
        """Cancels what still runs and closes what the runtime opened, the record last. Closing twice is harmless."""
        if self._closed.is_set():
            return
        self._closed.set()
        await self._runs.stop(_PATIENCE_S)
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

    # -- what runs need of it

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

    async def _finish(self, events: AsyncGenerator[RunEvent, None]) -> RunResult:
        result: RunResult | None = None
        async with contextlib.aclosing(events):
            async for event in events:
                if isinstance(event, RunResult):
                    result = event
        if result is None:
            raise RuntimeError("a run ended without a result")
        return result

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
