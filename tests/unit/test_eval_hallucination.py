"""Hallucination: which claim the contexts do not carry, by what a model finds likely."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from agentops.engine import Engine
from agentops.engine.scripted import ScriptedEngine
from agentops.errors import EngineError
from agentops.records import ScoreRequest
from agentops.sync import run_sync
from evals.judge import Judge, JudgeFailed, Schema
from evals.metrics import Metric
from evals.metrics.hallucination import ANSWER_CHARACTERS, Hallucination
from evals.samples import Context, Sample
from evals.support import MEASURES, load_weights

TAY = Context(
    "tay",
    "The Tay Bridge was opened in June 1878. It was designed by Thomas Bouch and was the longest bridge in the world at the "
    "time. On 28 December 1879 the bridge collapsed in a violent storm while a train was crossing it, and all aboard were "
    "killed. A second bridge, designed by William Henry Barlow, was opened in 1887 and is in use today.",
)
QUESTION = "What happened to the Tay Bridge?"


def asked(answer: str, *contexts: Context, question: str = QUESTION) -> Sample:
    return Sample(question, answer, contexts=contexts or (TAY,))


def informed(gain: Callable[[str], float]) -> Callable[[ScoreRequest], Sequence[float]]:
    """Scores of an engine: -3 a word, and so much more for the whole choice once a text was read."""

    def scores(request: ScoreRequest) -> list[float]:
        read = request.messages[-1].content.startswith("Text: ")
        return [-3.0 * len(choice.split()) + (gain(choice) if read else 0.0) for choice in request.choices]

    return scores


def storm_is_known(choice: str) -> float:
    return 2.5 * len(choice.split()) if "storm" in choice else -0.5


def test_the_form_of_the_metric() -> None:
    metric: Metric = Hallucination(ScriptedEngine())
    assert (metric.name, metric.low, metric.high, metric.better) == ("hallucination", 0, 1, "low")
    assert load_weights().identity in metric.version
    assert ScriptedEngine().info.revision in metric.version


def test_a_claim_that_the_contexts_make_likely_is_told_from_one_that_they_do_not() -> None:
    metric = Hallucination(ScriptedEngine(scores=informed(storm_is_known)))
    good = run_sync(metric.score(asked("It collapsed in a violent storm [1].")))
    bad = run_sync(metric.score(asked("It was hit by a whale.")))
    assert good.value is not None
    assert bad.value is not None
    assert good.value < 0.3 < 0.9 < bad.value
    assert good.comment == ""
    assert bad.comment == "It was hit by a whale (hit, whale)"
    assert (bad.source, bad.judged) == ("model", "computed")


def test_the_worst_claim_counts_and_is_named() -> None:
    engine = ScriptedEngine(scores=informed(storm_is_known))
    answer = "It collapsed in a storm. It was rebuilt by a whale. A storm came in December."
    score = run_sync(Hallucination(engine).score(asked(answer)))
    claims = score.details["claims"]
    assert claims[0]["claim"] == "It was rebuilt by a whale"
    assert score.value == pytest.approx(claims[0]["probability"], abs=1e-4)
    assert [one["probability"] for one in claims] == sorted((one["probability"] for one in claims), reverse=True)
    assert claims[0]["words"] == ["rebuilt", "whale"]
    assert "words" not in claims[1]
    assert set(MEASURES) < set(claims[1])
    assert json.loads(json.dumps(score.details)) == score.details
    # Both prompts once for all claims, and the words once.
    assert len(engine.score_requests) == 3
    assert [len(request.choices) for request in engine.score_requests[:2]] == [3, 3]


def test_what_cannot_be_scored_says_why() -> None:
    metric = Hallucination(ScriptedEngine())

    def reason(sample: Sample, by: Hallucination = metric) -> str:
        score = run_sync(by.score(sample))
        assert score.value is None
        return score.reason

    assert reason(Sample(QUESTION, "It fell.")) == "no contexts"
    assert reason(asked("It fell.", Context("a", " "))) == "no contexts"
    for empty in ("", " \n", "I do not know.", "Which bridge?"):
        assert reason(asked(empty)) == "no claims"
    assert "at most" in reason(asked("It fell. " * ANSWER_CHARACTERS))
    assert "tokens" in reason(asked("It fell."), Hallucination(ScriptedEngine(context_tokens=5)))
    closed = ScriptedEngine()
    run_sync(closed.close())
    assert "closed" in reason(asked("It fell."), Hallucination(closed))

    def fails(request: ScoreRequest) -> Sequence[float]:
        raise EngineError("the model failed")

    assert reason(asked("It fell."), Hallucination(ScriptedEngine(scores=fails))) == "the model failed"
    wrong = ScriptedEngine(scores=lambda request: [1.0] * 99)
    assert "99 of 1 choices" in reason(asked("It fell."), Hallucination(wrong))


def test_long_sources_and_odd_text_are_measured() -> None:
    metric = Hallucination(ScriptedEngine(scores=informed(storm_is_known)))
    filler = [Context(str(i), "Nothing of the kind was seen there. " * 300) for i in range(20)]
    score = run_sync(metric.score(asked("It collapsed in a violent storm.", *filler, TAY)))
    assert score.value is not None
    assert score.value < 0.3
    for odd in ("!!!", "\ud800", "42", "- \u200b x", "🌉 fell", "Yes", "x" * 5_000, "bridge " * 1_000):
        assert run_sync(metric.score(asked(odd, question=""))).value is not None


# --- a judge that can be asked ---


class Saying:
    """A respondent that always gives the same answer."""

    name, identity, context_tokens, held = "saying", "saying 1", None, True

    def __init__(self, answer: str | JudgeFailed) -> None:
        self._answer = answer
        self.prompts: list[str] = []

    async def answer(self, prompt: str, schema: Schema, attempt: int) -> str:
        self.prompts.append(prompt)
        if isinstance(self._answer, JudgeFailed):
            raise self._answer
        return self._answer

    async def close(self) -> None: ...


def judged(answer: str | JudgeFailed, how: Any = "asked") -> tuple[Any, Saying]:
    saying = Saying(answer)
    judge = Judge(saying, how=how, retries=0)
    metric = Hallucination(ScriptedEngine(scores=informed(storm_is_known)), judge)
    return run_sync(metric.score(asked("It collapsed in a storm. It was hit by a whale."))), saying


def test_a_judge_that_can_be_asked_shifts_the_odds() -> None:
    alone, _ = judged("unused", how="computed")
    held, saying = judged('{"verdicts": [1, 1]}')
    against, _ = judged('{"verdicts": [1, 0]}')
    assert saying.prompts[0].count("It was hit by a whale") == 1
    assert held.value < alone.value < against.value
    odds = [math.log(one.value / (1 - one.value)) for one in (held, alone, against)]
    assert odds[1] - odds[0] == pytest.approx(math.log(4)) == odds[2] - odds[1]
    assert (alone.judged, held.judged) == ("computed", "computed, asked")
    assert [one["judge"] for one in against.details["claims"]] == [0, 1]


def test_a_judge_that_fails_leaves_unscored() -> None:
    for answer in (JudgeFailed("down"), "garbage", '{"verdicts": [1]}', '{"verdicts": [1, 5]}'):
        score, _ = judged(answer)
        assert score.value is None
        assert score.reason.startswith("judge: ")


# --- the real model ---


@pytest.mark.model
def test_the_default_model_tells_an_invented_claim_from_a_supported_one(engine: Engine) -> None:
    metric = Hallucination(engine)
    other = Context("other", "Prefix blocks are evicted when the pool is full, the least recently used first.")

    def score(answer: str) -> Any:
        return run_sync(metric.score(asked(answer, other, TAY)))

    good, bad = score("It was designed by Thomas Bouch."), score("It was repaired by Gustave Eiffel in 1885.")
    assert good.value < 0.4 < 0.9 < bad.value
    assert {"Gustave", "Eiffel", "1885"} <= set(bad.details["claims"][0]["words"])
    both = score("It was designed by Thomas Bouch. The Queen of Spain was aboard.")
    assert both.value > 0.8
    assert both.comment.startswith("The Queen of Spain was aboard (")
    assert [one["claim"] for one in both.details["claims"]][1] == "It was designed by Thomas Bouch"


@pytest.mark.model
@pytest.mark.long
def test_the_figure_on_the_half_that_was_not_fitted_on(engine: Engine, shared_data: Path) -> None:
    file = shared_data / "halueval" / "qa_one-turn_data.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    sizes = [sorted((len(row["right_answer"]), len(row["hallucinated_answer"]))) for row in rows]
    held_out = [row for row, (short, long) in zip(rows, sizes, strict=True) if long <= 2 * short][1::2]
    metric = Hallucination(engine)

    def value(row: dict[str, str], key: str) -> float:
        score = run_sync(metric.score(asked(row[key], Context("knowledge", row["knowledge"]), question=row["question"])))
        assert score.value is not None
        return score.value

    right, wrong = ([value(row, key) for row in held_out] for key in ("right_answer", "hallucinated_answer"))
    assert len(held_out) == 43
    assert sum((bad > good) + (bad == good) / 2 for good in right for bad in wrong) / len(right) / len(wrong) >= 0.93
