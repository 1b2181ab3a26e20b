"""A process that runs graphs in children, to be killed: everything is imported once, and a child is there in milliseconds.

It reads a job a line (JSON: name, graph, question, durability) and writes lines: `child PID`, then what the caller of the run
sees (`step N` when a step of the graph itself begins, `result JSON` at the end), and `over STATUS` when the child is gone. A job
that is given again under its name is the same run, delivered again.
"""

from __future__ import annotations

import asyncio
import json
import operator
import os
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, TypedDict

from langgraph.graph import END, START, StateGraph
from langgraph.runtime import Runtime as Given
from langgraph.types import Send

from agentops import Context, Document, Runtime, ScriptedEngine
from agentops.records import RunEvent, RunResult, StepStarted, content_hash
from agentops.retrieval.embed import HashEmbedder
from agentops.settings import load_settings

WIDTH = 64


class Wide(TypedDict, total=False):
    number: int
    done: Annotated[list[int], operator.add]
    total: int


def add_line(file: Path, line: str) -> None:
    handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    os.write(handle, f"{line}\n".encode())
    os.close(handle)


async def work(state: Wide, runtime: Given[Context]) -> Wide:
    """Has one effect, once by its key; each time it runs is counted beside."""
    number, files, context = state["number"], runtime.context.files, runtime.context
    files.mkdir(parents=True, exist_ok=True)
    key = context.idempotency_key(number)
    add_line(files / "tries", key)
    await asyncio.sleep(0.002 * (number % 8))
    effects = files / "effects"
    if not effects.exists() or key not in effects.read_text().split():
        add_line(effects, key)
    await asyncio.sleep(0.001)
    return {"done": [number]}


def gather(state: Wide) -> Wide:
    return {"total": sum(state["done"])}


wide = StateGraph(Wide, context_schema=Context).add_node(work).add_node(gather).add_node("last", lambda _: {})
wide.add_conditional_edges(START, lambda _: [Send("work", {"number": number}) for number in range(WIDTH)], ["work"])
wide.add_edge("work", "gather").add_edge("gather", "last").add_edge("last", END)
graph = wide.compile()


def say(line: str) -> None:
    os.write(1, f"{line}\n".encode())


def follow(events: Iterable[RunEvent]) -> RunResult:
    for event in events:
        if isinstance(event, StepStarted) and not event.path:
            say(f"step {event.step}")
        elif isinstance(event, RunResult):
            result = event
    return result


def run(job: dict[str, Any]) -> None:
    from test_concurrency import TEXTS, answers, scores

    from agentops import execution
    from agentops.tracer import to_plain

    execution.DURABILITY = job["durability"]
    engine = ScriptedEngine(answers, scores=scores, delay_s=0.001)
    with Runtime(load_settings(), engine=engine, embedder=HashEmbedder()) as runtime:
        documents = [
            Document(source, text, content_hash(text), {"source": source, "heading": heading})
            for source, (heading, text) in TEXTS.items()
        ]
        runtime.index.upsert("tea", documents)
        say("ready")
        result = follow(runtime.stream(job["graph"], job["question"], run_id=job["name"], collection="tea"))
        while result.status == "waiting":
            result = follow(runtime.stream_resume(result.run_id, answer={"kind": "approve"}))
        say("result " + json.dumps({"status": result.status, "output": to_plain(result.output)}))


def main() -> None:
    import test_concurrency  # noqa: F401 - what children need is loaded before they are made

    from agentops.graph import load_graph
    from agentops.retrieval import embedded  # noqa: F401

    for name in ("rag", "research", "review", "assistant", "triage"):
        load_graph(name)
    say("warm")
    for line in sys.stdin:
        if (child := os.fork()) == 0:
            code = 1
            try:
                say(f"child {os.getpid()}")
                run(json.loads(line))
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        say(f"over {os.waitstatus_to_exitcode(status)}")


if __name__ == "__main__":
    main()
