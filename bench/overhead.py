"""What does the record cost? CPU of a durable, traced superstep, against LangGraph with upstream's SQLite savers alone.

Every subject runs in a process of its own in turns with the baseline: the same graph, `sync` durability, WAL and
`synchronous=FULL`. Each graph runs in a short and in a long form: a superstep costs what the long one takes more, a step each,
and a run what is left of the short one (its thread's file, its rows, its start and end). Medians of the rounds. Ours counts
twice: while the run goes on ("traced"), and with what the drainer does later to bring the events into the store ("+ store").
Peers are callback tracers over the baseline whose exporter keeps
nothing, so what they would do to store a span is not in their number; they need `--peers PYTHON`, an interpreter that has
them (`pip install langfuse mlflow-tracing openinference-instrumentation-langchain` beside this project's packages).

The last column: a process is killed (-9) while it runs a graph, and the spans of nodes that had ended are looked for. Peers
have the exporters that their documentation shows, writing to a file of ours. Not measured: fsync of the disk (noise) and
the models' own time.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import logging
import operator
import os
import platform
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypedDict

SUBJECTS = ("ours", "openinference", "langfuse", "mlflow")
SHAPES = ("chain", "send", "chat")
SIZES = {"chain": (4, 44), "send": (1, 9), "chat": (2, 16)}
WIDTH = 16
KILLED_AFTER = 300


class State(TypedDict, total=False):
    x: int
    found: Annotated[list[int], operator.add]


def chain(size: int) -> tuple[Any, Any, int]:
    """(graph builder, input, supersteps) of nodes in a row."""
    from langgraph.graph import START, StateGraph

    builder = StateGraph(State)
    before = START
    for number in range(size):
        builder.add_node(name := f"node_{number}", lambda state: {"x": state["x"] + 1})
        builder.add_edge(before, name)
        before = name
    return builder, {"x": 0}, size


def send(size: int) -> tuple[Any, Any, int]:
    """The same of packets sent to 16 tasks at once, and what they found put together."""
    from langgraph.graph import START, StateGraph
    from langgraph.types import Send

    builder = StateGraph(State)
    builder.add_node("plan", lambda state: {"x": state["x"] + 1})
    builder.add_node("work", lambda state: {"found": [state["x"]]})
    builder.add_edge(START, "plan")
    builder.add_conditional_edges("plan", lambda state: [Send("work", {"x": number}) for number in range(WIDTH)], ["work"])
    builder.add_node("join", lambda state: {"x": state["x"]})
    builder.add_edge("work", "join")
    builder.add_conditional_edges("join", lambda state: "plan" if state["x"] < size else "__end__", ["plan", "__end__"])
    return builder, {"x": 0, "found": []}, 3 * size


def chat(size: int) -> tuple[Any, Any, int]:
    """The same of a person and a model in turns, with the conversation as the state."""
    from langchain_core.language_models import FakeListChatModel
    from langgraph.graph import START, MessagesState, StateGraph

    model = FakeListChatModel(responses=["A span is one piece of work with a start and an end. " * 4])

    def ask(state: Any) -> Any:
        return {"messages": [("user", f"And what is word {len(state['messages'])}?")]}

    def answer(state: Any) -> Any:
        return {"messages": [model.invoke(state["messages"])]}

    builder = StateGraph(MessagesState)
    builder.add_node("ask", ask)
    builder.add_node("answer", answer)
    builder.add_edge(START, "ask")
    builder.add_edge("ask", "answer")
    enough = 2 * size
    builder.add_conditional_edges(
        "answer", lambda state: "ask" if len(state["messages"]) < enough else "__end__", ["ask", "__end__"]
    )
    return builder, {"messages": []}, 2 * size


MAKERS: dict[str, Callable[[int], tuple[Any, Any, int]]] = {"chain": chain, "send": send, "chat": chat}


@dataclass
class Cost:
    """Seconds of one run: CPU and wall time while it goes on, and CPU of what is done for it afterwards."""

    cpu: float
    wall: float
    after: float = 0.0


def measured(work: Callable[[], Any], afterwards: Callable[[], Any] | None = None) -> Cost:
    gc.collect()
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    ran = Cost(time.process_time() - cpu, time.perf_counter() - wall)
    if afterwards:
        cpu = time.process_time()
        afterwards()
        ran.after = time.process_time() - cpu
    return ran


def spans_kept(folder: Path) -> Any:
    """An OpenTelemetry exporter that writes the names of spans to a file, which a kill cannot take back."""
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

    class Kept(SpanExporter):
        def export(self, spans: Any) -> Any:
            with (folder / "spans").open("a") as file:
                file.write("".join(f"{span.name}\n" for span in spans))
            return SpanExportResult.SUCCESS

    return Kept()


def nothing_kept() -> Any:
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

    class Nothing(SpanExporter):
        def export(self, spans: Any) -> Any:
            return SpanExportResult.SUCCESS

    return Nothing()


def peer_callbacks(subject: str, folder: Path, exporter: Any) -> list[Any]:
    """What a user of that tracer passes as callbacks; some patch LangChain instead and need none."""
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    if subject == "openinference":
        from openinference.instrumentation.langchain import LangChainInstrumentor

        provider = TracerProvider()
        provider.add_span_processor(BatchSpanProcessor(exporter))
        LangChainInstrumentor().instrument(tracer_provider=provider)
        return []
    if subject == "langfuse":
        from langfuse import Langfuse
        from langfuse.langchain import CallbackHandler

        Langfuse(public_key="pk", secret_key="sk", base_url="http://127.0.0.1:9", span_exporter=exporter)
        return [CallbackHandler()]
    import mlflow

    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db" if "store" in str(folder) else f"file://{folder}/mlruns")
    from mlflow.langchain.langchain_tracer import MlflowLangchainTracer

    return [MlflowLangchainTracer()]


def peer_flushed() -> None:
    from opentelemetry import trace

    provider = trace.get_tracer_provider()
    if hasattr(provider, "force_flush"):
        provider.force_flush()


async def baseline_async(builder: Any, given: Any, file: Path, runs: list[str], callbacks: list[Any]) -> None:
    from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver

    async with AsyncSqliteSaver.from_conn_string(str(file)) as saver:
        await saver.setup()
        await saver.conn.execute("PRAGMA synchronous=FULL")
        graph = builder.compile(checkpointer=saver)
        for thread in runs:
            config = {"configurable": {"thread_id": thread}, "recursion_limit": 1000, "callbacks": list(callbacks)}
            await graph.ainvoke(given, config, durability="sync")


def baseline_sync(builder: Any, given: Any, file: Path, runs: list[str], callbacks: list[Any]) -> None:
    from langgraph.checkpoint.sqlite import SqliteSaver

    connection = sqlite3.connect(file, check_same_thread=False)
    saver = SqliteSaver(connection)
    saver.setup()
    connection.execute("PRAGMA synchronous=FULL")
    graph = builder.compile(checkpointer=saver)
    for thread in runs:
        config = {"configurable": {"thread_id": thread}, "recursion_limit": 1000, "callbacks": list(callbacks)}
        graph.invoke(given, config, durability="sync")
    connection.close()


def worker(subject: str, shape: str, caller: str, rounds: int, folder: Path) -> dict[str, Any]:
    """Costs in microseconds of a superstep and of a run: of the baseline, and of a subject, in turns in this process."""
    logging.disable(logging.WARNING)
    made = {size: MAKERS[shape](size) for size in SIZES[shape]}
    # asyncio.run asks for the interrupt's handler, and with that for the text of the task and of all it was given.
    loop = asyncio.new_event_loop()

    def baseline(size: int, round_: int, callbacks: list[Any], name: str) -> None:
        builder, given, _ = made[size]
        file, threads = folder / "baseline.db", [f"{name}_{size}_{round_}"]
        if caller == "sync":
            baseline_sync(builder, given, file, threads, callbacks)
        else:
            loop.run_until_complete(baseline_async(builder, given, file, threads, callbacks))

    afterwards: Callable[[], Any]
    if subject == "ours":
        from agentops import Runtime
        from agentops.engine.scripted import ScriptedEngine
        from agentops.graph import adopt_graph
        from agentops.records import Budget
        from agentops.settings import PathSettings, RecordSettings, Settings

        settings = Settings(paths=PathSettings(home=folder, cache=folder / "cache"), record=RecordSettings(drain_ms=60_000))
        runtime = Runtime(settings, engine=ScriptedEngine())
        loaded = {size: adopt_graph(builder.compile()) for size, (builder, _, _) in made.items()}
        budget = Budget(1_000, 1_000_000, 100_000, 3600.0)

        def work(size: int, round_: int) -> None:
            given = made[size][1]
            if caller == "sync":
                runtime.run(loaded[size], given, budget=budget)
            else:
                loop.run_until_complete(runtime.arun(loaded[size], given, budget=budget))

        afterwards = runtime._tracer.flush
    else:
        callbacks = peer_callbacks(subject, folder, nothing_kept())

        def work(size: int, round_: int) -> None:
            baseline(size, round_, callbacks, "traced")

        afterwards = peer_flushed
    plain: dict[int, list[Cost]] = {size: [] for size in made}
    traced: dict[int, list[Cost]] = {size: [] for size in made}
    if subject == "openinference":  # it patches LangChain: the baseline is what was before
        from openinference.instrumentation.langchain import LangChainInstrumentor

        instrumentor: Any = LangChainInstrumentor()
        instrumentor.uninstrument()
    for round_ in range(rounds + 2):
        for size in made:
            plain[size].append(measured(lambda size=size, round_=round_: baseline(size, round_, [], "plain")))
            if subject == "openinference":
                peer_callbacks(subject, folder, nothing_kept())
            traced[size].append(measured(lambda size=size, round_=round_: work(size, round_), afterwards))
            if subject == "openinference":
                instrumentor.uninstrument()

    def costs(of: dict[int, list[Cost]], what: str) -> tuple[float, float]:
        """(of a superstep, of a run), from the medians of all but the first rounds."""
        (short, long), (few, many) = (
            [statistics.median(getattr(one, what) for one in of[size][2:]) * 1e6 for size in made],
            [steps for _, _, steps in made.values()],
        )
        step = (long - short) / (many - few)
        return step, short - step * few

    plain_cpu, plain_run = costs(plain, "cpu")
    cpu, run = costs(traced, "cpu")
    return {
        "plain_cpu": plain_cpu,
        "plain_wall": costs(plain, "wall")[0],
        "plain_run": plain_run,
        "cpu": cpu,
        "wall": costs(traced, "wall")[0],
        "after": costs(traced, "after")[0],
        "run": run,
    }


def dying(subject: str, folder: Path) -> None:
    """Runs a graph without end; prints the number of each node that has ended, told by the next one."""
    from langgraph.graph import START, StateGraph

    logging.disable(logging.WARNING)

    def node(state: State) -> State:
        if state["x"]:
            print(state["x"], flush=True)
        return {"x": state["x"] + 1}

    builder = StateGraph(State)
    builder.add_node("node", node)
    builder.add_edge(START, "node")
    builder.add_conditional_edges("node", lambda state: "node", ["node"])
    if subject == "ours":
        from agentops import Runtime
        from agentops.engine.scripted import ScriptedEngine
        from agentops.records import Budget
        from agentops.settings import PathSettings, Settings

        settings = Settings(paths=PathSettings(home=folder, cache=folder / "cache"))
        Runtime(settings, engine=ScriptedEngine()).run(
            builder.compile(), {"x": 0}, budget=Budget(100_000, 1_000_000, 100_000, 3600.0)
        )
    else:
        callbacks = peer_callbacks(subject, folder, spans_kept(folder))
        builder.compile().invoke({"x": 0}, {"recursion_limit": 100_000, "callbacks": callbacks})


def lost(python: str, subject: str) -> str:
    """Spans of ended nodes that are not found after a kill -9, of those that had ended."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        command = [python, "-W", "ignore", __file__, "--die", subject, "--folder", place]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert child.stdout is not None
        ended = 0
        for line in child.stdout:
            ended = int(line) if line.strip().isdigit() else ended
            if ended >= KILLED_AFTER:
                child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        if ended < KILLED_AFTER:
            return "not run"
        found = 0
        if subject == "ours":
            from agentops.settings import PathSettings, Settings
            from agentops.store import open_store
            from agentops.tracer import catch_up

            settings = Settings(paths=PathSettings(home=folder, cache=folder / "cache"))
            catch_up(settings)
            with open_store(settings) as store:
                (run,) = store.runs()
                found = sum(one.kind == "node" and one.status == "ok" for one in store.spans(run.id))
        elif subject == "mlflow":
            found = sum(path.read_text().count('"node"') for path in folder.rglob("traces.json"))
        else:
            with suppress(FileNotFoundError):
                found = (folder / "spans").read_text().split().count("node")
        return f"{max(0, ended - found)} of {ended}"


def measure(python: str, subject: str, shape: str, caller: str, rounds: int) -> dict[str, Any] | None:
    with tempfile.TemporaryDirectory() as place:
        command = [python, "-W", "ignore", __file__, "--work", subject, shape, caller, "--rounds", str(rounds), "--folder", place]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"{subject}, {shape}, {caller}: {(done.stderr.strip().splitlines() or ['?'])[-1]}", file=sys.stderr)
            return None
        return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="5 rounds instead of 15")
    parser.add_argument("--peers", metavar="PYTHON", help="an interpreter with the other tracers")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--die", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    rounds = asked.rounds or (5 if asked.quick else 15)
    if asked.work:
        print(json.dumps(worker(*asked.work, rounds, asked.folder)))
        return
    if asked.die:
        dying(asked.die, asked.folder)
        return
    rows = []
    print(f"CPU us of a superstep and of what a run has beside its supersteps, medians of {rounds} rounds; wall time as a ratio")
    heads = f"{'LangGraph':>10}{'traced':>9}{'+ store':>9}{'ratio':>7}{'+ store':>9}{'wall':>7}{'a run':>8}{'traced':>8}"
    print(f"{'':27}{heads}  spans lost")
    for subject in SUBJECTS if asked.peers else SUBJECTS[:1]:
        python = sys.executable if subject == "ours" else asked.peers
        gone = lost(python, subject)
        for shape in SHAPES:
            for caller in ("sync", "async"):
                if (found := measure(python, subject, shape, caller, rounds)) is None:
                    print(f"{subject:14} {shape:6} {caller:6}          not run")
                    continue
                base, cpu = found["plain_cpu"], found["cpu"]
                both, wall = cpu + found["after"], found["wall"] / found["plain_wall"]
                numbers = f"{base:10.0f}{cpu:9.0f}{both:9.0f}{cpu / base:7.2f}{both / base:9.2f}{wall:7.2f}"
                numbers += f"{found['plain_run']:8.0f}{found['run']:8.0f}"
                print(f"{subject:13} {shape:6} {caller:6}{numbers}  {gone}", flush=True)
                rows.append(
                    {"metric": f"{subject}_{shape}_{caller}", "ours": round(cpu / base, 3), "unit": "ratio", "lost": gone} | found
                )
    machine = {"processor": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
    print(json.dumps({"bench": "overhead", "machine": machine, "rows": rows}))


if __name__ == "__main__":
    main()
