"""Reports from the record: an experiment, some recorded runs, or two experiments side by side.

The record is only read, and what runs said and were asked is got through the callables that the caller gives. Nothing here
draws, and no metric is computed: scores are as they were recorded.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from agentops.errors import AgentOpsError, RunNotFound, UsageError
from evals.report.model import (
    Arm,
    Calibrated,
    Case,
    Change,
    Comparison,
    MetricDifference,
    MetricResult,
    PeopleResult,
    PersonScore,
    Report,
    Scale,
    Verdict,
)
from evals.samples import Sample
from evals.statistics import Interval, agreement, calibration, estimate, holm, paired

if TYPE_CHECKING:
    from agentops.store import CaseRow, ExperimentRow, ScoreRow, Store

SampleOf = Callable[["CaseRow"], "Sample | None"]
"""Gives the sample behind a case: its question, answer and reference. For recorded runs the case's id is the run's."""

TraceOf = Callable[[str], Sequence[str]]
"""Gives the lines that show a run, by its id. Asked for the cases that the report opens up, and no others."""

THUMBS = "thumbs"
"""The name of people's scores that say of a whole answer whether it is good: 1 or 0. A metric that people did not score by its
own name is calibrated against these."""

SIGNIFICANT = 0.05
LEAST_CHANGE = 0.05
"""A case whose score moved by less than this part of the metric's range is not listed as changed."""

LEAST_CALIBRATED = 10
"""With fewer cases a calibration shows nothing."""


def report_of(
    store: Store,
    *,
    experiment: str | None = None,
    runs: Sequence[str] | None = None,
    scales: Mapping[str, Scale] | None = None,
    sample: SampleOf | None = None,
    trace: TraceOf | None = None,
    worst: int = 5,
    level: float = 0.95,
    seed: int = 0,
) -> Report:
    """The report of an experiment, which is named as for `Store.experiment`, or of runs as they are on record.

    Every case of an experiment counts for every metric: one that has not run, or has failed, is unscored with that as its
    reason. Of runs each is a case, and the latest score of each metric counts. `scales` says of metrics, by name, what their
    bounds are, whether there is something between, and which end is good; for those not in it more is better. The `worst` cases
    of each metric get their trace.

    Raises:
        RecordError: there is no such experiment.
        RunNotFound: a run is not on record.
        UsageError: there are no runs.
    """
    if (experiment is None) == (runs is None):
        raise TypeError("a report is of an experiment or of runs")
    reader = _Reader(store, dict(scales or {}), sample, level, seed)
    if experiment is not None:
        row = store.experiment(experiment)
        arm, notes = reader.experiment(row)
        title = f"Experiment {row.name or row.id}"
    else:
        if not runs:
            raise UsageError("there are no runs to report on", hint="list them with: agentops runs")
        arm, notes = reader.runs(runs)
        title = f"Run {arm.cases[0].id}" if len(arm.cases) == 1 else f"{len(arm.cases)} recorded runs"
    return _opened(Report(title, (arm,), notes=notes, level=level, seed=seed), trace, worst)


def compare(
    store: Store,
    first: str,
    second: str,
    *,
    common: bool = False,
    scales: Mapping[str, Scale] | None = None,
    sample: SampleOf | None = None,
    trace: TraceOf | None = None,
    worst: int = 5,
    level: float = 0.95,
    seed: int = 0,
) -> Report:
    """Two experiments on the same cases, paired by the case's id; differences are second minus first.

    With `common`, experiments on different datasets are compared over the cases that both have. The cases that changed most get
    their traces too.

    Raises:
        RecordError: there is no such experiment.
        UsageError: it is one experiment twice, the datasets differ and `common` is not asked for, or no case is in both.
    """
    rows = store.experiment(first), store.experiment(second)
    if rows[0].id == rows[1].id:
        raise UsageError(f"'{first}' and '{second}' are the same experiment", hint="list them with: agentops experiments")
    if rows[0].dataset_hash != rows[1].dataset_hash and not common:
        raise UsageError(
            f"the experiments were run on different datasets: {rows[0].dataset} ({rows[0].dataset_hash}) "
            f"and {rows[1].dataset} ({rows[1].dataset_hash})",
            hint="compare the cases that both have with: --common",
        )
    reader = _Reader(store, dict(scales or {}), sample, level, seed)
    (one, said), (other, also) = reader.experiment(rows[0]), reader.experiment(rows[1])
    title = f"{rows[0].name or rows[0].id} and {rows[1].name or rows[1].id}"
    comparison, notes = _compared(one, other, level, seed)
    if not comparison.common:
        raise UsageError("no case is in both experiments", hint="cases are the same where their ids are")
    told = (*(f"{one.name}: {line}" for line in said), *(f"{other.name}: {line}" for line in also), *notes)
    return _opened(Report(title, (one, other), comparison, told, level, seed), trace, worst)


@dataclass(frozen=True, slots=True)
class _Reader:
    """Makes arms of what is on record."""

    store: Store
    scales: Mapping[str, Scale]
    sample: SampleOf | None
    level: float
    seed: int

    def _estimate(self, name: str, values: Sequence[float], threads: Sequence[str]) -> Interval:
        binary = name == THUMBS or self._scale(name).binary
        return estimate(values, threads, binary=binary, level=self.level, seed=self.seed)

    def _scale(self, name: str) -> Scale:
        return self.scales.get(name, Scale())

    def experiment(self, row: ExperimentRow) -> tuple[Arm, tuple[str, ...]]:
        given: dict[str, list[ScoreRow]] = {}
        for one in self.store.scores(experiment=row.id):
            given.setdefault(one.case_id or "", []).append(one)
        cases = [self._case(found, given.get(found.case_id, [])) for found in self.store.cases(row.id)]
        model, asked = row.settings.get("model"), row.settings.get("metrics")
        prompts = row.settings.get("prompts") or {}
        about = (
            ("dataset", f"{row.dataset} ({row.dataset_hash})"),
            ("graph", row.graph),
            *((("model", model),) if isinstance(model, str) else ()),
            *((("prompts", ", ".join(f"{name} {version}" for name, version in prompts.items())),) if prompts else ()),
            ("status", row.status + (f": {row.error}" if row.error else "")),
            ("cases", str(len(cases))),
        )
        notes = (
            [] if row.status == "done" else [f"the experiment is {row.status}: what is not scored yet may change every number"]
        )
        if len(cases) < row.cases:
            notes.append(f"{row.cases - len(cases)} of {row.cases} cases are not on record yet")
        wanted = [str(name) for name in asked] if isinstance(asked, list) else []
        return self._arm(row.id, row.name or row.id, about, cases, given, notes, wanted)

    def runs(self, run_ids: Iterable[str]) -> tuple[Arm, tuple[str, ...]]:
        from agentops.store import CaseRow

        given: dict[str, list[ScoreRow]] = {}
        cases: list[Case] = []
        for run_id in dict.fromkeys(run_ids):
            run = self.store.run(run_id)
            given[run.id] = self.store.scores(run=run.id)
            cases.append(self._case(CaseRow("", run.id, len(cases), run.id, run.status, run.error), given[run.id]))
        threads = len({case.thread_id for case in cases})
        return self._arm("", "recorded runs", (("runs", str(len(cases))), ("threads", str(threads))), cases, given, [])

    def _case(self, row: CaseRow, given: Sequence[ScoreRow]) -> Case:
        said = self.store.scores(run=row.run_id) if row.run_id and row.experiment_id else given
        people: dict[tuple[str, str, str | None], PersonScore] = {}
        for one in said:
            if one.score.source == "human":
                people[one.author, one.score.name, one.span_id] = PersonScore(one.author, one.score, one.span_id)
        case = Case(
            id=row.case_id,
            run_id=row.run_id or "",
            status=row.status,
            error=row.error or "",
            scores={one.score.name: one.score for one in given if one.score.source != "human"},
            people=tuple(people.values()),
        )
        if not row.run_id:
            return case
        with suppress(RunNotFound):
            run = self.store.run(row.run_id)
            case = replace(case, thread_id=run.thread_id, error=case.error or run.error or "")
        if self.sample is None:
            return case
        try:
            sample = self.sample(row)
        except AgentOpsError as error:
            return replace(case, error=case.error or f"what it said cannot be read: {error}")
        if sample is None:
            return case
        return replace(case, question=sample.question, answer=sample.answer, reference=sample.reference.answer or "")

    def _arm(
        self,
        key: str,
        name: str,
        about: tuple[tuple[str, str], ...],
        cases: Sequence[Case],
        given: Mapping[str, Sequence[ScoreRow]],
        notes: list[str],
        asked: Sequence[str] = (),
    ) -> tuple[Arm, tuple[str, ...]]:
        names = dict.fromkeys([*asked, *(name for case in cases for name in case.scores)])
        versions: dict[str, set[str]] = {}
        for case in cases:
            latest = {one.score.name: one for one in given.get(case.id, ()) if one.score.source != "human"}
            for metric, row in latest.items():
                versions.setdefault(metric, set()).add(row.author)
        metrics = tuple(self._result(metric, cases, versions.get(metric, set())) for metric in names)
        notes += [
            f"{one.name} was scored by {len(one.versions)} versions of the metric: its values may not be comparable"
            for one in metrics
            if len(one.versions) > 1
        ]
        clusters = len({case.thread_id or case.id for case in cases})
        if clusters < len(cases):
            notes.append(f"the {len(cases)} cases come from {clusters} threads: intervals are clustered by thread")
        opinions = dict.fromkeys(one.score.name for case in cases for one in case.people)
        people = tuple(said for opinion in opinions if (said := self._people(opinion, cases)))
        calibrations = tuple(found for result in metrics if (found := self._calibrated(result, cases)))
        return Arm(key, name, about, tuple(cases), metrics, people, calibrations), tuple(notes)

    def _result(self, name: str, cases: Sequence[Case], versions: set[str]) -> MetricResult:
        values: dict[str, float] = {}
        unscored: Counter[str] = Counter()
        judged: Counter[str] = Counter()
        for case in cases:
            score = case.scores.get(name)
            if score is not None and score.value is not None:
                values[case.id] = score.value
                judged[score.judged or score.source] += 1
            else:
                unscored[score.reason if score is not None else _why_none(case)] += 1
        threads = [case.thread_id or case.id for case in cases if case.id in values]
        return MetricResult(
            name=name,
            scale=self._scale(name),
            interval=self._estimate(name, list(values.values()), threads),
            asked=len(cases),
            values=values,
            unscored=dict(unscored.most_common()),
            judged=dict(judged.most_common()),
            versions=tuple(sorted(versions - {""})),
        )

    def _people(self, name: str, cases: Sequence[Case]) -> PeopleResult | None:
        said = [
            {one.author: one.score.value for one in case.people if one.score.name == name and not one.span_id} for case in cases
        ]
        rated = [place for place, each in enumerate(said) if any(value is not None for value in each.values())]
        authors = sorted({author for each in said for author in each})
        if not rated:
            return None
        votes = [[value for value in said[place].values() if value is not None] for place in rated]
        threads = [cases[place].thread_id or cases[place].id for place in rated]
        judge = [score.value if (score := case.scores.get(name)) else None for case in cases]
        both = [place for place in rated if judge[place] is not None]
        rows = [[said[place].get(author) for place in both] for author in authors]
        among = agreement([[each.get(author) for each in said] for author in authors], level=self.level, seed=self.seed)
        judged = agreement([[judge[place] for place in both], *rows], level=self.level, seed=self.seed) if both else None
        return PeopleResult(
            name=name,
            people=tuple(authors),
            cases=len(rated),
            interval=self._estimate(name, [math.fsum(each) / len(each) for each in votes], threads),
            judge=judged,
            among=among if among.clusters else None,
        )

    def _calibrated(self, metric: MetricResult, cases: Sequence[Case]) -> Calibrated | None:
        """Of metrics known to lie between 0 and 1, as probabilities do, against what is known to be 0 or 1."""
        if (metric.scale.low, metric.scale.high) != (0, 1) or not all(0 <= value <= 1 for value in metric.values.values()):
            return None
        for against in (metric.name, THUMBS):
            if any(one.score.value not in (None, 0, 1) for case in cases for one in _answers(case, against)):
                continue
            pairs = [
                (metric.values[case.id], outcome)
                for case in cases
                if case.id in metric.values and (outcome := _outcome(case, against)) is not None
            ]
            if len(pairs) >= LEAST_CALIBRATED:
                scores, outcomes = zip(*pairs, strict=True)
                flipped = metric.scale.better == "low" and against == THUMBS
                outcomes = tuple(1 - one for one in outcomes) if flipped else outcomes
                return Calibrated(metric.name, against, calibration(scores, outcomes, level=self.level))
        return None


def _outcome(case: Case, name: str) -> float | None:
    """What most people said of the whole answer, 1 or 0; None where nobody did, or as many each way."""
    said = [one.score.value for one in _answers(case, name)]
    votes = sum(1 if value == 1 else -1 for value in said if value is not None)
    return None if not votes else float(votes > 0)


def _answers(case: Case, name: str) -> list[PersonScore]:
    """What people said under this name of the whole answer."""
    return [one for one in case.people if one.score.name == name and not one.span_id]


def _why_none(case: Case) -> str:
    if case.status in ("done", "waiting"):
        return "not scored"
    return (
        "not run yet"
        if case.status in ("queued", "running")
        else f"the run {case.status}"
        if case.status == "failed"
        else case.status
    )


def _compared(first: Arm, second: Arm, level: float, seed: int) -> tuple[Comparison, tuple[str, ...]]:
    """Over the cases that both arms have. A case's cluster is its place in the first arm's threads: a pair of runs of one case
    is independent of others where they are there."""
    threads = {case.id: case.thread_id or case.id for case in first.cases}
    ids = [case.id for case in second.cases if case.id in threads]
    ids = [case.id for case in first.cases if case.id in set(ids)]
    names = [one.name for one in first.metrics if second.metric(one.name)]
    notes = []
    found, changes = [], []
    for name in names:
        one, other = first.metric(name), second.metric(name)
        assert one is not None
        assert other is not None
        if one.versions != other.versions:
            notes.append(f"{name} was scored by different versions of the metric: a difference may be the metric's own")
        both = [key for key in ids if key in one.values and key in other.values]
        before, after = [one.values[key] for key in both], [other.values[key] for key in both]
        clusters = [threads[key] for key in both]
        test = paired(before, after, clusters, binary=other.scale.binary, level=level, seed=seed)
        found.append(
            MetricDifference(
                name=name,
                scale=other.scale,
                first=test.first,
                second=test.second,
                difference=test.difference,
                p=test.p,
                p_holm=None,
                test=test.test,
                verdict="not shown",
                higher=test.higher,
                same=test.same,
                lower=test.lower,
                only_first=sum(key in one.values and key not in other.values for key in ids),
                only_second=sum(key in other.values and key not in one.values for key in ids),
            )
        )
        changes += _changes(name, other.scale, dict(zip(both, zip(before, after, strict=True), strict=True)))
    corrected = holm([one.p for one in found])
    metrics = tuple(replace(one, p_holm=p, verdict=_verdict(one, p)) for one, p in zip(found, corrected, strict=True))
    missing = sorted({one.name for one in (*first.metrics, *second.metrics)} - set(names))
    if missing:
        notes.append("measured in one experiment alone, and not compared: " + ", ".join(missing))
    alone = (
        tuple(case.id for case in first.cases if case.id not in set(ids)),
        tuple(case.id for case in second.cases if case.id not in set(ids)),
    )
    return Comparison(metrics, _ranked(changes), len(ids), alone), tuple(notes)


def _changes(name: str, scale: Scale, pairs: Mapping[str, tuple[float, float]]) -> list[Change]:
    """Of a metric with bounds, or of which nothing is known. One known to have none, such as a time, differs in every case."""
    values = [value for pair in pairs.values() for value in pair]
    if scale == Scale() and values:
        scale = Scale(min(values), max(values))
    if scale.low is None or scale.high is None:
        return []
    width = (scale.high - scale.low) or 1.0
    sign = -1.0 if scale.better == "low" else 1.0
    return [
        Change(key, name, before, after, sign * (after - before) / width)
        for key, (before, after) in pairs.items()
        if before != after and abs(after - before) >= LEAST_CHANGE * width
    ]


def _ranked(changes: Sequence[Change]) -> tuple[Change, ...]:
    """The case with the biggest change first, of equals the one that lost more; a case's changes stay together."""
    biggest: dict[str, float] = {}
    gained: dict[str, float] = {}
    for one in changes:
        biggest[one.case_id] = max(biggest.get(one.case_id, 0.0), abs(one.gain))
        gained[one.case_id] = gained.get(one.case_id, 0.0) + one.gain
    return tuple(sorted(changes, key=lambda one: (-biggest[one.case_id], gained[one.case_id], one.case_id, -abs(one.gain))))


def _verdict(one: MetricDifference, p: float | None) -> Verdict:
    if p is None or p > SIGNIFICANT or not one.difference.value:
        return "not shown"
    return "better" if (one.difference.value > 0) == (one.scale.better != "low") else "worse"


def opened(report: Report, worst: int) -> tuple[str, ...]:
    """Ids of the cases that a report opens up: the worst of each metric, or those that changed most between two experiments."""
    if report.comparison is not None:
        return tuple(dict.fromkeys(change.case_id for change in report.comparison.changes))[: 2 * worst]
    return tuple(
        dict.fromkeys(case.id for arm in report.arms for metric in arm.metrics for case in arm.worst(metric.name, worst))
    )


def _opened(report: Report, trace: TraceOf | None, worst: int) -> Report:
    if trace is None:
        return report
    wanted = set(opened(report, worst))

    def lines(case: Case) -> Case:
        if case.id not in wanted or not case.run_id:
            return case
        try:
            return replace(case, trace=tuple(trace(case.run_id)))
        except AgentOpsError as error:
            return replace(case, trace=(f"the trace cannot be read: {error}",))

    return replace(report, arms=tuple(replace(arm, cases=tuple(map(lines, arm.cases))) for arm in report.arms))
