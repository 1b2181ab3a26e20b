"""How well is what a text carries told from what it does not? AUC on two sets of labelled claims, beside simple baselines.

HaluEval's hallucinated answers are longer, which alone separates them; so only pairs are taken whose lengths are within a
factor of two, and the length baseline is printed. Every second pair is for fitting; figures are of the other half, and, with
weights fitted on either half and used on the other, of all pairs. A third set leaves length no say at all: right and
hallucinated answers, to different questions and none of them fitted on, of exactly the same length. A fourth is harder:
paraphrases of short texts and near misses (`claims.json`, written for this), of which every second text is fitted on as well;
figures are cross-fitted. Both kinds count alike in the fit.
Intervals are 95 % bootstrap intervals over pairs. The peer is the same model, asked "is the answer right, Yes or No".
`--fit` writes the weights of `evals.support`, which verdicts and the metric have in common. What the model computed is kept in
`--cache`.
Not measured: other models, other languages, long answers, and data where hallucinations are rare.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agentops.engine import Engine
from agentops.engine.local import open_engine
from agentops.engine.models import prepare
from agentops.records import ChoiceScore, Message, ScoreRequest, Scores, Timing, Usage, content_hash
from agentops.settings import load_settings
from evals.metrics.hallucination import Hallucination
from evals.samples import Context, Sample
from evals.support import MEASURES, WEIGHTS, Support, load_weights, supports
from evals.verdicts import claims

ROOT = Path(__file__).resolve().parents[1]
RATIO = 2.0
ROUNDS = 2_000
STRENGTH = 1.0
"""Of the penalty on weights: half their squares, against the sum of the losses."""

Floats = NDArray[np.float64]
Model = tuple[Floats, Floats, Floats, float]

METRIC, ASKED = "combined: the metric", "asked: Yes or No"


class Remembered:
    """An engine whose scores are kept in a file, by all that was asked."""

    def __init__(self, engine: Engine, file: Path) -> None:
        self._engine, self._file = engine, file
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        self._known = dict(json.loads(line) for line in lines)
        self.computed = 0

    @property
    def info(self) -> Any:
        return self._engine.info

    async def score(self, request: ScoreRequest) -> Scores:
        key = content_hash(f"{self.info.revision} {request!r}")
        if key not in self._known:
            self.computed += 1
            self._known[key] = [choice.logprobs for choice in (await self._engine.score(request)).choices]
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps([key, self._known[key]]) + "\n")
        choices = tuple(ChoiceScore(text, tuple(one)) for text, one in zip(request.choices, self._known[key], strict=True))
        return Scores(choices, Usage(), Timing(), self.info.name, self.info.device)


Row = dict[str, str]
Answer = tuple[Row, str]
Pair = tuple[Answer, Answer]
"""A right answer and a hallucinated one, each with its question."""


def matched(folder: Path, ratio: float = RATIO) -> tuple[list[Pair], list[Pair]]:
    """HaluEval's pairs whose answers' lengths in characters are within a factor of `ratio`; and pairs of equal length from
    different questions, none of which is every second of the others."""
    file = folder / "halueval" / "qa_one-turn_data.jsonl"
    if not file.is_file():
        raise SystemExit("HaluEval is not here: name the folder of data sets in AGENTOPS_SHARED_DATA")
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    near = [row for row in rows if within(row, ratio)]
    pairs = [((row, row["right_answer"]), (row, row["hallucinated_answer"])) for row in near]
    rest = [row for row in rows if not any(row is fitted for fitted in near[::2])]
    free: dict[int, list[Row]] = {}
    for row in rest:
        free.setdefault(len(row["hallucinated_answer"]), []).append(row)
    equal: list[Pair] = []
    for row in rest:
        others = [other for other in free.get(len(row["right_answer"]), []) if other is not row]
        if others:
            free[len(row["right_answer"])].remove(others[0])
            equal.append(((row, row["right_answer"]), (others[0], others[0]["hallucinated_answer"])))
    return pairs, equal


def paraphrased() -> list[Pair]:
    """A claim that a text carries and one that it does not carry; two pairs a text."""
    rows = json.loads((ROOT / "bench" / "claims.json").read_text(encoding="utf-8"))
    made: list[Pair] = []
    for row in rows:
        about = {"question": row["question"], "knowledge": row["text"]}
        made += [((about, right), (about, wrong)) for right, wrong in zip(row["supported"], row["unsupported"], strict=True)]
    return made


def within(row: Row, ratio: float) -> bool:
    short, long = sorted((len(row["right_answer"]), len(row["hallucinated_answer"])))
    return long <= ratio * short


def auc(right: Sequence[float] | Floats, wrong: Sequence[float] | Floats) -> float:
    """Chance that one of `right` is above one of `wrong`, ties counting half."""
    above = np.asarray(right)[:, None] - np.asarray(wrong)[None, :]
    return float(((above > 0) + 0.5 * (above == 0)).mean())


def judged(values: Floats) -> tuple[float, float, float]:
    """AUC and its 95 % bootstrap interval; the two of a pair (a row) are drawn together."""
    generator = np.random.default_rng(0)
    draws = [generator.integers(0, len(values), len(values)) for _ in range(ROUNDS)]
    low, high = np.quantile([auc(values[draw, 0], values[draw, 1]) for draw in draws], [0.025, 0.975])
    return auc(values[:, 0], values[:, 1]), float(low), float(high)


def fit(sets: Sequence[Floats]) -> Model:
    """Means and scales of the measures, weights (none below zero: more evidence never speaks against a claim) and bias of the
    log-odds of being carried. Each set has pairs, carried and not, and the measures of both; each counts alike."""
    from scipy.optimize import minimize

    flat = [one.reshape(-1, len(MEASURES)) for one in sets]
    rows = np.concatenate(flat)
    counts = np.concatenate([np.full(len(one), len(rows) / len(flat) / len(one)) for one in flat])
    means, scales = rows.mean(0), rows.std(0)
    z = np.clip((rows - means) / scales, -3, 3)
    signs = np.tile([1.0, -1.0], len(rows) // 2)

    def loss(parameters: Floats) -> float:
        margins = signs * (z @ parameters[1:] + parameters[0])
        return float((counts * np.logaddexp(0, -margins)).sum() + STRENGTH / 2 * (parameters[1:] ** 2).sum())

    found = minimize(loss, np.zeros(z.shape[1] + 1), bounds=[(None, None)] + [(0, None)] * z.shape[1], method="L-BFGS-B").x
    return means, scales, found[1:], float(found[0])


def carried(model: Model, rows: Floats) -> Floats:
    """Log-odds of being carried by the contexts."""
    means, scales, weights, bias = model
    return np.clip((rows - means) / scales, -3, 3) @ weights + bias


async def worst(engine: Any, row: Row, answer: str) -> Support:
    """Of the claims of an answer the one with the lowest lift."""
    found = await supports(engine, claims(answer), row["knowledge"], row["question"])
    return min(found, key=lambda one: one.lift_lowest)


async def asked(engine: Any, row: Row, answer: str) -> float:
    """Log-odds of Yes against No."""
    question = (
        f"Text: {row['knowledge']}\n\nQuestion: {row['question']}\nAnswer: {answer}\n\n"
        "Is the answer right according to the text? Answer Yes or No."
    )
    yes, no = (await engine.score(ScoreRequest(("Yes", "No"), messages=(Message("user", question),)))).choices
    return float(yes.total - no.total)


async def scored(metric: Hallucination, row: Row, answer: str) -> float:
    score = await metric.score(Sample(row["question"], answer, contexts=(Context("knowledge", row["knowledge"]),)))
    if score.value is None:
        raise SystemExit(f"an answer was left unscored: {score.reason}")
    return score.value


async def of_pairs(pairs: list[Pair], measured: Callable[[Row, str], Awaitable[Any]]) -> list[list[Any]]:
    return [[await measured(row, answer) for row, answer in pair] for pair in pairs]


async def figures(engine: Any, pairs: list[Pair], evidence: Floats) -> dict[str, Floats]:
    """For each way of telling, a number for each answer of each pair; more is for the right ones."""
    column = {name: evidence[:, :, place] for place, name in enumerate(MEASURES)}
    metric = Hallucination(engine)

    async def quoted(row: Row, answer: str) -> float:
        return float(answer.strip().rstrip(".").lower() in row["knowledge"].lower())

    async def shorter(row: Row, answer: str) -> float:
        return -float(len(answer))

    return {
        METRIC: -np.array(await of_pairs(pairs, partial(scored, metric))),
        "lift, lowest": column["lift_lowest"],
        "lift, mean": column["lift_mean"],
        "coverage": column["coverage"],
        "uncertainty, lowest": column["logprob_lowest"],
        "no number is missing": column["numbers"],
        "quoted word for word": np.array(await of_pairs(pairs, quoted)),
        "shorter": np.array(await of_pairs(pairs, shorter)),
        ASKED: np.array(await of_pairs(pairs, partial(asked, engine))),
    }


def write_weights(model: Model, about: dict[str, Any]) -> None:
    means, scales, weights, bias = model
    measures = {
        name: {"mean": round(float(mean), 4), "scale": round(float(scale), 4), "weight": round(float(weight), 4)}
        for name, mean, scale, weight in zip(MEASURES, means, scales, weights, strict=True)
    }
    data = {"about": about, "bias": round(bias, 4), "measures": measures}
    WEIGHTS.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    load_weights.cache_clear()


async def run(pairs: list[Pair], equal: list[Pair], near: list[Pair], cache: Path, write: bool) -> dict[str, Any]:
    settings = load_settings({"engine.threads": 2})
    opened = open_engine(prepare(settings.model.name, settings), settings)
    cache.mkdir(parents=True, exist_ok=True)
    engine: Any = Remembered(opened, cache / "scores.jsonl")
    began = time.monotonic()
    evidence, other, close = [
        np.array(
            [[[getattr(one, name) for name in MEASURES] for one in pair] for pair in await of_pairs(some, partial(worst, engine))]
        )
        for some in (pairs, equal, near)
    ]
    fitted = np.arange(len(pairs)) % 2 == 0
    # Two pairs are of one text, and a text is either fitted on or not.
    texts = np.arange(len(near)) // 2 % 2 == 0
    models = [fit([evidence[half], close[part]]) for half, part in ((fitted, texts), (~fitted, ~texts))]
    if write:
        about = {
            "fitted_on": f"{int(fitted.sum())} pairs: every second of {len(pairs)} question answering pairs of HaluEval (MIT) "
            f"whose lengths are within a factor of {RATIO:g}; and {int(texts.sum())} of {len(near)} pairs of a paraphrase and a "
            "near miss (bench/claims.json), which count alike",
            "fitted_by": "python bench/hallucination.py --fit",
            "model": f"{opened.info.name} {opened.info.revision}",
            "penalty": STRENGTH,
        }
        write_weights(models[0], about)
    found, same, paraphrases = [await figures(engine, *some) for some in ((pairs, evidence), (equal, other), (near, close))]
    await opened.close()
    crossed, both = [
        np.where(half[:, None], carried(models[1], rows), carried(models[0], rows))
        for half, rows in ((fitted, evidence), (texts, close))
    ]
    return {
        "sizes": (
            f"held-out half, {int((~fitted).sum())}",
            f"cross-fitted, {len(pairs)}",
            f"equal length, {len(equal)}",
            f"paraphrases, {len(near)}",
        ),
        "seconds": time.monotonic() - began,
        "computed": engine.computed,
        "model": opened.info.name,
        "weights": [[round(float(weight), 2) for weight in model[2]] for model in models],
        "calibration": calibration(-found[METRIC][~fitted]),
        "accuracy": float(((both > 0) == np.array([True, False])).mean()),
        "rows": {
            name: [
                judged(values[~fitted]),
                judged(crossed if name == METRIC else values),
                judged(same[name]),
                judged(both if name == METRIC else paraphrases[name]),
            ]
            for name, values in found.items()
        },
    }


def calibration(probabilities: Floats) -> dict[str, float]:
    """On (pairs, right and hallucinated): accuracy at .5 and the Brier score (.25 for always saying .5)."""
    truth = np.array([0.0, 1.0])
    return {
        "accuracy": float(((probabilities > 0.5) == truth).mean()),
        "brier": float(((probabilities - truth) ** 2).mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="16 of the pairs and 8 of equal length only")
    parser.add_argument("--fit", action="store_true", help=f"fit the weights and write them to {WEIGHTS.name}")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "agentops-bench-hallucination")
    asked_for = parser.parse_args()
    if asked_for.quick and asked_for.fit:
        parser.error("weights are fitted on all the pairs there are for it")
    pairs, equal = matched(Path(os.environ.get("AGENTOPS_SHARED_DATA") or ROOT.parent / "shared" / "data"))
    near = paraphrased()
    if asked_for.quick:
        pairs, equal, near = pairs[:16], equal[:8], near[:8]
    found = asyncio.run(run(pairs, equal, near, asked_for.cache, asked_for.fit))
    print(f"{found['model']}: AUC of right against hallucinated answers of HaluEval, and of paraphrases against near misses")
    print("numbers of pairs; 95 % intervals\n")
    print(f"{'':24}" + "".join(f"{head:24}" for head in found["sizes"]).rstrip())
    for name, values in found["rows"].items():
        told = (f"{value:.3f} [{low:.3f}, {high:.3f}]" for value, low, high in values)
        print(f"{name:24}" + "".join(f"{one:24}" for one in told).rstrip())
    first, other = (", ".join(f"{weight:g}" for weight in weights) for weights in found["weights"])
    print(f"\nweights of {', '.join(MEASURES)}:\n{first}; fitted on the other half: {other}")
    sure = found["calibration"]
    print(f"held-out half: accuracy at .5 {sure['accuracy']:.3f}, Brier score {sure['brier']:.3f}")
    print(f"paraphrases, cross-fitted: accuracy at .5 {found['accuracy']:.3f}")
    print(f"{found['computed']} score requests were computed in {found['seconds']:.0f} s, the others were kept from before")
    print("not measured: other models, other languages, long answers, data where hallucinations are rare")
    machine = {"processor": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
    rows = [
        {
            "metric": head,
            "ours": round(value[0], 3),
            "peer": "the same model asked",
            "theirs": round(peer[0], 3),
            "ratio": round(value[0] / peer[0], 2),
            "unit": "AUC",
        }
        for head, value, peer in zip(found["sizes"], found["rows"][METRIC], found["rows"][ASKED], strict=True)
    ]
    print(json.dumps({"bench": "hallucination", "machine": machine, "rows": rows}))


if __name__ == "__main__":
    main()
