"""Taking up a run that is on record: whether it may go on, with which answers, and where it stands; or what it gave.

The caller holds the thread's lease, without which nothing of this is sure. Nothing here runs a graph.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from langgraph.types import Command

from agentops.checkpoints import Lease
from agentops.errors import ThreadBusy, UsageError
from agentops.execution import Standing, pending, standing
from agentops.graph import LoadedGraph
from agentops.people import Answers
from agentops.prompts import Prompt
from agentops.records import Interrupt, RunResult, content_hash
from agentops.settings import Settings
from agentops.store import RunRow, open_store
from agentops.tracer.payload import encode
from agentops.tracer.redaction import load_redactor


def check_run_id(run_id: str) -> None:
    """
    Raises:
        UsageError: it could not be a run's name.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", run_id):
        raise UsageError(
            f"{run_id[:80]!r} cannot name a run", hint="use up to 100 letters, digits, '.', '_' and '-', a letter or digit first"
        )


def check_same(row: RunRow, graph: LoadedGraph, thread_id: str, given: Any, settings: Settings) -> None:
    """
    Raises:
        UsageError: what is delivered under the name of a run is something else.
    """
    asked = None if given is None else encode(given, settings.record.payload_bytes, load_redactor(settings)).hash
    for what, before, now in (
        ("graph", row.graph, graph.reference),
        ("thread", row.thread_id, thread_id),
        ("input", row.input_hash, asked),
    ):
        if before != now:
            raise UsageError(f"run {row.id} is on record with another {what}", hint="a new run needs a new name")


def as_recorded(graph: LoadedGraph, row: RunRow, settings: Settings) -> LoadedGraph:
    """The graph with the prompts that the run was begun with in place of its own."""
    if graph.prompts.instead:
        return graph
    with open_store(settings) as store:
        kept = [span.attributes["prompts"] for span in store.spans(row.id) if "prompts" in span.attributes]
        instead = store.whole(kept[0]) if kept else {}
    return replace(graph, prompts=graph.prompts.replaced(Prompt(name, text) for name, text in instead.items()))


def resumable(row: RunRow) -> RunRow:
    """
    Raises:
        UsageError: it is done.  ThreadBusy: it still runs.
    """
    if row.status == "done":
        raise UsageError(f"run {row.id} is done; there is nothing to resume", hint=f"see it with: agentops show {row.id}")
    if row.status == "running":
        raise ThreadBusy(f"run {row.id} is still running", hint="stop it first, or wait for its end")
    return row


def result_of(row: RunRow, settings: Settings) -> RunResult:
    """What is on record of how a run ended, as JSON knows it.

    Raises:
        RecordError: its output was cut for its size, or is damaged.
    """
    with open_store(settings) as store:
        output = store.whole(row.output_hash) if row.output_hash else None
        took_ms = (row.duration_ns or 0) / 1e6
        return RunResult(row.id, row.thread_id, row.status, output, row.usage, took_ms, row.error, store.pending(row))


async def taken_up(graph: LoadedGraph, held: Lease, row: RunRow, answers: Answers) -> tuple[Any, Any, Standing]:
    """What a resumed run is invoked with, what of that is put on record, and where it stands.

    Raises:
        AnswerUnfit
        UsageError: also where a cancelled run is given an answer.
    """
    at = await standing(graph, held, row.id)
    if at == "passed":
        raise passed(row.id, row.thread_id)
    if row.status == "cancelled" and (answers.one is not None or answers.by_id):
        # Who answers has seen the question before it was withdrawn.
        raise UsageError(
            f"run {row.id} was cancelled, it waits for no answer; nothing was run",
            hint=f"take it up again with: agentops resume {row.id}; what is still open is asked anew",
        )
    waiting = row.status == "waiting"
    asked = await pending(graph, held, waiting=waiting) if at == "open" else ()
    given = answers.fitted(asked, row.id, waiting=waiting)
    if not waiting:
        # Its process died, or it failed, before what was answered was done with.
        given = {**await asyncio.to_thread(_answered, row, asked, held.settings), **given}
    if given:
        kept = {key: {"value": value, "hash": _hash(value)} for key, value in given.items()}
        return Command(resume=given), {"answers": kept}, at
    began_with = await asyncio.to_thread(_input, row, held.settings, begun=at != "unborn")
    return began_with, began_with, at


def passed(run_id: str, thread_id: str) -> UsageError:
    return UsageError(
        f"another run went on with thread {thread_id} after run {run_id}",
        hint="it cannot be resumed without undoing that; start a new run on the thread",
    )


def _answered(row: RunRow, asked: Sequence[Interrupt], settings: Settings) -> dict[str, Any]:
    """Answers that are on record for interrupts which are still open, whole ones only."""
    found: dict[str, Any] = {}
    with open_store(settings) as store:
        for span in store.spans(row.id) if asked else ():
            said = store.payload(span.input_hash) if span.kind == "workflow" and span.input_hash else None
            answers = said.get("answers") if isinstance(said, dict) else None
            for one in asked:
                kept = answers.get(one.id) if isinstance(answers, dict) else None
                if isinstance(kept, dict) and kept.get("hash") == _hash(kept.get("value")):
                    found[one.id] = kept["value"]
    return found


def _input(row: RunRow, settings: Settings, *, begun: bool) -> Any:
    """What a run was started with, as on record.

    Raises:
        UsageError: that is redacted, and no checkpoint has what it was.
    """
    with open_store(settings) as store:
        if not begun and any(span.redacted for span in store.spans(row.id) if span.kind == "workflow"):
            raise UsageError(
                f"run {row.id} ended before its first checkpoint, and its input was redacted on record",
                hint="start a new run with the input",
            )
        return store.payload(row.input_hash) if row.input_hash else None


def _hash(value: Any) -> str:
    return content_hash(json.dumps(value, sort_keys=True, default=repr))
