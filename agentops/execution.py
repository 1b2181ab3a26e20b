"""One run at work: the graph, its thread's checkpoints, and how it ended.

The caller holds the thread's lease and has the run on record. Nothing here opens engines or indexes or reads the store.
"""

from __future__ import annotations

import asyncio
import re
import sqlite3
import sysconfig
import traceback
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal, cast

from langgraph.types import Command

from agentops.checkpoint import open_checkpointer
from agentops.clock import Clock
from agentops.errors import AgentOpsError, JournalFull, NodeFailed, RecordError
from agentops.graph import Context, LoadedGraph
from agentops.records import RunResult, RunStatus
from agentops.settings import Settings
from agentops.tracer import RunTrace

Standing = Literal["unborn", "open", "over", "passed"]
"""Where a run stands in its thread. unborn: it has no checkpoint, its input was never taken.  open: the thread's newest
checkpoint is its own, and something is left to do.  over: the same, and nothing is left.  passed: another run went on."""

Outcome = tuple[RunResult, Exception | None]
"""How a run ended, and the error to raise where it failed."""


async def standing(graph: LoadedGraph, settings: Settings, run_id: str, thread_id: str) -> Standing:
    """
    Raises:
        StoreBroken: the thread's checkpoints cannot be read.
    """
    config: Any = {"configurable": {"thread_id": thread_id}}
    async with _checkpointed(graph, settings, thread_id) as compiled:
        state = await compiled.aget_state(config)
        if (state.metadata or {}).get("run_id") == run_id:
            # A task whose writes were saved before its step ended is not in `next` but in `tasks`: it goes on too.
            return "open" if state.tasks else "over"
        async for _ in compiled.aget_state_history(config, filter={"run_id": run_id}, limit=1):
            return "passed"
        return "unborn"


async def execute(
    graph: LoadedGraph,
    input: Any,
    trace: RunTrace,
    *,
    settings: Settings,
    clock: Clock,
    context: Context | None,
    at: Standing,
) -> Outcome:
    """Runs the graph and writes how it ended. A run that is `at` "open" goes on from its checkpoint, one that is "over" is
    only closed.

    Raises:
        asyncio.CancelledError: the run is on record as cancelled.
    """
    started = clock.monotonic_ns()

    def ended(status: RunStatus, output: Any = None, error: Exception | None = None, pending: tuple[Any, ...] = ()) -> Outcome:
        cause = error
        trace.end(status, output=output, error=error.__cause__ or error if isinstance(error, NodeFailed) else error)
        try:
            trace.check()
        except JournalFull as full:
            status, cause = "failed", full
        said = f"{type(cause).__name__}: {cause}" if cause is not None else None
        took_ms = (clock.monotonic_ns() - started) / 1e6
        return RunResult(trace.run_id, trace.thread_id, status, output, trace.usage, took_ms, said, pending), cause

    try:
        output = await _invoke(graph, input, trace, settings, context, at)
    except asyncio.CancelledError as error:
        trace.end("cancelled", error=error)
        raise
    except AgentOpsError as error:
        return ended("failed", error=error)
    except (Exception, SystemExit, KeyboardInterrupt) as error:
        return ended("failed", error=_explained(error, graph, trace.run_id, settings))
    if isinstance(output, dict) and (pending := output.get("__interrupt__")):
        visible = {key: value for key, value in output.items() if key != "__interrupt__"}
        return ended("waiting", visible, pending=tuple(pending))
    return ended("done", output)


async def _invoke(
    graph: LoadedGraph, input: Any, trace: RunTrace, settings: Settings, context: Context | None, at: Standing
) -> Any:
    config: Any = {
        "configurable": {"thread_id": trace.thread_id},
        "callbacks": [trace.handler],
        "metadata": {"run_id": trace.run_id},
        "recursion_limit": settings.budget.steps,
    }
    async with _checkpointed(graph, settings, trace.thread_id) as compiled:
        if at == "over":
            return (await compiled.aget_state(config)).values
        if at == "open" and not isinstance(input, Command):
            input = None  # noqa: A001 - the checkpoint holds the state; what is on record of the input is text
        output = await compiled.ainvoke(input, config, context=cast(Any, context), durability="sync")
        trace.check()
        return output


@asynccontextmanager
async def _checkpointed(graph: LoadedGraph, settings: Settings, thread_id: str) -> AsyncIterator[Any]:
    """The compiled graph with a checkpointer: its own, or ours for the thread."""
    if graph.compiled.checkpointer:
        yield graph.compiled
        return
    async with open_checkpointer(settings, thread_id, graph.state_types) as saver:
        yield graph.compiled.copy({"checkpointer": saver})


def _explained(error: BaseException, graph: LoadedGraph, run_id: str, settings: Settings) -> AgentOpsError:
    """What a user is told of an exception that is not ours, with it as the cause."""
    node = _failed_node(error)
    told: AgentOpsError
    if isinstance(error, sqlite3.OperationalError) and node is None:
        full = "full" in str(error) or "disk I/O" in str(error)
        kind, said = (JournalFull, "the disk is full") if full else (RecordError, str(error))
        told = kind(f"no checkpoint could be written: {said}", hint=f"make room, then go on with: agentops resume {run_id}")
    else:
        told = NodeFailed(f"{node or graph.name}: {type(error).__name__}: {error}{_place(error)}", run_id=run_id, node=node)
        if type(error).__name__ == "GraphRecursionError":
            limit = settings.budget.steps
            told.hint = f"the graph took {limit} supersteps; raise budget.steps or mend the loop"
    told.__cause__ = error
    return told


def _place(error: BaseException) -> str:
    """The innermost line of the user's own code that the error came through, or nothing."""
    libraries = (sysconfig.get_paths()["purelib"], sysconfig.get_paths()["stdlib"], str(Path(__file__).parent))
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith((*libraries, "<")):
            return f"\n  {frame.filename}, line {frame.lineno} | {frame.line}"
    return ""


def _failed_node(error: BaseException) -> str | None:
    """LangGraph tells where an error came from in a note: "During task with name 'write' and id '...'"."""
    for note in getattr(error, "__notes__", ()):
        if found := re.match(r"During task with name '([^']+)'", note):
            return found[1]
    return None
