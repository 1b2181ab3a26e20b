"""Eight conversations of all graphs at once on the real model: not a word, and not a bit of a probability, is different."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from crowd import APPROVE, Talk, at_once, difference, in_threads, one_by_one, overlapping, recorded, told

from agentops import Runtime, Settings
from agentops.engine.local import LocalEngine
from agentops.records import Decision
from agentops.replay import replay
from agentops.retrieval.embed import open_embedder

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.model

TALKS = [
    Talk("rag", ("With which library are PDF files parsed?", "And HTML files?")),
    Talk("rag", ("What status does a run have when its process died?",)),
    Talk("rag", ("How much does a licence for a team of ten cost per month?",)),
    Talk("research", ("How many dimensions does an embedding have, and how many requests may wait in the queue?",)),
    Talk("review", ("Where are prepared models kept?",), (Decision("reject", reason="The folder on Linux is meant."), APPROVE)),
    Talk("assistant", ("What is 37 times 48?",)),
    Talk("assistant", ("Write down that the plumber comes at 9.",), (APPROVE,)),
    Talk("triage", ("What is a span?",)),
]


@pytest.fixture(scope="module")
def runtime(session_settings: Settings, engine: LocalEngine, embedder_folder: Path) -> Iterator[Runtime]:
    embedder = open_embedder(embedder_folder, session_settings.engine.threads)
    with Runtime(session_settings, engine=engine, embedder=embedder) as opened:
        opened.ingest(ROOT / "docs", collection="docs")
        yield opened


def test_eight_conversations_at_once_are_each_as_if_alone(runtime: Runtime, session_settings: Settings) -> None:
    crowd = at_once(runtime, TALKS, "crowd", "docs")
    assert overlapping(session_settings, crowd) == len(TALKS)
    alone = one_by_one(runtime, TALKS, "alone", "docs")
    for talk, results in zip(TALKS, told(alone), strict=True):
        print(talk.graph, [result["answer"] for result in results])
    assert told(crowd) == told(alone)
    # What was scored and what was found is on record with its numbers, so equal hashes are equal numbers.
    assert difference(recorded(session_settings, crowd), recorded(session_settings, alone)) == ""
    for conversation in crowd:
        *_, replayed = replay(session_settings, thread=conversation[-1].thread_id)
        assert replayed.same, replayed.difference
    threads = in_threads(runtime, TALKS[::2], "threads", "docs")
    assert told(threads) == told(alone)[::2]
    assert difference(recorded(session_settings, threads), recorded(session_settings, alone)[::2]) == ""
