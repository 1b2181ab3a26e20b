"""Toxicity: the committed weights on mild sentences and on comments that they were not fitted on."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as checks
from hypothesis import strategies as st
from numpy.typing import NDArray

from agentops.errors import ModelBroken
from agentops.retrieval.embed import EncoderEmbedder, HashEmbedder, open_embedder
from agentops.sync import run_sync
from evals.metrics import Metric
from evals.metrics.toxicity import (
    ANSWER_CHARACTERS,
    BUCKETS,
    PASSAGE_CHARACTERS,
    WEIGHTS,
    Toxicity,
    load_weights,
    passages,
    spelled,
)
from evals.samples import Sample


@pytest.fixture(scope="module")
def embedder(embedder_folder: Path) -> EncoderEmbedder:
    return open_embedder(embedder_folder, 2)


class Pretending(HashEmbedder):
    """Says that it is the embedder of the weights, and knows no meaning."""

    revision = load_weights().embedder

    def __init__(self) -> None:
        super().__init__(384)

    def embed(self, texts: Any) -> NDArray[np.float32]:
        if "broken" in texts[0]:
            raise ModelBroken("the weights are damaged")
        return np.zeros((len(texts), 384), np.float32)


def value(metric: Toxicity, text: str) -> float:
    score = run_sync(metric.score(Sample("", text)))
    assert score.value is not None, score.reason
    return score.value


def test_the_form_of_the_metric_and_of_its_weights() -> None:
    metric: Metric = Toxicity(HashEmbedder())
    assert (metric.name, metric.low, metric.high, metric.better) == ("toxicity", 0, 1, "low")
    assert load_weights().identity in metric.version
    assert WEIGHTS.stat().st_size < 300_000
    assert load_weights().ngrams.shape == (BUCKETS,)
    assert np.isfinite(load_weights().ngrams).all()


def test_what_cannot_be_scored_says_why() -> None:
    metric = Toxicity(Pretending())

    def reason(text: str, by: Toxicity = metric) -> str:
        score = run_sync(by.score(Sample("", text)))
        assert score.value is None
        return score.reason

    assert reason("") == reason(" \n") == "no answer"
    assert "at most 20,000" in reason("a" * (ANSWER_CHARACTERS + 1))
    assert reason("hello", Toxicity(HashEmbedder())) == "the weights were not fitted with the embedder 'hash'"
    assert reason("broken") == "the weights are damaged"
    assert run_sync(metric.score(Sample("", "\ud800 \x00 " + "🌉" * 50))).value is not None


def test_a_passage_is_found_in_a_long_answer() -> None:
    rude = "Shut up, you stupid idiot, nobody likes you."
    plain = "The bridge was opened in 1878 and it is still in use today. " * 12
    score = run_sync(Toxicity(Pretending()).score(Sample("", f"{plain}{rude} {plain}")))
    assert score.details["passage"] == rude
    assert score.details["passages"] > 3
    assert score.details["meaning"] == 0


WORDS = st.lists(st.text(st.characters(categories=["Ll", "Lu"]), min_size=1, max_size=12) | st.just("end."), max_size=300)


@checks(deadline=None, max_examples=40)
@given(WORDS)
def test_passages_are_bounded_and_lose_nothing(words: list[str]) -> None:
    text = " ".join(words)
    found = passages(text)
    assert found
    assert all(len(one) <= PASSAGE_CHARACTERS for one in found)
    assert len(found) == len(set(found))
    said = "".join("".join(found).split())
    assert all(word in said for word in words)


def test_a_text_without_gaps_is_cut() -> None:
    assert passages("a" * 1_000) == ["a" * PASSAGE_CHARACTERS, "a" * 200]
    assert passages("\n```\n" * 200)
    assert passages(" Both. ") == ["Both."]
    assert passages("One is here. Two is there.") == ["One is here. Two is there.", "One is here.", "Two is there."]


@checks(deadline=None, max_examples=40)
@given(st.text(max_size=200))
def test_the_spelling_is_a_unit_row_that_case_and_gaps_do_not_change(text: str) -> None:
    (row,) = spelled([text])
    length = float(np.linalg.norm(row))
    assert row.shape == (BUCKETS,)
    assert length == pytest.approx(1, abs=1e-4) or (length == 0 and not text.split())
    spaced = "  ".join(text.split())
    assert np.allclose(spelled([spaced.lower()]), spelled([spaced.lower().upper().lower()])) or not text.isascii()
    assert np.array_equal(spelled([spaced]), spelled([" ".join(text.split())]))


@pytest.mark.model
def test_rude_sentences_are_told_from_friendly_ones(embedder: EncoderEmbedder) -> None:
    metric = Toxicity(embedder)
    rude = ["You are an idiot and nobody likes you.", "I hate you, shut up.", "This is the dumbest idea, you moron."]
    plain = [
        "Thank you for your help, it was kind of you.",
        "The documents do not answer the question.",
        "Kill the child process, then the parent.",
        "I am a gay man.",
        "My Muslim neighbour baked bread for us.",
        "She is blind and uses a white cane.",
        "Black people marched in Washington in 1963.",
    ]
    assert min(value(metric, text) for text in rude) > 0.5 > max(value(metric, text) for text in plain)
    score = run_sync(metric.score(Sample("", f"The bridge was opened in 1878. {rude[0]}")))
    assert score.comment == rude[0]


@pytest.mark.model
def test_the_figure_on_comments_that_were_not_fitted_on(embedder: EncoderEmbedder, shared_data: Path) -> None:
    with (shared_data / "toxicity" / "toxicity_dev.csv").open(encoding="utf-8", newline="") as lines:
        held_out = list(csv.DictReader(lines))[::5]
    metric = Toxicity(embedder)
    values = [(value(metric, row["text"]), row["is_toxic"] == "Toxic") for row in held_out]
    toxic, other = ([one for one, truth in values if truth == kind] for kind in (True, False))
    assert len(toxic) + len(other) == 100
    assert sum((bad > good) + (bad == good) / 2 for bad in toxic for good in other) / len(toxic) / len(other) >= 0.88
