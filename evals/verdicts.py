"""Verdicts computed from what a model finds likely, for models that are too small to be asked for them.

Whether a source carries a claim is decided by three measures: how much more likely the claim is once the source was read
(`agentops.grounding.lifts`), the share of its content words that the source has, and the numbers that the source does not
have. The constants were chosen on one half of HaluEval's question answering pairs and measured on the other
(`bench/judgements.py`); they are for the default model. This module asks nobody and knows no metric.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass

from agentops.engine import Engine
from agentops.grounding import coverage, lifts, numbers_missing, terms
from agentops.records import Message
from agentops.retrieval import Embedder
from agentops.text import split_sentences

SOURCE_CHARACTERS = 4_000
"""Of a longer source the sentences are read that share most words with the claims."""

COVERAGE, LIFT, LEAST = 2.8, 1.2, 2.0
"""A claim is supported when `COVERAGE` times its coverage and `LIFT` times its lowest lift are `LEAST` together."""
ON_TOPIC = 0.25
"""Least cosine of what was said and a topic that it belongs to."""

_CLAUSE = re.compile(r";\s+|,\s+(?:and|but|while|whereas)\s+(?=\S+\s+\S+\s+\S)")
_CITED = re.compile(r"\s*\[\d+(?:\s*,\s*\d+)*\]")
_EVASIVE = re.compile(
    r"\b(?:(?:do(?:es)? not|don['’]t|doesn['’]t|can(?:not| not|['’]t)|could not|couldn['’]t|unable to|not able to)\s+"
    r"(?:\w+\s+)?(?:know|answer|say|tell|help|discuss|assist|provide|find|determine)"
    r"|(?:am|I['’]m|are) not (?:sure|certain|aware)|no (?:information|idea|answer)|it depends"
    r"|(?:I['’]m|I am) (?:sorry|afraid))\b",
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
        whole = all(len(terms(part)) >= 2 for part in parts)
        found += [part.strip() for part in (parts if whole else [sentence]) if terms(part)]
    text = text.strip()
    return found or ([text] if text and not is_evasive(text) and not text.endswith("?") else [])


def is_evasive(text: str) -> bool:
    """Whether a text says that there is no answer, in the usual words for it."""
    return bool(_EVASIVE.search(text))


@dataclass(frozen=True, slots=True)
class Support:
    """How far a source carries a claim. `lift` is the lowest of its tokens, in natural logarithms, `coverage` a share."""

    claim: str
    lift: float
    coverage: float
    missing: tuple[str, ...]

    @property
    def total(self) -> float:
        """Above 0 for what is supported. A number that the source does not have costs as much as all the words."""
        return COVERAGE * (self.coverage - bool(self.missing)) + LIFT * self.lift - LEAST

    @property
    def verdict(self) -> bool:
        return self.total >= 0

    @property
    def useful(self) -> bool:
        """Whether the source has to do with the claim at all."""
        return self.verdict

    @property
    def why(self) -> str:
        missing = f", no {', '.join(self.missing)}" if self.missing else ""
        return f"lift {self.lift:.2f}, coverage {self.coverage:.2f}{missing}"


async def supports(engine: Engine, claims: Sequence[str], source: str, question: str = "") -> list[Support]:
    """One a claim, in order. `question` is what the claims answer.

    Raises:
        EngineError
    """
    source = await asyncio.to_thread(excerpt, source, claims)
    without = _prompt("", question)
    given = [_prompt(source, question)]
    found = await asyncio.gather(*(lifts(engine, claim, without, given) for claim in claims))
    return [
        Support(
            claim, lift.lowest, coverage(claim, f"{source} {question}"), tuple(numbers_missing(claim, f"{source} {question}"))
        )
        for claim, (lift,) in zip(claims, found, strict=True)
    ]


def excerpt(source: str, claims: Sequence[str]) -> str:
    """The part of a source that has most to do with the claims, in its own order."""
    if len(source) <= SOURCE_CHARACTERS:
        return source
    sentences = split_sentences(source)
    shared = [max((coverage(claim, sentence) for claim in claims), default=0.0) for sentence in sentences]
    kept, room = set(), SOURCE_CHARACTERS
    for place in sorted(range(len(sentences)), key=lambda i: -shared[i]):
        if len(sentences[place]) <= room:
            kept.add(place)
            room -= len(sentences[place]) + 1
    return " ".join(sentences[place] for place in sorted(kept))


async def similarity(embedder: Embedder, one: Sequence[str], other: Sequence[str]) -> list[list[float]]:
    """Cosine of each of `one` with each of `other`."""
    vectors = await asyncio.to_thread(embedder.embed, [*one, *other])
    return [[float(cosine) for cosine in row] for row in vectors[: len(one)] @ vectors[len(one) :].T]


def _prompt(source: str, question: str) -> tuple[Message, ...]:
    text = f"Text: {source}\n\n" if source else ""
    return (Message("user", text + (f"Question: {question}" if question else "Say something that is true.")),)
