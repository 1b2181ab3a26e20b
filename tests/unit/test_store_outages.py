"""The store may be slow, gone or down for long: no run notices, and afterwards every span is there once."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from test_tracer_crash import environment, simple_run

from agentops.clock import SystemClock, UlidSource
from agentops.settings import Settings
from agentops.store import StoreWriter, open_store
from agentops.tracer import Tracer, catch_up, open_tracer

SPANS = 21
"""Of one `simple_run`."""


def whole(settings: Settings, run_ids: list[str]) -> None:
    catch_up(settings, wait=True)
    with open_store(settings) as store:
        assert {run.id: run.status for run in store.runs()} == dict.fromkeys(run_ids, "done")
        for run_id in run_ids:
            spans = store.spans(run_id)
            assert sorted(span.seq for span in spans) == list(range(1, SPANS + 1))
            assert store.balance(run_id).balanced


def opened(settings: Settings) -> Tracer:
    return open_tracer(settings, clock=SystemClock(), ids=UlidSource())


def test_a_store_that_takes_a_second_for_each_batch_holds_up_no_run(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    busy = threading.Event()

    def slow(self: StoreWriter, *of: Any) -> None:
        busy.set()
        time.sleep(1)
        real(self, *of)

    real = StoreWriter.apply
    monkeypatch.setattr(StoreWriter, "apply", slow)
    tracer = opened(settings)
    simple_run(tracer, "run_0")
    assert busy.wait(10)
    during = [f"run_{number}" for number in range(1, 4)]
    for run_id in during:
        simple_run(tracer, run_id)
    with open_store(settings) as store:
        assert not store.runs(), "the runs were over before the store had taken the first of them"
    tracer.close()
    monkeypatch.undo()
    whole(settings, ["run_0", *during])


def test_a_store_that_vanishes_in_the_middle_and_comes_back_has_everything(settings: Settings, tmp_path: Path) -> None:
    away, home = tmp_path / "away", settings.paths.home
    away.mkdir()
    tracer = opened(settings)
    simple_run(tracer, "run_before")
    assert tracer.flush()
    run = tracer.start_run(run_id="run_within", thread_id="th_1", graph="simple", input={"x": 0})
    for file in home.glob("record.db*"):
        file.rename(away / file.name)
    # Where it was stands something that is no store, so that none is made anew.
    (home / "record.db").mkdir()
    with run.active():
        simple_run(tracer, "run_during")
    run.end("done")
    assert not tracer.flush()
    assert tracer.drainer.failures > 0
    (home / "record.db").rmdir()
    for file in away.iterdir():
        file.rename(home / file.name)
    assert tracer.flush()
    tracer.close()
    with open_store(settings) as store:
        assert store.run("run_within").status == "done"
        assert store.balance("run_within").balanced
    with open_store(settings) as store:
        assert {run.id for run in store.runs()} == {"run_before", "run_within", "run_during"}
        assert [len(store.spans(name)) for name in ("run_before", "run_during")] == [SPANS, SPANS]


def test_an_hour_without_a_store_costs_a_backlog_and_nothing_else(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many failed drains as an hour has at one every two hundred milliseconds."""
    tracer = opened(settings)

    def down(*of: Any, **how: Any) -> Any:
        raise OSError("no such server")

    monkeypatch.setattr("agentops.store.open_writer", down)
    names = [f"run_{number:02}" for number in range(40)]
    for name in names:
        simple_run(tracer, name)
        for _ in range(450):
            assert not tracer.flush()
    assert tracer.drainer.failures >= 18_000
    assert tracer.faults == 0
    backlog = tracer.journal.size
    monkeypatch.undo()
    assert tracer.flush()
    tracer.close()
    assert backlog > 0
    whole(settings, names)


EIGHT = """
import os
from agentops.clock import SystemClock, UlidSource
from agentops.settings import load_settings
from agentops.tracer import open_tracer, span

def work(name):
    tracer = open_tracer(load_settings(), clock=SystemClock(), ids=UlidSource())
    run = tracer.start_run(run_id=f"run_{name}", thread_id="th_1", graph="g", input={"x": 0})
    for number in range(15):
        with run.active(), span("tool", "work") as handle:
            handle.output = {"number": number, "by": name, "shared": number % 3}
        if number % 5 == 0:
            tracer.flush()
    run.end("done")
    tracer.close()

# What the children need is loaded once, here.
import agentops.store
children = []
for name in range(8):
    if not (child := os.fork()):
        work(name)
        os._exit(0)
    children.append(child)
assert [os.waitpid(child, 0)[1] for child in children] == [0] * 8
"""


def test_eight_processes_write_and_drain_one_home_at_once(settings: Settings) -> None:
    subprocess.run([sys.executable, "-c", EIGHT], env=environment(settings), check=True, timeout=120)
    catch_up(settings, wait=True)
    with open_store(settings) as store:
        assert {run.status for run in store.runs()} == {"done"}
        for name in range(8):
            run_id = f"run_{name}"
            spans = store.spans(run_id)
            assert sorted(span.seq for span in spans) == list(range(1, 17))
            assert store.balance(run_id).balanced
            told = [store.payload(str(span.output_hash)) for span in spans if span.kind == "tool"]
            assert [one["number"] for one in told] == list(range(15))
    assert list((settings.paths.home / "journal").glob("*.seg")) == []
