"""How many spans a second does one core bring from the journal into the store? Higher is better.

A span is two events, its beginning and its end, as a run writes them. "bare" spans have attributes and no contents; of the
"usual" ones each second has an input and an output, a fifth of them known already, of 200 bytes to 4 KB of text; "heavy" ones
have both, 10 KB each. The peers store the same rows without a journal: Core's `executemany` of rows that are ready (what no
journal can be faster than), and the ORM's `Session.add_all`. Seconds are of the wall clock, by a process that is bound to one
core; beside them stands the rate by the processor time used, which other programs on the machine disturb less. Where Postgres is
installed the same is drained into one on this machine; the server's own processor time is in the first rate only.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from postgres_server import Postgres, ServerError, cluster
from sqlalchemy import create_engine, event, insert
from sqlmodel import Session, SQLModel

from agentops.clock import SystemClock, UlidSource
from agentops.records import Timing, Usage
from agentops.settings import Settings, load_settings
from agentops.store import open_writer
from agentops.store.tables import Payload, Span, table
from agentops.tracer import open_tracer
from agentops.tracer.drain import drain

WORDS = Path(__file__).read_text().split()
COUNTS = {"bare": 60_000, "usual": 40_000, "heavy": 10_000}


def text(chance: random.Random, size: int) -> str:
    return " ".join(chance.choices(WORDS, k=size // 7))


def record(settings: Settings, kind: str, count: int) -> None:
    """Spans of runs of fifty steps: a node and the model call in it, as the runtime writes them."""
    tracer = open_tracer(settings, clock=SystemClock(), ids=UlidSource())
    tracer.drainer.close()
    chance = random.Random(4)

    def content() -> Any:
        if kind == "bare" or (kind == "usual" and chance.random() < 0.5):
            return None
        if kind == "usual" and chance.random() < 0.2:
            return {"messages": [{"role": "user", "content": "How much water does it take?"}]}
        size = 10_000 if kind == "heavy" else round(200 * 20 ** chance.random())
        return {"messages": [{"role": "user", "content": text(chance, size)}], "step": chance.randrange(10**6)}

    for number in range(count // 101):
        run = tracer.start_run(run_id=f"run_{number}", thread_id=f"th_{number}", graph="bench")
        for step in range(50):
            node = run.open(
                "node",
                f"node {step % 5}",
                parent=run.root_id,
                input=content(),
                attributes={"triggers": [f"branch:to:node {step % 5}"], "checkpoint": f"1f0c8f0e-7d3a-6b1c-8000-{step:012}"},
                node=f"node {step % 5}",
                step=step,
                task=f"6b1c7d3a-0000-5000-8000-{number:012}",
                checkpoint_ns=f"node {step % 5}:6b1c7d3a-0000-5000-8000-{number:012}",
                attempt=1,
            )
            call = run.open(
                "generation",
                "generate",
                parent=node.id,
                input=content(),
                attributes={"revision": "b2:0123456789abcdef", "device": "cpu", "max_tokens": 256, "temperature": 0.2},
                model="SmolLM2-135M-Instruct",
            )
            call.set(finish_reason="stop", chunks=31, pieces=[4] * 31)
            run.close(call, output=content(), usage=Usage(200, 31, 150, 50), timing=Timing(0.1, 12.5, 300.1, 13.0))
            run.close(node, output=content())
        run.end("done")
    tracer.journal.close()


@contextmanager
def measured(found: dict[str, float], count: int) -> Iterator[None]:
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    found["wall"], found["cpu"] = count / (time.perf_counter() - wall), count / (time.process_time() - cpu)


def drained(settings: Settings, spans: int) -> dict[str, float]:
    found: dict[str, float] = {}
    with open_writer(settings) as writer, measured(found, spans):
        done = drain(settings.paths.home / "journal", writer)
    assert done.lost == 0
    return found


def rows_of(settings: Settings) -> dict[str, list[dict[str, Any]]]:
    with open_writer(settings) as writer, writer._engine.connect() as connection:
        return {name: [dict(row._mapping) for row in connection.execute(table(name).select())] for name in ("payload", "span")}


def stored(rows: dict[str, list[dict[str, Any]]], spans: int, write: Callable[[Any, dict[str, Any]], None]) -> dict[str, float]:
    """The same rows into an empty file of the same kind, a thousand at a time."""
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as place:
        engine = create_engine(f"sqlite:///{place}/peer.db")

        @event.listens_for(engine, "connect")
        def _pragmas(connection: Any, _: object) -> None:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=NORMAL")

        SQLModel.metadata.create_all(engine)
        with measured(found, spans):
            for at in range(0, spans, 1_000):
                share = [len(rows["payload"]) * min(place, spans) // spans for place in (at, at + 1_000)]
                write(engine, {"payload": rows["payload"][slice(*share)], "span": rows["span"][at : at + 1_000]})
        engine.dispose()
    return found


def core(engine: Any, rows: dict[str, Any]) -> None:
    with engine.begin() as connection:
        for name in ("payload", "span"):
            if rows[name]:
                connection.execute(insert(table(name)), rows[name])


def orm(engine: Any, rows: dict[str, Any]) -> None:
    with Session(engine) as session:
        session.add_all(Payload(**row) for row in rows["payload"])
        session.add_all(Span(**row) for row in rows["span"])
        session.commit()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="a fifth of the spans")
    quick = parser.parse_args().quick
    with ExitStack() as stack:
        try:
            server = stack.enter_context(cluster())
        except ServerError as why:
            server = None
            print(f"not measured: Postgres ({why})")
        measure(quick, server)


def prepared(place: str, kind: str, count: int, url: str = "") -> Settings:
    settings = load_settings({"paths.home": Path(place) / ("postgres" if url else "files")})
    settings = replace(settings, record=replace(settings.record, url=url, journal_bytes=2**40, drain_ms=3_600_000))
    with open_writer(settings):
        """The tables are made before."""
    record(settings, kind, count)
    return settings


def measure(quick: bool, server: Postgres | None) -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    lines: list[dict[str, Any]] = []
    print(f"{'':8}{'':24}{'spans':>8}{'spans/s':>10}{'by CPU time':>13}")
    for kind, count in COUNTS.items():
        with tempfile.TemporaryDirectory() as place:
            count = count // (5 if quick else 1)
            settings, spans = prepared(place, kind, count), count // 101 * 101
            ways = {"journal to store": drained(settings, spans)}
            rows = rows_of(settings)
            assert len(rows["span"]) == spans
            ways["Core, rows ready"] = stored(rows, spans, core)
            ways["ORM"] = stored(rows, spans, orm)
            if server is not None:
                ways["journal to Postgres"] = drained(prepared(place, kind, count, server.database()), spans)
        for way, found in ways.items():
            print(f"{kind:8}{way:24}{spans:8,}{found['wall']:10,.0f}{found['cpu']:13,.0f}", flush=True)
        ours = round(ways["journal to store"]["cpu"])
        for peer in list(ways)[1:]:
            theirs = round(ways[peer]["cpu"])
            about = {"metric": f"drain, {kind}", "ours": ours, "peer": peer, "theirs": theirs, "ratio": round(ours / theirs, 3)}
            lines.append({**about, "unit": "spans/s"})
    machine = {"processor": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
    print(json.dumps({"bench": "drain", "machine": machine, "rows": lines}))


if __name__ == "__main__":
    main()
