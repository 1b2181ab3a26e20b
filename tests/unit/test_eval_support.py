"""Support: how far a source carries a claim, by what a model finds likely, and the weights that make odds of it."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import settings as checks
from hypothesis import strategies as st

from agentops.engine import Engine
from agentops.engine.scripted import ScriptedEngine
from agentops.records import ChoiceScore, ScoreRequest, Scores
from agentops.sync import run_sync
from evals.support import (
    MEASURES,
    SOURCE_CHARACTERS,
    WEIGHTS,
    Support,
    blamed,
    excerpt,
    load_weights,
    supports,
)

TAY = (
    "The Tay Bridge was opened in June 1878. It was designed by Thomas Bouch and was the longest bridge in the world at the "
    "time. On 28 December 1879 the bridge collapsed in a violent storm while a train was crossing it, and all aboard were killed."
)
QUESTION = "What happened to the Tay Bridge?"


def test_the_measures_are_what_they_say() -> None:
    def scores(request: ScoreRequest) -> list[float]:
        return [-1.0 if request.messages[-1].content.startswith("Text: ") else -7.0 for _ in request.choices]

    engine = ScriptedEngine(scores=scores)
    (found,) = run_sync(supports(engine, ["opened  in\n1878."], TAY, QUESTION))
    # Three tokens share the total evenly; "in" is no content word.
    assert [word for word, _ in found.words] == ["opened", "1878"]
    assert found.claim == "opened  in\n1878."
    assert found.lift_mean == found.lift_lowest == pytest.approx(2)
    assert found.logprob_lowest == pytest.approx(-1 / 3)
    assert (found.coverage, found.numbers, found.missing) == (1, 1, ())
    assert engine.score_requests[0].messages[0].content == f"Question: {QUESTION}"
    assert found.why == "lift 2.00, lowest 2.00, coverage 1.00"


def test_a_number_that_neither_source_nor_question_has_is_missing() -> None:
    engine = ScriptedEngine(scores=lambda request: [-1.0] * len(request.choices))
    wrong, asked = run_sync(supports(engine, ["It was opened in 1887.", "It was opened in 1878."], TAY, "Was it in 1879?"))
    assert (wrong.missing, wrong.numbers) == (("1887",), 0)
    assert asked.missing == ()
    assert wrong.why.endswith(", no 1887")
    assert wrong.log_odds < replace(wrong, missing=()).log_odds
    assert run_sync(supports(engine, [], TAY)) == []


def test_words_that_turn_a_claim_round_count() -> None:
    engine = ScriptedEngine(scores=lambda request: [-1.0] * len(request.choices))
    (found,) = run_sync(supports(engine, ["It was not opened by all of them, and wasn't designed."], TAY))
    assert [word for word, _ in found.words] == ["not", "opened", "all", "wasn't", "designed"]


class Uneven(ScriptedEngine):
    """An engine with two tokens a word in claims, whose words alone have `alone` tokens: some tokenizers mark beginnings."""

    alone = 2

    async def score(self, request: ScoreRequest) -> Scores:
        given = await super().score(request)
        read = request.messages[-1].content.startswith("Text: ")
        single = request.messages[-1].content.startswith("Say")
        made = []
        for choice in given.choices:
            count = self.alone if single else 2 * len(choice.text.split())
            made.append(ChoiceScore(choice.text, tuple(-float(at) * (2 if read else 1) for at in range(count))))
        return replace(given, choices=tuple(made))


def test_tokens_are_given_to_their_words() -> None:
    (found,) = run_sync(supports(Uneven(), ["opened in 1878"], TAY, QUESTION))
    assert found.words == (("opened", -0.5), ("1878", -4.5))
    assert (found.lift_lowest, found.lift_mean) == (-4.5, -2.5)


def test_where_words_cannot_be_told_each_token_stands_for_itself() -> None:
    engine = Uneven()
    engine.alone = 3
    (found,) = run_sync(supports(engine, ["opened in 1878"], TAY, QUESTION))
    assert found.words == ()
    assert (found.lift_lowest, found.lift_mean) == (-5, -2.5)


def test_words_that_speak_against_a_claim() -> None:
    found = Support("it fell", 1, 1, 1, 1, words=(("bridge", 2.0), ("whale", 3.0), ("fell", -0.1)))
    assert blamed(found, {"bridg", "fell"}) == ["whale", "fell"]
    assert blamed(found, {"bridg", "fell", "whale"}) == ["fell"]
    assert blamed(replace(found, words=(("bridge", 2.0), ("whale", 1.0))), {"bridg", "whale"}) == ["whale"]
    assert blamed(replace(found, words=()), set()) == []


def test_of_a_long_source_the_model_reads_what_has_to_do_with_the_claims() -> None:
    source = "Nothing of the kind. " * 300 + "The tower opened in 1889. " + "It rains. " * 300
    part = excerpt(source, ["The tower opened in 1889."])
    assert len(part) <= SOURCE_CHARACTERS
    assert "The tower opened in 1889." in part
    assert excerpt("brief", ["x"]) == "brief"
    engine = ScriptedEngine(scores=lambda request: [-1.0] * len(request.choices))
    (found,) = run_sync(supports(engine, ["The tower opened."], source))
    assert found.coverage == 1
    assert max(len(request.messages[-1].content) for request in engine.score_requests) < SOURCE_CHARACTERS + 100


# --- the weights ---


def test_the_weights_say_how_they_were_fitted() -> None:
    about = json.loads(WEIGHTS.read_text(encoding="utf-8"))
    assert set(about["measures"]) == set(MEASURES)
    assert "HaluEval" in about["about"]["fitted_on"]
    assert "paraphrase" in about["about"]["fitted_on"]
    assert about["about"]["model"].startswith("smollm2-135m-instruct")


FIGURES = st.floats(-50, 50)


@checks(deadline=None)
@given(
    st.builds(Support, st.just(""), FIGURES, FIGURES, st.floats(0, 1), FIGURES, st.sampled_from([(), ("7",)])),
    st.sampled_from(["lift_mean", "lift_lowest", "coverage", "logprob_lowest", "missing"]),
)
def test_more_evidence_never_speaks_against_a_claim(found: Support, name: str) -> None:
    better = replace(found, **{name: () if name == "missing" else getattr(found, name) + 1})
    odds = load_weights().log_odds
    assert math.isfinite(odds(found))
    assert odds(better) >= odds(found)


@pytest.mark.model
def test_the_default_model_tells_a_near_miss_from_a_quotation(engine: Engine) -> None:
    claims = ["It was designed by Thomas Bouch.", "It was designed by Gustave Eiffel.", "It was opened in June 1887."]
    quoted, *wrong = run_sync(supports(engine, claims, TAY, "Who designed the Tay Bridge?"))
    assert quoted.log_odds > 0 > max(one.log_odds for one in wrong)


def test_of_a_page_without_the_end_of_a_sentence_the_right_part_is_read() -> None:
    fact = "the tower opened in 1889"
    filler = ", ".join(f"entry {n} of the long table has value {n * 7}" for n in range(400))
    source = f"{filler}, {fact}, {filler}"
    part = excerpt(source, [fact])
    assert fact in part
    assert len(part) <= SOURCE_CHARACTERS
