"""Native metrics: what code can say of a sample by itself, without a model and without ragas.

Citations, retrieval by ids, trajectories of tool calls, JSON schema, exact and regular-expression match, latency, tokens, cost.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from agentops import schema
from agentops.grounding import coverage, numbers_missing
from agentops.prices import Price
from agentops.records import Score, ToolCall, content_hash
from agentops.text import split_sentences
from evals.metrics import NO_REFERENCE, Metric, Unscored, in_one_form
from evals.samples import Sample

CARRIED = 0.75
"""Least share of a sentence's content words that the documents it cites must have: what the graph `rag` holds itself to."""

NO_PRICE = "no_price"
"""Why a sample has no cost, with the model's name: the settings have no price of it."""

ANSWER_CHARACTERS = 100_000
PATTERN_CHARACTERS = 1_000

_MARK = re.compile(r"\[(\d{1,9}(?:\s?,\s?\d{1,9})*)\]")
_MARKS_AFTER_STOP = re.compile(r"(?m)(?<!^\d)(?<!^\d\d)([.!?…])((?:\s{0,2}\[\d{1,9}(?:\s?,\s?\d{1,9})*\])+)")
_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]+`", re.DOTALL)
_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Measured:
    """A value with what is worth knowing of it, as in `Score`."""

    value: float
    comment: str = ""
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class NativeMetric:
    """A `Metric` that is a function of the sample. `measure` raises `Unscored` where there is nothing to be said."""

    name: str
    measure: Callable[[Sample], Measured]
    low: float = 0.0
    high: float = 1.0
    better: str = "high"
    version: str = "1"

    async def score(self, sample: Sample) -> Score:
        """As `Metric.score`."""
        try:
            # Long texts take a while, in which others go on.
            found = await asyncio.to_thread(self.measure, sample)
        except Unscored as nothing:
            return Score(self.name, None, "code", reason=str(nothing))
        except Exception as error:
            return Score(self.name, None, "code", reason=f"{type(error).__name__}: {error}"[:500])
        return Score(self.name, found.value, "code", comment=found.comment[:500], details=found.details)


def native_metrics(ks: Sequence[int] = (5, 10), prices: Mapping[str, Price] | None = None) -> dict[str, Metric]:
    """All of them, by name. Retrieval is measured at the ranks `ks`, cost by `prices` of models."""
    prices = dict(prices or {})
    priced = f" {content_hash(repr(sorted(prices.items())))[3:11]}" if prices else ""
    metrics = [
        NativeMetric("citations_resolve", citations_resolve, version="2"),
        NativeMetric("citations_support", citations_support, version="2"),
        *(NativeMetric(f"recall_at_{k}", partial(recall, k=k)) for k in ks),
        *(NativeMetric(f"ndcg_at_{k}", partial(ndcg, k=k)) for k in ks),
        NativeMetric("mrr", reciprocal_rank),
        *(NativeMetric(f"trajectory_{mode}", partial(trajectory, fits=fits)) for mode, fits in TRAJECTORIES.items()),
        NativeMetric("json_schema", json_schema, version="2"),
        NativeMetric("exact", exact),
        NativeMetric("regex", regex, version="2"),
        NativeMetric("latency_ms", latency, high=math.inf, better="low"),
        NativeMetric("tokens", tokens, high=math.inf, better="low"),
        NativeMetric("cost", partial(cost, prices=prices), high=math.inf, better="low", version=f"2{priced}"),
    ]
    return {metric.name: metric for metric in metrics}


# --- citations ---


def citations_resolve(sample: Sample) -> Measured:
    """Share of the numbers cited in the answer that lead to a document."""
    cited = [number for _, numbers in _citing(sample) for number in numbers]
    dangling = [number for number in cited if _document(sample, number) is None]
    return Measured(
        (len(cited) - len(dangling)) / len(cited),
        ", ".join(f"[{number}]" for number in dict.fromkeys(dangling)) + " leads nowhere" if dangling else "",
        {"citations": len(cited), "dangling": dangling[:_SHOWN]},
    )


def citations_support(sample: Sample) -> Measured:
    """Share of the citing sentences that the documents which they cite carry together: these have at least `CARRIED` of a
    sentence's content words and all of its numbers."""
    citing = _citing(sample)
    wanting = []
    for sentence, numbers in citing:
        text = "\n".join(text for number in numbers if (text := _document(sample, number)) is not None)
        share, missing = coverage(sentence, text), numbers_missing(sentence, text)
        if not text or share < CARRIED or missing:
            wanting.append(
                {"sentence": sentence[:500], "cites": numbers, "coverage": round(share, 3), "numbers_missing": missing}
            )
    return Measured(
        (len(citing) - len(wanting)) / len(citing),
        "; ".join(str(one["sentence"]) for one in wanting),
        {"sentences": len(citing), "unsupported": wanting[:_SHOWN]},
    )


def _citing(sample: Sample) -> list[tuple[str, list[str]]]:
    """The sentences that cite something, without the marks, and the numbers that they cite. Numbers in code are no citations, nor
    are those of an output that has no list of sources at all."""
    output = sample.output if isinstance(sample.output, Mapping) else {}
    if not sample.answer.strip():
        raise Unscored("no answer")
    if not sample.cited and not isinstance(output.get("sources"), list):
        raise Unscored("the output has no sources")
    # A mark behind a full stop belongs to the sentence before it.
    answer = _MARKS_AFTER_STOP.sub(r"\2\1 ", _CODE.sub(lambda code: _MARK.sub(" ", code[0]), _read(sample)))
    found = []
    for sentence in split_sentences(answer):
        numbers = [number.strip() for marks in _MARK.findall(sentence) for number in marks.split(",")]
        if numbers:
            found.append((" ".join(_MARK.sub(" ", sentence).split()), numbers))
    if not found:
        raise Unscored("no citations")
    return found


def _document(sample: Sample, number: str) -> str | None:
    place = sample.cited.get(number)
    return sample.contexts[place].text if place is not None and 0 <= place < len(sample.contexts) else None


# --- retrieval ---


def recall(sample: Sample, k: int) -> Measured:
    """Share of the documents that belong to the question among the first `k`."""
    ranks, wanted = _ranks(sample)
    missing = [one for one in wanted if ranks.get(one, k) >= k]
    return Measured((len(wanted) - len(missing)) / len(wanted), "", {"missing": missing[:_SHOWN], "retrieved": len(ranks)})


def ndcg(sample: Sample, k: int) -> Measured:
    """Normalised discounted cumulative gain of the first `k`; a document belongs to the question or does not
    (Järvelin and Kekäläinen, 2002)."""
    ranks, wanted = _ranks(sample)
    gained = sum(1 / math.log2(ranks[one] + 2) for one in wanted if ranks.get(one, k) < k)
    possible = sum(1 / math.log2(rank + 2) for rank in range(min(k, len(wanted))))
    return Measured(min(1.0, gained / possible))


def reciprocal_rank(sample: Sample) -> Measured:
    """One divided by the place, from 1, of the first document that belongs to the question; 0 where there is none."""
    ranks, wanted = _ranks(sample)
    best = min((ranks[one] for one in wanted if one in ranks), default=None)
    return Measured(0.0 if best is None else 1 / (best + 1))


def _ranks(sample: Sample) -> tuple[dict[str, int], list[str]]:
    """The place of each retrieved document, from 0, and the documents wanted."""
    if sample.reference.contexts is None:
        raise Unscored(NO_REFERENCE)
    wanted = list(dict.fromkeys(sample.reference.contexts))
    if not wanted:
        raise Unscored("no document belongs to the question")
    retrieved = dict.fromkeys(context.id for context in sample.contexts)
    return {key: rank for rank, key in enumerate(retrieved)}, wanted


# --- trajectories ---

TRAJECTORIES: dict[str, Callable[[list[str], list[str]], bool]] = {
    "strict": lambda made, wanted: made == wanted,
    "unordered": lambda made, wanted: Counter(made) == Counter(wanted),
    "subset": lambda made, wanted: Counter(made) <= Counter(wanted),
    "superset": lambda made, wanted: Counter(made) >= Counter(wanted),
}
"""Which calls made fit the calls expected. strict: the same ones in the same order.  unordered: the same ones, each as often.
subset: none that was not expected.  superset: all that were expected."""


def trajectory(sample: Sample, fits: Callable[[list[str], list[str]], bool]) -> Measured:
    """Whether the calls of tools, arguments included, fit the ones expected: 1 or 0."""
    if sample.reference.trajectory is None:
        raise Unscored(NO_REFERENCE)
    made, wanted = ([_written(call) for call in calls] for calls in (sample.tool_calls, sample.reference.trajectory))
    missing, surplus = (list((Counter(one) - Counter(other)).elements()) for one, other in ((wanted, made), (made, wanted)))
    said = [f"missing: {', '.join(missing)}"] * bool(missing) + [f"surplus: {', '.join(surplus)}"] * bool(surplus)
    passed = fits(made, wanted)
    return Measured(
        float(passed),
        "" if passed else "; ".join(said) or "another order",
        {"missing": missing[:_SHOWN], "surplus": surplus[:_SHOWN], "calls": len(made)},
    )


def _written(call: ToolCall) -> str:
    return f"{call.name}({in_one_form(call.arguments)})"


# --- form ---


def json_schema(sample: Sample) -> Measured:
    """Whether the output fits the schema, or the answer read as JSON where there is no output: 1 or 0."""
    wanted = sample.reference.schema
    if wanted is None:
        raise Unscored(NO_REFERENCE)
    output = sample.output
    if output is None:
        try:
            output = json.loads(_read(sample))
        except (ValueError, RecursionError) as error:
            return Measured(0.0, f"the answer is no JSON: {error}")
    said = schema.violation(dict(wanted), output)
    if said.startswith(schema.BROKEN):
        raise Unscored(said[:500])
    return Measured(float(not said), said)


def exact(sample: Sample) -> Measured:
    """Whether the answer is the expected one, to the letter; white space and Unicode's ways of composing do not count."""
    if sample.reference.answer is None:
        raise Unscored(NO_REFERENCE)
    said, wanted = (" ".join(unicodedata.normalize("NFC", text).split()) for text in (sample.answer, sample.reference.answer))
    return Measured(float(said == wanted))


def regex(sample: Sample) -> Measured:
    """Whether the answer has a match of the pattern, anywhere where it is not anchored.

    Patterns are those of `agentops.schema`, which cannot hang.
    """
    pattern = sample.reference.pattern
    if pattern is None:
        raise Unscored(NO_REFERENCE)
    if len(pattern) > PATTERN_CHARACTERS:
        raise Unscored(f"the pattern has {len(pattern):,} characters; at most {PATTERN_CHARACTERS:,} are taken")
    try:
        return Measured(float(schema.matcher(pattern)(_read(sample))))
    except schema.PatternInvalid as error:
        raise Unscored(str(error)) from error


# --- effort ---


def latency(sample: Sample) -> Measured:
    """Milliseconds from start to end, without the time spent waiting for people."""
    if not sample.latency_ms > 0:
        raise Unscored("not measured")
    return Measured(_known(sample.latency_ms))


def tokens(sample: Sample) -> Measured:
    """Tokens read and written, those from the cache among them."""
    usage = sample.usage
    about = {
        name: getattr(usage, name)
        for name in ("input_tokens", "output_tokens", "cached_tokens", "computed_tokens", "trimmed_tokens")
    }
    return Measured(_known(usage.input_tokens + usage.output_tokens), "", about)


def cost(sample: Sample, prices: Mapping[str, Price]) -> Measured:
    """What the run's tokens cost, in the currency of the prices."""
    for name in sample.spent:
        if name not in prices:
            raise Unscored(f"{NO_PRICE}: {name or 'a model without a name'}"[:500])
    by_model = {name: prices[name].of(usage) for name, usage in sample.spent.items()}
    return Measured(_known(math.fsum(by_model.values())), "", {"by_model": by_model})


def _known(value: float) -> float:
    if not (math.isfinite(value) and value >= 0):
        raise Unscored(f"{value} is no amount")
    return float(value)


def _read(sample: Sample) -> str:
    if len(sample.answer) > ANSWER_CHARACTERS:
        raise Unscored(f"the answer has {len(sample.answer):,} characters; at most {ANSWER_CHARACTERS:,} are read")
    return sample.answer
