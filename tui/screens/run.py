"""Run: the trace of one run, and its span under the cursor in full; live while it works."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Container
from textual.timer import Timer
from textual.widgets import Static

from agentops.store import Balance
from agentops.store.pages import Pages, RunLine
from agentops.text import count, duration, moment, short_name
from tui.actions import bindings
from tui.screens.base import Base
from tui.screens.runs import INKS
from tui.text import flatten
from tui.widgets.detail import Detail, Part, span_parts
from tui.widgets.trace import Outline, Trace

_DETAIL_S = 0.08
_AT_WORK = ("running", "queued")


@dataclass(frozen=True, slots=True)
class _Read:
    """What one reading found: the run, the highest key of its spans, and their outline with what changed in it."""

    run: RunLine | None
    last: int
    outline: Outline
    changed: set[str] | None


class RunScreen(Base):
    """One run. `span` is where the cursor stands first."""

    where = "run"
    nothing = "This run has no spans on record yet.\n\nThey appear here as soon as they are written."
    BINDINGS: ClassVar[list[BindingType]] = [*bindings("run")]

    def __init__(self, run_id: str, span: str | None = None) -> None:
        super().__init__()
        self.run_id = run_id
        self._span = span
        self._run: RunLine | None = None
        self._missing = ""
        self._last = 0
        self._following = False
        self._pause: Timer | None = None
        self._shown = ""

    def body(self) -> ComposeResult:
        yield Static("", id="head", markup=False)
        with Container(id="halves"):
            yield Trace(id="trace")
            yield Detail(id="detail")

    def on_mount(self) -> None:
        self._trace.focus()
        self.set_interval(1.0, self._tick)

    @property
    def _trace(self) -> Trace:
        return self.query_one("#trace", Trace)

    def read(self, *, calm: bool = False) -> None:
        run_id, after, held = self.run_id, self._last, self._trace.outline

        def work(pages: Pages) -> _Read:
            run = pages.run_line(run_id)
            lines = pages.span_lines(run_id, after=after) + pages.span_lines_of(held.unsettled)
            outline, changed = held.with_spans(lines) if lines else (held, set())
            return _Read(run, max((line.key for line in lines), default=after), outline, changed)

        self.ask("spans", work, self._show, calm=calm)

    def _show(self, found: _Read) -> None:
        self._run = found.run
        trace = self._trace
        self._last = max(self._last, found.last)
        first = not trace.outline.spans
        trace.show_outline(found.outline, found.changed, self.terminal.now_ns())
        news = found.changed is None or bool(found.changed)
        if first and self._span is not None:
            trace.go_to(self._span)
        if self._following and news:
            trace.go_to_newest()
        self._show_head()
        if news and found.run is not None and found.run.status not in _AT_WORK:
            self.ask("balance", lambda pages: pages.balance(self.run_id), self._weigh, calm=True)
        self.show_nothing(not trace.line_count, instead_of=self.query_one("#halves"))
        if news:
            self._show_detail()

    def _weigh(self, balance: Balance) -> None:
        """Says so where the record does not have all that the run told."""
        self._missing = ""
        if not balance.balanced:
            kept = f"{balance.stored:,} stored" + (f", {balance.sampled_out:,} sampled out" if balance.sampled_out else "")
            self._missing = f"NOT BALANCED: {balance.emitted:,} spans emitted, {kept}, {balance.faults:,} faults of the recording"
            if balance.missing:
                self._missing += f", {balance.missing:,} contents missing"
        self._show_head()

    def _show_head(self) -> None:
        run = self._run
        if run is None:
            self.query_one("#head", Static).update(Text(f"✗ {flatten(self.run_id)} is not on record any more", style="bold red"))
            return
        mark, _ = INKS.get(run.status, ("?", ""))
        took = self.terminal.now_ns() - run.started_ns if run.status == "running" else run.duration_ns
        spans = len(self._trace.outline.spans)
        tokens = f"{count(run.input_tokens)} in ({count(run.cached_tokens)} cached), {count(run.output_tokens)} out"
        first = f"{mark} {run.status} · {short_name(flatten(run.graph))} · {run.id} · thread {run.thread_id}"
        second = f"{moment(run.started_ns)} · took {duration(took)} · {spans:,} spans · {tokens}"
        text = Text(flatten(first), style="bold", no_wrap=True, overflow="ellipsis")
        text.append(f"\n{flatten(second)}", style="not bold")
        if run.error:
            text.append(f"\n{flatten(run.error)}", style="red")
        if self._missing:
            text.append(f"\n{self._missing}", style="bold red")
        self.query_one("#head", Static).update(text)

    def _tick(self) -> None:
        """Open spans grow and the clock goes on without any change of the record."""
        if self._run is not None and self._run.status == "running" and self.is_current:
            self._trace.now_ns = self.terminal.now_ns()
            for index in self._trace.seen:
                if self._trace.outline.spans[self._trace.outline.visible[index][0]].status == "open":
                    self._trace.refresh_index(index)
            self._show_head()

    def on_lines_moved(self) -> None:
        # The detail follows when the cursor rests: a held key must not wait for it.
        if self._pause is not None:
            self._pause.stop()
        self._pause = self.set_timer(_DETAIL_S, self._show_detail)

    def _show_detail(self) -> None:
        line = self._trace.span
        if line is None or (line.id == self._shown and line.status != "open"):
            return
        span_id = line.id

        def deliver(parts: list[Part]) -> None:
            if self._trace.span is not None and self._trace.span.id == span_id:
                self._shown = span_id
                self.query_one("#detail", Detail).show_parts(parts)

        self.ask("detail", lambda pages: span_parts(pages, span_id), deliver)

    def action_problem(self) -> None:
        if not self._trace.next_problem():
            self.news("no span of this run failed or was stopped")

    def action_fold_all(self) -> None:
        self._trace.fold_all()

    def action_follow(self) -> None:
        self._following = not self._following
        self.news("the cursor stays on the newest span" if self._following else "the cursor stays where it is")
        if self._following:
            self._trace.go_to_newest()

    def action_detail(self) -> None:
        self.toggle_class("-detail")
        (self.query_one("#detail") if self.has_class("-detail") else self._trace).focus()

    def action_cancel(self) -> None:
        self.terminal.cancel(self.run_id)

    def action_replay(self) -> None:
        self.terminal.start_job(["replay", self.run_id])
