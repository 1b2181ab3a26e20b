"""Runs at work in this process: begun, delivered again, taken up or forked, each under its thread's lease, to its end.

A run is on record before it starts, and what happens in it is handed over while it happens. What its nodes are given (engine,
index, prompts) comes from the caller; nothing here opens one.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from langgraph.runtime import RunControl

from agentops import cancelling
from agentops.checkpoints import check_thread_id, lease
from agentops.clock import Clock, Ids
from agentops.errors import InputTooLarge, RunCancelled, RunNotFound, ThreadBusy, UsageError
from agentops.execution import Outcome, Standing, execute, standing
from agentops.graph import Context, LoadedGraph, adopt_graph, load_graph
from agentops.history import Origin, Snapshot, history, origin, plant
from agentops.people import Answers
from agentops.places import Places, affordable
from agentops.prices import load_prices
from agentops.prompts import read_prompts
from agentops.records import Budget, Labels, RunEvent, RunStarted
from agentops.resumption import as_recorded, check_run_id, check_same, passed, result_of, resumable, taken_up
from agentops.run_settings import budget_of, check_tools, chosen, sound
from agentops.settings import Settings
from agentops.store import RunRow, open_store
from agentops.tracer import Effects, Meter, RunTrace, TracedEmbedder, TracedEngine, TracedRetriever, Tracer, catch_up, locate

_CONNECTIONS = 32
"""Runs at once with Postgres, where each holds a connection: a third of what a server allows all processes that is left as it was
installed."""


class Runs:
    """Every run is an iterator of what happens in it, whose last item is its result; left early, it is cancelled.

    `context` makes what a graph's nodes are given, of the settings that its run is recorded with; `check_collection` raises where
    a collection that was asked for is not there.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        tracer: Tracer,
        clock: Clock,
        ids: Ids,
        effects: Effects,
        context: Callable[[LoadedGraph, dict[str, Any]], Context],
        check_collection: Callable[[str], None],
    ) -> None:
        self._settings = settings
        self._tracer = tracer
        self._clock = clock
        self._ids = ids
        self._effects = effects
        self._context = context
        self._check_collection = check_collection
        self._places = Places(settings.run.at_once or (_CONNECTIONS if settings.record.url else affordable()))
        self._working: dict[asyncio.Task[Outcome], RunControl] = {}
        self._draining = False

    def start(
        self,
        graph: Any,
        input: Any,
        thread: str | None,
        collection: str | None,
        budget: Budget | None,
        run_id: str | None,
        labels: Labels | None,
    ) -> AsyncGenerator[RunEvent, None]:
        """A new run, or, where its caller has named it, that of this name, which may be on record already."""
        loaded = _load(graph)
        if isinstance(input, str):
            if not input.strip():
                raise UsageError("the input is empty", hint="ask something: agentops run rag 'a question'")
            size, limit = len(input.encode(errors="replace")), self._settings.engine.input_bytes
            if size > limit:
                raise InputTooLarge(
                    f"the input has {size:,} bytes, the limit is {limit:,}",
                    hint="put long texts into a collection (agentops ingest), or raise engine.input_bytes",
                )
            input = loaded.as_input(input)  # noqa: A001
        if (
            self._settings.tools.mcp is not None
            and self._settings.source("tools.mcp").startswith("--")
            and not loaded.uses_context
        ):
            raise UsageError(
                f"graph '{loaded.name}' takes no tools of servers",
                hint="build it with context_schema=agentops.Context, or drop --mcp",
            )
        if run_id is not None:
            check_run_id(run_id)
            thread = thread or f"th_{run_id.removeprefix('run_')}"  # the same whenever it is delivered
        thread_id = check_thread_id(thread) if thread else self._ids.new("th")
        details = chosen(self._settings, {}, {"retrieval.collection": collection, "labels": labels})
        check_tools(self._settings, loaded, details)
        if run_id is not None:
            return self._deliver(loaded, input, run_id, thread_id, details, budget, collection)
        return self._go(loaded, input, self._ids.new("run"), thread_id, details, budget, collection)

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
            check_same(row, graph, thread_id, input, self._settings)
            if row.status in ("done", "waiting"):
                yield RunStarted(row.id, row.thread_id)
                yield await asyncio.to_thread(result_of, row, self._settings)
                return
            events = self.resume(row.id, Answers(), graph, budget)
        async with contextlib.aclosing(events):
            async for event in events:
                yield event

    def _recorded(self, run_id: str) -> RunRow | None:
        try:
            row = self.find(run_id)
        except RunNotFound:
            return None
        return row if row.id == run_id else None

    async def resume(self, run_id: str, answers: Answers, graph: Any, budget: Budget | None) -> AsyncGenerator[RunEvent, None]:
        """A run that is on record, from where it was left."""
        row = resumable(await asyncio.to_thread(self.find, run_id))
        loaded = as_recorded(_graph_of(row, graph), row, self._settings)
        details = chosen(self._settings, row.settings, {})
        check_tools(self._settings, loaded, details)
        async with contextlib.aclosing(self._go(loaded, answers, row.id, row.thread_id, details, budget)) as events:
            async for event in events:
                yield event

    async def fork(
        self,
        run_id: str,
        at: str | None,
        step: int | None,
        changes: Mapping[str, Any] | None,
        prompts: Path | None,
        graph: Any,
        budget: Budget | None,
    ) -> AsyncGenerator[RunEvent, None]:
        """A new run on a new thread, from a checkpoint of another."""
        row = await asyncio.to_thread(self.find, run_id)
        loaded = as_recorded(_graph_of(row, graph), row, self._settings)
        if prompts is not None:
            loaded = replace(loaded, prompts=loaded.prompts.replaced(read_prompts(prompts)))
        async with lease(self._settings, row.thread_id) as held:
            begin = await origin(loaded, held, row.id, at=at, step=step, changes=changes)
        details = chosen(self._settings, row.settings, {})
        check_tools(self._settings, loaded, details)
        new = self._ids.new("run"), self._ids.new("th")
        async with contextlib.aclosing(self._go(loaded, begin, *new, details, budget)) as events:
            async for event in events:
                yield event

    async def snapshots(self, run_id: str | None, thread: str | None, graph: Any) -> tuple[str, list[Snapshot]]:
        """What a run or a thread is called, and its checkpoints."""
        if (run_id is None) == (thread is None):
            raise UsageError("give a run or a thread", hint="agentops history RUN, or agentops history --thread THREAD")
        row = await asyncio.to_thread(self.find, run_id) if run_id else await asyncio.to_thread(self._newest, str(thread))
        loaded = _graph_of(row, graph)
        async with lease(self._settings, row.thread_id) as held:
            found = await history(loaded, held)
        if run_id is None:
            return f"thread {thread}", found
        return f"run {row.id}", [one for one in found if one.run_id == row.id]

    def _newest(self, thread: str) -> RunRow:
        catch_up(self._settings)
        with open_store(self._settings) as store:
            store.thread(thread)
            return store.runs(thread=thread, limit=1)[0]

    def find(self, run_id: str) -> RunRow:
        """
        Raises:
            RunNotFound
        """
        self._tracer.flush()
        catch_up(self._settings)
        with open_store(self._settings) as store:
            return store.run(run_id)

    async def cancel(self, run_id: str) -> str:
        """Asks a run at work or in line to stop, and ends one that waits for an answer or was drained; returns its id.

        Raises:
            RunNotFound: no run of that name is at work or waits.  ThreadBusy: it is being taken up in this moment.
        """
        try:
            return cancelling.cancel(self._settings, run_id)
        except RunNotFound as absent:
            try:
                row = await asyncio.to_thread(self.find, run_id)
            except RunNotFound:
                raise absent from None
        await self._end_idle(row)
        return row.id

    async def _end_idle(self, row: RunRow, *, in_line: bool = False) -> None:
        """Puts on record that a run which nobody works on is cancelled; one `in_line` to be taken up, whatever it was before."""
        async with lease(self._settings, row.thread_id):
            row = await asyncio.to_thread(self.find, row.id)  # only under the lease is it sure
            if row.status not in ("waiting", "queued") and not (in_line and row.status in ("failed", "crashed")):
                how = f"agentops show {row.id}"
                raise RunNotFound(f"run {row.id} is {row.status}; there is nothing to cancel", hint=f"see how it ended: {how}")
            why = "cancelled in line for a place" if in_line else f"cancelled while it was {row.status}"
            self._cancelled(why, row.id, row.thread_id, row.graph, row.settings, resumed=True, after_ns=row.ended_ns or 0)
        await asyncio.to_thread(self._tracer.flush)

    def _cancelled(
        self,
        why: str,
        run_id: str,
        thread_id: str,
        graph: str,
        details: Mapping[str, Any],
        *,
        input: Any = None,
        resumed: bool,
        after_ns: int = 0,
    ) -> None:
        trace = self._tracer.start_run(
            run_id=run_id,
            thread_id=thread_id,
            graph=graph,
            input=input,
            settings=details,
            resumed=resumed,
            after_ns=after_ns,
            tags=tuple(details.get("labels", {}).get("tags", ())),
        )
        trace.annotate(settings=details, idle=True)
        trace.end("cancelled", error=RunCancelled(why, run_id=run_id))
        trace.check()

    async def _go(
        self, graph: LoadedGraph, input: Any, run_id: str, thread_id: str, details: dict[str, Any], *rest: Any, **how: Any
    ) -> AsyncGenerator[RunEvent, None]:
        """As `_work`, once there is a place; cancelled while it is in line, the run is on record as such and not begun."""
        stopped = False

        @contextlib.contextmanager
        def in_line(leave: Callable[[], object]) -> Iterator[None]:
            def stop() -> None:
                nonlocal stopped
                stopped = True
                leave()

            with cancelling.cancellable(self._settings, run_id, stop, waits=True):
                yield

        async with contextlib.AsyncExitStack() as held:
            # A run inside another has that one's place: each of those at work could be waiting for a second.
            if locate() is None:
                try:
                    await held.enter_async_context(self._places.taken(in_line))
                except asyncio.CancelledError:
                    if not stopped:
                        raise
            if stopped:
                raise await self._left_line(graph, input, run_id, thread_id, details)
            async with contextlib.aclosing(self._work(graph, input, run_id, thread_id, details, *rest, **how)) as events:
                async for event in events:
                    yield event

    async def _left_line(
        self, graph: LoadedGraph, input: Any, run_id: str, thread_id: str, details: dict[str, Any]
    ) -> RunCancelled:
        """What a run that was cancelled in line for a place ends with."""
        said = f"run {run_id} was cancelled before it had a place"
        if isinstance(input, Origin):
            return RunCancelled(said, run_id=run_id, hint="nothing was recorded; fork again")
        with contextlib.suppress(ThreadBusy, RunNotFound):  # another process has it, and that one's word counts
            if (row := await asyncio.to_thread(self._recorded, run_id)) is not None:
                await self._end_idle(row, in_line=True)
            else:
                why = "cancelled in line for a place"
                self._cancelled(why, run_id, thread_id, graph.reference, details, input=input, resumed=False)
        return RunCancelled(said, run_id=run_id)

    async def _work(
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
        budget = sound(budget or budget_of(self._settings))
        if collection is not None and graph.uses_context:
            await asyncio.to_thread(self._check_collection, collection)
        resumed = isinstance(input, Answers)
        async with lease(self._settings, thread_id) as held:
            at: Standing = "unborn"
            told, about, after_ns = input, {}, 0
            if isinstance(input, Answers):
                # Only under the lease is it sure how the run ended.
                row = resumable(await asyncio.to_thread(self.find, run_id))
                after_ns = row.ended_ns or 0
                input, told, at = await taken_up(graph, held, row, input)  # noqa: A001
            elif isinstance(input, Origin):
                await plant(input, graph, held, run_id)
                about, told, at = input.told, {**input.told, "changes": dict(input.changes)}, "open"
            elif delivered:
                # Another process may have begun it since the record was asked, or could not put that into the store.
                resumed = (at := await standing(graph, held, run_id)) != "unborn"
                if at == "passed":
                    raise passed(run_id, thread_id)
            context = await asyncio.to_thread(self._context, graph, details) if graph.uses_context else None
            meter = Meter(budget, self._clock, load_prices(self._settings))
            trace = self._tracer.start_run(
                run_id=run_id,
                thread_id=thread_id,
                graph=graph.reference,
                input=told,
                settings=details,
                resumed=resumed,
                after_ns=after_ns,
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
                    held=held,
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
            with cancelling.cancellable(self._settings, run_id, work.cancel):
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

    def drain(self) -> bool:
        """Those at work, and those that begin later, stop at their next step boundary. Returns whether any is at work."""
        self._draining = True
        for control in list(self._working.values()):
            control.request_drain()
        return bool(self._working)

    async def stop(self, patience_s: float) -> None:
        """Cancels all that are at work, and waits so long for them to be on record as such."""
        deadline = self._clock.monotonic_ns() + int(patience_s * 1e9)
        for work in list(self._working):
            with contextlib.suppress(RuntimeError):  # its loop is gone, and it with the loop
                work.get_loop().call_soon_threadsafe(work.cancel)
        while self._working and self._clock.monotonic_ns() < deadline:
            await asyncio.sleep(0.01)


def _load(graph: Any) -> LoadedGraph:
    if isinstance(graph, LoadedGraph):
        return graph
    return load_graph(graph) if isinstance(graph, str) else adopt_graph(graph)


def _graph_of(row: RunRow, graph: Any) -> LoadedGraph:
    if graph is not None:
        return _load(graph)
    if row.graph.startswith("python:"):
        raise UsageError(f"run {row.id} is of a graph object made in Python", hint="do it there, and give the graph=")
    return load_graph(row.graph, recorded=True)


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
