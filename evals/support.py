"""Support: how far a source carries a claim, by what a model finds likely. One measure, with one fit.

A small model that is asked whether a text carries a claim answers at chance. So each claim is measured: by how much likelier its
words become when the model has read the source (lift), by the share of them that the source has, by numbers that it does not
have, and by how sure the model is of the words. A logistic model with committed weights makes log-odds of these, which are the
verdict of a judge that is too small to be asked (`evals.metrics.ragas_computed`) and the probability of the metric
`hallucination`. `bench/hallucination.py` fits it, on answers of HaluEval and on paraphrased claims, for the default model, and
tells how good it is on what it was not fitted on.
This module asks nobody and knows no metric.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean
from textwrap import wrap

from agentops.engine import Engine
from agentops.grounding import coverage, numbers_missing, terms
from agentops.records import ChoiceScore, Message, ScoreRequest, content_hash
from agentops.text import split_sentences

SOURCE_CHARACTERS = 4_000
"""Of a longer source the model reads the sentences that share most words with the claims."""

CLAIM_CHARACTERS = 4_000
"""Of a longer claim the beginning is measured."""

WEIGHTS = Path(__file__).with_suffix(".json")
MEASURES = ("lift_mean", "lift_lowest", "coverage", "logprob_lowest", "numbers")

_FAR = 3.0
_AT_ONCE = 16
_WORDS_AT_ONCE = 256
_TURNS = re.compile(
    r"(?i)(?:no|not|nor|none|never|nothing|nobody|neither|without|cannot|\w+n['’]t|all|every|only|more|less|most|least|before"
    r"|after|up|down|over|under|against)"
)
"""Words that turn a claim round, or say how much of it holds. To a search they are stop words."""


@dataclass(frozen=True, slots=True)
class Support:
    """What speaks for a claim; of each measure more is better.

    Words that count are content words, and those that turn a claim round or say how much of it holds; all of them where there
    are none.

    lift_mean, lift_lowest: of the words' tokens together, and of the word that has the lowest mean: log-probability given the
        source and the question minus given the question alone.
    coverage: share of the content words, stemmed, that the source has.
    logprob_lowest: as `lift_lowest`, of the log-probability given the source.
    missing: numbers that neither source nor question has.
    words: each word with its lift; empty where tokens cannot be told by words.

    Natural logarithms.
    """

    claim: str
    lift_mean: float
    lift_lowest: float
    coverage: float
    logprob_lowest: float
    missing: tuple[str, ...] = ()
    words: tuple[tuple[str, float], ...] = ()

    @property
    def numbers(self) -> float:
        """1, or 0 where a number is missing."""
        return 0.0 if self.missing else 1.0

    @property
    def log_odds(self) -> float:
        """That the source carries the claim; above 0 it does."""
        return load_weights().log_odds(self)

    @property
    def why(self) -> str:
        missing = f", no {', '.join(self.missing)}" if self.missing else ""
        return f"lift {self.lift_mean:.2f}, lowest {self.lift_lowest:.2f}, coverage {self.coverage:.2f}{missing}"


@dataclass(frozen=True, slots=True)
class Weights:
    """The fitted model: the log-odds that a claim is carried are `bias` plus each measure's z-score, at most 3 from 0, times its
    weight. `identity` is a hash of the numbers."""

    bias: float
    means: tuple[float, ...]
    scales: tuple[float, ...]
    weights: tuple[float, ...]
    identity: str

    def log_odds(self, support: Support) -> float:
        total = self.bias
        for name, mean, scale, weight in zip(MEASURES, self.means, self.scales, self.weights, strict=True):
            total += weight * max(-_FAR, min(_FAR, (getattr(support, name) - mean) / scale))
        return total


@cache
def load_weights() -> Weights:
    """The committed ones, from the file beside this module, which also says how they were fitted."""
    data = json.loads(WEIGHTS.read_text(encoding="utf-8"))
    parts = [data["measures"][name] for name in MEASURES]
    means, scales, weights = (tuple(float(part[key]) for part in parts) for key in ("mean", "scale", "weight"))
    bias = float(data["bias"])
    return Weights(bias, means, scales, weights, content_hash(repr((bias, means, scales, weights)))[3:11])


async def supports(engine: Engine, claims: Sequence[str], source: str, question: str = "") -> list[Support]:
    """One a claim, in order. `question` is what the claims answer. Each of the two prompts, with the source and without, is
    computed once for all claims.

    Raises:
        EngineError
    """
    if not claims:
        return []
    parts = [" ".join((claim.rstrip(" .!;:") or claim)[:CLAIM_CHARACTERS].split()) for claim in claims]
    without, given = await asyncio.to_thread(prompts, source, question, parts)
    alone, informed, counts = await asyncio.gather(
        _scored(engine, parts, without), _scored(engine, parts, given), _token_counts(engine, parts)
    )

    def measured() -> list[Support]:
        return [
            _measured(claim, part, one.logprobs, other.logprobs, counts, source, question)
            for claim, part, one, other in zip(claims, parts, alone, informed, strict=True)
        ]

    return await asyncio.to_thread(measured)


def prompts(source: str, question: str, claims: Sequence[str]) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """The prompt without the source, and the one with it, to which the claims would be answers."""
    asked = f"Question: {question.strip()}" if question.strip() else "Say something that is true."
    return (Message("user", asked),), (Message("user", f"Text: {excerpt(source, claims)}\n\n{asked}"),)


def excerpt(source: str, claims: Sequence[str]) -> str:
    """The part of a source that has most to do with the claims, in its own order."""
    if len(source) <= SOURCE_CHARACTERS:
        return source
    # Tables and logs may have no end of a sentence for pages.
    sentences = [part for sentence in split_sentences(source) for part in wrap(sentence, SOURCE_CHARACTERS // 8)]
    shared = [max((coverage(claim, sentence) for claim in claims), default=0.0) for sentence in sentences]
    kept, room = set(), SOURCE_CHARACTERS
    for place in sorted(range(len(sentences)), key=lambda i: -shared[i]):
        if len(sentences[place]) <= room:
            kept.add(place)
            room -= len(sentences[place]) + 1
    return " ".join(sentences[place] for place in sorted(kept))


def blamed(support: Support, have: set[str]) -> list[str]:
    """The words that speak against a claim, in order: those that the source, whose terms are `have`, does not have or makes less
    likely; where there are none, the one that it helps least."""
    against = [word for word, lift in support.words if lift < 0 or not have.issuperset(terms(word))]
    return against or [word for word, _ in sorted(support.words, key=lambda one: one[1])[:1]]


def _measured(
    claim: str,
    part: str,
    alone: Sequence[float],
    informed: Sequence[float],
    counts: dict[str, int],
    source: str,
    question: str,
) -> Support:
    spans: list[tuple[str, int, int]] = []
    end = 0
    for word in _spaced(part):
        spans.append((word.strip(" ,.;:!?\"'()"), end, end + counts[word]))
        end += counts[word]
    if end != len(informed):
        # A tokenizer that joins words, or marks where a text begins: each token stands for itself.
        spans = [("", at, at + 1) for at in range(len(informed))]
    spans = [span for span in spans if terms(span[0]) or _TURNS.fullmatch(span[0])] or spans
    places = [range(begin, end) for _, begin, end in spans]
    lifts = [fmean(informed[at] - alone[at] for at in place) for place in places]
    return Support(
        claim=claim,
        lift_mean=fmean(informed[at] - alone[at] for place in places for at in place),
        lift_lowest=min(lifts),
        coverage=coverage(part, source),
        logprob_lowest=min(fmean(informed[at] for at in place) for place in places),
        missing=tuple(numbers_missing(part, f"{source} {question}")),
        words=tuple((word, lift) for (word, _, _), lift in zip(spans, lifts, strict=True) if word),
    )


async def _token_counts(engine: Engine, parts: Sequence[str]) -> dict[str, int]:
    """Tokens of each word, with the space before it: what log-probabilities belong to it. An engine does not tell otherwise."""
    words = list(dict.fromkeys(word for part in parts for word in _spaced(part)))
    found: dict[str, int] = {}
    for start in range(0, len(words), _WORDS_AT_ONCE):
        some = words[start : start + _WORDS_AT_ONCE]
        scores = await engine.score(ScoreRequest(tuple(some), messages=prompts("", "", ())[0]))
        found |= {word: len(one.logprobs) for word, one in zip(some, scores.choices, strict=True)}
    return found


def _spaced(claim: str) -> list[str]:
    return [f" {word}" if place else word for place, word in enumerate(claim.split())]


async def _scored(engine: Engine, choices: Sequence[str], prompt: tuple[Message, ...]) -> list[ChoiceScore]:
    found: list[ChoiceScore] = []
    for start in range(0, len(choices), _AT_ONCE):
        found += (await engine.score(ScoreRequest(tuple(choices[start : start + _AT_ONCE]), messages=prompt))).choices
    return found


def logistic(odds: float) -> float:
    """The probability that has these log-odds."""
    return 1 / (1 + math.exp(-odds))
