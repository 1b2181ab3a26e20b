"""Foreign text for the screen. Everything that a model, a document, a tool or a person wrote passes through here, and nothing
else on the screen comes from the record: no markup is read, no control character is left, one line is one line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from rich.cells import cell_len, chop_cells, set_cell_size

from agentops.text import clean

PREVIEW_BYTES = 65_536
_MARK = "[\u0300-\u036f\u0483-\u0489\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe20-\ufe2f]"
_PILE = re.compile(f"({_MARK}{{3}}){_MARK}+")


def cell(text: object, cells: int, *, right: bool = False) -> str:
    """The text in one line of exactly `cells` terminal cells: cleaned, cut with an ellipsis, padded."""
    if cells <= 0:
        return ""
    flat = text if isinstance(text, str) and text.isascii() and text.isprintable() else flatten(str(text), cells)
    width = cell_len(flat)
    if width > cells:
        return set_cell_size(flat, cells - 1) + "…"
    return " " * (cells - width) + flat if right else flat + " " * (cells - width)


def flatten(text: str, cells: int = 500) -> str:
    """Cleaned, white space made single; of a long text the beginning."""
    return " ".join(_clean(text[: cells * 8]).split())


def _clean(text: str) -> str:
    # Marks piled on one character have no width and no end: three are enough for every language that is written.
    return clean(text) if text.isascii() else _PILE.sub(r"\1", clean(text))


def preview(text: str) -> tuple[str, bool]:
    """The cleaned text of at most `PREVIEW_BYTES`, tabs made spaces, and whether something was left out."""
    cut = text if len(text) <= PREVIEW_BYTES else text[:PREVIEW_BYTES]
    raw = cut.encode("utf-8", "replace")
    if len(raw) > PREVIEW_BYTES:
        cut = raw[:PREVIEW_BYTES].decode("utf-8", "ignore")
    return _clean(cut).expandtabs(4), len(cut) < len(text)


def as_text(value: Any) -> str:
    """A string as it is, anything else as indented JSON; what is nested too deeply for that, in one line or not at all."""
    if isinstance(value, str):
        return value
    for indent in (2, None):
        try:
            return json.dumps(value, indent=indent, ensure_ascii=False, default=str)
        except (RecursionError, ValueError):
            continue
    return "(it is nested too deeply to be shown)"


def wrapped(text: str, cells: int) -> Iterator[str]:
    """The lines of a cleaned text, each of at most `cells`, broken at spaces where there are any."""
    cells = max(8, cells)
    for line in text.split("\n"):
        if (len(line) if line.isascii() else cell_len(line)) <= cells:
            yield line
            continue
        indent = len(line) - len(line.lstrip(" "))
        lead = " " * min(indent, cells // 2)
        rest = line[indent:]
        while rest:
            room = cells - len(lead)
            head = rest[:room] if rest.isascii() else chop_cells(rest[: room * 4], room)[0]
            if len(head) < len(rest) and (gap := head.rfind(" ")) > room // 3:
                head = head[:gap]
            # A character that is wider than the room must not hold the loop.
            head = head or rest[0]
            yield lead + head
            rest = rest[len(head) :].lstrip(" ")
