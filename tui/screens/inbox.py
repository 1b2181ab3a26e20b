"""Inbox: what runs wait for, and the answers: approve, edit, reject. The run then goes on in a process of its own."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Container
from textual.widgets import Static

from agentops.errors import AgentOpsError
from agentops.records import Decision, Interrupt
from agentops.store import RunRow
from agentops.store.pages import Pages
from agentops.text import moment, short_name
from tui.actions import bindings
from tui.screens.base import ListScreen
from tui.screens.dialogs import Write
from tui.text import as_text, flatten
from tui.verbs import answer_words, answers
from tui.widgets.detail import Detail, Part, content, content_parts
from tui.widgets.table import Column, Table

MOST = 500
NOTHING = """No run waits for an answer.

A run comes here when its graph asks a person: when a tool wants an approval, or a node calls
`approve` or `ask`. Try one in another terminal:

    agentops run assistant "Make a note: tea at four." """


@dataclass(frozen=True, slots=True)
class Asked:
    """A question of a waiting run; `interrupt` is None where it is not on record."""

    run: RunRow
    interrupt: Interrupt | None
    given: str


class InboxScreen(ListScreen[Asked]):
    """The questions, oldest first, and the one under the cursor in full."""

    where = "inbox"
    section = "inbox"
    nothing = NOTHING
    BINDINGS: ClassVar[list[BindingType]] = [*bindings("inbox")]

    def body(self) -> ComposeResult:
        columns: list[Column[Asked]] = [
            Column("since", 19, lambda one: (moment(one.run.ended_ns or one.run.started_ns), "plain")),
            Column("asks", 10, lambda one: (one.interrupt.kind if one.interrupt else "?", "warn")),
            Column("graph", 14, lambda one: (short_name(flatten(one.run.graph)), "strong")),
            Column(
                "question", 0, lambda one: (one.interrupt.question if one.interrupt else "what it asks is not on record", "plain")
            ),
            Column("node", 16, lambda one: (one.interrupt.node if one.interrupt else "", "dim"), least=120),
        ]
        yield Static("", id="summary", markup=False)
        with Container(id="halves"):
            yield Table(columns, id="table")
            yield Detail(id="detail")

    def read(self, *, calm: bool = False) -> None:
        self.ask("list", _waiting, self._show, calm=calm)

    def _show(self, answer: tuple[list[Asked], int]) -> None:
        found, more = answer
        held = self._table.row
        self._table.show_rows(found)
        if held is not None:
            same = [place for place, one in enumerate(found) if _same(one, held)]
            if same:
                self._table.move_to(same[0])
            else:
                # Whoever is about to answer must not answer another one that stands in its place.
                self._table.choose_none()
                self.news("the question that was chosen is not asked any more", "yellow")
        summary = self.query_one("#summary", Static)
        summary.display = bool(more)
        summary.update(f"{more:,} older run{'s wait' if more > 1 else ' waits'} too and {'are' if more > 1 else 'is'} not shown")
        self.show_nothing(not found, instead_of=self.query_one("#halves"))
        self._show_detail()

    def on_lines_moved(self) -> None:
        self._show_detail()

    def _show_detail(self) -> None:
        one = self._table.row
        parts: list[Part] = []
        if one is not None:
            parts = [Part("run", f"{one.run.id}  {one.run.graph}  thread {one.run.thread_id}", "strong")]
            if one.given:
                parts.append(Part("asked", one.given, "dim"))
            if one.interrupt is not None:
                asked = one.interrupt
                parts += [Part(asked.kind, asked.question, "warn"), Part("node", asked.node, "dim")]
                if asked.content is not None:
                    parts += content_parts("proposed", asked.content)
                if asked.schema is not None:
                    parts.append(Part("it must fit", as_text(asked.schema), "dim", block=True))
        self.query_one("#detail", Detail).show_parts(parts)

    def action_open(self) -> None:
        if (one := self._table.row) is not None:
            self.terminal.open_run(one.run.id)

    def action_approve(self) -> None:
        one = self._asked()
        if one is None:
            return
        if one[1].kind == "question" and not self._yes_or_no(one[1]):
            self.news("a question wants an answer: press e and write it")
            return
        self._send(one, asdict(Decision("approve")) if one[1].kind != "question" else True)

    def action_reject(self) -> None:
        one = self._asked()
        if one is None:
            return
        if one[1].kind == "pause":
            self.news("nothing is proposed here; the run only waits to go on: press a")
            return
        if one[1].kind == "question":
            self.news("a question wants an answer: press e and write it")
            return
        asked = one

        def send(reason: str | None) -> None:
            if reason is not None:
                self._send(asked, asdict(Decision("reject", reason=reason.strip())))

        self.app.push_screen(Write("Why is it refused? The model may read it. Nothing is needed."), send)

    def action_edit(self) -> None:
        one = self._asked()
        if one is None:
            return
        asked = one[1]
        if asked.kind == "pause":
            self.news("nothing is proposed here; the run only waits to go on: press a")
            return
        proposed = asked.content if asked.kind == "approval" else None
        text = "" if proposed is None else as_text(proposed)
        if not Write.fits(text):
            self.news(f"this is too long to be edited here; use: agentops resume {one[0].id} --edit FILE", "yellow")
            return
        whole = one

        def send(given: str | None) -> None:
            if given is None:
                return
            if asked.kind == "question":
                self._send(whole, _answer(given, asked))
                return
            try:
                edited = given if isinstance(proposed, str) else json.loads(given)
            except (ValueError, RecursionError) as error:
                self.news(f"nothing was sent: this is no JSON: {error}", "red")
                return
            self._send(whole, asdict(Decision("edit", edited)))

        title = (
            asked.question
            if asked.kind == "question"
            else f"Edit what is proposed{'' if isinstance(proposed, str) else ' (JSON)'}"
        )
        self.app.push_screen(Write(title, text), send)

    def _asked(self) -> tuple[RunRow, Interrupt] | None:
        one = self._table.row
        if one is None:
            self.news("no question is chosen: choose one with the arrows" if self._table.line_count else "", "yellow")
        if one is not None and one.interrupt is None:
            self.news(f"what it asks is not on record; answer with: agentops resume {one.run.id} --answer TEXT", "yellow")
        return None if one is None or one.interrupt is None else (one.run, one.interrupt)

    @staticmethod
    def _yes_or_no(asked: Interrupt) -> bool:
        return asked.schema is not None and asked.schema.get("type") == "boolean"

    def _send(self, one: tuple[RunRow, Interrupt], answer: Any) -> None:
        run, asked = one
        self.terminal.start_job(answer_words(run.id), given=answers(asked.id, asked.kind, answer))


def _answer(text: str, asked: Interrupt) -> Any:
    """What a person wrote, as JSON where the question wants something else than a text."""
    if asked.schema is None or asked.schema.get("type") == "string":
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _same(one: Asked, other: Asked) -> bool:
    return one.run.id == other.run.id and (one.interrupt and one.interrupt.id) == (other.interrupt and other.interrupt.id)


def _waiting(pages: Pages) -> tuple[list[Asked], int]:
    """The questions, and how many more runs wait than they are of."""
    found: list[Asked] = []
    runs = pages.runs(status="waiting", limit=MOST)
    for run in reversed(runs):
        try:
            pending: tuple[Interrupt | None, ...] = pages.pending(run) or (None,)
        except AgentOpsError:
            pending = (None,)
        given = content(pages, run.input_hash) if run.input_hash else ""
        if isinstance(given, dict) and len(given) == 1 and isinstance(only := next(iter(given.values())), str):
            given = only
        found += [Asked(run, one, as_text(given)) for one in pending]
    return found, max(0, pages.statuses().get("waiting", 0) - len(runs))
