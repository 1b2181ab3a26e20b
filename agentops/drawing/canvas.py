"""A canvas of character cells on which lines join, turn and cross. A cell's style is a word that whoever prints it may heed."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from itertools import groupby
from typing import Literal

Style = Literal["line", "choice", "box", "name", "group"]
"""line: always taken.  choice: may be taken.  box: a border.  name: of a node.  group: of a subgraph."""

NORTH, _EAST, _SOUTH, _WEST = 1, 2, 4, 8
UPRIGHT, LEVEL = NORTH | _SOUTH, _EAST | _WEST
_CHARACTERS = " ╵╶╰╷│╭├╴╯─┴╮┤┬┼"
_DASHED = {"│": "╎", "─": "╌"}
_SQUARE = {"╭": "┌", "╮": "┐", "╰": "└", "╯": "┘"}
_LONGEST = 40


class Canvas:
    """Cells with the directions in which lines leave them. Lines of one owner join, those of two cross; 0 joins with all."""

    def __init__(self) -> None:
        self.width = self.height = 0
        self._ways: dict[tuple[int, int], tuple[int, int, Style, bool]] = {}
        self._text: dict[tuple[int, int], tuple[str, Style | None]] = {}

    def _grow(self, x: int, y: int) -> None:
        self.width, self.height = max(self.width, x + 1), max(self.height, y + 1)

    def way(self, x: int, y: int, ways: int, owner: int, style: Style, square: bool = False) -> None:
        self._grow(x, y)
        before = self._ways.get((x, y))
        if before is None:
            self._ways[x, y] = ways, owner, style, square
        elif owner == before[1] or not owner or not before[1]:
            self._ways[x, y] = before[0] | ways, before[1], before[2], before[3]
        elif ways & ~LEVEL:
            self._ways[x, y] = ways, owner, style, square  # the upright line stays whole, the level one passes beneath

    def across(self, y: int, x: int, to: int, owner: int, style: Style) -> None:
        low, high = sorted((x, to))
        for at in range(low, high + 1):
            self.way(at, y, (_EAST if at < high else 0) | (_WEST if at > low else 0), owner, style)

    def down(self, x: int, y: int, to: int, owner: int, style: Style) -> None:
        low, high = sorted((y, to))
        for at in range(low, high + 1):
            self.way(x, at, (_SOUTH if at < high else 0) | (NORTH if at > low else 0), owner, style)

    def box(self, x: int, y: int, width: int, height: int, square: bool = False) -> None:
        right, bottom = x + width - 1, y + height - 1
        for row, (left_way, right_way) in ((y, (_SOUTH, _SOUTH)), (bottom, (NORTH, NORTH))):
            self.way(x, row, _EAST | left_way, 0, "box", square)
            self.way(right, row, _WEST | right_way, 0, "box", square)
            for column in range(x + 1, right):
                self.way(column, row, LEVEL, 0, "box")
        for row in range(y + 1, bottom):
            self.way(x, row, UPRIGHT, 0, "box")
            self.way(right, row, UPRIGHT, 0, "box")

    def write(self, x: int, y: int, text: str, style: Style | None) -> None:
        for character in text:
            self._grow(x, y)
            self._text[x, y] = character, style
            if cells_of(character) == 2:
                x += 1
                self._text[x, y] = "", style
            x += 1

    def paste(self, other: Canvas, x: int, y: int) -> None:
        for row in range(other.height):
            at = x
            for text, style in other.runs(row):
                self.write(at, y + row, text, style)
                at += cells_of(text)

    def upright(self, x: int, y: int) -> bool:
        return (x, y) not in self._text and self._ways.get((x, y), (0,))[0] == UPRIGHT

    def free(self, x: int, y: int, cells: int) -> bool:
        return not any((at, y) in self._text or (at, y) in self._ways for at in range(x, x + cells))

    def runs(self, row: int) -> list[tuple[str, Style | None]]:
        cells = [self._shown(x, row) for x in range(self.width)]
        return [("".join(text for text, _ in run), style) for style, run in groupby(cells, key=lambda cell: cell[1])]

    def _shown(self, x: int, y: int) -> tuple[str, Style | None]:
        if (x, y) in self._text:
            return self._text[x, y]
        if (x, y) not in self._ways:
            return " ", None
        ways, _, style, square = self._ways[x, y]
        character = _CHARACTERS[ways]
        if style == "choice":
            character = _DASHED.get(character, character)
        return _SQUARE.get(character, character) if square else character, style


def plain(lines: Iterable[Iterable[tuple[str, Style | None]]]) -> str:
    return "\n".join("".join(text for text, _ in line).rstrip() for line in lines)


def cells_of(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(one) in "WF" else 0 if unicodedata.combining(one) else 1 for one in text)


def cut(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= _LONGEST else flat[: _LONGEST - 1] + "…"
