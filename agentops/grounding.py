"""Grounding: how far a text rests on another.

A small model that is asked "is this supported?" answers at chance; what it finds likely is another matter. So support is
measured, by the words that two texts share and by *lift*: how much more likely the model finds a text when it has read
the other one first (log-probability a token, natural logarithm). This module decides nothing; thresholds are its caller's.
"""

from __future__ import annotations

import asyncio
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from agentops.engine import Engine
from agentops.records import Message, ScoreRequest
from agentops.retrieval import Embedder
from agentops.retrieval.analysis import terms

QUESTION_CHARACTERS = 1_500
"""Of a longer question the end is measured, which is where pasted text is followed by what is asked."""

__all__ = ["Lift", "Relevance", "coverage", "lifts", "numbers_missing", "rarity", "relevance", "terms"]

_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")


def coverage(claim: str, source: str, weight: Callable[[str], float] = lambda _: 1.0) -> float:
    """Share of the claim's content words (stemmed, by `weight`) that the source has; 1.0 for a claim without any."""
    wanted = set(terms(claim))
    total = sum(map(weight, wanted))
    return sum(map(weight, wanted & set(terms(source)))) / total if total else 1.0


def numbers_missing(claim: str, source: str) -> list[str]:
    """Numbers of the claim that the source does not have, in order."""
    have = {number.replace(",", "") for number in _NUMBER.findall(source)}
    return [number for number in _NUMBER.findall(claim) if number.replace(",", "") not in have]


def rarity(texts: Sequence[str]) -> Callable[[str], float]:
    """Weight of a term by how few of the texts have it (BM25's inverse document frequency)."""
    counts = Counter(term for text in texts for term in set(terms(text)))

    def weight(term: str) -> float:
        return math.log(1 + (len(texts) - counts[term] + 0.5) / (counts[term] + 0.5))

    return weight


@dataclass(frozen=True, slots=True)
class Lift:
    """Gain in log-probability (natural logarithm) over the tokens of a text: their `mean` and the `lowest`."""

    mean: float
    lowest: float


async def lifts(engine: Engine, text: str, without: tuple[Message, ...], given: Sequence[tuple[Message, ...]]) -> list[Lift]:
    """Lift of `text` as the answer to each prompt of `given`, over the prompt `without` the source.

    Raises:
        EngineError
    """
    base, *others = await asyncio.gather(*(engine.score(ScoreRequest((text,), messages=turn)) for turn in (without, *given)))
    alone = base.choices[0].logprobs
    found = []
    for scores in others:
        gains = [
            with_source - without_source for with_source, without_source in zip(scores.choices[0].logprobs, alone, strict=True)
        ]
        found.append(Lift(sum(gains) / max(1, len(gains)), min(gains, default=0.0)))
    return found


@dataclass(frozen=True, slots=True)
class Relevance:
    """What a text has to do with a question: `cosine` of their vectors, `coverage` of the question's words, rare ones
    counting more, and mean `lift` of the question given the text."""

    index: int
    cosine: float
    coverage: float
    lift: float

    @property
    def total(self) -> float:
        """The three, scaled alike: a lift of 4 is what a text gives that answers the question outright."""
        return self.cosine + self.coverage + min(self.lift, 4.0) / 4


async def relevance(
    engine: Engine,
    embedder: Embedder,
    question: str,
    texts: Sequence[str],
    ask: Callable[[str], tuple[Message, ...]],
    *,
    shortlist: int = 10,
) -> list[Relevance]:
    """The texts that have most to do with the question, best first, at most `shortlist`: cosine and coverage choose them
    and lift ranks them with these. `ask` makes the prompt to which the question would be the answer.

    Raises:
        EngineError
    """
    if not texts:
        return []
    question = question[-QUESTION_CHARACTERS:]
    vectors = await asyncio.to_thread(embedder.embed, [question, *texts])
    cosines = vectors[1:] @ vectors[0]
    weight = rarity(texts)
    shared = [coverage(question, text, weight) for text in texts]
    likely = sorted(range(len(texts)), key=lambda i: -(shared[i] + float(cosines[i])))[:shortlist]
    gains = await lifts(engine, question, ask(""), [ask(texts[i]) for i in likely])
    found = [Relevance(i, float(cosines[i]), shared[i], gain.mean) for i, gain in zip(likely, gains, strict=True)]
    return sorted(found, key=lambda one: -one.total)
