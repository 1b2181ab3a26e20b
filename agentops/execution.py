"""One run at work: the graph, its thread's checkpoints, and how it ended.

The caller holds the thread's lease and has the run on record. Nothing here opens engines or indexes or reads the store.
"""

from __future__ import annotations

import asyncio
import re
import sqlite3
import sysconfig
import traceback
from collections.abc import AsyncIterator, Collection
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from langgraph.errors import GraphDrained, GraphRecursionError
from langgraph.runtime import RunControl
from langgraph.types import Command, StateSnapshot

from agentops import people
from agentops.checkpoints import Lease, Told, open_checkpointer, telling
from agentops.clock import Clock
from agentops.errors import AgentOpsError, BudgetSpent, JournalFull, NodeFailed, RecordError, RunDrained
from agentops.graph import Context, LoadedGraph
from agentops.records import Interrupt, RunResult, RunStatus
from agentops.tracer import Meter, RunTrace
from agentops.tracer.stores import TracedStore, told_of_stream, traced_cache

Standing = Literal["unborn", "open", "over", "passed"]
"""Where a run stands in its thread. unborn: it has no checkpoint, its input was never taken.  open: the thread's newest
checkpoint is its own, and something is left to do.  over: the same, and nothing is left.  passed: another run went on."""

DURABILITY: Literal["sync", "async", "exit"] = "sync"
"""What LangGraph waits for before a step begins: the checkpoint of the one before. With the other two a caller has seen steps
that are gone when the process dies."""

Outcome = tuple[RunResult, Exception | None]
"""How a run ended, and the error to raise where it failed."""


async def standing(graph: LoadedGraph, held: Lease, run_id: str) -> Standing:
    """
    Raises:
        StoreBroken: the thread's checkpoints cannot be read.
    """
    config: Any = {"configurable": {"thread_id": held.thread_id}}
    async with checkpointed(graph, held) as compiled:
        state = newest = await compiled.aget_state(config)
        while "run_id" not in (told := state.metadata or {}) and told.get("source") == "update" and state.parent_config:
            # Nobody's run: somebody has changed the state by hand, and the run goes on from that.
            state = await compiled.aget_state(state.parent_config)
        if told.get("run_id") == run_id:
            # A task whose writes were saved before its step ended is not in `next` but in `tasks`: it goes on too.
            return "open" if newest.tasks else "over"
        async for _ in compiled.aget_state_history(config, filter={"run_id": run_id}, limit=1):
            return "passed"
        return "unborn"


async def execute(
    graph: LoadedGraph,
    input: Any,
    trace: RunTrace,
    *,
    held: Lease,
    clock: Clock,
    context: Context | None,
    at: Standing,
    meter: Meter,
    control: RunControl,
) -> Outcome:
    """Runs the graph and writes how it ended. A run that is `at` "open" goes on from its checkpoint, one that is "over" is
    only closed. Where its budget is spent, what was reached is its output; so where `control` has it stop at a step boundary.

    Raises:
        asyncio.CancelledError: the run is on record as cancelled.
    """
    started = clock.monotonic_ns()

    def ended(
        status: RunStatus, output: Any = None, error: Exception | None = None, pending: tuple[Interrupt, ...] = ()
    ) -> Outcome:
        cause = error
        said_of = error.__cause__ or error if isinstance(error, NodeFailed) else error
        trace.end(status, output=output, error=said_of, pending=[asdict(one) for one in pending])
        try:
            trace.check()
        except JournalFull as full:
            status, cause = "failed", full
        said = f"{type(cause).__name__}: {cause}" if cause is not None else None
        took_ms = (clock.monotonic_ns() - started) / 1e6
        return RunResult(trace.run_id, trace.thread_id, status, output, trace.usage, took_ms, said, pending), cause

    reached = _Reached()
    try:
        async with _equipped(context, trace) as equipped:
            model = {"engine": asdict(equipped.engine.info)} if equipped is not None else {}
            instead = {name: prompt.template for name, prompt in graph.prompts.instead.items()}
            prompts = {"prompts": trace.keep(instead, redact=False)} if instead else {}
            trace.describe(budget=asdict(meter.budget), **model, **prompts)
            await _invoke(graph, input, trace, held, equipped, at, meter, control, reached)
    except asyncio.CancelledError as error:
        trace.end("cancelled", error=error)
        raise
    except GraphDrained:
        result, cause = ended("queued", reached.values)
        return result, cause or RunDrained(f"run {trace.run_id} was drained, it stopped at a step boundary", run_id=trace.run_id)
    except AgentOpsError as error:
        return ended("failed", reached.values, error=error)
    except (Exception, SystemExit, KeyboardInterrupt) as error:
        return ended("failed", error=_explained(error, graph, trace.run_id))
    return ended("waiting" if reached.pending else "done", reached.values, pending=reached.pending)


@asynccontextmanager
async def _equipped(context: Context | None, trace: RunTrace) -> AsyncIterator[Context | None]:
    """The context with the tools of the servers that the settings name, which live as long as the block. What they offer is put
    on record."""
    if context is None:
        yield None
        return
    if (tools := context.effects.server_tools()) is not None:
        yield replace(context, tools=tuple(tools))
        return
    if context.tool_settings.mcp is None:
        yield context
        return
    from agentops.tools import no_such_tool, schema_of
    from agentops.tools.mcp import open_servers, server_names

    wanted, servers = context.tool_settings, server_names(context.tool_settings.mcp)
    async with open_servers(context.tool_settings.mcp, wanted.timeout_s) as tools:
        for word in ("allow", "ask", "deny"):
            for name in getattr(wanted, word):
                theirs = [one for one in servers if name.startswith(f"{one}_")]
                if theirs and name not in (offered := {one.name for one in tools}):
                    raise no_such_tool(f"tools.{word}", name, f"server '{theirs[0]}'", offered)
        trace.annotate(server_tools=trace.keep([[one.name, one.description, schema_of(one)] for one in tools]))
        yield replace(context, tools=tools)


@dataclass
class _Reached:
    """How far a graph came: the values of its state, and what it waits for."""

    values: Any = None
    pending: tuple[Interrupt, ...] = ()


async def _invoke(
    graph: LoadedGraph,
    input: Any,
    trace: RunTrace,
    held: Lease,
    context: Context | None,
    at: Standing,
    meter: Meter,
    control: RunControl,
    reached: _Reached,
) -> None:
    labels = trace.labels
    config: Any = {
        "configurable": {"thread_id": trace.thread_id},
        "callbacks": [trace.handler, *trace.effects.handlers],
        "tags": list(labels.tags),
        "metadata": {**labels.metadata, **({"user": labels.user} if labels.user else {}), "run_id": trace.run_id},
        "recursion_limit": meter.budget.steps,
    }
    async with checkpointed(graph, held, trace.state) as plain:
        compiled = _tapped(plain, trace)
        if at == "over":
            reached.values = (await compiled.aget_state(config)).values
            return
        if at == "open" and not isinstance(input, Command):
            input = None  # noqa: A001 - the checkpoint holds the state; what is on record of the input is text
        spent: str | None = None
        loop = asyncio.get_running_loop()
        config["configurable"] |= told_of_stream(trace, compiled.store)
        how: Any = {"context": context, "control": control, "durability": DURABILITY}
        try:
            async with asyncio.timeout(meter.budget.seconds) as limit:
                meter.watch = lambda: loop.call_soon_threadsafe(_set, limit, loop, meter)
                output = await compiled.ainvoke(input, config, **how)
        except TimeoutError:
            if not limit.expired():
                raise
            spent = "seconds"
        except GraphRecursionError as error:
            if _failed_node(error) and f"of {meter.budget.steps} reached" not in str(error):
                raise  # a limit that a node has set for a graph of its own
            # LangGraph counts before it looks whether there is anything left to do.
            if (await compiled.aget_state(config)).next:
                spent = "steps"
            else:
                output = await compiled.ainvoke(None, config, **how)
        except (BudgetSpent, GraphDrained):
            reached.values = (await compiled.aget_state(config)).values
            raise
        if limit.expired():
            spent = "seconds"  # also where a node took no notice
        if spent:
            reached.values = (await compiled.aget_state(config)).values
            raise meter.spent(spent)
        trace.check()
        reached.pending = pending_in(await compiled.aget_state(config, subgraphs=True))
        waiting = reached.pending and isinstance(output, dict)
        reached.values = {key: value for key, value in output.items() if key != "__interrupt__"} if waiting else output


def _set(limit: asyncio.Timeout, loop: asyncio.AbstractEventLoop, meter: Meter) -> None:
    with suppress(RuntimeError):  # it is over
        limit.reschedule(loop.time() + meter.seconds_left())


def pending_in(
    state: StateSnapshot, path: tuple[str, ...] = (), answered: Collection[str] = frozenset()
) -> tuple[Interrupt, ...]:
    """What the tasks of a thread wait for, those inside subgraphs too, each once; nothing of tasks that are `answered`."""
    found: dict[str, Interrupt] = {}
    for task in state.tasks:
        if task.id in answered:
            continue
        inner = pending_in(task.state, (*path, task.name), answered) if isinstance(task.state, StateSnapshot) else ()
        # A graph that a node calls by itself is no subgraph to LangGraph; what it asks is known of the node.
        own = (people.read(raised, " / ".join((*path, task.name))) for raised in task.interrupts)
        for one in (*inner, *own):
            found.setdefault(one.id, one)
    if not found and state.next and not path:
        return tuple(
            Interrupt(task.id, "pause", f"stopped before {task.name}", task.name) for task in state.tasks if not task.error
        )
    return tuple(found.values())


async def pending(graph: LoadedGraph, held: Lease, *, waiting: bool) -> tuple[Interrupt, ...]:
    """What a thread waits for. Where its run is not `waiting` but failed or died, tasks whose answers LangGraph
    has kept by then wait for none: given again, an answer would be taken for that to the task's next question.

    Raises:
        StoreBroken: the thread's checkpoints cannot be read.
    """
    async with checkpointed(graph, held) as compiled:
        config: Any = {"configurable": {"thread_id": held.thread_id}}
        state = await compiled.aget_state(config, subgraphs=True)
        return pending_in(state, answered=frozenset() if waiting else await _answered(compiled, state))


async def _answered(compiled: Any, state: StateSnapshot) -> set[str]:
    """Tasks of the step under way, those of its subgraphs too, that have an answer saved; a task is there with all of its own."""
    config: Any = {"configurable": {"thread_id": state.config["configurable"]["thread_id"]}}
    newest, found, known = state.config["configurable"]["checkpoint_id"], set(), _tasks(state)
    async with aclosing(compiled.checkpointer.alist(config)) as checkpoints:
        async for kept in checkpoints:
            if kept.checkpoint["id"] < newest:
                break
            found |= {task for task, channel, _ in kept.pending_writes or () if channel == "__resume__"}
    if found - known.keys():
        # Of a graph that a node calls by itself; it is not told whose.
        found |= set(known)
    return found | {task for task, inner in known.items() if inner & found}


def _tasks(state: StateSnapshot) -> dict[str, set[str]]:
    """The tasks of a step and of its subgraphs, with those inside them."""
    found: dict[str, set[str]] = {}
    for task in state.tasks:
        inner = _tasks(task.state) if isinstance(task.state, StateSnapshot) else {}
        found |= {**inner, task.id: set(inner)}
    return found


@asynccontextmanager
async def checkpointed(graph: LoadedGraph, held: Lease, told: Told | None = None) -> AsyncIterator[Any]:
    """The compiled graph with a checkpointer, its own or ours for the thread, which tells what it saves."""
    if own := graph.compiled.checkpointer:
        if told is None or own is True:
            yield graph.compiled
        else:
            yield graph.compiled.copy({"checkpointer": telling(own, told)})
        return
    async with open_checkpointer(held, graph.state_types, told) as saver:
        yield graph.compiled.copy({"checkpointer": saver})


def _tapped(compiled: Any, trace: RunTrace) -> Any:
    """The compiled graph with what its store and its node cache do on record."""
    parts: dict[str, Any] = {}
    if compiled.store is not None:
        parts["store"] = TracedStore(compiled.store, trace)
    if compiled.cache is not None:
        parts["cache"] = traced_cache(compiled.cache, trace)
    return compiled.copy(parts) if parts else compiled


def _explained(error: BaseException, graph: LoadedGraph, run_id: str) -> AgentOpsError:
    """What a user is told of an exception that is not ours, with it as the cause."""
    node = _failed_node(error)
    told: AgentOpsError
    if isinstance(error, sqlite3.OperationalError) and node is None:
        full = "full" in str(error) or "disk I/O" in str(error)
        kind, said = (JournalFull, "the disk is full") if full else (RecordError, str(error))
        told = kind(f"no checkpoint could be written: {said}", hint=f"make room, then go on with: agentops resume {run_id}")
    else:
        told = NodeFailed(f"{node or graph.name}: {type(error).__name__}: {error}{_place(error)}", run_id=run_id, node=node)
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
