"""A report as one page of HTML that needs nothing else: no script, no font, no picture, no network.

Every text is cleaned and escaped, and a content security policy forbids all but the page's own style, by its hash: were a text
to slip through as markup, it could still do nothing.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from html import escape

from agentops.records import Score
from evals.report.build import opened
from evals.report.model import Arm, Case, Comparison, MetricDifference, MetricResult, PeopleResult, PersonScore, Report
from evals.report.plots import calibrated, change, distribution, forest
from evals.report.style import STYLE
from evals.report.words import (
    UNKNOWN,
    bounds,
    changes_by_case,
    counts,
    cut,
    direction,
    named,
    number,
    percent,
    probability,
    said,
)
from evals.statistics import Interval

SHORT, LONG = 200, 8_000
"""Characters of a text in a table, and where a case is opened."""

TRACE_LINES, TRACE_WIDTH = 400, 500
LISTED = 2_000
"""Cases in the list of all."""


def to_html(report: Report, *, worst: int = 5) -> str:
    """A whole document. The `worst` cases of each metric, or twice as many that changed most, can be opened."""
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    head = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="referrer" content="no-referrer">',
        f"<title>{_text(report.title, SHORT)}</title><style>{STYLE}</style></head><body>",
    ]
    return "".join([*head, *_body(report, worst), "</body></html>\n"])


def _body(report: Report, worst: int) -> Iterator[str]:
    yield f"<header><h1><bdi>{_text(report.title, SHORT)}</bdi></h1>"
    yield '<div class="arms">'
    for arm in report.arms:
        yield "<div>"
        if len(report.arms) > 1:
            yield f"<h3><bdi>{_text(arm.name, SHORT)}</bdi></h3>"
        yield '<dl class="about">'
        yield from (f"<dt>{_text(name)}</dt><dd><bdi>{_text(value)}</bdi></dd>" for name, value in arm.about)
        yield "</dl></div>"
    yield "</div>"
    yield from (f'<p class="note">{_text(note, LONG)}</p>' for note in report.notes)
    yield "</header><main>"
    if report.comparison is not None:
        yield from _comparison(report, report.comparison)
        yield from _opened(report, worst)
    for arm in report.arms:
        yield from _arm(arm, report)
    yield from _distributions(report)
    if report.comparison is None:
        yield from _opened(report, worst)
    yield from _all(report)
    yield "</main>"
    yield from _reading(report)


def _arm(arm: Arm, report: Report) -> Iterator[str]:
    several = f" of <bdi>{_text(arm.name, SHORT)}</bdi>" if len(report.arms) > 1 else ""
    yield f"<section><h2>Metrics{several}</h2>"
    if not arm.metrics:
        yield '<p class="note">No metric has scored anything yet.</p>'
    head = ("metric", "#mean", f"{percent(report.level)} interval", "#scored", "unscored", "judged", "interval by")
    if arm.metrics:
        yield from _table(head, map(_row, arm.metrics))
    for (low, high), rows in _by_scale(arm.metrics).items():
        yield f"<figure>{forest(rows, low, high, name='metrics with their intervals')}</figure>"
    yield "</section>"
    if arm.people:
        yield f"<section><h2>What people say{several}</h2>"
        columns = ("name", "#mean", "interval", "#cases", "people", "#alpha with the judge", "#alpha among people")
        yield from _table(columns, map(_people, arm.people))
        every = said(arm)
        yield f'<details><summary>Each of {len(every):,}</summary><div class="inside">'
        yield from _table(("case", "who", "name", "#says", "#metric", "comment"), (_beside(*one) for one in every[:LISTED]))
        yield "</div></details></section>"
    if arm.calibrations:
        yield f'<section><h2>Calibration{several}</h2><div class="figures">'
        for one in arm.calibrations:
            found = one.calibration
            yield f"<figure><h3><bdi>{_text(one.name, SHORT)}</bdi></h3>{calibrated(found, name=f'calibration of {one.name}')}"
            yield f"<figcaption>against people's <bdi>{_text(one.against, SHORT)}</bdi>, {found.n} cases: expected calibration "
            yield f"error {number(found.error)}, Brier score {number(found.brier)}</figcaption></figure>"
        yield "</div></section>"


def _people(one: PeopleResult) -> list[str]:
    return [
        f"<bdi>{_text(one.name, SHORT)}</bdi>",
        number(one.interval.value),
        _text(bounds(one.interval)),
        str(one.cases),
        f"<bdi>{_text(', '.join(one.people), SHORT)}</bdi>",
        *(_alpha(alpha) for alpha in (one.judge, one.among)),
    ]


def _alpha(alpha: Interval | None) -> str:
    return f'{number(alpha.value)}<br><span class="soft">{_text(bounds(alpha))}</span>' if alpha else UNKNOWN


def _beside(case: Case, one: PersonScore) -> list[str]:
    """What a person said, beside the metric's score of that name."""
    name, value, by, comment = _person(one)
    judge = case.scores.get(one.score.name)
    return [f"<bdi>{_text(case.id, 60)}</bdi>", by, name, value, number(judge.value) if judge else UNKNOWN, comment]


def _row(one: MetricResult) -> list[str]:
    versions = f' <span class="soft">{_text(", ".join(one.versions), 80)}</span>' if one.versions else ""
    clustered = f" ({one.interval.clusters} threads)" if one.interval.clusters < one.interval.n else ""
    return [
        f'<bdi>{_text(one.name, SHORT)}</bdi>{versions}<br><span class="soft">{direction(one.scale.better)}</span>',
        number(one.interval.value),
        _text(bounds(one.interval)),
        f"{one.scored}/{one.asked}",
        _text(counts(one.unscored), LONG),
        _text(counts(one.judged), SHORT),
        _text(one.interval.method if one.interval.low is not None else UNKNOWN) + clustered,
    ]


def _by_scale(metrics: Iterable[MetricResult]) -> dict[tuple[float, float], list[tuple[str, Interval]]]:
    groups: dict[tuple[float, float], list[tuple[str, Interval]]] = {}
    for one in metrics:
        if one.scale.low is not None and one.scale.high is not None:
            groups.setdefault((one.scale.low, one.scale.high), []).append((one.name, one.interval))
    return groups


def _comparison(report: Report, comparison: Comparison) -> Iterator[str]:
    first, second = report.arms
    yield "<section><h2>Differences</h2>"
    yield f"<p>Second minus first, over the {comparison.common} cases that both have. A difference is shown where p after Holm's "
    yield "correction over all metrics is at most .05.</p>"
    alone = [(arm.name, len(ids)) for arm, ids in zip(report.arms, comparison.alone, strict=True) if ids]
    yield from (f'<p class="note">{many} cases are in <bdi>{_text(name, SHORT)}</bdi> alone.</p>' for name, many in alone)
    names = ("#" + cut(first.name, 40), "#" + cut(second.name, 40))
    head = ("metric", "verdict", "#difference", f"{percent(report.level)} interval", *names, "#p", "#p (Holm)", "cases")
    yield from _table(head, map(_difference, comparison.metrics))
    for rows in _by_width(comparison.metrics):
        edge = max((abs(bound) for _, one in rows for bound in (one.low, one.high, one.value) if bound is not None), default=0)
        edge = edge * 1.1 or 1.0
        yield f"<figure>{forest(rows, -edge, edge, zero=True, name='differences with their intervals')}</figure>"
    yield "</section>"


def _difference(one: MetricDifference) -> list[str]:
    kind = one.verdict if one.verdict != "not shown" else "soft"
    more = ((one.only_first, "first"), (one.only_second, "second"))
    alone = "".join(f"<br>{many} more in the {which}" for many, which in more if many)
    pairs = f"{one.higher} ↑ {one.same} = {one.lower} ↓"
    return [
        f'<bdi>{_text(one.name, SHORT)}</bdi><br><span class="soft">{direction(one.scale.better)}</span>',
        f'<span class="{kind}">{one.verdict}</span>',
        number(one.difference.value, signed=True),
        _text(bounds(one.difference, signed=True)),
        number(one.first.value),
        number(one.second.value),
        escape(probability(one.p)),
        escape(probability(one.p_holm)),
        f'{one.difference.n} <span class="soft">{pairs}{alone}<br>{_text(one.test)}</span>',
    ]


def _by_width(metrics: Iterable[MetricDifference]) -> list[list[tuple[str, Interval]]]:
    """Metrics of one range share a plot; those without bounds have one each."""
    groups: dict[object, list[tuple[str, Interval]]] = {}
    for one in metrics:
        low, high = one.scale.low, one.scale.high
        groups.setdefault(high - low if low is not None and high is not None else one.name, []).append((one.name, one.difference))
    return list(groups.values())


def _distributions(report: Report) -> Iterator[str]:
    names = dict.fromkeys(one.name for arm in report.arms for one in arm.metrics if one.values)
    if not names:
        return
    yield '<section><h2>Distributions</h2><p class="soft">Each dot is a case; where there are many, bars count them. Below them '
    yield 'the mean with its interval.</p><div class="figures">'
    for name in names:
        found = [(arm, one) for arm in report.arms if (one := arm.metric(name)) and one.values]
        values = [value for _, one in found for value in one.values.values()]
        scale = found[0][1].scale
        low = scale.low if scale.low is not None else min(0.0, *values)
        high = scale.high if scale.high is not None else max(values)
        yield f"<figure><h3><bdi>{_text(name, SHORT)}</bdi></h3>"
        for arm, one in found:
            if len(report.arms) > 1:
                yield f"<figcaption><bdi>{_text(arm.name, SHORT)}</bdi></figcaption>"
            yield distribution(list(one.values.values()), low, high, one.interval, name=f"distribution of {name}")
        yield "</figure>"
    yield "</div></section>"


def _opened(report: Report, worst: int) -> Iterator[str]:
    wanted = opened(report, worst)
    if not wanted:
        return
    anchors = {key: f"case-{place}" for place, key in enumerate(wanted, 1)}
    if report.comparison is None:
        yield "<section><h2>Worst cases</h2>"
        for arm in report.arms:
            found = ((metric, arm.worst(metric.name, worst)) for metric in arm.metrics)
            yield from _table(("metric", "worst first"), (_links(metric, cases, anchors) for metric, cases in found if cases))
    else:
        yield "<section><h2>Cases that changed most</h2>"
        yield from _table(("case", "question", "metric", "change", "#first", "#second"), _changes(report, anchors))
    for key in wanted:
        yield from _case(report, key, anchors[key])
    yield "</section>"


def _links(metric: MetricResult, cases: Sequence[Case], anchors: dict[str, str]) -> list[str]:
    links = (
        f'<a href="#{anchors[case.id]}"><bdi>{_text(case.id, 60)}</bdi></a>&nbsp;{number(metric.values[case.id])}'
        for case in cases
    )
    return [f"<bdi>{_text(metric.name, SHORT)}</bdi>", ", ".join(links)]


def _changes(report: Report, anchors: dict[str, str]) -> Iterator[list[str]]:
    first = named(report.arms[0])
    ranges: dict[str, tuple[float, float]] = {}
    for name in {one.metric for one in report.comparison.changes} if report.comparison else ():
        results = [found for arm in report.arms if (found := arm.metric(name))]
        values = [value for result in results for value in result.values.values()]
        low, high = results[-1].scale.low, results[-1].scale.high
        ranges[name] = (min(values) if low is None else low, max(values) if high is None else high)
    for key, changes in changes_by_case(report):
        if key not in anchors:
            continue
        for place, one in enumerate(changes):
            link = f'<a href="#{anchors[key]}"><bdi>{_text(key, 60)}</bdi></a>' if not place else ""
            question = f"<bdi>{_text(first[key].question, SHORT)}</bdi>" if not place else ""
            drawn = change(one.first, one.second, *ranges[one.metric], one.gain)
            yield [link, question, f"<bdi>{_text(one.metric, SHORT)}</bdi>", drawn, number(one.first), number(one.second)]


def _case(report: Report, key: str, anchor: str) -> Iterator[str]:
    found = [(arm, cases[key]) for arm in report.arms if key in (cases := named(arm))]
    question = found[0][1].question
    yield f'<details id="{anchor}"><summary><b><bdi>{_text(key, 100)}</bdi></b>'
    yield f'<span class="soft"><bdi>{_text(question, SHORT)}</bdi></span></summary><div class="inside">'
    if question:
        yield f'<h4>Question</h4><p class="said" dir="auto">{_text(question, LONG)}</p>'
    if reference := found[0][1].reference:
        yield f'<h4>Expected</h4><p class="said" dir="auto">{_text(reference, LONG)}</p>'
    yield '<div class="arms">'
    for arm, case in found:
        yield "<div>"
        if len(report.arms) > 1:
            yield f"<h4><bdi>{_text(arm.name, SHORT)}</bdi></h4>"
        yield from _answered(case)
        yield "</div>"
    yield "</div></div></details>"


def _answered(case: Case) -> Iterator[str]:
    if case.answer:
        yield f'<h4>Answer</h4><p class="said" dir="auto">{_text(case.answer, LONG)}</p>'
    if case.error:
        yield f'<h4>Error</h4><p class="said worse" dir="auto">{_text(case.error, LONG)}</p>'
    rows = [_score(score) for score in case.scores.values()] + [_person(one) for one in case.people]
    if rows:
        yield "<h4>Scores</h4>"
        yield from _table(("metric", "#score", "by", "comment"), rows)
    yield f'<p class="soft">{_text(case.status)} <code>{_text(case.run_id, 60)}</code></p>'
    if case.trace:
        more = len(case.trace) - TRACE_LINES
        lines = [_text(line, TRACE_WIDTH) for line in case.trace[:TRACE_LINES]]
        lines += [f"… ({more:,} more lines)"] if more > 0 else []
        text = "\n".join(lines)
        yield f'<details><summary>Trace</summary><div class="inside"><pre class="trace">{text}</pre></div></details>'


def _score(score: Score) -> list[str]:
    value = (
        number(score.value) if score.value is not None else f'<span class="soft">unscored: {_text(score.reason, SHORT)}</span>'
    )
    by = f"{score.source}, {score.judged}" if score.judged else score.source
    return [f"<bdi>{_text(score.name, SHORT)}</bdi>", value, _text(by, SHORT), f"<bdi>{_text(score.comment, LONG)}</bdi>"]


def _person(one: PersonScore) -> list[str]:
    name, value, _, comment = _score(one.score)
    where = " on a step" if one.span_id else ""
    return [name, value, f"<bdi>{_text(one.author, 80) or 'a person'}</bdi>{where}", comment]


def _all(report: Report) -> Iterator[str]:
    for arm in report.arms:
        if not arm.cases:
            continue
        several = f" of <bdi>{_text(arm.name, SHORT)}</bdi>" if len(report.arms) > 1 else ""
        yield f'<details><summary>All {len(arm.cases):,} cases{several}</summary><div class="inside">'
        if len(arm.cases) > LISTED:
            yield f"<p>The first {LISTED:,} are listed.</p>"
        head = ("case", "status", *("#" + cut(one.name, 40) for one in arm.metrics), "question")
        yield from _table(head, (_listed(case, arm.metrics) for case in arm.cases[:LISTED]))
        yield "</div></details>"


def _listed(case: Case, metrics: Sequence[MetricResult]) -> list[str]:
    values = (number(metric.values.get(case.id)) for metric in metrics)
    return [f"<bdi>{_text(case.id, 60)}</bdi>", _text(case.status), *values, f"<bdi>{_text(case.question, 120)}</bdi>"]


def _reading(report: Report) -> Iterator[str]:
    level = percent(report.level)
    yield '<footer class="soft"><h2>How the numbers are made</h2>'
    yield "<p>A case without a score is unscored with a reason, and is in no mean. A rate (all values 0 or 1) has Wilson's "
    yield "interval, another mean the bootstrap's (BCa). Where cases share a thread, threads are counted and not cases. "
    yield f"Below two values there is no interval. An interval of {level} is made so that it holds the true value in {level} "
    yield "of such evaluations.</p>"
    yield "<p>Two experiments are compared case by case: rates by McNemar's exact test, means by a permutation test; with "
    yield f"several metrics p is corrected after Holm. What is drawn at random is drawn with seed {report.seed}.</p></footer>"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """`rows` are markup, `head` is text; a column whose head begins with # is one of numbers."""
    numeric = [name.startswith("#") for name in head]
    yield '<div class="wide"><table><thead><tr>'
    yield from (
        f"<th{' class=n' if is_n else ''}>{_text(name.removeprefix('#'))}</th>" for name, is_n in zip(head, numeric, strict=True)
    )
    yield "</tr></thead><tbody>"
    for row in rows:
        first, *others = row
        cells = "".join(
            f'<td class="{"n" if is_n else _width(cell)}">{cell}</td>' for cell, is_n in zip(others, numeric[1:], strict=True)
        )
        yield f"<tr><th>{first}</th>{cells}</tr>"
    yield "</tbody></table></div>"


def _width(cell: str) -> str:
    """Whether a cell is kept in one line, wraps, or is broad before it wraps."""
    longest = max(map(len, re.sub(r"<(?!br)[^>]*>", "", cell).split("<br>")))
    return "one" if longest <= 34 else "text" if longest > 80 else ""


def _text(text: str, limit: int = LONG) -> str:
    return escape(cut(text, limit))
