"""The graphs research and review on the real model, over the project's own documentation."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agentops import RunResult, Runtime, Settings
from agentops.engine.local import LocalEngine
from agentops.records import Decision
from agentops.retrieval.embed import open_embedder
from agentops.store import open_store
from agentops.tracer import catch_up

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.model

UNKNOWN = "I do not know"
TWO_PARTS = [
    (
        "How many dimensions does an embedding have, and how many positions does a block of the KV cache hold?",
        [("384", "retrieval.md"), (r"\b16\b", "engine.md")],
    ),
    (
        "How many layers does the default model have, and what licence does it have?",
        [("30", "engine.md"), ("apache", "engine.md")],
    ),
    (
        "Which library compiles the constraints on the output, and which library keeps the lexical index?",
        [("llguidance", "engine.md"), ("tantivy", "retrieval.md")],
    ),
    (
        "How many documents are retrieved for a question by default, and how many requests may wait in the queue?",
        [("eight", "retrieval.md"), (r"\b256\b", "engine.md")],
    ),
    (
        "How often does the critic send an answer back at most, and in whose checkpoint layout is a quantized model written?",
        [("twice", "graphs.md"), ("autogptq", "engine.md")],
    ),
    ("Where are checkpoints and prepared models kept?", [("threads", "record.md"), ("cache folder", "engine.md")]),
    (
        "What status does a run have when its process died, and how much does a licence for a team of ten cost per month?",
        [("crashed", "record.md"), (UNKNOWN, "")],
    ),
]


@pytest.fixture(scope="module")
def runtime(session_settings: Settings, engine: LocalEngine, embedder_folder: Path) -> Iterator[Runtime]:
    embedder = open_embedder(embedder_folder, session_settings.engine.threads)
    with Runtime(session_settings, engine=engine, embedder=embedder) as opened:
        opened.ingest(ROOT / "docs", collection="docs")
        yield opened


def test_both_halves_of_a_question_are_answered(runtime: Runtime, session_settings: Settings) -> None:
    marks, split = [], 0

    async def ask_all() -> list[RunResult]:
        return await asyncio.gather(*(runtime.arun("research", question, collection="docs") for question, _ in TWO_PARTS))

    for (_, facts), result in zip(TWO_PARTS, asyncio.run(ask_all()), strict=True):
        out = result.output
        cited = {Path(source["source"]).name for source in out["sources"]}
        found = [bool(re.search(fact, out["answer"], re.I)) and (not source or source in cited) for fact, source in facts]
        marks += found
        print(f"{found} {out['plan']} {out['answer']!r} {sorted(cited)}")
        split += len(out["plan"]) == 2
        assert [source["n"] for source in out["sources"]] == list(range(1, len(out["sources"]) + 1))
        assert set(re.findall(r"\[(\d+)\]", out["answer"])) == {str(source["n"]) for source in out["sources"]}
        catch_up(session_settings)
        with open_store(session_settings) as store:
            assert store.balance(result.run_id).balanced
    print(f"{split} of {len(TWO_PARTS)} questions split, {sum(marks)} of {len(marks)} halves answered")
    assert split >= len(TWO_PARTS) - 1
    assert sum(marks) >= 0.8 * len(marks)


def drafted(runtime: Runtime, question: str) -> RunResult:
    waiting = runtime.run("review", question, collection="docs")
    assert waiting.status == "waiting"
    print(waiting.interrupts[0].content)
    return waiting


def filed(runtime: Runtime, output: dict[str, Any]) -> str:
    path: Path = runtime.settings.files / output["file"]
    return path.read_text(encoding="utf-8")


def test_an_approved_answer_is_filed(runtime: Runtime) -> None:
    waiting = drafted(runtime, "What licence does the default model have?")
    done = runtime.resume(waiting.run_id, answer=Decision("approve")).output
    assert "apache" in done["answer"].lower()
    assert waiting.interrupts[0].content in filed(runtime, done)
    assert "engine.md" in filed(runtime, done)


def test_an_edited_answer_is_filed_as_edited(runtime: Runtime) -> None:
    waiting = drafted(runtime, "What is the journal made of?")
    done = runtime.resume(waiting.run_id, answer=Decision("edit", "Of segment files, one for each process.")).output
    assert "\nOf segment files, one for each process.\n" in filed(runtime, done)
    assert waiting.interrupts[0].content not in filed(runtime, done)


def test_a_reason_leads_to_the_answer_that_is_wanted(runtime: Runtime) -> None:
    waiting = drafted(runtime, "Where are prepared models kept?")
    again = runtime.resume(waiting.run_id, answer=Decision("reject", reason="The folder on Linux is meant."))
    assert again.status == "waiting"
    assert again.interrupts[0].content != waiting.interrupts[0].content
    assert "~/.cache/agentops-runtime/models" in again.interrupts[0].content
    done = runtime.resume(waiting.run_id, answer=Decision("approve")).output
    assert "Reason: The folder on Linux is meant." in filed(runtime, done)


def test_what_a_person_never_wants_is_never_filed(runtime: Runtime) -> None:
    run, offered = drafted(runtime, "How long does the first question of a process take?"), []
    while run.status == "waiting":
        offered.append(run.interrupts[0].content)
        run = runtime.resume(run.run_id, answer=Decision("reject"))
    assert len(set(offered)) == len(offered) <= 3
    assert (run.output["outcome"], run.output["file"]) == ("rejected", "")
