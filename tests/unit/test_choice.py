"""Choosing among described options, with a scripted engine and an embedder of words."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from agentops import ScriptedEngine
from agentops.choice import EXAMPLES, choose, described
from agentops.records import Message, ScoreRequest
from agentops.retrieval.embed import HashEmbedder

OPTIONS = {
    "clock": "Tells the time.\n\nExamples:\n    How late is it?\n    What day is today?",
    "take_note": "Writes a note.",
}


def ask(text: str) -> tuple[Message, ...]:
    return (Message("user", f"Tool: {text}\n\nWrite a request."),)


def even(request: ScoreRequest) -> Sequence[float]:
    return [-2.0 * len(choice.split()) for choice in request.choices]


@pytest.mark.parametrize(
    ("text", "what", "examples"),
    [
        (OPTIONS["clock"], "Tells the time.", ["How late is it?", "What day is today?"]),
        ("Tells the time. Examples:\n- One?\n\n- Two?\n", "Tells the time.", ["One?", "Two?"]),
        ("Shows Examples: many of them.", "Shows Examples: many of them.", []),
        ("Examples:\nOnly?", "", ["Only?"]),
        ("Tells.\n\nExamples:\n" + "more\n" * 99, "Tells.", ["more"] * EXAMPLES),
        ("", "", []),
    ],
)
def test_a_description_may_end_in_examples(text: str, what: str, examples: list[str]) -> None:
    assert described(text) == (what, examples)


async def test_the_nearer_option_is_first_where_likelihood_says_nothing() -> None:
    engine = ScriptedEngine(scores=even)
    best, other = await choose(engine, HashEmbedder(), "What day is today?", OPTIONS, ask)
    assert (best.name, other.name) == ("clock", "take_note")
    assert best.score >= 1.0


async def test_the_likelier_option_is_first_where_nearness_says_little() -> None:
    def scores(request: ScoreRequest) -> Sequence[float]:
        return [-1.0 if "take note" in request.messages[-1].content else -9.0]

    options = await choose(ScriptedEngine(scores=scores), HashEmbedder(), "zzz", OPTIONS, ask)
    assert [option.name for option in options] == ["take_note", "clock"]
    # The lift of 8 for one word counts half.
    assert options[0].score - options[1].score == pytest.approx(4.0, abs=0.5)


async def test_examples_are_put_in_as_answers_to_the_same_prompt() -> None:
    engine = ScriptedEngine(scores=even)
    await choose(engine, HashEmbedder(), "When?", OPTIONS, ask)
    asked = {request.messages for request in engine.score_requests}
    prompt = ask("clock: Tells the time.")
    first, second = Message("assistant", "How late is it?"), Message("assistant", "What day is today?")
    assert (*prompt, first, *prompt, second, *prompt) in asked
    assert ask("take note: Writes a note.") in asked
    assert ask("") in asked


async def test_without_options_nothing_is_asked() -> None:
    assert await choose(ScriptedEngine(), HashEmbedder(), "When?", {}, ask) == []
