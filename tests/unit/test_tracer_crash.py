"""What the record promises when things go wrong: dead processes, a locked or broken store, a full disk, a newer schema."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict

import pytest
from langgraph.graph import START, StateGraph

from agentops.clock import CountingIds, SystemClock, UlidSource
from agentops.errors import JournalFull, StoreBroken, StoreLocked
from agentops.records import RunStatus
from agentops.settings import PathSettings, RecordSettings, Settings
from agentops.store import Store, open_store, open_writer
from agentops.tracer import Tracer, catch_up, open_tracer, span
from agentops.tracer.journal import read


class State(TypedDict, total=False):
    x: int
    text: str


_BEGIN = """
import sys
from agentops.clock import SystemClock, UlidSource
from agentops.settings import load_settings
from agentops.tracer import open_tracer, span
tracer = open_tracer(load_settings(), clock=SystemClock(), ids=UlidSource())
run = tracer.start_run(run_id="run_" + sys.argv[1], thread_id="th_1", graph="endless", input={"x": 0})
def work(number):
    with span("tool", "inner"):
        print(number, flush=True)
"""
_GRAPH = """
from typing import TypedDict
from langgraph.graph import START, StateGraph
State = TypedDict("State", {"x": int})
def node(state):
    work(state["x"])
    return {"x": state["x"] + 1}
builder = StateGraph(State)
builder.add_node("node", node)
builder.add_edge(START, "node")
builder.add_conditional_edges("node", lambda state: "node", ["node"])
builder.compile().invoke({"x": 0}, {"callbacks": [run.handler], "recursion_limit": 1_000_000})
"""
_LOOP = """
with run.active():
    number = 0
    while True:
        with span("agent", "outer"):
            work(number)
        number += 1
"""


def start(settings: Settings, name: str, body: str = _LOOP) -> Any:
    """A process that records without end and says what it has begun."""
    command = [sys.executable, "-c", _BEGIN + body, name]
    return subprocess.Popen(command, env=environment(settings), stdout=subprocess.PIPE, text=True)


def kill(child: Any) -> list[int]:
    """Kills it and returns what it had said and nobody had read."""
    child.send_signal(signal.SIGKILL)
    rest = [int(line) for line in child.stdout.read().split()]
    child.stdout.close()
    child.wait()
    return rest


def environment(settings: Settings) -> dict[str, str]:
    server = {"AGENTOPS_RECORD_URL": settings.record.url} if settings.record.url else {}
    return os.environ | server | {"AGENTOPS_PATHS_HOME": str(settings.paths.home), "AGENTOPS_RECORD_DRAIN_MS": "20"}


def record(settings: Settings) -> Store:
    catch_up(settings)
    return open_store(settings)


def segments(settings: Settings) -> list[Path]:
    return sorted(path for path in (settings.paths.home / "journal").iterdir() if path.name != "home")


def test_a_killed_process_loses_nothing_and_its_run_shows_as_crashed(either_settings: Settings) -> None:
    for round_, body in enumerate((_GRAPH, _LOOP, _LOOP, _LOOP)):
        child, last = start(either_settings, str(round_), body), 0
        for line in child.stdout:
            last = int(line)
            if last == 5:
                with record(either_settings) as store:
                    assert store.run(f"run_{round_}").status == "running", "its process lives"
            if last >= 40 + 31 * round_:
                break
        last = max([last, *kill(child)])
        with record(either_settings) as store:
            assert store.run(f"run_{round_}").status == "crashed"
            spans = store.spans(f"run_{round_}")
            balance = store.balance(f"run_{round_}")
        assert balance.balanced
        # Everything that said something had been told to the journal before.
        assert sum(one.name == "inner" for one in spans) > last
        assert spans[0].kind == "workflow"
        assert spans[0].status == "crashed"
        assert {one.status for one in spans} <= {"ok", "crashed"}
        assert sum(one.status == "crashed" for one in spans) <= 3, "the workflow, a node, and what was open in it"
        assert segments(either_settings) == [], "a dead owner's segment is removed once it is drained"


def test_a_crashed_run_that_is_resumed_is_no_longer_crashed(settings: Settings) -> None:
    child = start(settings, "1")
    child.stdout.readline()
    kill(child)
    tracer = open_tracer(settings, clock=SystemClock(), ids=UlidSource())
    tracer.start_run(run_id="run_1", thread_id="th_1", graph="endless", resumed=True).end("done")
    assert tracer.flush()
    with record(settings) as store:
        assert store.run("run_1").status == "done"
        roots = [one for one in store.spans("run_1") if one.kind == "workflow"]
    assert [one.status for one in roots] == ["crashed", "ok"]
    tracer.close()


def test_a_forked_childs_run_is_crashed_once_the_child_is_dead(settings: Settings) -> None:
    body = """
import os, signal, time
child = os.fork()
if child == 0:
    tracer.start_run(run_id="run_child", thread_id="th_2", graph="g")
    os.kill(os.getpid(), signal.SIGKILL)
os.waitpid(child, 0)
print(1, flush=True)
time.sleep(60)
"""
    parent = start(settings, "parent", body)
    try:
        assert parent.stdout.readline() == "1\n"
        with record(settings) as store:
            assert store.run("run_child").status == "crashed"
            assert store.run("run_parent").status == "running"
    finally:
        kill(parent)


@pytest.fixture
def quick(settings: Settings) -> Settings:
    return replace(settings, record=RecordSettings(drain_ms=10, lock_timeout_s=0.2))


def simple_run(tracer: Tracer, run_id: str, nodes: int = 20) -> None:
    builder = StateGraph(State)
    before = START
    for number in range(nodes):
        builder.add_node(f"n{number}", lambda state: {"x": state["x"] + 1})
        builder.add_edge(before, f"n{number}")
        before = f"n{number}"
    run = tracer.start_run(run_id=run_id, thread_id="th_1", graph="simple", input={"x": 0})
    output = builder.compile().invoke({"x": 0}, {"callbacks": [run.handler]})
    run.end("done", output)


def test_a_locked_store_holds_up_no_run_and_the_backlog_drains_afterwards(quick: Settings) -> None:
    tracer = open_tracer(quick, clock=SystemClock(), ids=CountingIds())
    simple_run(tracer, "run_before")
    assert tracer.flush()
    foreign = sqlite3.connect(quick.paths.home / "record.db", isolation_level=None)
    foreign.execute("PRAGMA locking_mode=EXCLUSIVE")
    foreign.execute("BEGIN EXCLUSIVE")
    started = time.monotonic()
    simple_run(tracer, "run_locked")
    took = time.monotonic() - started
    assert took < 1.0, "the run waited for the store"
    assert not tracer.flush()
    assert tracer.faults == 0
    foreign.close()
    deadline = time.monotonic() + 5
    found: list[str] = []
    while "run_locked" not in found and time.monotonic() < deadline:
        time.sleep(0.05)
        with open_store(quick) as store:
            found = [row.id for row in store.runs()]
    with open_store(quick) as store:
        assert store.run("run_locked").status == "done", "the background drainer brings the backlog by itself"
        assert len(store.spans("run_locked")) == 21
        assert store.balance("run_locked").balanced
    tracer.close()


def test_a_backlog_at_its_limit_stops_the_run_within_a_second_and_nothing_told_is_lost(settings: Settings) -> None:
    limited = replace(settings, record=RecordSettings(drain_ms=10, lock_timeout_s=0.1, journal_bytes=200_000))
    tracer = open_tracer(limited, clock=SystemClock(), ids=CountingIds())
    run = tracer.start_run(run_id="run_1", thread_id="th_1", graph="writer", input={"x": 0})
    assert tracer.flush()
    ended: list[int] = []
    stopped = 0.0

    def node(state: State) -> State:
        nonlocal stopped
        ended.append(state["x"])
        stopped = time.monotonic()
        return {"x": state["x"] + 1, "text": os.urandom(10_000).hex()}

    builder = StateGraph(State)
    builder.add_node("node", node)
    builder.add_edge(START, "node")
    builder.add_conditional_edges("node", lambda state: "node", ["node"])
    with sqlite3.connect(settings.paths.home / "record.db") as locking:
        locking.execute("BEGIN EXCLUSIVE")
        with pytest.raises(JournalFull, match="the store has not taken"):
            builder.compile().invoke({"x": 0}, {"callbacks": [run.handler], "recursion_limit": 1_000})
        assert time.monotonic() - stopped < 1.2
        run.end("failed", error="the backlog is full")
        locking.rollback()
    locking.close()
    tracer.close()
    with record(settings) as store:
        assert store.run("run_1").status == "failed"
        done = [one for one in store.spans("run_1") if one.kind == "node" and one.status == "ok"]
        assert len(done) >= len(ended) - 1 > 3
        assert store.balance("run_1").balanced


def test_a_reader_that_must_miss_nothing_waits_for_who_writes(quick: Settings) -> None:
    patient = replace(quick, record=replace(quick.record, lock_timeout_s=30.0))
    open_tracer(quick, clock=SystemClock(), ids=CountingIds()).close()
    with open_writer(quick), pytest.raises(StoreLocked):
        catch_up(quick, wait=True)
    with ThreadPoolExecutor(1) as pool:
        with open_writer(quick):
            waiting = pool.submit(catch_up, patient, wait=True)
            time.sleep(0.5)
            assert not waiting.done()
            catch_up(quick)
        waiting.result(timeout=25)


def test_a_broken_store_holds_up_no_run_either(quick: Settings) -> None:
    quick.paths.home.mkdir(parents=True)
    (quick.paths.home / "record.db").write_bytes(b"this is no database, " * 100)
    tracer = open_tracer(quick, clock=SystemClock(), ids=CountingIds())
    simple_run(tracer, "run_1")
    tracer.close()
    with pytest.raises(StoreBroken, match="no database") as caught:
        record(quick)
    assert "move the file away" in caught.value.hint
    (quick.paths.home / "record.db").rename(quick.paths.home / "old.db")
    with record(quick) as store:
        assert store.run("run_1").status == "done"
        assert store.balance("run_1").balanced


def test_a_damaged_segment_is_kept_and_the_loss_shows(settings: Settings) -> None:
    tracer = open_tracer(replace(settings, record=RecordSettings(drain_ms=60_000)), clock=SystemClock(), ids=CountingIds())
    simple_run(tracer, "run_1", nodes=5)
    segment = tracer.journal.path
    places = [(end, event) for event, end in read(segment)]
    starts = [0, *(end for end, _ in places)]
    ends_of_nodes = [
        start
        for start, (_, event) in zip(starts, places, strict=False)
        if event and event.get("name") == "n2" and event.get("status") == "ok"
    ]
    starts_of_nodes = [
        start
        for start, (_, event) in zip(starts, places, strict=False)
        if event and event.get("name") == "n2" and event.get("status") == "open"
    ]
    raw = bytearray(segment.read_bytes())
    for start in (*ends_of_nodes, *starts_of_nodes):
        raw[start + 20] ^= 0xFF
    segment.write_bytes(raw)
    tracer.close()
    with record(settings) as store:
        balance = store.balance("run_1")
        assert store.run("run_1").status == "done"
    assert (balance.emitted, balance.stored, balance.balanced) == (6, 5, False)
    assert [path.suffix for path in segments(settings)] == [".damaged"]


@pytest.fixture
def small_disk(tmp_path: Path, settings: Settings) -> Iterator[Settings]:
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)], capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield replace(settings, paths=PathSettings(home=place, cache=settings.paths.cache))
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill(ballast: Path) -> None:
    """Takes all the space that is left."""
    with ballast.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))


@pytest.mark.parametrize("filled_before_step", [0, 1, 3])
def test_a_full_disk_stops_the_run_at_a_step_and_nothing_told_is_lost(small_disk: Settings, filled_before_step: int) -> None:
    tracer = open_tracer(small_disk, clock=SystemClock(), ids=CountingIds())
    run = tracer.start_run(run_id="run_1", thread_id="th_1", graph="writer", input={"x": 0})
    assert tracer.flush()
    ballast, begun = small_disk.paths.home / "ballast", []

    def node(state: State) -> State:
        begun.append(state["x"])
        if state["x"] == filled_before_step:
            fill(ballast)
        return {"x": state["x"] + 1, "text": os.urandom(20_000).hex()}

    builder = StateGraph(State)
    builder.add_node("node", node)
    builder.add_edge(START, "node")
    builder.add_conditional_edges("node", lambda state: "node", ["node"])
    started = time.monotonic()
    with pytest.raises(JournalFull, match="No space left") as caught:
        builder.compile().invoke({"x": 0}, {"callbacks": [run.handler], "recursion_limit": 100})
    assert time.monotonic() - started < 1.0 + 0.2 * filled_before_step
    assert caught.value.hint
    assert begun == list(range(filled_before_step + 1)), "no further step began"
    with pytest.raises(JournalFull):
        run.check()
    run.end("failed", error=caught.value)
    ballast.unlink()
    tracer.close()
    with record(small_disk) as store:
        assert store.run("run_1").status == "failed"
        assert "No space left" in str(store.run("run_1").error)
        spans = store.spans("run_1")
        assert [one.status for one in spans[1:-1]] == ["ok"] * filled_before_step
        assert store.balance("run_1").balanced


@pytest.mark.parametrize("status", ["done", "failed"])
def test_an_end_too_big_for_a_full_disk_is_written_without_its_output(small_disk: Settings, status: RunStatus) -> None:
    tracer = open_tracer(small_disk, clock=SystemClock(), ids=CountingIds())
    run = tracer.start_run(run_id="run_1", thread_id="th_1", graph="writer", input={"x": 0})
    assert tracer.flush()
    ballast = small_disk.paths.home / "ballast"
    fill(ballast)
    if status == "done":
        run.end("done", output={"text": os.urandom(100_000).hex()})
    else:
        run.end("failed", error=ValueError("x" * 100_000))
    run.check()
    ballast.unlink()
    tracer.close()
    with record(small_disk) as store:
        row, (root,) = store.run("run_1"), store.spans("run_1")
        assert (row.status, row.output_hash, root.output_hash) == (status, None, None)
        assert row.ended_ns is not None
        assert root.status == ("ok" if status == "done" else "error")
        assert root.attributes.get("output_left_out") is (True if status == "done" else None)
        assert str(row.error).startswith("ValueError: xxx") == (status == "failed")
        assert store.balance("run_1").balanced


def test_a_run_whose_end_cannot_be_written_at_all_tells_so(small_disk: Settings) -> None:
    tracer = open_tracer(small_disk, clock=SystemClock(), ids=CountingIds())
    run = tracer.start_run(run_id="run_1", thread_id="th_1", graph="writer")
    run.check()
    (reserve,) = (small_disk.paths.home / "journal").glob("*.reserve")
    reserve.unlink()
    fill(small_disk.paths.home / "ballast")
    with suppress(JournalFull):  # the segment's last page still has room
        for _ in range(4096):
            tracer.journal.append(run._row)
    run.check()
    run.end("done", output={"text": "x" * 100_000})
    with pytest.raises(JournalFull, match="No space left"):
        run.check()
    tracer.close()


def test_a_run_does_not_start_on_a_full_disk(small_disk: Settings) -> None:
    tracer = open_tracer(small_disk, clock=SystemClock(), ids=CountingIds())
    fill(small_disk.paths.home / "ballast")
    with pytest.raises(JournalFull):
        tracer.start_run(run_id="run_1", thread_id="th_1", graph="g", input="x" * 10_000)
    tracer.close()


def test_a_payload_of_fifty_megabytes_is_cut_with_a_mark(settings: Settings) -> None:
    tracer = open_tracer(settings, clock=SystemClock(), ids=CountingIds())
    run = tracer.start_run(run_id="run_1", thread_id="th_1", graph="g", input={"question": "q", "file": "x" * 50_000_000})
    with run.active(), span("tool", "read") as handle:
        handle.output = "y" * 50_000_000
    run.end("done")
    tracer.close()
    with record(settings) as store:
        shown = store.payload(str(store.run("run_1").input_hash))
        balance = store.balance("run_1")
    assert shown["question"] == "q"
    assert "[cut: 50,000,000 characters in all]" in shown["file"]
    assert len(json.dumps(shown)) <= settings.record.payload_bytes + 100
    assert (balance.truncated, balance.balanced) == (2, True)


def test_two_processes_drain_side_by_side_without_a_double(settings: Settings) -> None:
    children = [start(settings, str(name)) for name in range(2)]
    for child in children:
        while int(child.stdout.readline()) < 60:
            pass
    for child in children:
        kill(child)
    with record(settings) as store:
        for name in range(2):
            assert store.run(f"run_{name}").status == "crashed"
            assert store.balance(f"run_{name}").balanced
