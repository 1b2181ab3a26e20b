"""Evals: experiments with their scores, compared, and the cases behind a number down to their trace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Container
from textual.widgets import Static

from agentops.records import RunStatus
from agentops.store import CaseRow, ExperimentRow, ScoreRow
from agentops.store.pages import Pages
from agentops.text import duration, moment, short_name
from tui.actions import bindings
from tui.screens.base import Base
from tui.screens.runs import status_piece
from tui.text import as_text, flatten
from tui.widgets.detail import Detail, Part, score_parts
from tui.widgets.lines import Lines, Piece
from tui.widgets.table import Column, Table

Interval = Callable[[str, Sequence[float], Sequence[str]], tuple[float, float] | None]
"""The interval of a mean: of a score's name, values and the thread that each belongs to; None where there is none."""

NOTHING = """No experiments yet.

Score what is on record, or run a dataset through a graph:

    agentops eval last
    agentops eval --dataset cases.jsonl --graph rag"""


@dataclass(frozen=True, slots=True)
class Measured:
    """A metric of an experiment: the mean of `scored` values, its interval where there is one, and why others have none."""

    name: str
    scored: int
    mean: float | None
    interval: tuple[float, float] | None
    unscored: dict[str, int]


@dataclass(frozen=True, slots=True)
class Experiment:
    row: ExperimentRow
    counts: dict[str, int]
    metrics: tuple[Measured, ...]


def measured(rows: Sequence[ScoreRow], interval: Interval | None, threads: dict[str, str]) -> tuple[Measured, ...]:
    """The metrics of scores, by name. A person's score is a metric of its own."""
    named: dict[str, list[ScoreRow]] = {}
    for row in rows:
        named.setdefault(row.score.name if row.score.source != "human" else f"{row.score.name} (people)", []).append(row)
    found = []
    for name, group in sorted(named.items()):
        scored = [(row.score.value, threads.get(row.run_id, row.run_id)) for row in group if row.score.value is not None]
        values = [value for value, _ in scored]
        unscored: dict[str, int] = {}
        for row in group:
            if row.score.value is None:
                unscored[row.score.reason] = unscored.get(row.score.reason, 0) + 1
        mean = sum(values) / len(values) if values else None
        threads_of = [thread for _, thread in scored]
        span = interval(group[0].score.name, values, threads_of) if interval and len(values) > 1 else None
        found.append(Measured(name, len(values), mean, span, unscored))
    return tuple(found)


def metric_parts(metrics: Sequence[Measured]) -> list[Part]:
    parts = []
    for one in metrics:
        mean = "-" if one.mean is None else f"{one.mean:.3f}"
        span = f"  [{one.interval[0]:.3f}, {one.interval[1]:.3f}]" if one.interval else ""
        bar = "█" * round(20 * min(1.0, max(0.0, one.mean or 0.0)))
        text = f"{one.name}\n{mean}{span}  n={one.scored}  {bar}"
        if one.unscored:
            text += "\nunscored: " + ", ".join(f"{reason} {number}" for reason, number in sorted(one.unscored.items()))
        parts.append(Part("", text, "plain", block=True))
    return parts


class EvalsScreen(Base):
    """The experiments, newest first, and the scores of the one under the cursor."""

    where = "evals"
    section = "evals"
    nothing = NOTHING
    BINDINGS: ClassVar[list[BindingType]] = [*bindings("evals")]

    def __init__(self) -> None:
        super().__init__()
        self.marked: str | None = None

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

    def on_mount(self) -> None:
        self._table.focus()

    @property
    def _table(self) -> Table[Experiment]:
        return cast("Table[Experiment]", self.query_one("#table", Table))

    def read(self, *, calm: bool = False) -> None:
        held = self._table.row
        wanted = held.row.id if held else None
        interval = self.terminal.interval

        def work(pages: Pages) -> list[Experiment]:
            counts, rows = pages.case_counts(), pages.experiments(limit=500)
            # Scores of the one that is looked at; those of the others when the cursor comes to them.
            first = wanted or (rows[0].id if rows else None)
            return [
                Experiment(row, counts.get(row.id, {}), _metrics(pages, row.id, interval) if row.id == first else ())
                for row in rows
            ]

        self.ask("list", work, self._show, calm=calm)

    def _show(self, found: list[Experiment]) -> None:
        held = self._table.row
        self._table.show_rows(found)
        if held is not None:
            places = [place for place, one in enumerate(found) if one.row.id == held.row.id]
            self._table.move_to(places[0] if places else 0, tell=False)
        self.show_nothing(not found, instead_of=self.query_one("#halves"))
        self._show_detail()

    def on_lines_moved(self) -> None:
        self._show_detail()
        one = self._table.row
        if one is not None and not one.metrics:
            key, interval = one.row.id, self.terminal.interval

            def deliver(metrics: tuple[Measured, ...]) -> None:
                for place, row in self._table.rows.items():
                    if row.row.id == key:
                        self._table.rows[place] = Experiment(row.row, row.counts, metrics)
                self._show_detail()

            self.ask("metrics", lambda pages: _metrics(pages, key, interval), deliver)

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
            parts += [Part("took", duration(took)), Part("settings", as_text(dict(row.settings)).replace("\n", " "), "dim")]
            parts.append(Part("cases", ", ".join(f"{number} {name}" for name, number in sorted(one.counts.items()))))
            if row.error:
                parts.append(Part("error", row.error, "bad"))
            parts += metric_parts(one.metrics)
        self.query_one("#detail", Detail).show_parts(parts)

    def on_lines_chosen(self, message: Lines.Chosen) -> None:
        self.action_open()

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


@dataclass(frozen=True, slots=True)
class Case:
    row: CaseRow
    scores: tuple[ScoreRow, ...]


class CasesScreen(Base):
    """The cases of an experiment with their scores, the worst first; Enter opens the trace."""

    where = "cases"
    section = "evals"
    nothing = "This experiment has no cases on record yet."
    BINDINGS: ClassVar[list[BindingType]] = [*bindings("cases")]

    def __init__(self, experiment: ExperimentRow) -> None:
        super().__init__()
        self._experiment = experiment

    def body(self) -> ComposeResult:
        def worst(one: Case) -> Piece:
            scored = [(row.score.value, row.score.name) for row in one.scores if row.score.value is not None]
            return ("{:.3f}  {}".format(*min(scored)), "plain") if scored else ("", "dim")

        columns: list[Column[Case]] = [
            Column("status", 11, lambda one: status_piece(one.row.status)),
            Column("case", 20, lambda one: (one.row.case_id, "strong")),
            Column("lowest score", 26, worst),
            Column("run", 30, lambda one: (one.row.run_id or "", "dim"), least=100),
            Column("error", 0, lambda one: (one.row.error or "", "bad")),
        ]
        yield Static(flatten(f"{self._experiment.name}  {self._experiment.id}"), id="summary", markup=False)
        with Container(id="halves"):
            yield Table(columns, id="table")
            yield Detail(id="detail")

    def on_mount(self) -> None:
        self._table.focus()

    @property
    def _table(self) -> Table[Case]:
        return cast("Table[Case]", self.query_one("#table", Table))

    def read(self, *, calm: bool = False) -> None:
        key = self._experiment.id

        def work(pages: Pages) -> list[Case]:
            by_case: dict[str, list[ScoreRow]] = {}
            for row in pages.scores(experiment=key):
                by_case.setdefault(row.case_id or "", []).append(row)
            cases = [Case(row, tuple(by_case.get(row.case_id, ()))) for row in pages.cases(key)]
            return sorted(cases, key=_badness)

        self.ask("list", work, self._show, calm=calm)

    def _show(self, found: list[Case]) -> None:
        held = self._table.row
        self._table.show_rows(found)
        if held is not None:
            places = [place for place, one in enumerate(found) if one.row.case_id == held.row.case_id]
            self._table.move_to(places[0] if places else 0, tell=False)
        self.show_nothing(not found, instead_of=self.query_one("#halves"))
        self.on_lines_moved()

    def on_lines_moved(self) -> None:
        one = self._table.row
        parts: list[Part] = []
        if one is not None:
            parts = [Part("case", one.row.case_id, "strong"), Part("run", one.row.run_id or "it has not run")]
            if one.row.error:
                parts.append(Part("error", one.row.error, "bad"))
            parts += score_parts(one.scores)
        self.query_one("#detail", Detail).show_parts(parts)

    def on_lines_chosen(self, message: Lines.Chosen) -> None:
        self.action_open()

    def action_open(self) -> None:
        one = self._table.row
        if one is None or one.row.run_id is None:
            self.news("this case has no run on record")
            return
        self.terminal.open_run(one.row.run_id)


def _badness(one: Case) -> tuple[bool, float, int]:
    scored = [row.score.value for row in one.scores if row.score.value is not None]
    return one.row.status == "done", min(scored, default=2.0), one.row.place


def _metrics(pages: Pages, key: str, interval: Interval | None) -> tuple[Measured, ...]:
    rows = pages.scores(experiment=key)
    return measured(rows, interval, pages.threads({row.run_id for row in rows}))
