"""How numbers are written, the same in every form of a report."""

from __future__ import annotations

from collections.abc import Mapping

from agentops.text import clean
from evals.report.model import Arm, Case, Change, PersonScore, Report
from evals.statistics import Interval

UNKNOWN = "–"


def number(value: float | None, *, signed: bool = False) -> str:
    """Three digits after the point below 10, fewer above; a dash for none. `signed` writes a plus too."""
    if value is None:
        return UNKNOWN
    size = abs(value)
    digits = 3 if size < 10 else 2 if size < 100 else 1 if size < 1000 else 0
    text = f"{value:{'+' if signed else ''},.{digits}f}"
    return text.replace("-", "−") if text.strip("+-0.,") else text.lstrip("+-")


def bounds(interval: Interval, *, signed: bool = False) -> str:
    """`0.742 to 0.881`, or why there is no interval."""
    if interval.low is None or interval.high is None:
        return interval.method.removeprefix("none: ")
    return f"{number(interval.low, signed=signed)} to {number(interval.high, signed=signed)}"


def probability(p: float | None) -> str:
    if p is None:
        return UNKNOWN
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def counts(of: Mapping[str, int]) -> str:
    """`3 no_reference, 1 the run failed`."""
    return ", ".join(f"{many} {what}" for what, many in of.items())


def percent(level: float) -> str:
    return f"{level * 100:g} %"


def cut(text: str, limit: int) -> str:
    """Cleaned, and at most `limit` characters with a note of how many more there were."""
    rest = len(text) - limit
    return clean(text) if rest <= 0 else clean(text[:limit]) + f"… ({rest:,} more characters)"


def direction(better: str) -> str:
    return "less is better" if better == "low" else "more is better"


def changes_by_case(report: Report) -> list[tuple[str, list[Change]]]:
    """The cases that changed, those whose scores changed most first, with their changes."""
    found: dict[str, list[Change]] = {}
    for change in report.comparison.changes if report.comparison else ():
        found.setdefault(change.case_id, []).append(change)
    return list(found.items())


def named(arm: Arm) -> dict[str, Case]:
    return {case.id: case for case in arm.cases}


def said(arm: Arm) -> list[tuple[Case, PersonScore]]:
    """What people said, those with a comment first."""
    found = [(case, one) for case in arm.cases for one in case.people]
    return sorted(found, key=lambda pair: not pair[1].score.comment)
