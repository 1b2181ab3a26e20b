"""The five graphs answer as well from the server's index as from the embedded one, on the real model and a real server."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from test_answers import questions
from test_research_and_review import TWO_PARTS
from test_tasks import lines

from agentops import Query, Runtime, Settings
from agentops.engine.local import LocalEngine
from agentops.records import RunResult
from agentops.retrieval.embed import open_embedder

ROOT = Path(__file__).resolve().parents[2]
TOGETHER = 4
UNKNOWN = "^I do not know"

pytestmark = pytest.mark.model


@dataclass(frozen=True)
class Case:
    graph: str
    question: str
    facts: tuple[str, ...]

    def right(self, result: RunResult) -> list[bool]:
        """For each fact whether it was said, to the user or to the person who is asked to approve it."""
        said = result.interrupts[0].content if result.status == "waiting" else result.output["answer"]
        return [bool(re.search(fact, str(said), re.IGNORECASE | re.MULTILINE)) for fact in self.facts]


CASES = [
    *(Case("rag", case["question"], (case.get("fact", UNKNOWN),)) for case in questions("docs")[::2]),
    *(Case("research", question, tuple(fact for fact, _ in facts)) for question, facts in TWO_PARTS[::3]),
    Case("review", "What licence does the default model have?", ("apache",)),
    Case("assistant", "Where are checkpoints kept?", ("threads",)),
    Case("triage", "Where does the runtime keep its checkpoints?", ("threads",)),
]
QUESTIONS = [
    *(case["question"] for case in questions("docs")),
    *(question for question, _ in TWO_PARTS),
    *(task["task"] for task in lines("tasks.jsonl") if task["tool"] == "search"),
    *(message["message"] for message in lines("messages.jsonl") if message["route"] == "documents"),
]
"""All that is asked of documents in the other tests."""


async def answer_all(runtime: Runtime, cases: Sequence[Case]) -> list[RunResult]:
    places = asyncio.Semaphore(TOGETHER)

    async def one(case: Case) -> RunResult:
        async with places:
            return await runtime.arun(case.graph, case.question, collection="docs")

    return list(await asyncio.gather(*map(one, cases)))


async def found_by(runtime: Runtime) -> list[list[str]]:
    searches = [runtime.index.search(Query(question, "docs", 8)) for question in QUESTIONS]
    return [[hit.document.id for hit in found.hits] for found in await asyncio.gather(*searches)]


def test_answers_are_as_good_on_elasticsearch(
    settings: Settings, elastic_settings: Settings, engine: LocalEngine, embedder_folder: Path
) -> None:
    marks, hits, answers = [], [], []
    for where in (settings, elastic_settings):
        embedder = open_embedder(embedder_folder, settings.engine.threads)
        with Runtime(where, engine=engine, embedder=embedder) as runtime:
            runtime.ingest(ROOT / "docs", collection="docs")
            hits.append(asyncio.run(found_by(runtime)))
            results = asyncio.run(answer_all(runtime, CASES))
        marks.append([case.right(result) for case, result in zip(CASES, results, strict=True)])
        answers.append([result.output["answer"] for result in results])
    for case, own, theirs, words in zip(CASES, marks[0], marks[1], zip(*answers, strict=True), strict=True):
        if own != theirs or not all(own):
            print(f"{case.graph} {case.question!r}: embedded {own} {words[0]!r}, elasticsearch {theirs} {words[1]!r}")
    embedded, elastic = (sum(map(sum, of)) for of in marks)
    total, alike = sum(len(case.facts) for case in CASES), sum(one == other for one, other in zip(*answers, strict=True))
    print(
        f"facts said: embedded {embedded}, elasticsearch {elastic} of {total}; answers in the same words: {alike} of {len(CASES)}"
    )
    shared = [len(set(one) & set(other)) / max(1, len(one)) for one, other in zip(*hits, strict=True)]
    print(f"documents found by both: {sum(shared) / len(shared):.3f}")
    assert embedded >= 0.8 * total
    assert abs(embedded - elastic) <= 1
    assert sum(shared) / len(shared) >= 0.95
