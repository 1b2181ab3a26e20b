"""Sentences: where running text can be cut.

Rules for Latin and CJK punctuation, no model, and no knowledge of a language beyond a list of English abbreviations.
It does not parse Markdown; it only keeps lists, headings, tables and fences from melting together.
"""

from __future__ import annotations

import re

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
