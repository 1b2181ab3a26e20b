"""What opens above a screen: a text to write, a question to confirm, the words of a verb at work, and the help."""

from __future__ import annotations

from difflib import SequenceMatcher
from typing import ClassVar

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import Footer, Static, TextArea

from agentops.text import clean
from tui.actions import ACTIONS
from tui.text import PREVIEW_BYTES, flatten
from tui.verbs import Job
from tui.widgets.detail import Detail, Part


def _title(text: str) -> Static:
    return Static(Text(flatten(text), style="bold", overflow="ellipsis"), classes="title", markup=False)


class Write(ModalScreen[str | None]):
    """Asks for a text, beginning with one; None when it is given up. `title` and `text` are foreign text.

    What of it cannot be shown stays in the lines that are not changed; a changed line is what was seen."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+s", "send", "Send", priority=True),
        Binding("escape", "leave", "Give up", priority=True),
    ]

    def __init__(self, title: str, text: str = "") -> None:
        super().__init__()
        self._title = title
        self._text = text
        self._shown = "\n".join(map(clean, text.split("\n")))

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog"):
            yield _title(self._title)
            if hidden := len(self._text) - len(self._shown):
                said = f"{hidden:,} characters that cannot be shown stay where they are, in the lines that you do not change"
                yield Static(Text(said, style="yellow"), id="hidden", markup=False)
            yield TextArea(self._shown, soft_wrap=True, show_line_numbers=False, id="text")
            yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        self.query_one("#text").focus()

    def action_send(self) -> None:
        self.dismiss(restored(self._text, self._shown, self.query_one("#text", TextArea).text))

    def action_leave(self) -> None:
        self.dismiss(None)

    @staticmethod
    def fits(text: str) -> bool:
        """Whether a text is short enough to be edited here; a longer one would hold up the screen for seconds."""
        return len(text.encode("utf-8", "replace")) <= 4 * PREVIEW_BYTES


def restored(text: str, shown: str, written: str) -> str:
    """What was written, with the lines of `text` for those that are as they were `shown`, line by line."""
    if text == shown:
        return written
    lines, before, after = text.split("\n"), shown.split("\n"), written.split("\n")
    for start, at, size in SequenceMatcher(None, before, after, autojunk=False).get_matching_blocks():
        after[at : at + size] = lines[start : start + size]
    return "\n".join(after)


class Confirm(ModalScreen[bool]):
    """Asks whether to do something. `question` is foreign text."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("y,enter", "yes", "Yes", key_display="y"),
        Binding("n,escape", "no", "No", key_display="n"),
    ]

    def __init__(self, question: str) -> None:
        super().__init__()
        self._question = question

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog small"):
            yield _title(self._question)
            yield Footer(show_command_palette=False)

    def action_yes(self) -> None:
        self.dismiss(True)

    def action_no(self) -> None:
        self.dismiss(False)


class JobScreen(ModalScreen[None]):
    """What a verb that was started says. Leaving it does not stop the verb."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,q,l", "leave", "Leave; it goes on", key_display="Esc")]

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.job = job
        self._shown: tuple[str, int | None] = ("\0", None)

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog"):
            yield _title(self.job.line)
            yield Detail(id="said")
            yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        self.query_one("#said").focus()
        self.call_after_refresh(self.show)

    def show(self) -> None:
        """Shows what is new."""
        job = self.job
        if (job.text, job.code) == self._shown or not self.query("#said"):  # not composed yet: it is shown when it is
            return
        self._shown = (job.text, job.code)
        ended = {None: ("it is at work ...", "live"), 0: ("it is done", "good")}.get(
            job.code, (f"it ended with code {job.code}", "bad")
        )
        parts = [Part("", job.text[-PREVIEW_BYTES:], block=True), Part("", ended[0], ended[1], block=True)]
        self.query_one("#said", Detail).show_parts(parts, to_end=True)

    def action_leave(self) -> None:
        self.dismiss(None)


class Help(ModalScreen[None]):
    """All keys, from the table of actions."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,q,question_mark", "leave", "Leave", key_display="Esc")]

    def __init__(self, *, acting: bool) -> None:
        super().__init__()
        self._acting = acting

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog"):
            yield _title("Keys")
            yield Detail(id="said")
            yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        self.query_one("#said").focus()
        self.call_after_refresh(lambda: self.query_one("#said", Detail).show_parts(help_parts(acting=self._acting)))

    def action_leave(self) -> None:
        self.dismiss(None)


MOVING = (
    ("↑ ↓ j k", "one line; PgUp PgDn b: a page; Home End g G: the first, the last"),
    ("← → Space", "fold and unfold a branch of a trace"),
    ("Tab", "between the parts of a screen; the mouse does all of it too"),
)


def help_parts(*, acting: bool = True) -> list[Part]:
    """The table of actions as parts, screen by screen."""
    parts: list[Part] = []
    places = ("", *dict.fromkeys(place for action in ACTIONS for place in action.where))
    for place in places:
        parts.append(Part(place.capitalize() if place else "Everywhere", "", block=True))
        here = [action for action in ACTIONS if (place in action.where if place else not action.where)]
        parts += [Part(f"  {action.shown_key}", action.about) for action in here if acting or not action.acts]
    parts.append(Part("Moving", "", block=True))
    parts += [Part(f"  {keys}", about) for keys, about in MOVING]
    return parts
