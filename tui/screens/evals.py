"""Evals: experiments with their scores, compared, and the cases behind a number down to their trace."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, cast

from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Container
from textual.widgets import Static

from agentops.records import RunStatus
from agentops.store import CaseRow, ExperimentRow, ScoreRow
from agentops.store.pages import Pages
from agentops.text import duration, moment, short_name
from tui.actions import bindings
from tui.screens.base import ListScreen
from tui.screens.runs import status_piece
from tui.text import as_text, flatten
from tui.widgets.detail import Detail, Part, score_parts
from tui.widgets.lines import Piece
from tui.widgets.table import Column, Table

Interval = Callable[[str, Sequence[float], Sequence[str]], tuple[float, float] | None]
"""The interval of a mean: of a score's name, values and the thread that each belongs to; None where there is none."""

NOTHING = """No experiments yet.

Score what is on record, or run a dataset through a graph:

    agentops eval last
    agentops eval --dataset cases.jsonl --graph rag"""


class Scale(NamedTuple):
    """A metric's bounds, `high` None where there is none, and which end of them is good: "high" or "low"."""

    low: float = 0.0
    high: float | None = 1.0
    better: str = "high"

    def goodness(self, value: float) -> float | None:
        """From 0, the worst, to 1; None where the metric has no bounds to tell."""
        if self.high is None:
            return None
        share = min(1.0, max(0.0, (value - self.low) / ((self.high - self.low) or 1.0)))
        return 1.0 - share if self.better == "low" else share


Scales = Mapping[str, Scale]


@dataclass(frozen=True, slots=True)
class Measured:
    """A metric of an experiment: the mean of `scored` values, its interval where there is one, and why others have none."""

    name: str
    scale: Scale
    scored: int
    mean: float | None
    interval: tuple[float, float] | None
    unscored: dict[str, int]


@dataclass(frozen=True, slots=True)
class Case:
    """A case, the latest score of each metric, and what people said."""

    row: CaseRow
    scores: dict[str, ScoreRow]
    people: tuple[ScoreRow, ...] = ()

    def value(self, name: str) -> float | None:
        return None if (row := self.scores.get(name)) is None else row.score.value


@dataclass(frozen=True, slots=True)
class Experiment:
    row: ExperimentRow
    counts: dict[str, int]


def cases_of(pages: Pages, experiment: str) -> list[Case]:
    """The cases of an experiment in the order of its dataset. A case that was scored again has its latest scores."""
    scores: dict[str, dict[str, ScoreRow]] = {}
    people: dict[str, list[ScoreRow]] = {}
    for row in pages.scores(experiment=experiment):
        if row.score.source == "human":
            people.setdefault(row.case_id or "", []).append(row)
        else:
            scores.setdefault(row.case_id or "", {})[row.score.name] = row
    return [Case(row, scores.get(row.case_id, {}), tuple(people.get(row.case_id, ()))) for row in pages.cases(experiment)]


def names_of(row: ExperimentRow, cases: Sequence[Case]) -> list[str]:
    """The metrics that were asked for, and others that are on record."""
    asked = row.settings.get("metrics")
    listed = map(str, asked) if isinstance(asked, list) else ()
    return list(dict.fromkeys([*listed, *(name for case in cases for name in case.scores)]))


def scales_of(names: Sequence[str], cases: Sequence[Case], known: Scales) -> dict[str, Scale]:
    """The scales of metrics: of one that is not known, what its values lie between, and more is better."""
    found = {}
    for name in names:
        values = [value for case in cases if (value := case.value(name)) is not None]
        found[name] = known.get(name) or Scale(min([0.0, *values]), max([1.0, *values]))
    return found


def measured(
    row: ExperimentRow, cases: Sequence[Case], known: Scales, interval: Interval | None, threads: Mapping[str, str]
) -> tuple[Measured, ...]:
    """The metrics of an experiment as its report has them: every case counts for each, with its latest score or the reason why
    it has none. `threads` are those of runs."""
    names = names_of(row, cases)
    scales = scales_of(names, cases, known)
    found = []
    for name in names:
        values, clusters, unscored = [], [], Counter[str]()
        for case in cases:
            score = case.scores.get(name)
            if score is not None and score.score.value is not None:
                values.append(score.score.value)
                clusters.append(threads.get(case.row.run_id or "", case.row.case_id))
            else:
                unscored[score.score.reason if score is not None else _why_none(case.row.status)] += 1
        mean = math.fsum(values) / len(values) if values else None
        span = interval(name, values, clusters) if interval and len(values) > 1 else None
        found.append(Measured(name, scales[name], len(values), mean, span, dict(unscored.most_common())))
    return tuple(found)


def _why_none(status: str) -> str:
    if status in ("done", "waiting"):
        return "not scored"
    return "not run yet" if status in ("queued", "running") else "the run failed" if status == "failed" else status


def metric_parts(metrics: Sequence[Measured]) -> list[Part]:
    """Means with their intervals. The longer a bar, the better."""
    parts = []
    for one in metrics:
        mean = "-" if one.mean is None else f"{one.mean:.3f}"
        span = f"  [{one.interval[0]:.3f}, {one.interval[1]:.3f}]" if one.interval else ""
        bar = "█" * round(20 * ((one.scale.goodness(one.mean) or 0.0) if one.mean is not None else 0.0))
        text = f"{one.name}{'  (less is better)' if one.scale.better == 'low' else ''}\n{mean}{span}  n={one.scored}  {bar}"
        if one.unscored:
            text += "\nunscored: " + ", ".join(f"{reason} {number}" for reason, number in one.unscored.items())
        parts.append(Part("", text, "plain", block=True))
    return parts


class EvalsScreen(ListScreen[Experiment]):
    """The experiments, newest first, and the scores of the one under the cursor."""

    where = "evals"
    section = "evals"
    nothing = NOTHING
    BINDINGS: ClassVar[list[BindingType]] = [*bindings("evals")]

    def __init__(self) -> None:
        super().__init__()
        self.marked: str | None = None
        self._measured: dict[str, tuple[Measured, ...]] = {}
        self._fresh: set[str] = set()

    def body(self) -> ComposeResult:
        def cases(one: Experiment) -> Piece:
            done, bad = one.counts.get("done", 0), one.counts.get("failed", 0) + one.counts.get("crashed", 0)
            return f"{done}/{one.row.cases}" + (f" ✗{bad}" if bad else ""), "bad" if bad else "plain"

        columns: list[Column[Experiment]] = [
            Column("", 1, lambda one: ("◆" if one.row.id == self.marked else "", "live")),
            Column("status", 11, lambda one: status_piece(cast("RunStatus", one.row.status))),
            Column("started", 19, lambda one: (moment(one.row.started_ns), "plain")),
            Column("name", 0, lambda one: (one.row.name, "strong")),
            Column("cases", 10, cases, right=True),
            Column("graph", 12, lambda one: (short_name(flatten(one.row.graph)), "plain")),
            Column("dataset", 0, lambda one: (one.row.dataset, "dim"), least=120),
        ]
        with Container(id="halves"):
            yield Table(columns, id="table")
            yield Detail(id="detail")

    def read(self, *, calm: bool = False) -> None:
        def work(pages: Pages) -> list[Experiment]:
            counts = pages.case_counts()
            return [Experiment(row, counts.get(row.id, {})) for row in pages.experiments(limit=500)]

        self.ask("list", work, self._show, calm=calm)

    def _show(self, found: list[Experiment]) -> None:
        held = self._table.row
        self._table.show_rows(found)
        if held is not None:
            places = [place for place, one in enumerate(found) if one.row.id == held.row.id]
            self._table.move_to(places[0] if places else 0, tell=False)
        # The scores that are shown stay until there are newer ones.
        self._fresh.clear()
        self.show_nothing(not found, instead_of=self.query_one("#halves"))
        self.on_lines_moved()

    def on_lines_moved(self) -> None:
        self._show_detail()
        one = self._table.row
        if one is None or one.row.id in self._fresh:
            return
        row, interval, scales = one.row, self.terminal.interval, self.terminal.scales

        def deliver(metrics: tuple[Measured, ...]) -> None:
            self._measured[row.id] = metrics
            self._fresh.add(row.id)
            self._show_detail()

        self.ask("metrics", lambda pages: _metrics(pages, row, scales, interval), deliver)

    def _show_detail(self) -> None:
        one = self._table.row
        parts: list[Part] = []
        if one is not None:
            row = one.row
            took = None if row.ended_ns is None else row.ended_ns - row.started_ns
            parts = [
                Part("name", row.name, "strong"),
                Part("id", row.id, "dim"),
                Part("dataset", f"{row.dataset}  {row.dataset_hash}"),
            ]
            parts += [Part("took", duration(took)), Part("settings", " ".join(as_text(dict(row.settings)).split()), "dim")]
            parts.append(Part("cases", ", ".join(f"{number} {name}" for name, number in sorted(one.counts.items()))))
            if row.error:
                parts.append(Part("error", row.error, "bad"))
            metrics = self._measured.get(row.id)
            parts += [Part("", "reading the scores ...", "dim")] if metrics is None else metric_parts(metrics)
        self.query_one("#detail", Detail).show_parts(parts)

    def action_open(self) -> None:
        if (one := self._table.row) is not None:
            self.app.push_screen(CasesScreen(one.row))

    def action_mark(self) -> None:
        if (one := self._table.row) is not None:
            self.marked = None if self.marked == one.row.id else one.row.id
            self._table.refresh()

    def action_compare(self) -> None:
        one = self._table.row
        if one is None or self.marked is None or self.marked == one.row.id:
            self.news("mark one experiment with v, and go to another")
            return
        self.terminal.start_job(["eval", "--compare", self.marked, one.row.id])


class CasesScreen(ListScreen[Case]):
    """The cases of an experiment with their scores, the worst first: of one metric, or of all. Enter opens the trace."""

    where = "cases"
    section = "evals"
    nothing = "This experiment has no cases on record yet."
    BINDINGS: ClassVar[list[BindingType]] = [*bindings("cases")]

    def __init__(self, experiment: ExperimentRow) -> None:
        super().__init__()
        self._experiment = experiment
        self._cases: list[Case] = []
        self._scales: dict[str, Scale] = {}
        self._metric: str | None = None

    def body(self) -> ComposeResult:
        def worst(one: Case) -> Piece:
            name = self._metric or _worst(one, self._scales)[1]
            value = one.value(name)
            return ("", "dim") if value is None else (f"{value:.3f}  {name}", "plain")

        columns: list[Column[Case]] = [
            Column("status", 11, lambda one: status_piece(one.row.status)),
            Column("case", 20, lambda one: (one.row.case_id, "strong")),
            Column("worst score", 26, worst),
            Column("run", 30, lambda one: (one.row.run_id or "", "dim"), least=100),
            Column("error", 0, lambda one: (one.row.error or "", "bad")),
        ]
        yield Static("", id="summary", markup=False)
        with Container(id="halves"):
            yield Table(columns, id="table")
            yield Detail(id="detail")

    def read(self, *, calm: bool = False) -> None:
        key = self._experiment.id
        self.ask("list", lambda pages: cases_of(pages, key), self._show, calm=calm)

    def _show(self, cases: list[Case]) -> None:
        self._cases = cases
        self._scales = scales_of(names_of(self._experiment, cases), cases, self.terminal.scales)
        self._metric = self._metric if self._metric in self._scales else None
        self._order(to_first=False)

    def _order(self, *, to_first: bool) -> None:
        name, scales = self._metric, self._scales
        found = sorted(self._cases, key=lambda case: _badness(case, scales) if name is None else _by(case, name, scales[name]))
        held = None if to_first else self._table.row
        self._table.show_rows(found)
        places = [place for place, one in enumerate(found) if held is not None and one.row.case_id == held.row.case_id]
        if found:
            self._table.move_to(places[0] if places else 0, tell=False)
        about = f"{self._experiment.name} · {self._experiment.id} · the worst first by "
        if name is None:
            about += "all metrics that have bounds"
        else:
            scored = sum(case.value(name) is not None for case in found)
            about += f"{name}: {scored:,} of {len(found):,} cases are scored, {scales[name].better} is better"
        self.query_one("#summary", Static).update(flatten(about))
        self.show_nothing(not found, instead_of=self.query_one("#halves"))
        self.on_lines_moved()

    def on_lines_moved(self) -> None:
        one = self._table.row
        parts: list[Part] = []
        if one is not None:
            parts = [Part("case", one.row.case_id, "strong"), Part("run", one.row.run_id or "it has not run")]
            if one.row.error:
                parts.append(Part("error", one.row.error, "bad"))
            parts += score_parts([*one.scores.values(), *one.people])
        self.query_one("#detail", Detail).show_parts(parts)

    def action_open(self) -> None:
        one = self._table.row
        if one is None or one.row.run_id is None:
            self.news("this case has no run on record")
            return
        self.terminal.open_run(one.row.run_id)

    def action_metric(self) -> None:
        names: list[str | None] = [None, *self._scales]
        place = names.index(self._metric) if self._metric in names else 0
        self._metric = names[(place + 1) % len(names)]
        self._order(to_first=True)


def _worst(one: Case, scales: Scales) -> tuple[float, str]:
    """The goodness of a case's worst score, and which it is; above 1 where it has none that can be told."""
    found = [
        (goodness, name)
        for name, scale in scales.items()
        if (value := one.value(name)) is not None and (goodness := scale.goodness(value)) is not None
    ]
    return min(found, default=(2.0, ""))


def _badness(one: Case, scales: Scales) -> tuple[bool, float, int]:
    return one.row.status == "done", _worst(one, scales)[0], one.row.place


def _by(one: Case, name: str, scale: Scale) -> tuple[bool, float, int]:
    value = one.value(name)
    return value is None, 0.0 if value is None else -value if scale.better == "low" else value, one.row.place


def _metrics(pages: Pages, row: ExperimentRow, known: Scales, interval: Interval | None) -> tuple[Measured, ...]:
    cases = cases_of(pages, row.id)
    return measured(row, cases, known, interval, pages.threads({case.row.run_id for case in cases if case.row.run_id}))
