"""What is sent to the terminal: of every frame the cells that differ from what it shows, and of every style what changes.

Textual writes a line that is touched from its first cell to its last, each piece with all of its style. `Wire` holds what the
terminal shows and lets through the rest. What it does not understand goes through as it is, and then nothing is taken for
known; so it is after a resize. Characters that terminals do not agree about the width of are always sent.
"""

from __future__ import annotations

import re
import threading
from functools import lru_cache
from typing import NamedTuple

from rich.cells import cell_len
from textual.driver import Driver

_FRAME = re.compile(r"\x1b\[([\d;]*)([mH])|\n")
_OTHER = re.compile(r"\x1b(?!\[[\d;]*[mH])|[\x00-\x09\x0b-\x1a\x1c-\x1f\x7f-\x9f]")
_NARROW = re.compile(
    "[ -~\xa1-\xac\xae-\u02ff\u0391-\u03c9\u0410-\u044f\u2010-\u2027\u2190-\u21ff\u2500-\u25ff\u2713\u2717\u23f8]*"
)
_HARMLESS = ("\x1b[?2026h", "\x1b[?2026l")
_OFF = {1: 22, 2: 22, 3: 23, 4: 24, 5: 25, 6: 25, 7: 27, 8: 28, 9: 29, 21: 24, 53: 55}
_ON_BLANKS = {4, 5, 6, 7, 9, 21, 53}
"""Attributes that are seen where there is no letter."""
_JUMP_CELLS = 4
"""As many cells are sent again rather than jumped over: a jump is as long."""


class Pen(NamedTuple):
    """How letters are written: attributes, and the codes of both colours, empty for the terminal's own."""

    attributes: frozenset[int] = frozenset()
    ink: str = ""
    ground: str = ""

    @property
    def on_blanks(self) -> Pen:
        """What is seen of it where there is no letter."""
        return self if self.attributes & _ON_BLANKS else Pen(ground=self.ground)


PLAIN = Pen()


class Wire:
    """The terminal as it is; `forget` makes it one of which nothing is known. It belongs to no thread: hold `lock`."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.forget(0, 0)

    def forget(self, width: int, height: int) -> None:
        """The terminal has this size, and shows anything. With no size all goes through as it is."""
        self._width, self._height = width, height
        self._letters: dict[int, list[str]] = {}
        self._pens: dict[int, list[Pen]] = {}
        self._pen: Pen | None = None
        self._at: tuple[int, int] | None = None

    def thin(self, data: str) -> str:
        """What is to be sent in place of `data`, to the same effect."""
        if not self._width or data in _HARMLESS:
            return data
        if _OTHER.search(data):
            self.forget(self._width, self._height)
            return f"\x1b[m{data}"
        self._out: list[str] = []
        self._later: dict[Pen, list[tuple[int, int, str]]] = {}
        self._upto = (0, 0)
        x, y, pen, done = 0, 0, PLAIN, 0
        for found in _FRAME.finditer(data):
            if found.start() > done:
                x += self._put(x, y, data[done : found.start()], pen)
            done = found.end()
            match found[2]:
                case "m":
                    pen = _written(pen, found[1])
                case "H":
                    row, _, column = found[1].partition(";")
                    x, y = int(column or 1) - 1, int(row or 1) - 1
                case _:
                    x, y = 0, y + 1
        x += self._put(x, y, data[done:], pen)
        self._flush()
        self._go(x, y)
        return "".join(self._out)

    def _put(self, x: int, y: int, text: str, pen: Pen) -> int:
        """Text at a place; how many cells it takes."""
        if y >= self._height:
            return cell_len(text)
        if (y, x) < self._upto:
            self._flush()
        self._upto = y, x + len(text)
        letters, pens = self._letters.setdefault(y, []), self._pens.setdefault(y, [])
        if x + len(text) > self._width or not _NARROW.fullmatch(text):
            self._flush()
            self._send(x, y, text, pen)
            # Where it ends is the terminal's to decide, and a mark may have joined a letter before it.
            del letters[max(0, x - 2) :], pens[max(0, x - 2) :]
            self._at = None
            return cell_len(text)
        end = x + len(text)
        if (missing := end - len(letters)) > 0:
            letters += [""] * missing
            pens += [PLAIN] * missing
        blank = pen.on_blanks
        wanted = list(text)
        inks = [blank if letter == " " else pen for letter in wanted] if " " in text else [pen] * len(text)
        if letters[x:end] != wanted or pens[x:end] != inks:
            differ = [
                place
                for place, (letter, ink) in enumerate(zip(wanted, inks, strict=True))
                if letter != letters[x + place] or ink != pens[x + place]
            ]
            first = last = differ[0]
            for place in (*differ[1:], -1):
                if place < 0 or place - last > _JUMP_CELLS:
                    part = text[first : last + 1]
                    self._later.setdefault(blank if part.isspace() else pen, []).append((x + first, y, part))
                    first = place
                last = place
            letters[x:end], pens[x:end] = wanted, inks
        return len(text)

    def _flush(self) -> None:
        """Sends what differs, pen by pen and not line by line: colours cost more than ways."""
        grounds = list(dict.fromkeys(pen.ground for pen in self._later))
        for pen in sorted(self._later, key=lambda pen: grounds.index(pen.ground)):
            for x, y, text in self._later[pen]:
                self._send(x, y, text, pen)
        self._later.clear()
        self._upto = (0, 0)

    def _send(self, x: int, y: int, text: str, pen: Pen) -> None:
        self._go(x, y)
        if text.isspace() and self._pen is not None and not pen.attributes & _ON_BLANKS:
            # A blank has no ink: only its ground need be right.
            pen = pen if self._pen.attributes & _ON_BLANKS else self._pen._replace(ground=pen.ground)
        self._out.append(_change(self._pen, pen) + text)
        self._pen = pen
        end = x + len(text)
        # In the last column terminals differ in where the cursor is.
        self._at = (end, y) if end < self._width else None

    def _go(self, x: int, y: int) -> None:
        if self._at == (x, y):
            return
        ways = [f"\x1b[{y + 1};{x + 1}H"]
        if self._at is not None:
            ways.append(_steps(x - self._at[0], "C", "D") + _steps(y - self._at[1], "B", "A"))
        self._out.append(min(ways, key=len))
        self._at = (x, y)


def _steps(by: int, ahead: str, back: str) -> str:
    return f"\x1b[{abs(by) if abs(by) > 1 else ''}{ahead if by > 0 else back}" if by else ""


@lru_cache(4_096)
def _written(pen: Pen, codes: str) -> Pen:
    """The pen after an SGR sequence."""
    attributes, ink, ground = set(pen.attributes), pen.ink, pen.ground
    left = [int(code or 0) for code in codes.split(";")]
    while left:
        code = left.pop(0)
        if code in (38, 48):
            taken = 2 if left[:1] == [5] else 4
            colour = ";".join(map(str, (code, *left[:taken])))
            del left[:taken]
            ink, ground = (colour, ground) if code == 38 else (ink, colour)
        elif 30 <= code <= 37 or 90 <= code <= 97:
            ink = str(code)
        elif 40 <= code <= 47 or 100 <= code <= 107:
            ground = str(code)
        elif code == 0:
            attributes, ink, ground = set(), "", ""
        elif code == 39:
            ink = ""
        elif code == 49:
            ground = ""
        elif code in _OFF.values() and code != 21:
            attributes -= {name for name, off in _OFF.items() if off == code}
        else:
            attributes.add(code)
    return Pen(frozenset(attributes), ink, ground)


@lru_cache(4_096)
def _change(old: Pen | None, new: Pen) -> str:
    """The shortest SGR sequence that makes the new pen of the old one, whatever it was where that is not known."""
    if old == new:
        return ""
    whole = [*map(str, sorted(new.attributes)), new.ink, new.ground]
    ways = [["0", *whole] if any(whole) else [""]]
    if old is not None and (gone := old.attributes - new.attributes) <= _OFF.keys():
        off = {_OFF[name] for name in gone}
        # What is switched off takes its like with it: bold and dim have one switch.
        kept = {name for name in new.attributes if name not in old.attributes or _OFF.get(name) in off}
        parts = [*map(str, sorted(off)), *map(str, sorted(kept))]
        parts += [new.ink or "39"] if new.ink != old.ink else []
        parts += [new.ground or "49"] if new.ground != old.ground else []
        ways.append(parts)
    return min((f"\x1b[{';'.join(filter(None, way))}m" for way in ways), key=len)


def thinned(driver: type[Driver], wire: Wire) -> type[Driver]:
    """A driver that sends through a wire."""

    def write(self: Driver, data: str) -> None:
        with wire.lock:
            driver.write(self, wire.thin(data))

    return type(driver.__name__, (driver,), {"write": write})
