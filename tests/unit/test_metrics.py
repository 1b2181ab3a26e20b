"""What a monitoring system is told: well-formed text, the numbers of a plain count over the record, to this machine only."""

from __future__ import annotations

import asyncio
import math
import random
import re
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, TypedDict

import pytest
from langgraph.graph import START, StateGraph
from langgraph.runtime import Runtime as Node
from scripted_runner import scripted_engine
from tiny_model import write_tiny_model
from typer.testing import CliRunner

from agentops import Context, Runtime, ScriptedEngine, Settings
from agentops.cli import app
from agentops.cli.metrics import CONTENT_TYPE, Family, Source, server_of
from agentops.clock import SystemClock, UlidSource
from agentops.engine import generate
from agentops.engine.counters import Counters
from agentops.errors import RecordError, UsageError
from agentops.records import Message, Request
from agentops.store import open_store, open_writer
from agentops.store.metrics import BOUNDS_S, measure
from agentops.tracer import catch_up, open_tracer

Told = dict[tuple[str, tuple[tuple[str, str], ...]], float]
_SAMPLE = re.compile(r'([a-z_]+)(?:\{((?:[a-z]+="(?:[^"\\\n]|\\[\\n"])*",?)+)\})? ([0-9.e+-]+)')
_LABEL = re.compile(r'([a-z]+)="((?:[^"\\\n]|\\[\\n"])*)"(?:,|$)')


def parsed(text: str) -> Told:
    """The samples, by name and labels. What a reader of the format could stumble over is an error."""
    assert text.endswith("\n")
    found: Told = {}
    kinds: dict[str, str] = {}
    family, left = "", False
    for line in text.removesuffix("\n").split("\n"):
        if line.startswith("# HELP "):
            family, left = line.split()[2], True
            assert family not in kinds
            continue
        if line.startswith("# TYPE "):
            assert left
            assert line.split()[2] == family
            kinds[family], left = line.split()[3], False
            continue
        match = _SAMPLE.fullmatch(line)
        assert match is not None, line
        name, labels, value = match.groups()
        parts = ("_bucket", "_sum", "_count") if kinds[family] == "histogram" else ("",)
        assert name in [family + part for part in parts]
        assert kinds[family] != "counter" or name.endswith("_total")
        key = tuple(
            (a, re.sub(r"\\(.)", lambda hit: "\n" if hit[1] == "n" else hit[1], b)) for a, b in _LABEL.findall(labels or "")
        )
        assert (name, key) not in found
        found[name, key] = float(value)
    for name, key in found:
        if name.endswith("_bucket"):
            own = [dict(labels) for other, labels in found if other == name and labels[:-1] == key[:-1]]
            bounds = [math.inf if one["le"] == "+Inf" else float(one["le"]) for one in own]
            numbers = [found[name, (*key[:-1], ("le", one["le"]))] for one in own]
            assert bounds == sorted(bounds)
            assert numbers == sorted(numbers)
            assert bounds[-1] == math.inf
            assert numbers[-1] == found[name.replace("_bucket", "_count"), key[:-1]]
    return found


def summed(told: Told, name: str, **labels: str) -> float:
    return sum(value for (other, key), value in told.items() if other == name and labels.items() <= dict(key).items())


class Hurried(SystemClock):
    """A clock that can be set forward."""

    ahead_ns = 0

    def monotonic_ns(self) -> int:
        return super().monotonic_ns() + self.ahead_ns


class State(TypedDict, total=False):
    q: str


def asking() -> Any:
    async def a(state: State, runtime: Node[Context]) -> State:
        answer = await generate(runtime.context.engine, Request(messages=(Message("user", state["q"]),)))
        return {"q": answer.text}

    builder: Any = StateGraph(State, context_schema=Context)
    return builder.add_node("a", a).add_edge(START, "a").compile()


@pytest.fixture
def recorded(settings: Settings) -> Settings:
    """With a run of two questions on record."""
    with Runtime(settings, engine=ScriptedEngine(["ok"] * 9)) as runtime:
        runtime.run(asking(), {"q": "?"})
        runtime.run(asking(), {"q": "x" * 5})
    return settings


def seeded(count: int) -> list[dict[str, Any]]:
    """Events of runs with one or two sittings, some with spans lost, faults, and texts that could not be redacted."""
    draw = random.Random(4)
    events: list[dict[str, Any]] = []
    for number in range(count):
        status = draw.choice(["done", "failed", "running", "crashed"])
        run = {"id": f"run_{number:03}", "thread_id": "th_1", "graph": draw.choice(["rag", "./a.py:graph"]), "status": status}
        events.append({"t": "run", "ns": number, "started_ns": number, "ended_ns": None, "segment": "a.seg", **run})
        for sitting in range(draw.randrange(1, 3)):
            root, size = f"sp_{number:03}_{sitting}_1", draw.randrange(1, 7)
            lost = draw.randrange(2, 30)
            for seq in range(1, size + 1):
                if seq == lost:
                    continue
                kind = "workflow" if seq == 1 else draw.choice(["node", "generation", "tool"])
                span = {"id": f"{root[:-1]}{seq}", "run_id": run["id"], "root_id": root, "seq": seq, "kind": kind, "name": "x"}
                span |= {"status": draw.choice(["ok", "ok", "error", "open", "crashed"]), "start_ns": number, "segment": "a.seg"}
                ended = span["status"] in ("ok", "error")
                span |= {"duration_ns": draw.choice([1, 10**7, 10**7 + 1, 2 * 10**9, 10**13]) if ended else None}
                if kind == "generation":
                    span |= {"model": draw.choice(["m", None]), "input_tokens": 9, "cached_tokens": 4, "computed_tokens": 5}
                if seq == 1 and ended:
                    span["attributes"] = {"emitted": size, "faults": draw.choice([0, 0, 0, 2])}
                elif draw.random() < 0.05:
                    span["attributes"] = {"unredacted": 3, "other": '"unredacted"'}
                elif draw.random() < 0.05:
                    span["attributes"] = {"other": '"unredacted"'}
                events.append({"t": "span", "ns": number, **span})
    events += [{"t": "payload", "hash": f"b2:{n}", "data": b"1", "truncated": n < 3} for n in range(9)]
    return events


def test_the_numbers_are_those_of_a_plain_count(either_settings: Settings) -> None:
    events = seeded(200)
    with open_writer(either_settings) as writer:
        writer.apply(events, {"a.seg": 7, "b.seg": 9}, {"a.seg": 2})
    runs = [one for one in events if one["t"] == "run"]
    spans = [one for one in events if one["t"] == "span"]
    with open_store(either_settings) as store:
        found = measure(store)
        balances = {run["id"]: store.balance(run["id"]) for run in runs}
    assert found.runs == Counter((run["graph"], run["status"]) for run in runs)
    assert found.spans == Counter((one["kind"], one["status"]) for one in spans if one["kind"] != "workflow")
    of = {run["id"]: run["graph"] for run in runs}
    assert len(found.graphs) == 2
    assert 0 < sum(sums.unbalanced for sums in found.graphs.values()) < len(runs)
    for graph, sums in found.graphs.items():
        mine = [balance for run_id, balance in balances.items() if of[run_id] == graph]
        assert sums.emitted == sum(one.emitted for one in mine) > sums.stored == sum(one.stored for one in mine)
        assert sums.faults == sum(one.faults for one in mine) > 0
        assert sums.unbalanced == sum(not one.balanced for one in mine)
        took = [one["duration_ns"] for one in spans if one["kind"] == "workflow" and of[one["run_id"]] == graph]
        assert sums.sittings.count == len([ns for ns in took if ns])
    for kind, histogram in found.durations.items():
        took = [one["duration_ns"] for one in spans if one["kind"] == kind and one["duration_ns"]]
        assert histogram.below == tuple(sum(ns / 1e9 <= bound for ns in took) for bound in BOUNDS_S)
        assert (histogram.count, histogram.seconds) == (len(took), pytest.approx(sum(took) / 1e9))
    for model in ("m", None):
        calls = sum(one["kind"] == "generation" and one.get("model") == model for one in spans)
        assert found.usage[model or ""].cached_tokens == 4 * calls
    assert (found.truncated, found.damaged, found.positions) == (3, 2, {"a.seg": 7, "b.seg": 9})


def test_what_is_printed_is_well_formed_and_balances(recorded: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTOPS_PATHS_HOME", str(recorded.paths.home))
    monkeypatch.setenv("AGENTOPS_COST_PRICES", "scripted=1000000/2000000")
    done = CliRunner().invoke(app, ["metrics"])
    assert done.exit_code == 0, done.output
    told = parsed(done.stdout)
    assert summed(told, "agentops_runs", status="done") == 2
    assert summed(told, "agentops_spans_emitted_total") == summed(told, "agentops_spans_stored_total") == 6
    assert summed(told, "agentops_runs_unbalanced") == summed(told, "agentops_faults_total") == 0
    assert summed(told, "agentops_run_seconds_count") == summed(told, "agentops_span_seconds_count", kind="generation") == 2
    tokens = {kind: summed(told, "agentops_tokens_total", kind=kind) for kind in ("computed", "cached", "output")}
    assert summed(told, "agentops_cost_total") == tokens["computed"] + tokens["cached"] + 2 * tokens["output"] > 0
    assert summed(told, "agentops_journal_backlog_bytes") == summed(told, "agentops_journal_drain_lag_seconds") == 0


def test_the_engines_times_and_blocks_are_told(settings: Settings, tmp_path: Path) -> None:
    engine, _ = scripted_engine(write_tiny_model(tmp_path / "tiny"))

    async def record() -> Counters:
        await engine.pin(Request(text="the quick brown fox jumps over the lazy dog " * 6))
        async with Runtime(settings, engine=engine) as runtime:
            for question in ("what is the capital", "yes or no"):
                await runtime.arun(asking(), {"q": question})
        return engine.counters

    counters = asyncio.run(record())
    told = parsed(Source(settings).text())
    blocks = {state: summed(told, "agentops_engine_blocks", state=state) for state in ("used", "pinned", "cached", "free")}
    assert blocks["pinned"] == counters.pinned_blocks > 0
    assert sum(blocks.values()) == engine.pool.total
    assert (blocks["used"], blocks["cached"], blocks["free"]) == (0, counters.cached_blocks, counters.free_blocks)
    assert summed(told, "agentops_engine_peak_memory_bytes") > 1_000_000
    assert summed(told, "agentops_engine_waiting") == 0
    for phase in ("prefill", "decode"):
        spent = summed(told, "agentops_call_seconds_total", phase=phase)
        assert 0 < spent <= getattr(counters.timing, f"{phase}_ms") / 1e3
    asyncio.run(engine.close())


def test_a_span_that_is_missing_is_told(recorded: Settings) -> None:
    with closing(sqlite3.connect(recorded.paths.home / "record.db")) as database, database:
        assert database.execute("DELETE FROM span WHERE kind = 'generation' AND rowid < 4").rowcount == 1
    told = parsed(Source(recorded).text())
    assert summed(told, "agentops_runs_unbalanced") == 1
    assert summed(told, "agentops_spans_emitted_total") - summed(told, "agentops_spans_stored_total") == 1


def test_what_the_store_has_not_taken_is_told_and_left_where_it_is(recorded: Settings) -> None:
    late = replace(recorded, record=replace(recorded.record, drain_ms=60_000))
    tracer = open_tracer(late, clock=SystemClock(), ids=UlidSource())
    run = tracer.start_run(run_id="run_1", thread_id="th_1", graph="g")
    time.sleep(0.01)
    for _ in range(2):
        told = parsed(Source(recorded).text())
        assert summed(told, "agentops_journal_segments") == 1
        assert summed(told, "agentops_journal_backlog_bytes") == tracer.journal.size > 0
        assert 0.01 < summed(told, "agentops_journal_drain_lag_seconds") < 600
        assert summed(told, "agentops_runs", graph="g") == 0
    catch_up(recorded, wait=True)
    told = parsed(Source(recorded).text())
    assert summed(told, "agentops_journal_backlog_bytes") == summed(told, "agentops_journal_drain_lag_seconds") == 0
    assert summed(told, "agentops_runs", graph="g", status="running") == 1
    assert summed(told, "agentops_spans_emitted_total", graph="g") == 1
    run.end("done")
    tracer.close()


def test_counters_do_not_fall_with_what_is_removed_and_gauges_do(recorded: Settings) -> None:
    clock = Hurried()
    source = Source(recorded, clock)
    before = parsed(source.text())
    with closing(sqlite3.connect(recorded.paths.home / "record.db")) as database, database:
        for name in ("span", "run", "payload"):
            database.execute(f"DELETE FROM {name}")
    assert parsed(source.text()) == before, "it is measured anew only after a while"
    clock.ahead_ns += 10**12
    after = parsed(source.text())
    assert summed(after, "agentops_runs") == 0
    for (name, labels), value in before.items():
        if name.endswith(("_total", "_bucket", "_sum", "_count")):
            assert after[name, labels] == value
    with Runtime(recorded, engine=ScriptedEngine(["ok"] * 9)) as runtime:
        runtime.run(asking(), {"q": "?"})
    clock.ahead_ns += 10**12
    last = parsed(source.text())
    assert summed(last, "agentops_spans_stored_total") == summed(before, "agentops_spans_stored_total") + 3
    assert summed(last, "agentops_runs") == 1


ODD = ['a"b\\c\nd', "\x1b]52;c;eA==\x07x", "e\ud800", "\\n", "ü\u202e", ""]


def test_names_of_any_kind_are_told_safely() -> None:
    family = Family("agentops_x", "gauge", "Odd names.")
    for name in [*ODD, "x"]:
        family.add(1, graph=name)
    told = parsed("".join(family.text()))
    # `x` comes twice: what was around it is not for a terminal.
    assert [dict(labels)["graph"] for _, labels in told] == ['a"b\\c\nd', "x", "e\ufffd", "\\n", "ü", ""]
    assert list(told.values()) == [1, 2, 1, 1, 1, 1]


@pytest.mark.parametrize(
    "text", ["", "# TYPE a gauge\na 1\n", "# HELP a b\n# TYPE a gauge\na 1\na 2\n", '# HELP a b\n# TYPE a gauge\na{b="\\d"} 1\n']
)
def test_text_that_is_off_is_noticed(text: str) -> None:
    with pytest.raises(AssertionError):
        parsed(text)


@contextmanager
def serving(text: Callable[[], str]) -> Iterator[int]:
    server = server_of(text, "127.0.0.1", 0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def asked(port: int, path: str = "/metrics", method: str = "GET", **headers: str) -> tuple[int, str, str]:
    with closing(HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode(), answer.headers["Content-Type"]


def test_they_are_served_to_programs_of_this_machine_alone(recorded: Settings) -> None:
    source = Source(recorded)
    with serving(source.text) as port:
        status, body, kind = asked(port)
        assert (status, body, kind) == (200, source.text(), CONTENT_TYPE)
        assert asked(port, Host=f"localhost:{port}")[0] == 200
        assert asked(port, method="HEAD") == (200, "", CONTENT_TYPE)
        assert asked(port, "/")[0] == asked(port, "/metrics/../x")[0] == 404
        assert asked(port, method="POST")[0] == 501
        for headers in ({"Host": "evil.example"}, {"Host": f"evil.example:{port}"}, {"Origin": "http://evil.example"}):
            assert asked(port, **headers)[:2] == (403, "only programs and pages of this machine may be here\n")


def test_who_says_nothing_keeps_nobody_waiting(recorded: Settings) -> None:
    with serving(Source(recorded).text) as port, socket.create_connection(("127.0.0.1", port)) as silent:
        silent.sendall(b"GET /met")
        assert asked(port)[0] == 200


def test_a_record_that_cannot_be_read_is_told_and_read_again_once_it_can(settings: Settings) -> None:
    with serving(Source(settings).text) as port:
        status, body, _ = asked(port)
        assert status == 503
        assert "there is no record" in body
        open_store(settings).close()
        assert asked(port)[0] == 200
    with pytest.raises(RecordError, match="there is no record"):
        Source(replace(settings, paths=replace(settings.paths, home=settings.paths.home / "none"))).text()


@pytest.mark.parametrize("address", ["0.0.0.0:9464", "example.org:9464", "0", "99999", "x", ""])
def test_only_a_port_of_this_machine_is_served(address: str) -> None:
    done = CliRunner().invoke(app, ["metrics", "--serve", address])
    assert isinstance(done.exception, UsageError)


def test_the_verb_serves_until_it_is_stopped(recorded: Settings, environment: dict[str, str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        words = [sys.executable, "-m", "agentops", "metrics", "--serve", f"localhost:{port}"]
        refused = subprocess.run(words, capture_output=True, text=True, env=environment)
        assert refused.returncode == 2
        assert "take another port" in refused.stderr
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        try:
            assert f"http://localhost:{port}/metrics" in process.stderr.readline()
            assert asked(port)[0] == 200
            process.send_signal(2)
            assert process.wait(10) == 0
            assert process.stderr.read() == ""
        finally:
            # Leaving the block waits for it, and whoever ignores the signal would hold up all other tests.
            process.kill()
