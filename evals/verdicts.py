"""Verdicts on texts: what one claims, whether it evades, what it is about. Judged by its form and by vectors; nobody is asked.

Whether a source carries a claim is measured by `evals.support`.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence

from agentops.grounding import terms
from agentops.retrieval import Embedder
from agentops.text import split_sentences

ON_TOPIC = 0.13
"""Least cosine of a question and "a question about" the topic that it belongs to (`bench/topics.py`)."""

_CLAUSE = re.compile(r";\s+|,\s+(?:and|but|while|whereas)\s+(?=\S+\s+\S+\s+\S)")
_VERB = re.compile(
    r"\b(?:is|are|was|were|has|have|had|does|did|will|would|can|could|may|must|should|\w{2,}(?:ed|s))\b", re.IGNORECASE
)
"""A word that may be a verb. A clause without one is part of an enumeration."""
_CITED = re.compile(r"\s*\[\d+(?:\s*,\s*\d+)*\]")
_EVASIVE = re.compile(
    r"\b(?:(?:do(?:es)? not|don['’]t|doesn['’]t|can(?:not| not|['’]t)|could not|couldn['’]t|unable to|not able to)\s+"
    r"(?:\w+\s+)?(?:know|answer|say|tell|help|discuss|assist|provide|find|determine)"
    r"|(?:am|I['’]m|are) not (?:sure|certain|aware)|no (?:information|idea|answer)|it depends"
    r"|(?:I['’]m|I am) (?:sorry|afraid))\b"
    # What a search came near to is told of the search, and claims nothing.
    r"|\b(?:nearest|closest)\b[^.]*\babout:",
    re.IGNORECASE,
)


def claims(text: str) -> list[str]:
    """What a text says, one a sentence or a clause that stands for itself; no questions, no citation marks, nothing evasive. A
    text that is too short to be taken apart is one claim."""
    found: list[str] = []
    for sentence in split_sentences(_CITED.sub("", text)):
        if sentence.endswith("?") or is_evasive(sentence):
            continue
        parts = _CLAUSE.split(sentence)
        whole = all(len(terms(part)) >= 2 and _VERB.search(part) for part in parts)
        found += [part.strip() for part in (parts if whole else [sentence]) if terms(part)]
    text = text.strip()
    return found or ([text] if text and not is_evasive(text) and not text.endswith("?") else [])


def is_evasive(text: str) -> bool:
    """Whether a text says that there is no answer, in the usual words for it."""
    return bool(_EVASIVE.search(text))


async def on_topic(embedder: Embedder, questions: Sequence[str], topics: Sequence[str]) -> list[bool]:
    """Whether each question belongs to one of the topics."""
    near = await similarity(embedder, questions, [f"a question about {topic}" for topic in topics])
    return [max(row) >= ON_TOPIC for row in near]


async def similarity(embedder: Embedder, one: Sequence[str], other: Sequence[str]) -> list[list[float]]:
    """Cosine of each of `one` with each of `other`."""
    vectors = await asyncio.to_thread(embedder.embed, [*one, *other])
    return [[float(cosine) for cosine in row] for row in vectors[: len(one)] @ vectors[len(one) :].T]
