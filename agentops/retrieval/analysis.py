"""What is searched for in a document: its lexical terms and the text whose vector stands for it.

Done here and not in a back-end, so that every back-end indexes the same terms and gives the same ranking.
English stemming and stop words; other languages are indexed by their words as written, CJK by pairs of characters.
"""

from __future__ import annotations

import re
import threading
import unicodedata
from functools import lru_cache

import snowballstemmer  # type: ignore[import-untyped]

from agentops.records import Document

TITLE_WEIGHT = 2
"""How often the words of title and heading count."""

_STOP_WORDS = (
    "a about above after again against all am an and any are as at be because been before being below between both but "
    "by can could did do does doing down during each few for from further had has have having he her here hers him his "
    "how i if in into is it its itself just me more most my no nor not now of off on once only or other our ours out "
    "over own same she should so some such than that the their theirs them then there these they this those through to "
    "too under until up very was we were what when where which while who whom why will with would you your yours"
)
STOP_WORDS = frozenset(_STOP_WORDS.split())

_TERM_CHARACTERS = 64
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
_WORD = re.compile(rf"[{_CJK}]+|(?:(?![{_CJK}_])\w)+(?:['’](?:(?![{_CJK}_])\w)+)*")
_PAIRED = re.compile(f"[{_CJK}]")
_local = threading.local()


@lru_cache(maxsize=65_536)
def _stem(word: str) -> str:
    # A stemmer keeps the word it works on in itself: one a thread.
    if not hasattr(_local, "stemmer"):
        _local.stemmer = snowballstemmer.stemmer("english")
    return str(_local.stemmer.stemWord(word))


def terms(text: str) -> list[str]:
    """Lower-case stems without stop words, in order, duplicates kept; none contains white space or exceeds 64 characters."""
    found: list[str] = []
    for match in _WORD.finditer(unicodedata.normalize("NFKC", text).lower()):
        word = match.group()
        if _PAIRED.match(word):
            found.extend(word[i : i + 2] for i in range(max(1, len(word) - 1)))
        else:
            word = word.replace("’", "'").removesuffix("'s").replace("'", "")[:_TERM_CHARACTERS]
            if word and word not in STOP_WORDS:
                found.append(_stem(word))
    return found


def lexical_terms(document: Document) -> list[str]:
    """Terms of the document, those of its title and heading `TITLE_WEIGHT` times."""
    return terms(_context(document)) * TITLE_WEIGHT + terms(document.text)


def embedding_text(document: Document) -> str:
    """The text to embed: title and heading, which say what a piece from the middle of a page is about, and the piece."""
    context = _context(document)
    if not context or document.text.lstrip().startswith(context):
        return document.text
    return f"{context}\n{document.text}"


def _context(document: Document) -> str:
    title, heading = (str(document.metadata.get(key) or "").strip() for key in ("title", "heading"))
    return heading if heading.startswith(title) else f"{title} > {heading}" if heading else title
