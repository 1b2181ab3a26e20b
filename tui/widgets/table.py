"""A table of any length: a vector of keys, and the rows of those that are seen.

Rows that are seen and not here are asked for with `Wanted` and given with `give`; until then their line is empty. What the
keys mean and where rows come from is not known here.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from textual import events
from textual.message import Message

from tui.text import cell
from tui.widgets.lines import Lines, Piece

R = TypeVar("R")
_KEPT = 4_000


@dataclass(frozen=True)
class Column(Generic[R]):
    """`show` gives the text of a row's cell (any text, it is cleaned) and its ink. A `width` of 0 takes what is left; the column
    is left out where the table is narrower than `least`. `sort` is the name under which a click on the head sorts."""

    title: str
    width: int
    show: Callable[[R], Piece]
    right: bool = False
    least: int = 0
    sort: str = ""


class Table(Lines, Generic[R]):
    """Shows rows of keys. `sorted_by` marks a column's head with an arrow."""

    head_lines = 1

    class Wanted(Message):
        """Rows are seen that are not here."""

        def __init__(self, table: Table[object], keys: list[int]) -> None:
            super().__init__()
            self.table = table
            self.keys = keys

        @property
        def control(self) -> Table[object]:
            return self.table

    class HeadClicked(Message):
        """A column that can be sorted by was clicked."""

        def __init__(self, table: Table[object], sort: str) -> None:
            super().__init__()
            self.table = table
            self.sort = sort

        @property
        def control(self) -> Table[object]:
            return self.table

    def __init__(self, columns: Sequence[Column[R]], *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.columns = columns
        self.keys: array[int] = array("q")
        self.rows: dict[int, R] = {}
        self.sorted_by: tuple[str, bool] = ("", True)
        self._asked: set[int] = set()
        self._asking = False

    @property
    def line_count(self) -> int:
        return len(self.keys)

    @property
    def key(self) -> int | None:
        """The key under the cursor."""
        return self.keys[self.cursor] if 0 <= self.cursor < len(self.keys) else None

    @property
    def row(self) -> R | None:
        """The row under the cursor, where it is here."""
        return None if self.key is None else self.rows.get(self.key)

    def show(self, keys: array[int], rows: Mapping[int, R] | None = None, *, to_first: bool = False) -> None:
        """Shows these keys. The cursor stays on its row, in the same place of the screen, or goes `to_first`."""
        held, place = self.key, self.cursor - self.scroll_offset.y
        moved = len(keys) != len(self.keys) or keys != self.keys
        self.keys = keys
        if rows is not None:
            self.rows.update(rows)
        self._asked.clear()
        if not moved:
            if to_first:
                self.move_to(0)
            return
        self.resized_lines()
        if to_first or (held is None and self.cursor >= 0):
            self.move_to(0)
            self.scroll_to(y=0, animate=False, force=True)
        elif held is not None and self.key != held:
            try:
                self.cursor = keys.index(held)
                self.scroll_to(y=max(0, self.cursor - place), animate=False, force=True)
            except ValueError:
                self.move_to(self.cursor)
        self.refresh()
        if self.key != held:
            self.post_message(self.Moved(self))

    def show_rows(self, rows: Sequence[R]) -> None:
        """Shows a list that is whole; keys are the places in it."""
        self.rows = dict(enumerate(rows))
        self.show(array("q", range(len(rows))))
        self.refresh()

    def give(self, rows: Mapping[int, R]) -> None:
        """Rows that were asked for, or are newer than those here. Lines that look the same are not drawn again."""
        self._asked.difference_update(rows)
        if len(self.rows) > _KEPT:
            near = {self.keys[index] for index in self.seen}
            self.rows = {key: row for key, row in self.rows.items() if key in near}
        changed = {key for key, row in rows.items() if self.rows.get(key) != row}
        self.rows.update(rows)
        for index in self.seen:
            if self.keys[index] in changed:
                self.refresh_index(index)

    def seen_keys(self) -> list[int]:
        return [self.keys[index] for index in self.seen]

    def pieces(self, index: int, width: int) -> Iterable[Piece]:
        row = self.rows.get(self.keys[index])
        yield ("▸ " if index == self.cursor else "  "), "live"
        if row is None:
            yield "…", "dim"
            self._ask_soon()
            return
        for column, cells in self._layout(width):
            text, ink = column.show(row)
            yield cell(text, cells, right=column.right) + "  ", ink

    def head(self, y: int, width: int) -> Iterable[Piece]:
        yield "  ", ""
        for column, cells in self._layout(width):
            arrow = (" ↓" if self.sorted_by[1] else " ↑") if column.sort and column.sort == self.sorted_by[0] else ""
            yield cell(column.title + arrow, cells, right=column.right), ""
            yield "  ", ""

    def _layout(self, width: int) -> list[tuple[Column[R], int]]:
        shown = [column for column in self.columns if width >= column.least]
        taken = 2 + sum(column.width + 2 for column in shown)
        free = [column for column in shown if not column.width]
        share = max(6, (width - taken) // len(free)) if free else 0
        return [(column, column.width or share) for column in shown]

    def watch_scroll_y(self, old_value: float, new_value: float) -> None:
        super().watch_scroll_y(old_value, new_value)
        self._ask_soon()

    def _ask_soon(self) -> None:
        if not self._asking:
            self._asking = True
            self.call_later(self._ask)

    def _ask(self) -> None:
        """Asks for what is missing of what is seen, and of two pages to either side: they are here before they are gone to."""
        self._asking = False
        ahead = 2 * len(self.seen)
        wanted = self.keys[max(0, self.seen.start - ahead) : self.seen.stop + ahead]
        missing = [key for key in wanted if key not in self.rows and key not in self._asked]
        if missing:
            self._asked.update(missing)
            self.post_message(self.Wanted(self, missing))  # type: ignore[arg-type]

    def on_click(self, event: events.Click) -> None:
        # A click below is the base's: Textual calls the handlers of both classes.
        if event.y >= self.head_lines:
            return
        at = 2
        for column, cells in self._layout(self.line_width):
            if at <= event.x < at + cells + 2 and column.sort:
                self.post_message(self.HeadClicked(self, column.sort))  # type: ignore[arg-type]
            at += cells + 2
