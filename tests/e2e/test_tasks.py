"""Tools on the real model: twenty tasks, six that no tool serves, and ten messages for the triage.

A task counts when the right tool is called with the right arguments: a formula that comes to the value, or words that are
the task's. Tasks and messages were written before the graphs were, and those were tuned on others.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from agentops import Runtime, Settings
from agentops.engine.local import LocalEngine
from agentops.records import Decision, RunResult, ToolCall
from agentops.retrieval.embed import open_embedder
from agentops.store import open_store
from agentops.tracer import catch_up
from graphs._desk import find_zone, value

ROOT = Path(__file__).resolve().parents[2]
TOGETHER = 3

pytestmark = pytest.mark.model


def lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(__file__).parent / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def runtime(session_settings: Settings, engine: LocalEngine, embedder_folder: Path) -> Iterator[Runtime]:
    embedder = open_embedder(embedder_folder, session_settings.engine.threads)
    with Runtime(session_settings, engine=engine, embedder=embedder) as opened:
        opened.ingest(ROOT / "docs", collection="docs")
        yield opened


def run_all(runtime: Runtime, graph: str, texts: list[str]) -> list[RunResult]:
    async def run() -> list[RunResult]:
        places = asyncio.Semaphore(TOGETHER)

        async def one(text: str) -> RunResult:
            async with places:
                return await runtime.arun(graph, text, collection="docs")

        return list(await asyncio.gather(*map(one, texts)))

    return asyncio.run(run())


def called(result: RunResult) -> ToolCall | None:
    """The first call of a run: the one that waits, or the one that was made."""
    done = result.output["results"]
    return result.output["call"] or (done[0].call if done else None)


def right(task: dict[str, Any], call: ToolCall | None) -> bool:
    if call is None or call.name != task["tool"]:
        return call is None and not task["tool"]
    if "value" in task:
        try:
            return bool(value(call.arguments["expression"]) == Fraction(str(task["value"])))
        except ArithmeticError:
            return False
    given = {name: str(text or "") for name, text in call.arguments.items()}
    if given.get("zone"):
        try:
            given["zone"] = find_zone(given["zone"])
        except LookupError:
            return False
    return all(re.search(pattern, given.get(name, ""), re.IGNORECASE) for name, pattern in task["arguments"].items())


def test_tasks(runtime: Runtime, session_settings: Settings) -> None:
    tasks = lines("tasks.jsonl")
    results = run_all(runtime, "assistant", [task["task"] for task in tasks])
    marks = [right(task, called(result)) for task, result in zip(tasks, results, strict=True)]
    for task, result, mark in zip(tasks, results, marks, strict=True):
        call = called(result)
        made = f"{call.name} {call.arguments}" if call else result.output["answer"][:80]
        print(f"{'ok  ' if mark else 'MISS'} {task['task']!r}: {made}")
    served = [mark for task, mark in zip(tasks, marks, strict=True) if task["tool"]]
    rest = [mark for task, mark in zip(tasks, marks, strict=True) if not task["tool"]]
    print(f"{sum(served)} of {len(served)} tasks, {sum(rest)} of {len(rest)} without a tool")
    assert len(served) == 20
    assert sum(served) >= 16
    assert sum(rest) >= 4
    for result in results:
        call = called(result)
        assert result.status == ("waiting" if call and call.name == "append_note" else "done")
    assert not (session_settings.files / "notes.md").exists()
    catch_up(session_settings)
    with open_store(session_settings) as store:
        assert all(store.balance(result.run_id).balanced for result in results)


def test_a_conversation_with_tools_ends_in_a_note(runtime: Runtime, session_settings: Settings) -> None:
    assert runtime.run("assistant", "What is 125 times 16?", thread="desk").output["answer"] == "125 * 16 = 2000"
    waiting = runtime.run("assistant", "And 15% of that? Write it down.", thread="desk")
    (asked,) = waiting.interrupts
    assert "300" in asked.content["text"]
    done = runtime.resume(waiting.run_id, answer=Decision("edit", {"text": "The discount is 300."}))
    assert "15% * 2000 = 300" in done.output["answer"]
    notes = session_settings.files / "notes.md"
    assert re.fullmatch(r"- The discount is 300\. <!-- call_\w+ -->\n", notes.read_text())
    notes.unlink()


def test_messages_go_to_the_one_who_can_deal_with_them(runtime: Runtime) -> None:
    messages = lines("messages.jsonl")
    results = run_all(runtime, "triage", [message["message"] for message in messages])
    marks = [result.output["route"] == message["route"] for message, result in zip(messages, results, strict=True)]
    for message, result, mark in zip(messages, results, marks, strict=True):
        done = result.output["answer"] or [asked.question for asked in result.interrupts]
        print(f"{'ok  ' if mark else 'MISS'} {message['message']!r} ({result.output['reason']}): {str(done)[:120]}")
    assert len(marks) == 10
    assert sum(marks) >= 8
    for result in results:
        waits = [asked.node for asked in result.interrupts]
        assert waits == [] or waits in (["person / hand_over"], ["tools / act"])
        assert (result.status == "waiting") is bool(waits)
    for result in results:
        if result.output["route"] == "person":
            assert runtime.resume(result.run_id, answer="I call you.").output["answer"] == "I call you."
