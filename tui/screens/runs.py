"""Runs: all that were recorded, live, filtered and sorted."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import ClassVar, cast

from textual.app import ComposeResult
from textual.binding import BindingType
from textual.widgets import Input, Static

from agentops.errors import UsageError
from agentops.records import RunStatus
from agentops.store.pages import SORTS, Pages, RunFilter, RunLine, Sort
from agentops.text import count, duration, moment, short_name
from tui.actions import bindings
from tui.query import HELP, LONGEST, parse
from tui.screens.base import ListScreen
from tui.text import flatten
from tui.widgets.lines import Piece
from tui.widgets.table import Column, Table

_FIRST = 300
INKS: dict[RunStatus, tuple[str, str]] = {
    "queued": ("○", "dim"),
    "running": ("▶", "live"),
    "waiting": ("⏸", "warn"),
    "done": ("✓", "good"),
    "failed": ("✗", "bad"),
    "cancelled": ("■", "warn"),
    "crashed": ("✗", "bad"),
}
NOTHING = """No runs yet.

Start one in another terminal, and it appears here while it works:

    agentops run assistant "What is 17 * 23?"

To see everything at once, with a model, documents and a trace:

    agentops demo"""


def status_piece(status: RunStatus) -> Piece:
    mark, ink = INKS.get(status, ("?", "bad"))
    return f"{mark} {status}", ink


@dataclass(frozen=True, slots=True)
class _Seen:
    """What one reading found: the keys in order, rows of some, and how many runs have which status; which run was the last to be
    recorded, by key and id; in how many inputs words were looked for, where not in all."""

    keys: array[int]
    rows: dict[int, RunLine]
    counts: dict[str, int]
    last: tuple[int, str]
    whole: bool
    searched: int | None

    @property
    def total(self) -> int:
        return sum(self.counts.values())


class RunsScreen(ListScreen[RunLine]):
    """The list of runs."""

    where = "runs"
    nothing = NOTHING
    BINDINGS: ClassVar[list[BindingType]] = [*bindings("runs")]

    def body(self) -> ComposeResult:
        yield Input(placeholder=HELP, id="filter", select_on_focus=False, max_length=LONGEST)
        yield Static("", id="summary", markup=False)
        now = self.terminal.now_ns

        def took(run: RunLine) -> Piece:
            return (duration(now() - run.started_ns), "live") if run.status == "running" else (duration(run.duration_ns), "plain")

        columns: list[Column[RunLine]] = [
            Column("status", 11, lambda run: status_piece(run.status), sort="status"),
            Column("started", 19, lambda run: (moment(run.started_ns), "plain"), sort="started"),
            Column("time", 9, took, right=True, sort="time"),
            Column("tokens", 8, lambda run: (count(run.input_tokens + run.output_tokens), "plain"), right=True, sort="tokens"),
            Column("graph", 0, lambda run: (short_name(flatten(run.graph)), "strong"), sort="graph"),
            Column("thread", 20, lambda run: (run.thread_id, "dim"), least=140),
            Column("run", 30, lambda run: (run.id, "dim"), least=110),
            Column("error", 0, lambda run: (run.error or "", "bad"), least=170),
        ]
        yield Table(columns, id="table")

    def on_mount(self) -> None:
        self._seen: _Seen | None = None
        self._asked_for: object = None
        self._shown_for: object = None
        self.query_one("#filter").display = False

    def read(self, *, calm: bool = False) -> None:
        state = self.terminal.state
        try:
            wanted = parse(state.filter, self.terminal.now_ns())
        except UsageError as error:
            self.news(f"{error}; {error.hint}", "red")
            return
        sort, descending = cast("Sort", state.sort), state.descending
        asked = (state.filter, sort, descending)
        # The list that is shown, which may be another than the last that was asked for.
        held = self._seen if asked == self._shown_for and self._seen is not None and self._seen.whole else None
        self._asked_for = asked
        # Only what is new is read where what was there cannot have moved, come or gone.
        stays = RunFilter(graphs=wanted.graphs, threads=wanted.threads)
        grows = held if sort == "started" and descending and wanted == stays else None
        seen = self._table.seen_keys()
        full = held is not None or calm

        def work(pages: Pages) -> _Seen:
            last = pages.last_run_key()
            counts = pages.statuses()
            keys = _grown(pages, grows, wanted, sum(counts.values())) if grows is not None else None
            whole = keys is not None or full
            if keys is None:
                keys = pages.run_keys(wanted, sort, descending=descending, limit=None if full else _FIRST)
                whole = full or len(keys) < _FIRST
            searched = pages.searched if wanted.words else None
            # Home and End find their rows here.
            rows = pages.run_lines({*keys[:100], *keys[-100:], *seen, last})
            return _Seen(keys, rows, counts, (last, rows[last].id if last in rows else ""), whole, searched)

        def deliver(found: _Seen) -> None:
            if asked != self._asked_for:
                return
            self._seen = found
            table = self._table
            table.sorted_by = (sort, descending)
            table.show(found.keys, to_first=state.follow or asked != self._shown_for)
            self._shown_for = asked
            table.give(found.rows)
            self.terminal.counts = found.counts
            self._summarise(found)
            if not found.whole:
                self.read(calm=True)

        self.ask("list", work, deliver, calm=calm)

    def _summarise(self, found: _Seen) -> None:
        state = self.terminal.state
        total = found.total
        shown = f"{len(found.keys):,} of {total:,} runs" if state.filter else f"{total:,} runs"
        by = ", ".join(f"{number:,} {name}" for name, number in sorted(found.counts.items()))
        bounded = f"only the newest {found.searched:,} inputs searched" if found.searched is not None else ""
        filtered = f"filter: {state.filter}" if state.filter else ""
        parts = [shown, bounded, by, filtered, "following" if state.follow else ""]
        self.query_one("#summary", Static).update(flatten(" · ".join(part for part in parts if part)))
        none = f"No run fits the filter: {flatten(state.filter)}\n\nPress / and change it, or Esc there to clear it."
        said = NOTHING if not total else none + (f"\n\n{bounded.capitalize()}." if bounded else "")
        self.show_nothing(not found.keys, instead_of=self._table, said=said)
        self.terminal.tell_bar()

    def on_table_wanted(self, message: Table.Wanted) -> None:
        keys = message.keys
        self.ask("rows", lambda pages: pages.run_lines(keys), self._table.give)

    def on_table_head_clicked(self, message: Table.HeadClicked) -> None:
        state = self.terminal.state
        state.descending = not state.descending if state.sort == message.sort else True
        state.sort = message.sort
        self.read()

    def action_open(self) -> None:
        if (run := self._table.row) is not None:
            self.terminal.open_run(run.id)

    def action_filter(self) -> None:
        box = self.query_one("#filter", Input)
        box.display = True
        box.value = self.terminal.state.filter
        box.focus()

    def on_input_changed(self, event: Input.Changed) -> None:
        self._filter_by(event.value, quiet=True)

    def on_input_submitted(self, event: Input.Submitted) -> None:
        if self._filter_by(event.value):
            self._close_filter()

    def on_key(self, event: object) -> None:
        if getattr(event, "key", "") == "escape" and self.query_one("#filter").has_focus:
            self._filter_by("")
            self._close_filter()
            event.stop()  # type: ignore[attr-defined]

    def _close_filter(self) -> None:
        self.query_one("#filter").display = False
        self._table.focus()

    def _filter_by(self, text: str, *, quiet: bool = False) -> bool:
        try:
            parse(text, self.terminal.now_ns())
        except UsageError as error:
            if not quiet:
                self.news(f"{error}; {error.hint}", "red")
            return False
        if text != self.terminal.state.filter:
            self.terminal.state.filter = text
            self.news("")
            self.read()
        return True

    def action_sort(self) -> None:
        state = self.terminal.state
        state.sort = SORTS[(SORTS.index(cast("Sort", state.sort)) + 1) % len(SORTS)]
        state.descending = state.sort not in ("graph", "status")
        self.read()

    def action_reverse(self) -> None:
        self.terminal.state.descending = not self.terminal.state.descending
        self.read()

    def action_follow(self) -> None:
        state = self.terminal.state
        state.follow = not state.follow
        self.news("the cursor stays on the first row" if state.follow else "the cursor stays where it is")
        self.read()

    def action_cancel(self) -> None:
        if (run := self._table.row) is not None:
            self.terminal.cancel(run.id)

    def action_replay(self) -> None:
        if (run := self._table.row) is not None:
            self.terminal.start_job(["replay", run.id])


def _grown(pages: Pages, held: _Seen, wanted: RunFilter, total: int) -> array[int] | None:
    """The keys of a list, newest first, with those of runs that were recorded since; None where runs went, or came that started
    before others: then all have to be read."""
    upto, run_id = held.last
    rows = pages.run_lines([upto])
    new = pages.new_run_keys(RunFilter(), upto)
    if (rows[upto].id if upto in rows else "") != run_id or total != held.total + len(new):
        return None
    mine = pages.new_run_keys(wanted, upto) if wanted != RunFilter() else new
    if mine and held.keys:
        ends = pages.run_lines([mine[-1], held.keys[0]])
        if len(ends) < 2 or ends[mine[-1]].started_ns < ends[held.keys[0]].started_ns:
            return None
    return mine + held.keys
