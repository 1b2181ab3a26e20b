"""Verdicts computed from what a model finds likely, for models that are too small to be asked for them.

Whether a source carries a claim is decided by four measures: how much more likely the claim is once the source was read, on
average and at its least likely token (`agentops.grounding.lifts`), the share of its content words that the source has, and
numbers that the source does not have. The weights are those of a logistic regression on HaluEval's question answering and on
paraphrased claims (`bench/judgements.py` tells how well they do on what they were not fitted on), for the default model.
This module asks nobody and knows no metric.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass

from agentops.engine import Engine
from agentops.grounding import Lift, coverage, lifts, numbers_missing, terms
from agentops.records import Message
from agentops.retrieval import Embedder
from agentops.text import split_sentences

SOURCE_CHARACTERS = 4_000
"""Of a longer source the sentences are read that share most words with the claims."""

CLAIM_CHARACTERS = 1_000
"""Of a longer claim the beginning is measured."""
_TOGETHER = 16

COVERAGE, LOWEST, MEAN, MISSING, LEAST = 4.2, 0.4, 0.35, 3.8, 3.3
"""A claim is supported when its coverage, its lowest lift, its mean lift and whether a number is missing, by these weights, are
`LEAST` together."""
FLOOR = -3.0
"""A single token counts this much at most: another word order makes some unlikely."""
USEFUL = -0.3
"""A context is useful when the total of its best carried claim and its cosine with the question are this much together."""
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
        whole = all(len(terms(part)) >= 2 and _VERB.search(part) for part in parts)
        found += [part.strip() for part in (parts if whole else [sentence]) if terms(part)]
    text = text.strip()
    return found or ([text] if text and not is_evasive(text) and not text.endswith("?") else [])


def is_evasive(text: str) -> bool:
    """Whether a text says that there is no answer, in the usual words for it."""
    return bool(_EVASIVE.search(text))


@dataclass(frozen=True, slots=True)
class Support:
    """How far a source carries a claim. `lift` is that of the claim, `coverage` the share of its content words that the source
    has, `missing` are the numbers that neither source nor question has."""

    claim: str
    lift: Lift
    coverage: float
    missing: tuple[str, ...]

    @property
    def total(self) -> float:
        """At least 0 for what is supported."""
        lift = LOWEST * max(self.lift.lowest, FLOOR) + MEAN * self.lift.mean
        return COVERAGE * self.coverage + lift - MISSING * bool(self.missing) - LEAST

    @property
    def verdict(self) -> bool:
        return self.total >= 0

    @property
    def why(self) -> str:
        missing = f", no {', '.join(self.missing)}" if self.missing else ""
        return f"lift {self.lift.mean:.2f}, lowest {self.lift.lowest:.2f}, coverage {self.coverage:.2f}{missing}"


async def supports(engine: Engine, claims: Sequence[str], source: str, question: str = "") -> list[Support]:
    """One a claim, in order. `question` is what the claims answer.

    Raises:
        EngineError
    """
    source = await asyncio.to_thread(excerpt, source, claims)
    without = _prompt("", question)
    given = [_prompt(source, question)]
    gate = asyncio.Semaphore(_TOGETHER)

    async def one(claim: str) -> Support:
        claim = claim[:CLAIM_CHARACTERS]
        async with gate:
            (lift,) = await lifts(engine, claim, without, given)
        missing = numbers_missing(claim, f"{source} {question}")
        return Support(claim, lift, coverage(claim, source), tuple(missing))

    return await asyncio.gather(*map(one, claims))


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


async def on_topic(embedder: Embedder, questions: Sequence[str], topics: Sequence[str]) -> list[bool]:
    """Whether each question belongs to one of the topics."""
    near = await similarity(embedder, questions, [f"a question about {topic}" for topic in topics])
    return [max(row) >= ON_TOPIC for row in near]


async def similarity(embedder: Embedder, one: Sequence[str], other: Sequence[str]) -> list[list[float]]:
    """Cosine of each of `one` with each of `other`."""
    vectors = await asyncio.to_thread(embedder.embed, [*one, *other])
    return [[float(cosine) for cosine in row] for row in vectors[: len(one)] @ vectors[len(one) :].T]


def _prompt(source: str, question: str) -> tuple[Message, ...]:
    text = f"Text: {source}\n\n" if source else ""
    return (Message("user", text + (f"Question: {question}" if question else "Say something that is true.")),)
