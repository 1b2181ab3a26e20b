"""Experiments: every case of a dataset run through a graph and scored, and runs scored as they are on record.

`begin` puts an experiment on record, with its dataset as it is now; `carry_out` does what of it is not done yet. So one that was
stopped, or whose process was killed, is taken up by carrying it out again: cases that are done are not run again, and what has a
score is not scored again. `score_runs` scores recorded runs. Every case has, for each metric, a score or the reason why it
has none; that they add up is checked against the record at the end.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from agentops.errors import (
    AgentOpsError,
    GraphBroken,
    GraphNotFound,
    InputTooLarge,
    JournalFull,
    ModelError,
    RecordError,
    RetrievalError,
    RunCancelled,
    UsageError,
)
from agentops.records import ExperimentStatus, RunResult, RunStarted, RunStatus, Score, content_hash
from agentops.store import CaseRow, ExperimentRow, Store, open_store
from agentops.tracer import Tracer
from evals.datasets import Case, Dataset, written
from evals.metrics import Metric
from evals.metrics.registry import ENTRIES
from evals.reading import frozen_dataset, read_sample
from evals.samples import Sample

if TYPE_CHECKING:
    from agentops.graph import LoadedGraph
    from agentops.runtime import Runtime

CONCURRENCY = 4
JUDGEMENT_S = 600.0
"""The longest that one score of one case may take."""

Told = Callable[[int, int], None]
"""Called with the number of cases that are run and scored, and how many there are."""

_SETTLED = ("done", "failed", "waiting")


@dataclass(frozen=True, slots=True)
class Tally:
    """What came of an experiment or a scoring. `run` and `judged` are what was done now; `scored` and `unscored` count what is on
    record, with the latest score of each case and metric; together they are `asked`."""

    cases: int
    run: int
    failed: int
    judged: int
    asked: int
    scored: int
    unscored: int


# --- experiments ---


def begin(tracer: Tracer, dataset: Dataset, graph: LoadedGraph, *, name: str = "", settings: Mapping[str, Any]) -> str:
    """Puts an experiment on record and returns its id. `settings` say how it is to be carried out.

    Raises:
        UsageError: a case is too large to be kept whole.
        JournalFull
    """
    limit, frozen = tracer.settings.record.payload_bytes, dataset.frozen()
    for what, value in [(f"case '{case.id[:60]}'", case.frozen()) for case in dataset.cases] + [("the list of cases", frozen)]:
        if (size := len(written(value))) > limit:
            raise UsageError(f"{what} has {size:,} bytes and would not be kept whole", hint="raise record.payload_bytes")
    experiment_id = tracer.ids.new("exp")
    for place, case in enumerate(dataset.cases):
        tracer.content(case.frozen())
        tracer.case(experiment_id=experiment_id, case_id=case.id, place=place, status="queued")
    # Last, so that an experiment that is on record has all of its cases.
    tracer.experiment(
        id=experiment_id,
        name=name,
        dataset=dataset.name,
        dataset_hash=tracer.content(frozen),
        graph=graph.reference,
        status="running",
        cases=len(dataset.cases),
        started_ns=tracer.clock.now_ns(),
        settings=settings,
    )
    return experiment_id


async def carry_out(
    runtime: Runtime,
    tracer: Tracer,
    experiment_id: str,
    graph: LoadedGraph,
    metrics: Sequence[Metric],
    *,
    concurrency: int = CONCURRENCY,
    timeout_s: float = JUDGEMENT_S,
    collection: str | None = None,
    retry_failed: bool = False,
    told: Told | None = None,
) -> Tally:
    """Runs the cases that are not run yet, `concurrency` at a time, and scores each as soon as it has ended.

    Turns of one conversation share a thread and are run in their order. A case that fails is on record as failed, and its metrics
    as unscored; with `retry_failed` those that have failed are run again. Cancelled, it leaves the experiment as cancelled.

    Raises:
        UsageError, GraphError, RetrievalError, ModelError: no case can be run; the experiment is on record as failed.
        RecordError: the experiment, or its dataset, is not on record.  JournalFull
    """
    settings = runtime.settings
    await asyncio.to_thread(_up_to_date, tracer, experiment_id)
    with open_store(settings) as store:
        row = store.experiment(experiment_id)
        rows = {one.case_id: one for one in store.cases(row.id)}
        dataset = frozen_dataset(store, row.dataset_hash, row.dataset)
        ordered = sorted(dataset.cases, key=lambda case: rows[case.id].place if case.id in rows else len(rows))
        work = _Work(runtime, tracer, store, row, graph, metrics, timeout_s, collection, retry_failed, len(ordered), told)

        def status(status: ExperimentStatus, error: str | None = None) -> None:
            tracer.experiment(
                id=row.id,
                name=row.name,
                dataset=row.dataset,
                dataset_hash=row.dataset_hash,
                graph=row.graph,
                status=status,
                cases=row.cases,
                started_ns=row.started_ns,
                settings=row.settings,
                error=error,
            )

        status("running")
        conversations: dict[str, list[Case]] = {}
        for case in ordered:
            conversations.setdefault(f"thread {case.thread}" if case.thread else f"case {case.id}", []).append(case)
        try:
            await _side_by_side(concurrency, [work.conversation(cases, rows) for cases in conversations.values()])
            tally = await work.tally([case.id for case in ordered])
        except (asyncio.CancelledError, RunCancelled):
            status("cancelled")
            raise
        except JournalFull:
            raise
        except Exception as error:
            status("failed", str(error) or type(error).__name__)
            raise
        status("done")
        await asyncio.to_thread(tracer.flush)
        return tally


async def score_runs(
    runtime: Runtime,
    tracer: Tracer,
    run_ids: Iterable[str],
    metrics: Sequence[Metric],
    *,
    concurrency: int = CONCURRENCY,
    timeout_s: float = JUDGEMENT_S,
    told: Told | None = None,
) -> Tally:
    """Scores runs as they are on record. What has a score of the same version of a metric is not scored again.

    Raises:
        RunNotFound, RecordError, JournalFull
    """
    await asyncio.to_thread(_up_to_date, tracer)
    with open_store(runtime.settings) as store:
        runs = {run.id: run for run in map(store.run, run_ids)}
        work = _Work(runtime, tracer, store, None, None, metrics, timeout_s, None, False, len(runs), told)
        await _side_by_side(concurrency, [work.recorded(run_id) for run_id in runs])
        return await work.tally(list(runs))


def _up_to_date(tracer: Tracer, experiment_id: str = "") -> None:
    """Waits until what happened is in the store. A run that is read before it has ended there would be scored as if it had said
    nothing.

    Raises:
        RecordError: the store takes nothing.
    """
    if not tracer.flush():
        again = f"go on later with: agentops eval --resume {experiment_id}" if experiment_id else "give the same command later"
        raise RecordError("the store is locked by another process", hint=again)


async def _side_by_side(limit: int, jobs: Sequence[Any]) -> None:
    """Awaits all, `limit` at a time. The first that raises ends the others, and is raised as it is."""
    waiting = iter(jobs)

    async def worker() -> None:
        for job in waiting:
            await job

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(limit, len(jobs))):
                group.create_task(worker())
    except BaseExceptionGroup as several:
        first: BaseException = several
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        raise first from None
    finally:
        for job in waiting:
            job.close()


class _Work:
    """What workers share: where cases are run and scores are kept, and how far it is."""

    def __init__(
        self,
        runtime: Runtime,
        tracer: Tracer,
        store: Store,
        experiment: ExperimentRow | None,
        graph: LoadedGraph | None,
        metrics: Sequence[Metric],
        timeout_s: float,
        collection: str | None,
        retry_failed: bool,
        total: int,
        told: Told | None,
    ) -> None:
        self._runtime, self._tracer, self._store = runtime, tracer, store
        self._experiment, self._graph, self._metrics = experiment, graph, metrics
        self._timeout_s, self._collection, self._retry_failed = timeout_s, collection, retry_failed
        self._done, self._total, self._told = 0, total, told
        self._ran, self._failed, self._judged = 0, 0, 0
        self._draining = asyncio.Lock()
        self._tell()

    # -- running

    async def conversation(self, cases: Sequence[Case], rows: Mapping[str, CaseRow]) -> None:
        """The turns of one thread in their order, or the only case of one. After a turn that did not end the next ones would be
        asked of another conversation than is meant, so they fail too."""
        broken = ""
        for case in cases:
            row = rows.get(case.id) or CaseRow(self._id, case.id, len(rows), None, "queued", None)
            row = await self._settled(row)
            if row.status not in _SETTLED or (self._retry_failed and row.status == "failed"):
                if broken:
                    row = replace(row, status="failed", run_id=None, error=f"turn '{broken}' before it did not end")
                    self._keep(row)
                else:
                    row = await self._run(case, row)
                    self._ran += 1
            if row.status != "done":
                broken = broken or case.id
            self._failed += row.status == "failed"
            await self._score_case(case, row)
            self._advance()

    async def _settled(self, row: CaseRow) -> CaseRow:
        """The row as its run has ended, where its process died between that and telling so."""
        if row.status in _SETTLED or not row.run_id:
            return row
        with contextlib.suppress(RecordError):
            run = await asyncio.to_thread(self._store.run, row.run_id)
            if run.status in _SETTLED:
                row = replace(row, status=run.status, error=run.error)
                self._keep(row)
        return row

    async def _run(self, case: Case, row: CaseRow) -> CaseRow:
        """Runs a case to its end. One whose run crashed or failed is run anew, but in a conversation taken up where it was:
        there the thread has half a turn already."""
        assert self._graph is not None
        thread = f"{self._id}-{content_hash(case.thread)[3:15]}" if case.thread else None
        given = dict(case.input) if isinstance(case.input, Mapping) else case.input
        if resumed := bool(thread and row.run_id):
            events = self._runtime.astream_resume(row.run_id or "", graph=self._graph)
        else:
            events = self._runtime.astream(self._graph, given, thread=thread, collection=self._collection)
        row = replace(row, run_id=None, error=None)
        status: RunStatus = "failed"
        try:
            async with contextlib.aclosing(events):  # type: ignore[type-var]
                async for event in events:
                    if isinstance(event, RunStarted):
                        row = replace(row, run_id=event.run_id, status="running")
                        self._keep(row)
                    elif isinstance(event, RunResult):
                        status = event.status
                        row = replace(row, error=event.error)
        except (asyncio.CancelledError, RunCancelled):
            self._keep(replace(row, status="cancelled"))
            raise
        except JournalFull:
            raise
        except Exception as error:
            if _hopeless(error, begun=resumed or row.run_id is not None):
                raise
            status, row = "failed", replace(row, error=_in_words(error))
        row = replace(row, status=status)
        self._keep(row)
        return row

    def _keep(self, row: CaseRow) -> None:
        about = {"experiment_id": row.experiment_id, "case_id": row.case_id, "place": row.place}
        self._tracer.case(**about, status=row.status, run_id=row.run_id, error=row.error)  # type: ignore[arg-type]

    @property
    def _id(self) -> str:
        return self._experiment.id if self._experiment else ""

    # -- scoring

    async def recorded(self, run_id: str) -> None:
        """A run as it is on record."""
        run = await asyncio.to_thread(self._store.run, run_id)
        why = "" if run.status in ("done", "waiting") else _ended(run.status, run.error)
        self._failed += run.status == "failed"
        await self._score(run_id, "", None, why)
        self._advance()

    async def _score_case(self, case: Case, row: CaseRow) -> None:
        why = _ended(row.status, row.error) if row.status == "failed" else ""
        await self._score(row.run_id or "", case.id, case, why)

    async def _score(self, run_id: str, case_id: str, case: Case | None, why: str) -> None:
        latest = await self._latest(run_id, case_id)
        wanted = [metric for metric in self._metrics if not _scored(latest.get(metric.name), metric)]
        sample: Sample | None = None
        if wanted and not why:
            try:
                sample = await asyncio.to_thread(self._read, run_id, case)
            except AgentOpsError as error:
                why = f"the run cannot be read: {error}"
        for metric in wanted:
            if sample is None:
                score = _unscored(metric, why)
            elif cut := _cut(metric, sample):
                score = _unscored(metric, f"truncated: {', '.join(sorted(cut))}")
            else:
                score = await judge(metric, sample, self._timeout_s)
                self._judged += 1
            before = latest.get(metric.name)
            if before is not None and before[1] == metric.version and before[0].reason and before[0].reason == score.reason:
                continue
            self._tracer.score(
                score,
                run_id=run_id,
                experiment_id=self._experiment.id if self._experiment else None,
                case_id=case_id or None,
                author=metric.version,
            )

    def _read(self, run_id: str, case: Case | None) -> Sample:
        run = self._store.run(run_id)
        sample = read_sample(self._store, run, case.reference if case else None, case.id if case else "")
        return replace(sample, question=case.question) if case else sample

    async def _latest(self, run_id: str, case_id: str) -> dict[str, tuple[Score, str]]:
        """The latest score of each metric and its version: of this run in this experiment, or outside of all."""
        await self._catch_up()
        rows = await asyncio.to_thread(lambda: self._store.scores(run=run_id, experiment=self._id or None))
        return {
            row.score.name: (row.score, row.author)
            for row in rows
            if row.score.source != "human" and (row.experiment_id or "") == self._id and (row.case_id or "") == case_id
        }

    async def _catch_up(self) -> None:
        async with self._draining:
            await asyncio.to_thread(_up_to_date, self._tracer, self._id)

    # -- counting

    def _advance(self) -> None:
        self._done += 1
        self._tell()

    def _tell(self) -> None:
        if self._told is not None:
            self._told(self._done, self._total)

    async def tally(self, keys: Sequence[str]) -> Tally:
        """Counts what is on record for these cases, or runs.

        Raises:
            RuntimeError: a case has neither a score nor a reason for a metric.
        """
        await self._catch_up()
        names = {metric.name for metric in self._metrics}
        found: dict[tuple[str, str], Score] = {}

        def read() -> None:
            groups = [self._store.scores(experiment=self._id)] if self._id else [self._store.scores(run=key) for key in keys]
            wanted = set(keys)
            for row in (row for group in groups for row in group):
                key = (row.case_id or "") if self._id else row.run_id
                of_these = key in wanted and row.score.name in names and row.score.source != "human"
                if of_these and (row.experiment_id or "") == self._id:
                    found[key, row.score.name] = row.score

        await asyncio.to_thread(read)
        asked = len(keys) * len(names)
        scored = sum(score.value is not None for score in found.values())
        if len(found) != asked:
            raise RuntimeError(f"{len(found)} judgements are on record, and {asked} were asked for")
        return Tally(len(keys), self._ran, self._failed, self._judged, asked, scored, asked - scored)


async def judge(metric: Metric, sample: Sample, timeout_s: float = JUDGEMENT_S) -> Score:
    """The score of a sample, or why there is none: also where the metric takes too long, or raises despite its promise."""
    try:
        async with asyncio.timeout(timeout_s):
            score = await metric.score(sample)
        if score.name != metric.name:
            return _unscored(metric, f"the metric gave a score of '{score.name[:60]}'")
        if score.value is not None and not metric.low <= score.value <= metric.high:
            return _unscored(metric, f"the value {score.value} is out of its range, {metric.low} to {metric.high}")
        return score
    except TimeoutError:
        return _unscored(metric, f"timeout after {timeout_s:g} s")
    except Exception as error:
        return _unscored(metric, _in_words(error))


def _scored(latest: tuple[Score, str] | None, metric: Metric) -> bool:
    return latest is not None and latest[0].value is not None and latest[1] == metric.version


def _unscored(metric: Metric, reason: str) -> Score:
    return Score(metric.name, None, "code", reason=reason[:500])


def _ended(status: str, error: str | None) -> str:
    """Why a run has nothing to be scored, in a line; where in which file it failed is in its trace."""
    said = (error or "").strip().splitlines()
    return f"{status}: {said[0]}" if said else f"the run is {status}"


def _cut(metric: Metric, sample: Sample) -> frozenset[str]:
    """What the metric reads and the record does not have whole."""
    entry = ENTRIES.get(metric.name)
    return sample.truncated & entry.reads if entry is not None else sample.truncated


def _hopeless(error: Exception, *, begun: bool) -> bool:
    """Whether every other case would end with this error too."""
    if isinstance(error, ModelError | GraphNotFound | GraphBroken):
        return True
    return not begun and isinstance(error, UsageError | RetrievalError) and not isinstance(error, InputTooLarge)


def _in_words(error: BaseException) -> str:
    said = str(error).strip()
    return (said if isinstance(error, AgentOpsError) and said else f"{type(error).__name__}: {said}".removesuffix(": "))[:500]
