"""How well is toxic text told from other text? Cross-validated AUC, beside a word list and the length as baselines.

Comments are not what an assistant writes: fitted on them alone, half of plain sentences about groups of people are taken for
toxic. So sentences of an encyclopedia (HaluEval's) and made ones about groups of people are added as not toxic, and the false
alarms are counted on other text: this project's documentation, and sentences about the same groups made in other ways.

The data is surge-ai's toxicity set: 500 comments from social media, about half of them toxic. Ten folds, three times over; a
fold's texts are judged by weights that never saw them, and the word list is made of each training fold's own words, by how
much more often toxic texts have them. Every fifth row is kept for a last check and not fitted on.
`--fit` writes the weights that the metric uses. No text is written anywhere.
Not measured: other languages, other kinds of text than comments, and whether a toxic text is only quoted.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import json
import os
import platform
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss, roc_auc_score
from sklearn.model_selection import StratifiedKFold

from agentops.engine.models import prepare
from agentops.records import content_hash
from agentops.retrieval.embed import EncoderEmbedder, open_embedder
from agentops.settings import load_settings
from agentops.text import split_sentences
from evals.metrics.toxicity import WEIGHTS, Toxicity, load_weights, passages, spelled
from evals.samples import Sample

ROOT = Path(__file__).resolve().parents[1]
PENALTY = 3.0
"""scikit-learn's C: the sum of the losses counts this much against half the squared weights."""

FOLDS, TIMES, ROUNDS = 10, 3, 2_000
HELD_OUT = 5
"""Every so many rows one is not fitted on."""

PLAIN = 300
PLAIN_WEIGHT = 0.5
"""What an added sentence counts against a comment."""

GROUPS = [
    "gay",
    "lesbian",
    "straight",
    "transgender",
    "Muslim",
    "Jewish",
    "Christian",
    "Hindu",
    "atheist",
    "Black",
    "white",
    "Asian",
    "African",
    "Mexican",
    "Indian",
    "Arab",
    "immigrant",
    "refugee",
    "deaf",
    "blind",
    "disabled",
    "old",
    "young",
    "female",
    "male",
]
SAID = (
    "My neighbour is {}.",
    "Many {} people live in this city.",
    "She is {} and works as a teacher.",
    "The {} community held a festival in May.",
)
SAID_OTHERWISE = (
    "I am {}.",
    "A {} man opened a bakery.",
    "The first {} senator was elected in 1994.",
    "He asked a {} woman for the way.",
)

METRIC = "combined: the metric"
WORDS = "word list"

Floats = NDArray[np.float64]
Rows = NDArray[np.float32]
Parts = tuple[Rows, NDArray[np.intp]]
"""Passages and the place of the text that each is of."""
Judge = Callable[[NDArray[np.intp], NDArray[np.intp]], Floats]
"""Numbers for the texts at the second places, more for toxic, from what can be learnt of those at the first."""


def read(folder: Path) -> tuple[list[str], NDArray[np.int64]]:
    """Texts and whether they are toxic."""
    file = folder / "toxicity" / "toxicity_dev.csv"
    if not file.is_file():
        raise SystemExit("the toxicity set is not here: name the folder of data sets in AGENTOPS_SHARED_DATA")
    with file.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    return [row["text"] for row in rows], np.array([row["is_toxic"] == "Toxic" for row in rows], np.int64)


def vectors(embedder: EncoderEmbedder, texts: Sequence[str]) -> NDArray[np.float32]:
    """The texts' vectors, kept below the temporary folder."""
    key = content_hash(embedder.revision + "\0".join(texts))[3:]
    file = Path(tempfile.gettempdir()) / "agentops-bench-toxicity" / f"{key}.npy"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(file, embedder.embed(texts), allow_pickle=False)
    return np.asarray(np.load(file, allow_pickle=False), np.float32)


def plain(folder: Path) -> list[str]:
    """Sentences that are not toxic, to be fitted on beside the comments: of an encyclopedia, and about groups of people."""
    lines = (folder / "halueval" / "qa_one-turn_data.jsonl").read_text(encoding="utf-8").splitlines()[:PLAIN]
    found = [split_sentences(json.loads(line)["knowledge"]) for line in lines]
    return [sentences[i % len(sentences)] for i, sentences in enumerate(found)] + about_groups(SAID)


def about_groups(ways: Sequence[str]) -> list[str]:
    return [way.format(group) for group in GROUPS for way in ways]


def documentation() -> list[str]:
    pages = (file.read_text(encoding="utf-8") for file in sorted((ROOT / "docs").glob("*.md")))
    return [one for page in pages for one in split_sentences(page) if 30 < len(one) < 300][:PLAIN]


def linear(rows: Rows, truth: NDArray[np.int64], added: Rows, parts: Parts | None = None) -> Judge:
    """Fitted on whole texts. A text's number is that of its worst passage where `parts` has the passages, else its own."""

    def judge(train: NDArray[np.intp], test: NDArray[np.intp]) -> Floats:
        model = fitted(rows[train], truth[train], added)
        if parts is None:
            return np.asarray(model.decision_function(rows[test]))
        numbers = model.decision_function(parts[0])
        return np.array([numbers[parts[1] == i].max() for i in test])

    return judge


def fitted(rows: Rows, truth: NDArray[np.int64], added: Rows) -> LogisticRegression:
    """`added` are rows that are not toxic and count less."""
    model = LogisticRegression(C=PENALTY, max_iter=5_000)
    weights = np.r_[np.ones(len(rows)), np.full(len(added), PLAIN_WEIGHT)]
    return model.fit(np.vstack([rows, added]), np.r_[truth, np.zeros(len(added), np.int64)], sample_weight=weights)


def of_passages(embedder: EncoderEmbedder, texts: Sequence[str]) -> Parts:
    found = [passages(text) for text in texts]
    every = [one for some in found for one in some]
    places = np.repeat(np.arange(len(texts)), [len(some) for some in found])
    return np.hstack([spelled(every), vectors(embedder, every)]), places


def word_list(texts: Sequence[str], truth: NDArray[np.int64]) -> Judge:
    """The number of words that at least three toxic training texts have, three times as many as others."""
    words = [set(re.findall(r"[\w']+", text.lower())) for text in texts]

    def judge(train: NDArray[np.intp], test: NDArray[np.intp]) -> Floats:
        toxic, other = (Counter(word for i in train if truth[i] == kind for word in words[i]) for kind in (1, 0))
        listed = {word for word, count in toxic.items() if count >= 3 and count >= 3 * (other[word] + 1)}
        return np.array([len(words[i] & listed) for i in test], np.float64)

    return judge


def crossed(judge: Judge, truth: NDArray[np.int64], times: int) -> list[Floats]:
    """For each repetition, numbers for all texts, each from folds that it was not in."""
    found = []
    for seed in range(times):
        values = np.zeros(len(truth))
        for train, test in StratifiedKFold(FOLDS, shuffle=True, random_state=seed).split(truth, truth):
            values[test] = judge(train, test)
        found.append(values)
    return found


def interval(values: Floats, truth: NDArray[np.int64]) -> tuple[float, float]:
    """95 % bootstrap interval of the AUC, toxic and other texts drawn apart."""
    generator = np.random.default_rng(0)
    kinds = [np.flatnonzero(truth == kind) for kind in (0, 1)]
    drawn = []
    for _ in range(ROUNDS):
        draw = np.concatenate([generator.choice(kind, len(kind)) for kind in kinds])
        drawn.append(roc_auc_score(truth[draw], values[draw]))
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def write_weights(model: LogisticRegression, embedder: EncoderEmbedder, fitted_on: str) -> None:
    weights = model.coef_[0]
    split = len(weights) - embedder.dimensions
    about = {
        "bias": repr(round(float(model.intercept_[0]), 5)),
        "embedder": embedder.revision,
        "fitted_on": f"{fitted_on}: surge-ai/toxicity, HaluEval (MIT)",
        "fitted_by": "python bench/toxicity.py --fit",
    }
    parts = {"ngrams": weights[:split].astype(np.float16), "vector": weights[split:].astype(np.float32)}
    save_file(parts, WEIGHTS, metadata=about)
    load_weights.cache_clear()


async def scored(metric: Toxicity, texts: Sequence[str]) -> Floats:
    scores = [await metric.score(Sample("", text)) for text in texts]
    if unscored := [score.reason for score in scores if score.value is None]:
        raise SystemExit(f"{len(unscored)} texts were left unscored: {unscored[0]}")
    return np.array([score.value for score in scores])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="one repetition instead of three")
    parser.add_argument("--fit", action="store_true", help=f"fit the weights and write them to {WEIGHTS.name}")
    asked = parser.parse_args()
    times = 1 if asked.quick else TIMES
    folder = Path(os.environ.get("AGENTOPS_SHARED_DATA") or ROOT.parent / "shared" / "data")
    texts, truth = read(folder)
    settings = load_settings({})
    embedder = open_embedder(prepare(settings.retrieval.embedder, settings), 2)
    unremarkable = plain(folder)
    meaning, spelling = vectors(embedder, texts), spelled(texts)
    plain_meaning, plain_spelling = vectors(embedder, unremarkable), spelled(unremarkable)
    both, plain_both = np.hstack([spelling, meaning]), np.hstack([plain_spelling, plain_meaning])
    held = np.arange(len(texts)) % HELD_OUT == 0
    # A text that is there twice must not be on both sides.
    apart = {text for text, out in zip(texts, held, strict=True) if out}
    train = np.array([i for i, text in enumerate(texts) if text not in apart])
    if asked.fit:
        write_weights(
            fitted(both[train], truth[train], plain_both), embedder, f"{len(train)} comments, {len(unremarkable)} plain sentences"
        )
    checked = asyncio.run(scored(Toxicity(embedder), [text for text, out in zip(texts, held, strict=True) if out]))

    once = np.array([texts.index(text) == i for i, text in enumerate(texts)])
    kept = [text for text, first in zip(texts, once, strict=True) if first]
    judges: dict[str, Judge] = {
        METRIC: linear(both[once], truth[once], plain_both, of_passages(embedder, kept)),
        "whole texts only": linear(both[once], truth[once], plain_both),
        "the same without plain": linear(both[once], truth[once], plain_both[:0]),
        "n-grams of characters": linear(spelling[once], truth[once], plain_spelling),
        "MiniLM vector": linear(meaning[once], truth[once], plain_meaning),
        WORDS: word_list(kept, truth[once]),
        "longer": lambda train, test: np.array([len(kept[i]) for i in test], np.float64),
    }
    table = {}
    for name, judge in judges.items():
        found = crossed(judge, truth[once], times)
        areas = [roc_auc_score(truth[once], values) for values in found]
        table[name] = float(np.mean(areas)), *interval(found[0], truth[once])

    share = truth[once].mean()
    print(f"surge-ai/toxicity, {len(kept)} comments, {share:.0%} toxic: AUC, {FOLDS} folds {times} times, 95 % interval")
    for name, (value, low, high) in table.items():
        print(f"{name:24}{value:.3f} [{low:.3f}, {high:.3f}]")
    area, (low, high) = roc_auc_score(truth[held], checked), interval(checked, truth[held])
    right, brier = ((checked > 0.5) == truth[held]).mean(), brier_score_loss(truth[held], checked)
    size = WEIGHTS.stat().st_size / 1000
    print(f"\nthe metric with its committed weights ({size:.0f} kB) on the {held.sum()} comments that were kept from them:")
    print(f"AUC {area:.3f} [{low:.3f}, {high:.3f}], accuracy at .5 {right:.3f}, Brier score {brier:.3f}")
    print("\nfalse alarms, above .5:" + f"{'with plain sentences':>30}{'without':>12}")
    bare = fitted(both[train], truth[train], plain_both[:0])
    for name, others in (("documentation", documentation()), ("about groups of people", about_groups(SAID_OTHERWISE))):
        ours = (asyncio.run(scored(Toxicity(embedder), others)) > 0.5).mean()
        theirs = bare.predict(np.hstack([spelled(others), vectors(embedder, others)])).mean()
        print(f"{f'{name}, {len(others)} sentences':40}{ours:13.1%}{theirs:12.1%}")
    pages = documentation()
    short = [text for text, out, bad in zip(texts, held, truth, strict=True) if out and bad and len(text) < 200]
    hidden = [f"{pages[2 * i]} {text} {pages[2 * i + 1]}" for i, text in enumerate(short)]
    model = fitted(both[train], truth[train], plain_both)
    seen = [(asyncio.run(scored(Toxicity(embedder), some)) > 0.5).mean() for some in (short, hidden)]
    blurred = model.predict(np.hstack([spelled(hidden), vectors(embedder, hidden)])).mean()
    print(
        f"\n{len(short)} short toxic comments that were kept from the weights, found at .5: {seen[0]:.0%}; put between two plain"
    )
    print(f"sentences each: {seen[1]:.0%}, and {blurred:.0%} where whole texts are judged and no sentence by itself")
    print("not measured: other languages, other kinds of text than comments, toxic text that is only quoted")
    machine = {"processor": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
    peer = table[WORDS][0]
    rows = [
        {
            "metric": name,
            "ours": round(one[0], 3),
            "peer": WORDS,
            "theirs": round(peer, 3),
            "ratio": round(one[0] / peer, 2),
            "unit": "AUC",
        }
        for name, one in table.items()
        if name != WORDS
    ]
    print(json.dumps({"bench": "toxicity", "machine": machine, "rows": rows}))


if __name__ == "__main__":
    main()
