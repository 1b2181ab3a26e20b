"""A terminal in memory: what a person would see of what is written to it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from rich.cells import cell_len

Look = tuple[frozenset[str], str, str]
NONE: Look = (frozenset(), "", "")


@dataclass
class Emulated:
    """A terminal that knows SGR, the ways of the cursor, and letters of two cells; it does not wrap."""

    width: int
    height: int
    cells: dict[tuple[int, int], tuple[str, Look]] = field(default_factory=dict)
    x: int = 0
    y: int = 0
    look: Look = NONE

    def write(self, data: str) -> None:
        for codes, letter, text in re.findall(r"\x1b\[\??([\d;]*)([A-Za-z])|([^\x1b])", data):
            if text == "\n":
                self.x, self.y = 0, min(self.height - 1, self.y + 1)
            elif text:
                self._put(text)
            elif letter == "m":
                self._style([int(code or 0) for code in codes.split(";")])
            elif letter == "H":
                row, _, column = codes.partition(";")
                self.x, self.y = min(self.width, int(column or 1)) - 1, min(self.height, int(row or 1)) - 1
            elif letter in "ABCD":
                by = int(codes or 1)
                self.x = max(0, min(self.width - 1, self.x + {"C": by, "D": -by}.get(letter, 0)))
                self.y = max(0, min(self.height - 1, self.y + {"B": by, "A": -by}.get(letter, 0)))
            else:
                assert letter in "hl", letter

    def _put(self, text: str) -> None:
        if (width := cell_len(text)) == 0:
            before = max(0, self.x - 1), self.y
            old, look = self.cells.get(before, (" ", NONE))
            self.cells[before] = old + text, look
            return
        self._cut(self.x)
        self._cut(self.x + width)
        self.cells[self.x, self.y] = text, self.look
        for place in range(self.x + 1, self.x + width):
            self.cells[place, self.y] = "", self.look
        self.x = min(self.width - 1, self.x + width)

    def _cut(self, x: int) -> None:
        """A wide letter that stands across this place is gone."""
        if self.cells.get((x, self.y), (" ", NONE))[0] == "" and x:
            for place in (x - 1, x):
                self.cells[place, self.y] = " ", self.cells[place, self.y][1]

    def _style(self, codes: list[int]) -> None:
        attributes, ink, ground = set(self.look[0]), self.look[1], self.look[2]
        while codes:
            code = codes.pop(0)
            if code in (38, 48):
                taken = [code, *codes[: 2 if codes[0] == 5 else 4]]
                del codes[: len(taken) - 1]
                ink, ground = (str(taken), ground) if code == 38 else (ink, str(taken))
            elif code == 0:
                attributes, ink, ground = set(), "", ""
            elif code in (22, 24, 27):
                attributes -= {22: {"1", "2"}, 24: {"4"}, 27: {"7"}}[code]
            elif code in (39, 49):
                ink, ground = ("", ground) if code == 39 else (ink, "")
            elif code >= 30:
                ink, ground = (str(code), ground) if code < 40 else (ink, str(code))
            else:
                attributes.add(str(code))
        self.look = frozenset(attributes), ink, ground

    @property
    def seen(self) -> dict[tuple[int, int], object]:
        """What a person sees: a blank has no ink, unless it is underlined or turned round."""
        looks = {
            place: (letter, look if letter[:1] != " " or look[0] & {"4", "7"} else look[2])
            for place, (letter, look) in self.cells.items()
            if place[0] < self.width
        }
        return {place: look for place, look in looks.items() if look != (" ", "")}
