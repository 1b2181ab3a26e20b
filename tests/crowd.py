"""Conversations of all kinds of graphs, held one by one or all at once, and what can be compared of them afterwards."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from agentops import RunResult, Runtime, Settings
from agentops.records import Decision
from agentops.store import open_store
from agentops.store.rows import SpanRow
from agentops.tracer import catch_up

APPROVE = Decision("approve")
COMPARED = ("answer", "sources", "plan", "query", "verdict", "route", "outcome", "rejected")
CONTENT = ("generation", "retrieval")
"""Kinds of spans whose input and output are the same whenever the same is computed."""


@dataclass(frozen=True)
class Talk:
    """What is said on one thread, and what a person answers whenever that is asked, in order."""

    graph: str
    questions: tuple[str, ...]
    decisions: tuple[Decision, ...] = field(default=())


async def hold(runtime: Runtime, talk: Talk, thread: str, collection: str) -> list[RunResult]:
    results, decisions = [], list(talk.decisions)
    for question in talk.questions:
        result = await runtime.arun(talk.graph, question, thread=thread, collection=collection)
        while result.status == "waiting":
            result = await runtime.aresume(result.run_id, answer=decisions.pop(0))
        results.append(result)
    assert not decisions
    return results


def one_by_one(runtime: Runtime, talks: Sequence[Talk], name: str, collection: str) -> list[list[RunResult]]:
    return [asyncio.run(hold(runtime, talk, f"{name}-{number}", collection)) for number, talk in enumerate(talks)]


def at_once(runtime: Runtime, talks: Sequence[Talk], name: str, collection: str) -> list[list[RunResult]]:
    """On one event loop."""

    async def run() -> list[list[RunResult]]:
        held = (hold(runtime, talk, f"{name}-{number}", collection) for number, talk in enumerate(talks))
        return list(await asyncio.gather(*held))

    return asyncio.run(run())


def in_threads(runtime: Runtime, talks: Sequence[Talk], name: str, collection: str) -> list[list[RunResult]]:
    """Each in a thread of its own, with the synchronous verbs for every other one and an event loop for the rest."""

    def one(number: int, talk: Talk) -> list[RunResult]:
        if number % 2:
            return asyncio.run(hold(runtime, talk, f"{name}-{number}", collection))
        results, decisions = [], list(talk.decisions)
        for question in talk.questions:
            result = runtime.run(talk.graph, question, thread=f"{name}-{number}", collection=collection)
            while result.status == "waiting":
                result = runtime.resume(result.run_id, answer=decisions.pop(0))
            results.append(result)
        return results

    with ThreadPoolExecutor(len(talks)) as pool:
        return list(pool.map(one, range(len(talks)), talks))


def told(conversations: list[list[RunResult]]) -> list[list[dict[str, Any]]]:
    """What the user was told, without what must differ: names, ids and times."""
    return [
        [{"status": result.status, **{key: result.output.get(key) for key in COMPARED}} for result in results]
        for results in conversations
    ]


def recorded(settings: Settings, conversations: list[list[RunResult]]) -> list[list[list[tuple[Any, ...]]]]:
    """The record of every run, in an order of its own: each span with its ancestors and, of model calls and searches, the
    hashes of what went in and came out. That every run is whole and has only spans of its own is checked on the way."""
    catch_up(settings)
    with open_store(settings) as store:
        found: list[list[list[tuple[Any, ...]]]] = []
        for results in conversations:
            found.append([])
            for result in results:
                spans = {span.id: span for span in store.spans(result.run_id)}
                run, calls = store.run(result.run_id), [span for span in spans.values() if span.kind == "generation"]
                assert store.balance(result.run_id).balanced
                assert run.status == result.status
                assert run.thread_id == result.thread_id
                assert all(span.parent_id is None or span.parent_id in spans for span in spans.values())
                assert sum(call.usage.output_tokens for call in calls) == run.usage.output_tokens
                assert sum(call.usage.input_tokens for call in calls) == run.usage.input_tokens
                assert all(c.usage.cached_tokens + c.usage.computed_tokens == c.usage.input_tokens for c in calls)
                found[-1].append(sorted(_signature(span, spans) for span in spans.values()))
    return found


def difference(one: list[list[list[tuple[Any, ...]]]], other: list[list[list[tuple[Any, ...]]]]) -> str:
    """Where two records differ, run by run, with the spans that only one of them has; empty where they are the same."""
    lines = []
    for talk, (these, those) in enumerate(zip(one, other, strict=True)):
        for turn, (left, right) in enumerate(zip(these, those, strict=True)):
            for name, only in (("first", Counter(left) - Counter(right)), ("second", Counter(right) - Counter(left))):
                lines += [f"talk {talk}, turn {turn}, only in the {name}: {span}" for span in sorted(only.elements())]
    return "\n".join(lines)


def overlapping(settings: Settings, conversations: list[list[RunResult]]) -> int:
    """How many conversations were under way at the same moment, at most."""
    catch_up(settings)
    with open_store(settings) as store:
        rows = [[store.run(result.run_id) for result in results] for results in conversations]
    begins = [min(row.started_ns for row in own) for own in rows]
    ends = [max(row.ended_ns or 0 for row in own) for own in rows]
    return max(sum(begin <= at < end for begin, end in zip(begins, ends, strict=True)) for at in begins)


def _signature(span: SpanRow, spans: dict[str, SpanRow]) -> tuple[Any, ...]:
    path, at = [], span
    while at.parent_id is not None:
        at = spans[at.parent_id]
        path.append(at.name)
    hashes = (str(span.input_hash), str(span.output_hash)) if span.kind in CONTENT else ()
    return (*reversed(path), span.name), span.kind, span.status, str(span.node), str(span.prompt_name), hashes
