"""What a report says, as frozen values: metrics with their intervals, the cases behind them, and two experiments side by side.

Nothing here reads the record or draws; texts are as they were recorded and are made safe where they are shown.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from agentops.records import Score
from evals.statistics import Calibration, Interval

Verdict = Literal["better", "worse", "not shown"]
"""What a comparison shows of the second experiment. not shown: a difference of this size could be chance."""


@dataclass(frozen=True, slots=True)
class Scale:
    """A metric's bounds, where it has them, and which end is good ("high" or "low"). `binary` says that there is nothing
    between the bounds."""

    low: float | None = None
    high: float | None = None
    better: str = "high"
    binary: bool = False


@dataclass(frozen=True, slots=True)
class PersonScore:
    """What a person said of a case's run, or of one of its spans."""

    author: str
    score: Score
    span_id: str | None = None


@dataclass(frozen=True, slots=True)
class Case:
    """One case with all that was said of it. `scores` are those of metrics by their names, the latest of each. `status` and
    `error` are the run's. `reference` is the expected answer, empty where there is none."""

    id: str
    run_id: str = ""
    thread_id: str = ""
    status: str = "done"
    error: str = ""
    question: str = ""
    answer: str = ""
    reference: str = ""
    scores: Mapping[str, Score] = field(default_factory=dict)
    people: tuple[PersonScore, ...] = ()
    trace: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class MetricResult:
    """One metric over all cases. `values` are by case id, in the order of the cases; `unscored` counts cases by the reason.

    `judged` counts how verdicts came about ("asked", "log-probability", ...), `versions` are those of the metric that scored.

    Raises:
        ValueError: what was scored and what was not do not add up to what was asked.
    """

    name: str
    scale: Scale
    interval: Interval
    asked: int
    values: Mapping[str, float]
    unscored: Mapping[str, int] = field(default_factory=dict)
    judged: Mapping[str, int] = field(default_factory=dict)
    versions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.values) + sum(self.unscored.values()) != self.asked:
            raise ValueError(f"'{self.name}': {len(self.values)} scored and {sum(self.unscored.values())} not, of {self.asked}")

    @property
    def scored(self) -> int:
        return len(self.values)


@dataclass(frozen=True, slots=True)
class PeopleResult:
    """What people said of whole answers under one name. `interval` is of the mean over the `cases` that anybody scored.

    `judge` is Krippendorff's alpha of people and the metric of that name together, over the cases that both scored; None where
    there is no such metric. `among` is that of people alone, where two or more scored the same cases: a judge can hardly be
    nearer to people than they are to each other.
    """

    name: str
    people: tuple[str, ...]
    cases: int
    interval: Interval
    judge: Interval | None = None
    among: Interval | None = None


@dataclass(frozen=True, slots=True)
class Calibrated:
    """A metric's scores against what people said of the same cases: `against` names their score."""

    name: str
    against: str
    calibration: Calibration


@dataclass(frozen=True, slots=True)
class Arm:
    """One experiment, or a set of recorded runs. `about` are lines for its head: what was run, on what, with what."""

    id: str
    name: str
    about: tuple[tuple[str, str], ...]
    cases: tuple[Case, ...]
    metrics: tuple[MetricResult, ...]
    people: tuple[PeopleResult, ...] = ()
    calibrations: tuple[Calibrated, ...] = ()

    def metric(self, name: str) -> MetricResult | None:
        return next((one for one in self.metrics if one.name == name), None)

    def worst(self, name: str, limit: int) -> tuple[Case, ...]:
        """The worst scored cases of a metric, the worst first, of equals the first first; none that cannot be better."""
        found = self.metric(name)
        if found is None:
            return ()
        sign, best = (-1.0, found.scale.low) if found.scale.better == "low" else (1.0, found.scale.high)
        scored = [case for case in self.cases if found.values.get(case.id, best) != best]
        return tuple(sorted(scored, key=lambda case: sign * found.values[case.id])[:limit])


@dataclass(frozen=True, slots=True)
class MetricDifference:
    """A metric in two experiments over the cases that have a score in both; `difference` is second minus first.

    `p` is the test's, `p_holm` the same after Holm's correction over all metrics compared. `higher`, `same` and `lower` count
    the cases; `only_first` and `only_second` those that have a score in one alone.
    """

    name: str
    scale: Scale
    first: Interval
    second: Interval
    difference: Interval
    p: float | None
    p_holm: float | None
    test: str
    verdict: Verdict
    higher: int
    same: int
    lower: int
    only_first: int = 0
    only_second: int = 0


@dataclass(frozen=True, slots=True)
class Change:
    """A case whose score differs between two experiments. `gain` is the difference in the sense in which bigger is better, as
    a part of the metric's range, so that changes in several metrics can be ranked."""

    case_id: str
    metric: str
    first: float
    second: float
    gain: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two experiments on the same cases. `changes` are those of metrics with bounds, by case, the biggest first; `alone` are
    ids of cases that only the first, and only the second, has."""

    metrics: tuple[MetricDifference, ...]
    changes: tuple[Change, ...]
    common: int
    alone: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())


@dataclass(frozen=True, slots=True)
class Report:
    """One arm, or two that are compared. `notes` say what a reader has to know before believing a number."""

    title: str
    arms: tuple[Arm, ...]
    comparison: Comparison | None = None
    notes: tuple[str, ...] = ()
    level: float = 0.95
    seed: int = 0
