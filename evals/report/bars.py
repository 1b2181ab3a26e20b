"""Bars: what a metric must reach for a build to pass, such as `faithfulness=.8`.

They are read before anything is computed, so that a slip of the pen costs no hour of evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from agentops.errors import UsageError
from agentops.text import one_line
from evals.metrics import NO_REFERENCE
from evals.report.model import Report

MOST_UNSCORED = 0.05
"""Share of the cases a metric was asked about that may have no score: the mean of the others says little where more are missing.
A case that gives the metric nothing to score does not count."""
NOTHING_TO_SCORE = frozenset({NO_REFERENCE, "no claims", "no citations"})
"""Reasons that say so: a refusal claims and cites nothing, and is often right."""


@dataclass(frozen=True, slots=True)
class Bar:
    """The mean of `metric` must be at least `value`; for a metric of which less is better, at most."""

    metric: str
    value: float


def parse_bars(texts: Iterable[str]) -> tuple[Bar, ...]:
    """Reads `metric=number`, each once.

    Raises:
        UsageError: it is not of this form, the number is not finite, or a metric is named twice.
    """
    bars: dict[str, Bar] = {}
    for text in texts:
        name, equals, number = (part.strip() for part in text.partition("="))
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if not name or not equals or not math.isfinite(value):
            raise UsageError(f"'{one_line(text, 60)}' is no bar for a metric", hint="write it as: --fail-under faithfulness=.8")
        if name in bars:
            raise UsageError(f"'{one_line(name, 60)}' has two bars", hint="give each metric one --fail-under")
        bars[name] = Bar(name, value)
    return tuple(bars.values())


def failures(report: Report, bars: Iterable[Bar]) -> tuple[str, ...]:
    """What is not reached, a line each; of two experiments the second is held to it. The mean is compared, not its interval. A
    metric that left more than `MOST_UNSCORED` without a score has reached nothing."""
    return tuple(line for bar in bars if (line := _failure(report, bar)))


def _failure(report: Report, bar: Bar) -> str:
    arm = report.arms[-1]
    found = arm.metric(bar.metric)
    name = one_line(bar.metric, 60)
    if found is None:
        known = ", ".join(one_line(one.name, 60) for one in arm.metrics) or "none"
        return f"{name} was not measured (measured: {known})"
    value = found.interval.value
    if value is None:
        why = ", ".join(f"{one_line(reason, 80)}: {number}" for reason, number in found.unscored.items())
        return f"{name} has no score in {found.asked} {'case' if found.asked == 1 else 'cases'} ({why})"
    missing = {reason: number for reason, number in found.unscored.items() if reason not in NOTHING_TO_SCORE}
    asked = found.scored + sum(missing.values())
    if sum(missing.values()) > MOST_UNSCORED * asked:
        why = ", ".join(f"{one_line(reason, 80)}: {number}" for reason, number in missing.items())
        return f"{name} was scored in {found.scored} of {asked} cases ({why}); at most {MOST_UNSCORED:.0%} may have no score"
    low = found.scale.better == "low"
    if value <= bar.value if low else value >= bar.value:
        return ""
    where = "" if found.interval.low is None else f", interval {found.interval.low:.3f} to {found.interval.high:.3f}"
    must = f"may be {bar.value:g} at most" if low else f"must be {bar.value:g} at least"
    return f"{name} has a mean of {value:.3f} ({found.scored} scored{where}); it {must}"
