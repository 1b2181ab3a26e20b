"""Lines with a cursor: the base of the table, the trace and the detail.

A key that moves the cursor within what is seen redraws two lines; at the edge the view jumps by half its height, so that a
held key costs the terminal little. What is built on it says how many lines there are and what is in one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.binding import Binding, BindingType
from textual.geometry import Region, Size
from textual.message import Message
from textual.scroll_view import ScrollView
from textual.strip import Strip

INKS = ("head", "dim", "good", "bad", "warn", "live", "model", "search", "tool", "strong", "cursor", "plain")

Piece = tuple[str, str]
"""Text that is safe to show, and the name of the ink it is written with."""


class Lines(ScrollView, can_focus=True):
    """Scrolls over `line_count` lines, below `head_lines` that stay. Posts `Moved` and `Chosen`."""

    ALLOW_SELECT = False
    COMPONENT_CLASSES: ClassVar[set[str]] = {f"lines--{name}" for name in INKS}
    DEFAULT_CSS = """
    Lines {
        overflow-x: hidden;
        scrollbar-size-vertical: 1;
        background: $background;
        color: $foreground;
        .lines--head { background: $panel; color: $foreground 70%; }
        .lines--dim { color: $foreground 60%; }
        .lines--good { color: $text-success; }
        .lines--bad { color: $text-error; text-style: bold; }
        .lines--warn { color: $text-warning; }
        .lines--live { color: $text-accent; }
        .lines--model { color: $text-secondary; }
        .lines--search { color: $text-primary; }
        .lines--tool { color: $text-success; }
        .lines--strong { text-style: bold; }
        .lines--plain { color: $foreground; }
        .lines--cursor { background: $surface-lighten-2; }
        &:focus .lines--cursor { background: $primary-muted; text-style: bold; }
    }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "move(-1)", "Up", show=False),
        Binding("down,j", "move(1)", "Down", show=False),
        Binding("pageup,b", "page(-1)", "Page up", show=False),
        Binding("pagedown,space", "page(1)", "Page down", show=False),
        Binding("home,g", "jump(0)", "First", show=False),
        Binding("end,G", "jump(-1)", "Last", show=False),
    ]
    head_lines = 0
    has_cursor = True

    class Moved(Message):
        """The cursor stands on another line."""

        def __init__(self, lines: Lines) -> None:
            super().__init__()
            self.lines = lines

        @property
        def control(self) -> Lines:
            return self.lines

    class Chosen(Moved):
        """A click on the line under the cursor, or a double one."""

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.cursor = 0
        self._inks: dict[tuple[str, ...], Style] = {}

    @property
    def line_count(self) -> int:
        return 0

    def pieces(self, index: int, width: int) -> Iterable[Piece]:
        """What is in a line, to be shown in `width` cells."""
        return ()

    def head(self, y: int, width: int) -> Iterable[Piece]:
        """What is in a line that stays."""
        return ()

    def notify_style_update(self) -> None:
        self._inks.clear()
        super().notify_style_update()

    def ink(self, *names: str) -> Style:
        """The style of inks written one over the other on the widget's own ground."""
        if (found := self._inks.get(names)) is None:
            found = self.rich_style
            for name in names:
                if name:
                    part = self.get_component_rich_style(f"lines--{name}", partial=True)
                    if part.color is not None:
                        # Only the whole style has colours mixed with what is behind them.
                        part += Style(color=self.get_component_rich_style(f"lines--{name}").color)
                    found += part
            self._inks[names] = found
        return found

    @property
    def line_width(self) -> int:
        """Cells of a line; the scrollbar stands beside it."""
        return self.size.width - int(self.show_vertical_scrollbar)

    def render_line(self, y: int) -> Strip:
        width = self.line_width
        if y < self.head_lines:
            return self._strip(self.head(y, width), width, "head")
        index = self.scroll_offset.y + y - self.head_lines
        if index >= self.line_count:
            return Strip.blank(width, self.ink(""))
        return self._strip(self.pieces(index, width), width, "cursor" if self.has_cursor and index == self.cursor else "")

    def _strip(self, pieces: Iterable[Piece], width: int, over: str) -> Strip:
        segments = [Segment(text, self.ink(ink, over)) for text, ink in pieces if text]
        return Strip(segments).adjust_cell_length(width, self.ink("", over)).simplify()

    def resized_lines(self) -> None:
        """To be called when `line_count` has changed."""
        self.virtual_size = Size(self.size.width, self.line_count + self.head_lines)
        if self.cursor >= self.line_count:
            self.cursor = max(0, self.line_count - 1)

    def on_resize(self) -> None:
        self.resized_lines()

    @property
    def seen(self) -> range:
        """The lines that are on the screen."""
        first = self.scroll_offset.y
        return range(first, min(self.line_count, first + max(0, self.size.height - self.head_lines)))

    def refresh_index(self, index: int) -> None:
        if index in self.seen:
            self.refresh(Region(0, index - self.scroll_offset.y + self.head_lines, self.size.width, 1))

    def move_to(self, index: int, *, tell: bool = True) -> None:
        """Puts the cursor there and the view around it."""
        index = max(0, min(index, self.line_count - 1))
        before, self.cursor = self.cursor, index
        self._reveal(index)
        if before != index:
            self.refresh_index(before)
            self.refresh_index(index)
            if tell:
                self.post_message(self.Moved(self))

    def choose_none(self) -> None:
        """Puts the cursor on no line, until it is moved again."""
        before, self.cursor = self.cursor, -1
        self.refresh_index(before)

    def _reveal(self, index: int) -> None:
        height = max(1, self.size.height - self.head_lines)
        first = self.scroll_offset.y
        if index < first:
            first = index if first - index > height else index - height // 2
        elif index >= first + height:
            first = index - height + 1 if index - first > 2 * height else index - height // 2
        else:
            return
        self.scroll_to(y=max(0, first), animate=False, force=True)

    def action_move(self, by: int) -> None:
        if self.has_cursor:
            self.move_to(self.cursor + by)
        else:
            self.scroll_to(y=self.scroll_offset.y + by, animate=False)

    def action_page(self, by: int) -> None:
        height = max(1, self.size.height - self.head_lines - 1)
        if self.has_cursor:
            self.move_to(self.cursor + by * height)
        else:
            self.scroll_to(y=self.scroll_offset.y + by * height, animate=False)

    def action_jump(self, to: int) -> None:
        if self.has_cursor:
            self.move_to(to if to >= 0 else self.line_count - 1)
        else:
            self.scroll_to(y=0 if to == 0 else self.max_scroll_y, animate=False)

    def on_click(self, event: events.Click) -> None:
        if not self.has_cursor or event.y < self.head_lines:
            return
        index = self.scroll_offset.y + event.y - self.head_lines
        if index < self.line_count:
            again = index == self.cursor
            self.move_to(index)
            if again or event.chain > 1:
                self.post_message(self.Chosen(self))
