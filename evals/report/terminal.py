"""A report for a terminal, drawn by rich: tables, and bars of characters. Every text is cleaned before it is shown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING

from agentops.text import one_line
from evals.report.model import Arm, Comparison, MetricResult, Report
from evals.report.words import UNKNOWN, bounds, changes_by_case, counts, direction, named, number, percent, probability, said

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.table import Table

_CELLS = 24
_WIDE = 110
"""Columns of a terminal from which on tables have all that is helpful; below, what is needed."""

_COLOURS = {"better": "green", "worse": "red", "not shown": "dim"}


def to_terminal(report: Report, *, worst: int = 5) -> RenderableType:
    """For `rich.console.Console.print`. At most `worst` cases are listed for each metric, or as having changed."""
    return _Drawn(report, worst)


@dataclass(frozen=True, slots=True)
class _Drawn:
    """Drawn when the width of the terminal is known."""

    report: Report
    worst: int

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        from rich.table import Table

        for part in _parts(self.report, self.worst, options.max_width >= _WIDE):
            yield part
            if isinstance(part, Table):
                yield ""


def _parts(report: Report, worst: int, wide: bool) -> Iterator[RenderableType]:
    from rich.text import Text

    yield Text(one_line(report.title, 200), style="bold")
    for letter, arm in zip("AB", report.arms, strict=False):
        head = f"{letter}: {one_line(arm.name, 60)}  " if len(report.arms) > 1 else ""
        about = ", ".join(f"{name} {one_line(value, 100)}" for name, value in arm.about)
        yield Text.assemble((head, "bold"), (about, "dim"))
    for note in report.notes:
        yield Text(f"! {one_line(note, 300)}", style="yellow")
    yield Text()
    if report.comparison is not None:
        yield _compared(report, report.comparison, wide)
        yield from _changed(report, worst)
        return
    for arm in report.arms:
        if not arm.metrics:
            yield Text("no metric has scored anything yet", style="yellow")
        else:
            yield _metrics(arm, report.level, wide)
        if arm.people:
            yield _people(arm)
            yield from _said(arm, 2 * worst)
        yield from _worst(arm, worst, wide)


def _table(*columns: str, right: Sequence[int] = ()) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, header_style="bold", padding=(0, 1, 0, 0), show_edge=False)
    for place, name in enumerate(columns):
        is_number = place in right
        table.add_column(
            Text(name),
            justify="right" if is_number else "left",
            no_wrap=is_number,
            overflow="fold",
            min_width=None if place else 12,
        )
    return table


def _metrics(arm: Arm, level: float, wide: bool) -> Table:
    from rich.text import Text

    more = ("", "judged") if wide else ()
    table = _table("metric", "mean", f"{percent(level)} interval", "scored", "unscored", *more, right=(1, 3))
    for one in arm.metrics:
        bar = (Text(_bar(one), style="cyan"), Text(one_line(", ".join(one.judged), 40), style="dim"))
        table.add_row(
            Text(one_line(one.name, 40), style="bold"),
            number(one.interval.value),
            bounds(one.interval),
            f"{one.scored}/{one.asked}",
            Text(one_line(counts(one.unscored), 80), style="yellow"),
            *(bar if wide else ()),
        )
    return table


def _bar(one: MetricResult) -> str:
    """`────────├──●─┤──`, for a metric with bounds."""
    low, high, interval = one.scale.low, one.scale.high, one.interval
    if low is None or high is None or interval.value is None or high <= low:
        return ""
    width = high - low

    def cell(value: float) -> int:
        return max(0, min(_CELLS - 1, round((value - low) / width * (_CELLS - 1))))

    cells = ["·"] * _CELLS
    if interval.low is not None and interval.high is not None:
        for place in range(cell(interval.low), cell(interval.high) + 1):
            cells[place] = "━"
    cells[cell(interval.value)] = "●"
    return "".join(cells)


def _people(arm: Arm) -> Table:
    from rich.text import Text

    table = _table("people say", "mean", "interval", "cases", "people", "alpha with judge", "among people", right=(1, 3, 5, 6))
    for one in arm.people:
        table.add_row(
            Text(one_line(one.name, 40), style="bold"),
            number(one.interval.value),
            bounds(one.interval),
            str(one.cases),
            Text(one_line(", ".join(one.people), 60)),
            number(one.judge.value) if one.judge else UNKNOWN,
            number(one.among.value) if one.among else UNKNOWN,
        )
    return table


def _said(arm: Arm, limit: int) -> Iterator[RenderableType]:
    """Each of what people said, beside the metric's score of that name."""
    from rich.text import Text

    table = _table("case", "who", "says", "", "metric", "comment", right=(3, 4))
    table.columns[0].no_wrap = True
    every = said(arm)
    for case, one in every[:limit]:
        judge = case.scores.get(one.score.name)
        table.add_row(
            Text(one_line(case.id, 40)),
            Text(one_line(one.author, 24)),
            Text(one_line(one.score.name, 32)),
            number(one.score.value),
            number(judge.value) if judge else UNKNOWN,
            Text(one_line(one.score.comment, 80)),
        )
    if table.row_count:
        yield table
        if len(every) > limit:
            yield Text(f"and {len(every) - limit} more of what people said: --json", style="dim")


def _worst(arm: Arm, limit: int, wide: bool) -> Iterator[RenderableType]:
    from rich.text import Text

    if not limit or len(arm.cases) < 2:
        return
    # Recorded runs are cases of their own.
    named_cases = any(case.id != case.run_id for case in arm.cases)
    asked = wide or not named_cases
    heads = (*(("case",) if named_cases else ()), "run", *(("question",) if asked else ()))
    table = _table("worst of", "", *heads, right=(1,))
    # An id is to be copied.
    table.columns[2 + named_cases].no_wrap = True
    for metric in arm.metrics:
        for place, case in enumerate(arm.worst(metric.name, limit)):
            table.add_row(
                Text(one_line(metric.name, 40) if not place else "", style="bold"),
                number(metric.values[case.id]),
                *((Text(one_line(case.id, 32)),) if named_cases else ()),
                Text(one_line(case.run_id, 40), style="dim"),
                *((Text(one_line(case.question, 60)),) if asked else ()),
            )
    if table.row_count:
        yield table


def _compared(report: Report, comparison: Comparison, wide: bool) -> Table:
    from rich.text import Text

    head = ("metric", "A", "B", "B − A", f"{percent(report.level)} interval", "p (Holm)", "", *(("p", "cases") if wide else ()))
    table = _table(*head, right=(1, 2, 3, 4, 5, 7, 8))
    for one in comparison.metrics:
        name = Text(one_line(one.name, 40), style="bold")
        if wide and one.scale.better == "low":
            name.append(f" ({direction('low')})", style="dim")
        table.add_row(
            name,
            number(one.first.value),
            number(one.second.value),
            number(one.difference.value, signed=True),
            bounds(one.difference, signed=True),
            probability(one.p_holm),
            Text(one.verdict, style=_COLOURS[one.verdict]),
            *((probability(one.p), str(one.difference.n)) if wide else ()),
        )
    return table


def _changed(report: Report, limit: int) -> Iterator[RenderableType]:
    from rich.text import Text

    changed = changes_by_case(report)
    common = report.comparison.common if report.comparison else 0
    yield Text(f"{len(changed)} of {common} cases changed" + (", those that changed most:" if len(changed) > limit else ""))
    if not changed or not limit:
        return
    first, second = (named(arm) for arm in report.arms)
    table = _table("case", "question and runs", "metric", "A → B", right=(3,))
    for key, changes in changed[:limit]:
        about = [
            one_line(first[key].question, 60),
            f"A {one_line(first[key].run_id, 40)}",
            f"B {one_line(second[key].run_id, 40)}",
        ]
        for place, (line, one) in enumerate(zip_longest(about, changes)):
            table.add_row(
                Text(one_line(key, 32) if not place else "", style="bold"),
                Text(line or "", style="dim" if place else ""),
                Text(one_line(one.metric, 40) if one else ""),
                Text(f"{number(one.first)} → {number(one.second)}", style="green" if one.gain > 0 else "red") if one else "",
            )
    yield table
