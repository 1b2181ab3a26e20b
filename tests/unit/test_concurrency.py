"""Conversations of all graphs at once in one process give what each gives alone, and their records do not mix."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from crowd import APPROVE, Talk, at_once, in_threads, one_by_one, overlapping, recorded, told
from tea import TEXTS, likely

from agentops import Document, Request, Runtime, ScriptedEngine, Settings
from agentops.records import Decision, ScoreRequest, content_hash
from agentops.retrieval.embed import HashEmbedder

GREEN, BLACK = "At how many degrees is green tea brewed?", "At how many degrees is black tea brewed?"
CUP = "How many millilitres does a cup hold?"
TALKS = [
    Talk("rag", (GREEN, "And black tea?")),
    Talk("rag", ("Who won the football game?", CUP)),
    Talk("research", (f"{GREEN[:-1]}, and {CUP[0].lower()}{CUP[1:]}", BLACK)),
    Talk("research", (f"{CUP[:-1]}, and who won the football game?",)),
    Talk("review", (GREEN, CUP), (APPROVE, APPROVE)),
    Talk("review", (GREEN,), (Decision("reject", reason="Black tea."), Decision("edit", "At 95 °C."))),
    Talk("assistant", ("What is 37 times 48?", "Write down that the plumber comes at 9."), (APPROVE,)),
    Talk("triage", (BLACK, "What is 12 times 12?")),
]
FITS = {"times": ("tools", "calculator"), "plumber": ("tools", "append note"), "degrees": ("documents", "search")}
FACTS = {
    "green": "Green tea is brewed at 80 degrees.",
    "black": "Black tea is brewed at 95 degrees.",
    "cup": "A cup holds 250 millilitres.",
}

AT_80, AT_95 = "Green tea is brewed at 80 degrees. [1]", "Black tea is brewed at 95 degrees. [1]"
UNKNOWN = (
    "I do not know: the documents do not answer “Who won the football game?”. The nearest they have is about: Brewing; Cups."
)
EXPECTED = [
    [AT_80, AT_95],
    [UNKNOWN, "A cup holds 250 millilitres. [1]"],
    [f"{AT_80}\nA cup holds 250 millilitres. [2]", AT_95],
    [f"A cup holds 250 millilitres. [1]\n{UNKNOWN}"],
    [AT_80, "A cup holds 250 millilitres. [1]"],
    ["At 95 °C."],
    ["37 * 48 = 1776", "Noted: the plumber comes at 9"],
    [AT_95, "12 * 12 = 144"],
]


def answers(request: Request) -> str:
    orders, said = request.messages[0].content, request.messages[-1].content
    if request.constraint is not None and request.constraint.kind == "json_schema":
        if "expression" in request.constraint.value["properties"]:
            return json.dumps({"expression": " * ".join(re.findall(r"\d+", said))})
        return json.dumps({"text": "the plumber comes at 9"})
    if orders.startswith("You split"):
        return "\n".join(part for part in (GREEN, CUP, "Who won the football game?") if part[4:20].lower() in said.lower())
    if orders.startswith("You join"):
        return "Nothing of this kind."
    if orders.startswith("You rewrite"):
        return BLACK
    return next((fact for key, fact in FACTS.items() if key in said.rpartition("Question:")[2].lower()), "I have no idea.")


def scores(request: ScoreRequest) -> list[float]:
    said, asked = request.messages[-1].content, request.choices[0]
    if not said.startswith("Tool: "):
        return likely(request)
    wanted = next(names for piece, names in FITS.items() if piece in asked)
    fits = said.startswith(tuple(f"Tool: {name}:" for name in wanted))
    return [(-1.0 if fits else -9.0 if said.startswith("Tool: \n") else -99.0) * len(asked.split())]


@pytest.fixture
def runtime(settings: Settings) -> Iterator[Runtime]:
    engine = ScriptedEngine(answers, scores=scores, delay_s=0.001)
    with Runtime(settings, engine=engine, embedder=HashEmbedder()) as opened:
        documents = [
            Document(source, text, content_hash(text), {"source": source, "heading": heading})
            for source, (heading, text) in TEXTS.items()
        ]
        opened.index.upsert("tea", documents)
        yield opened


@pytest.mark.parametrize("together", [at_once, in_threads], ids=["asyncio", "threads"])
def test_eight_conversations_at_once_are_each_as_if_alone(
    runtime: Runtime, settings: Settings, together: Callable[..., Any]
) -> None:
    alone = one_by_one(runtime, TALKS, "alone", "tea")
    assert [[result["answer"] for result in results] for results in told(alone)] == EXPECTED
    crowd = together(runtime, TALKS, "crowd", "tea")
    assert overlapping(settings, crowd) == len(TALKS)
    assert told(crowd) == told(alone)
    assert recorded(settings, crowd) == recorded(settings, alone)
    assert len({run.run_id for results in (*alone, *crowd) for run in results}) == 2 * sum(len(talk.questions) for talk in TALKS)
    notes = (settings.files / "notes.md").read_text(encoding="utf-8")
    assert notes.count("the plumber comes at 9") == 2
    assert len(list((settings.files / "reviews").iterdir())) == 6
