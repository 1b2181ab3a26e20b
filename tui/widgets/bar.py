"""The line at the top: the sections, how much waits in them, and what is wrong with the record."""

from __future__ import annotations

from rich.text import Text
from textual import events
from textual.widget import Widget

from tui.actions import SECTIONS
from tui.text import flatten


class Bar(Widget):
    """Shows the sections, the current one marked; a click goes there."""

    ALLOW_SELECT = False
    DEFAULT_CSS = """
    Bar { height: 1; background: $panel; color: $foreground; }
    """

    def __init__(self, section: str) -> None:
        super().__init__()
        self._section = section
        self._counts: dict[str, int] = {}
        self._said = ""
        self._bad = False

    def tell(self, counts: dict[str, int], said: str, *, bad: bool) -> None:
        """`counts` are numbers behind sections; `said` is foreign text, for the right."""
        new = (counts, flatten(said), bad)
        if new != (self._counts, self._said, self._bad):
            self._counts, self._said, self._bad = new
            self.refresh()

    def _tabs(self) -> list[tuple[str, str]]:
        tabs = []
        for number, name in enumerate(SECTIONS, 1):
            count = self._counts.get(name)
            tabs.append((name, f" {number} {name.capitalize()}{f' ({count})' if count else ''} "))
        return tabs

    def render(self) -> Text:
        text = Text(no_wrap=True, overflow="ellipsis", end="")
        for name, label in self._tabs():
            text.append(label, style="bold reverse" if name == self._section else "")
        room = self.size.width - text.cell_len - 1
        said = Text(self._said, style="bold red" if self._bad else "dim", no_wrap=True)
        if room > 8:
            said.truncate(room, overflow="ellipsis")
            text.append(" " * max(1, room - said.cell_len))
            text.append_text(said)
        return text

    async def on_click(self, event: events.Click) -> None:
        at = 0
        for name, label in self._tabs():
            if at <= event.x < at + len(label):
                await self.app.run_action(f"section('{name}')")
            at += len(label)
