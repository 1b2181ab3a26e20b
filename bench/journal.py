"""How long does an append to the journal take, with payloads of some sizes? Microseconds, and events a second.

"span" is what a span's event costs on the hot path: its input is packed as it is then, and one append acknowledges both. JSON,
hash and compression are the drainer's. "hashed at once" is what it would cost to make JSON and hash before the append.
"messages" is a span whose input is as many LangChain messages. Peers keep the same bytes: a put into LMDB and an insert into
SQLite, each committed and none fsynced (as the journal does), and the limit is a bare `os.write` of the framed bytes.
OpenTelemetry's span is opened and ended with the payload's text, which was made beforehand, as an attribute, and kept nowhere: a
kill loses it. It and LMDB are measured where they are installed: `pip install lmdb opentelemetry-sdk`. The drainer does not
run meanwhile.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sqlite3
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from langchain_core.messages import HumanMessage

from agentops.tracer.journal import Event, Journal, frame
from agentops.tracer.payload import encode, pack

SIZES = {"no payload": 0, "1 KB": 1_000, "10 KB": 10_000, "100 KB": 100_000}
LIMIT = 1_000_000
SPAN: Event = {
    "t": "span",
    "ns": 1,
    "id": "sp_01K0000000000000000000000A",
    "run_id": "run_01K0000000000000000000000A",
    "parent_id": "sp_01K0000000000000000000000B",
    "kind": "node",
    "name": "write",
    "status": "open",
    "start_ns": 1_700_000_000_000_000_000,
    "segment": "j_01K0000000000000000000000A.seg",
    "attributes": {"triggers": ["branch:to:write"]},
}


def timed(work: Callable[[int], Any], count: int) -> dict[str, float]:
    """Percentiles in microseconds, and how many a second."""
    clock, took = time.perf_counter_ns, []
    for number in range(200):
        work(-number - 1)
    for number in range(count):
        began = clock()
        work(number)
        took.append(clock() - began)
    took.sort()
    return {"p50": took[count // 2] / 1e3, "p99": took[count * 99 // 100] / 1e3, "per_s": count * 1e9 / sum(took)}


def ways(folder: Path, size: int, absent: set[str]) -> dict[str, Callable[[int], Any]]:
    journal = Journal(folder / "journal")
    value = {"messages": [{"role": "user", "content": "word " * 20} for _ in range(size // 130)]}

    spoken = [HumanMessage("word " * 20) for _ in range(size // 130)]

    def told(asked: Any) -> Event:
        return {**SPAN, "input": pack(asked, LIMIT), "limit": LIMIT} if size else SPAN

    def hashed(number: int) -> list[Event]:
        found = encode({**value, "n": number}, LIMIT)
        return [{"t": "payload", "hash": found.hash, "data": found.data}, {**SPAN, "input_hash": found.hash}]

    kept = [told({**value, "n": 0})]
    raw = b"".join(frame(event) for event in kept)
    limit = os.open(folder / "limit", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    database = sqlite3.connect(folder / "peer.db", isolation_level=None)
    database.execute("PRAGMA journal_mode=WAL")
    database.execute("PRAGMA synchronous=OFF")
    database.execute("CREATE TABLE span (id INTEGER PRIMARY KEY, data BLOB)")
    found: dict[str, Callable[[int], Any]] = {
        "span": lambda number: journal.append(told({**value, "n": number})),
        "append alone": lambda number: journal.append(*kept),
        "sqlite insert": lambda number: database.execute("INSERT INTO span (data) VALUES (?)", (raw,)),
        "os.write": lambda number: os.write(limit, raw),
    }
    if size:
        found["messages"] = lambda number: journal.append(told({"messages": spoken, "n": number}))
        found["hashed at once"] = lambda number: journal.append(*hashed(number))
    try:
        lmdb = importlib.import_module("lmdb")
    except ImportError:
        absent.add("LMDB put")
    else:
        environment = lmdb.open(str(folder / "lmdb"), map_size=4_000_000_000, sync=False)

        def put(number: int) -> None:
            with environment.begin(write=True) as transaction:
                transaction.put(str(number).encode(), raw)

        found["LMDB put"] = put
    try:
        sdk = importlib.import_module("opentelemetry.sdk.trace")
    except ImportError:
        absent.add("OpenTelemetry")
    else:
        tracer, text = sdk.TracerProvider().get_tracer("bench"), json.dumps(value)
        found["OpenTelemetry"] = lambda number: tracer.start_span("write", attributes={"input": text}).end()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="a fifth of the events")
    quick = parser.parse_args().quick
    rows, absent = list[dict[str, Any]](), set[str]()
    print(f"{'':28}{'p50 us':>9}{'p99 us':>9}{'events/s':>11}")
    for label, size in SIZES.items():
        with tempfile.TemporaryDirectory() as place:
            for way, work in ways(Path(place), size, absent).items():
                count = (20_000 if size < 5_000 else 4_000) // (5 if quick else 1)
                found = timed(work, count)
                print(f"{label:12}{way:16}{found['p50']:9.1f}{found['p99']:9.1f}{found['per_s']:11,.0f}", flush=True)
                rows.append({"metric": f"{way}, {label}", "unit": "us"} | {key: round(value, 2) for key, value in found.items()})
    for way in sorted(absent):
        print(f"{way}: not installed")
        rows += [{"metric": f"{way}, {label}", "unit": "us", "p50": None, "why": "not installed"} for label in SIZES]
    machine = {"processor": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
    print(json.dumps({"bench": "journal", "machine": machine, "rows": rows}))


if __name__ == "__main__":
    main()
