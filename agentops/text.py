"""Text: what is safe to show, times and counts for people, and where running text can be cut into sentences.

`clean` comes before everything that a model, a document, a tool or a user wrote. Sentences are found by rules for Latin and
CJK punctuation, no model, and no knowledge of a language beyond a list of English abbreviations; Markdown is not parsed, only
lists, headings, tables and fences are kept from melting together.
"""

from __future__ import annotations

import re
from datetime import datetime

_SEQUENCES = re.compile(
    r"(?:\x1b\]|\x9d)[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)"  # OSC: titles, the clipboard, links
    r"|(?:\x1b[PX^_]|[\x90\x98\x9e\x9f])[^\x1b\x9c]*(?:\x1b\\|\x9c)"  # DCS, SOS, PM, APC
    r"|(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"  # CSI: colours, the cursor
    r"|\x1b[ -/]*[0-~]"
)
_CONTROLS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # bidirectional controls: text that reads otherwise than it is
    "\u2028\u2029\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)
_SURROGATES = re.compile("[\ud800-\udfff]")


def clean(text: str) -> str:
    """The text without anything a terminal would obey or reorder by; newlines and tabs stay. Lone surrogates become �."""
    return _SURROGATES.sub("\ufffd", _CONTROLS.sub("", _SEQUENCES.sub("", text)))


def one_line(text: str, width: int) -> str:
    """Cleaned, white space made single, cut to `width` characters with an ellipsis."""
    flat = " ".join(clean(text[: width * 8]).split())
    return flat if len(flat) <= width else flat[: max(0, width - 1)] + "…"


def short_name(reference: str) -> str:
    """What people call the graph of a reference: `agent` for `/path/langgraph.json:agent`, `mine.py:graph` for a file's."""
    place, found, name = reference.rpartition(":")
    if place.endswith(".json"):
        return name
    return f"{place.rpartition('/')[2]}:{name}" if found and place.endswith(".py") else reference


def duration(ns: int | None) -> str:
    """`0.4 ms`, `340 ms`, `1.24 s`, `2 m 05 s`, `3 h 07 m`; a dash for what has not ended."""
    if ns is None:
        return "-"
    seconds = ns / 1e9
    # Each limit is where the next unit's rounding begins: 999.6 ms would read 1000 ms.
    if seconds < 0.00995:
        return f"{seconds * 1000:.1f} ms"
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 59.995:
        return f"{seconds:.2f} s"
    minutes = round(seconds) // 60
    return f"{minutes} m {round(seconds) % 60:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} m"


def moment(ns: int) -> str:
    """Local date and time to the second."""
    return datetime.fromtimestamp(ns / 1e9).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def count(number: int) -> str:
    """`812`, `12.3k`, `4.5M`."""
    if number < 10_000:
        return str(number)
    return f"{number / 1000:.1f}k" if number < 1_000_000 else f"{number / 1_000_000:.1f}M"


_ABBREVIATIONS = (
    "e.g i.e cf vs viz ca al approx resp incl excl esp eds Dr Mr Mrs Ms Prof St Jr Sr Mt Inc Ltd Co Corp Dept Univ Gen Col "
    "Sgt Rev Hon Gov Sen Rep Jan Feb Mar Apr Jun Jul Aug Sep Sept Oct Nov Dec a.m p.m U.S U.K E.U Ph.D"
)
_BEFORE_NUMBERS = "no nos vol p pp ch sec secs fig figs eq eqs ref refs tab app art"


def _forms(words: str) -> list[str]:
    return [re.escape(form) for word in words.split() for form in dict.fromkeys((word, word[0].upper() + word[1:]))]


_NOT_AFTER = "".join(rf"(?<!\b{form}\.)" for form in _forms(_ABBREVIATIONS))
_NOT_BETWEEN = "|".join(rf"(?<=\b{form}\.)" for form in _forms(_BEFORE_NUMBERS))

SENTENCE_GAP = (
    rf"(?<=[.!?…])(?=\s){_NOT_AFTER}(?!(?:{_NOT_BETWEEN})\s+[\d(])"
    r"(?<!\b[A-Z]\.)(?<!^\d\.)(?<!\n\d\.)(?<!\n\d\d\.)\s+(?=[^a-z\s])"
    r"|(?<=[.!?…][\"'”’»)\]])\s+(?=[^a-z\s])"
    r"|(?<=\s[.!?])\s+"
    r"|(?<=[。！？])\s*"
)
"""Pattern of the white space between two sentences. A full stop with white space before it (as in tokenised corpora) ends
a sentence whatever follows; another one only when no lower-case letter follows."""

_GAP = re.compile(SENTENCE_GAP)
_FENCE = re.compile(r"^\s*(```|~~~)")
_ITEM = re.compile(r"^\s*(?:[-*+•–]|\(?\d{1,3}[.)]|\(?[a-z][.)])\s+(?=\S)")
_ALONE = re.compile(r"^\s*(?:#{1,6}\s|\||>|={3,}|-{3,})")


def split_sentences(text: str) -> list[str]:
    """The sentences of `text` in order, white space inside them made single, list markers and heading marks removed.

    Each list item, heading, table row and blank-line-separated block starts a new sentence. A fenced code block is one
    sentence and keeps its line breaks. No words are lost; empty text gives an empty list.
    """
    sentences: list[str] = []
    unit: list[str] = []
    fence: list[str] | None = None

    def close() -> None:
        joined = " ".join(" ".join(unit).split())
        sentences.extend(piece for part in _GAP.split(joined) if (piece := part.strip()))
        unit.clear()

    for line in text.splitlines():
        if fence is not None:
            if _FENCE.match(line):
                sentences.extend(["\n".join(fence)] if any(map(str.strip, fence)) else [])
                fence = None
            else:
                fence.append(line)
        elif _FENCE.match(line):
            close()
            fence = []
        elif not line.strip():
            close()
        elif item := _ITEM.match(line):
            close()
            unit.append(line[item.end() :])
        elif _ALONE.match(line):
            close()
            unit.append(line.strip().strip("#>=-").strip())
            close()
        else:
            unit.append(line)
    if fence is not None:
        unit.extend(fence)
    close()
    return sentences
