"""A report as Markdown, for a pull request.

What models, documents and people wrote is shown in code spans: there it can be no HTML, no link, no mention and no table.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from agentops.text import one_line
from evals.report.model import Arm, Comparison, Report
from evals.report.words import UNKNOWN, bounds, changes_by_case, counts, named, number, percent, probability

LONGEST = 60_000
"""Characters: GitHub takes 65,536 in a comment."""

_VERDICTS = {"better": "**better**", "worse": "**worse**", "not shown": "not shown"}


def to_markdown(report: Report, *, worst: int = 5) -> str:
    """GitHub's Markdown, short enough for a comment; what does not fit is left out, and that is said."""
    lines: list[str] = []
    size, folded = 0, False
    for line in _lines(report, worst):
        size += len(line) + 1
        if size > LONGEST:
            lines += ["", *(["</details>", ""] if folded else []), "The rest did not fit into a comment."]
            break
        folded = line.startswith("<details>") or (folded and line != "</details>")
        lines.append(line)
    return "\n".join(lines) + "\n"


def code(text: str, width: int = 200) -> str:
    """A code span of one line that keeps its text inside; empty for nothing."""
    flat = one_line(text, width).strip()
    if not flat:
        return ""
    longest = max((len(run) for run in re.findall("`+", flat)), default=0)
    fence = "`" * (longest + 1)
    pad = " " if flat.startswith("`") or flat.endswith("`") else ""
    return f"{fence}{pad}{flat}{pad}{fence}"


def _lines(report: Report, worst: int) -> Iterator[str]:
    yield f"### {code(report.title)}"
    yield ""
    for arm in report.arms:
        said = ", ".join(f"{name} {code(value)}" for name, value in arm.about)
        yield f"- {code(arm.name)}: {said}"
    for note in report.notes:
        yield f"- **Note** {code(note, 300)}"
    yield ""
    if report.comparison is not None:
        yield from _compared(report, report.comparison)
        yield from _changed(report, worst)
        return
    for arm in report.arms:
        yield from _metrics(arm, report.level)
        yield from _worst(arm, worst)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int] = ()) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'|'.join(' ---: ' if place in right else ' --- ' for place in range(len(head)))}|"
    for row in rows:
        yield f"| {' | '.join(map(_cell, row))} |"
    yield ""


def _cell(text: str) -> str:
    """A pipe ends a cell unless a backslash is before it, and what two backslashes do differs between readers."""
    return re.sub(r"(?<=\\)(?=\|)", " ", text).replace("|", r"\|")


def _metrics(arm: Arm, level: float) -> Iterator[str]:
    if not arm.metrics:
        yield "No metric has scored anything yet."
        yield ""
    rows = [
        (
            code(one.name),
            number(one.interval.value),
            bounds(one.interval),
            f"{one.scored}/{one.asked}",
            code(counts(one.unscored)),
            code(", ".join(one.judged)),
        )
        for one in arm.metrics
    ]
    if rows:
        yield from _table(("metric", "mean", f"{percent(level)} interval", "scored", "unscored", "judged"), rows, right=(1, 3))
    if arm.people:
        people = [
            (
                code(one.name),
                number(one.interval.value),
                bounds(one.interval),
                str(one.cases),
                number(one.judge.value) if one.judge else UNKNOWN,
                number(one.among.value) if one.among else UNKNOWN,
            )
            for one in arm.people
        ]
        head = ("people say", "mean", "interval", "cases", "alpha with judge", "among people")
        yield from _table(head, people, right=(1, 3, 4, 5))


def _worst(arm: Arm, limit: int) -> Iterator[str]:
    rows = [
        (code(metric.name), number(metric.values[case.id]), code(case.id, 60), code(case.question, 120), code(case.run_id, 40))
        for metric in arm.metrics
        for case in arm.worst(metric.name, limit)
    ]
    if rows and len(arm.cases) > 1:
        yield "<details><summary>Worst cases</summary>"
        yield ""
        yield from _table(("metric", "score", "case", "question", "run"), rows, right=(1,))
        yield "</details>"


def _compared(report: Report, comparison: Comparison) -> Iterator[str]:
    first, second = (code(arm.name, 40) for arm in report.arms)
    head = ("metric", first, second, "difference", f"{percent(report.level)} interval", "p", "p (Holm)", "cases", "shown")
    rows = [
        (
            code(one.name) + (" (less is better)" if one.scale.better == "low" else ""),
            number(one.first.value),
            number(one.second.value),
            number(one.difference.value, signed=True),
            bounds(one.difference, signed=True),
            probability(one.p).replace("<", "&lt;"),
            probability(one.p_holm).replace("<", "&lt;"),
            str(one.difference.n),
            _VERDICTS[one.verdict],
        )
        for one in comparison.metrics
    ]
    yield from _table(head, rows, right=(1, 2, 3, 5, 6, 7))


def _changed(report: Report, limit: int) -> Iterator[str]:
    changed = changes_by_case(report)
    common = report.comparison.common if report.comparison else 0
    yield f"{len(changed)} of {common} cases changed."
    yield ""
    first, second = (named(arm) for arm in report.arms)
    rows = [
        (
            code(key, 60),
            code(first[key].question, 120),
            code(one.metric),
            f"{number(one.first)} → {number(one.second)}",
            f"{code(first[key].run_id, 40)} → {code(second[key].run_id, 40)}",
        )
        for key, changes in changed[: 2 * limit]
        for one in changes
    ]
    if rows:
        yield "<details><summary>Cases that changed most</summary>"
        yield ""
        yield from _table(("case", "question", "metric", "scores", "runs"), rows)
        yield "</details>"
