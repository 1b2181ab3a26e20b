"""The journal between a run and the store: what is told is kept as it was told, whoever brings it into the store, and when."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from typing import Any

import pytest

from agentops.clock import SystemClock, UlidSource
from agentops.errors import RunNotFound
from agentops.settings import Settings
from agentops.store import open_store
from agentops.tracer import Tracer, catch_up, open_tracer
from agentops.tracer.journal import read


@pytest.fixture
def slow(settings: Settings) -> Settings:
    """Nothing is brought into the store but by the test."""
    return replace(settings, record=replace(settings.record, drain_ms=3_600_000, lock_timeout_s=0.2))


def recording(settings: Settings) -> Tracer:
    return open_tracer(settings, clock=SystemClock(), ids=UlidSource())


def test_contents_are_kept_as_they_were_when_they_were_told(slow: Settings) -> None:
    tracer = recording(slow)
    run = tracer.start_run(run_id="run_1", thread_id="th_1", graph="g")
    given: dict[str, Any] = {"list": [1]}
    one, two = (run.open("tool", name, parent=run.root_id, input=given) for name in ("one", "two"))
    given["list"].append(2)
    assert tracer.flush()
    run.close(two, output=(said := {"said": [given]}))
    given["list"].append(3)
    assert tracer.flush()
    said.clear()
    run.amend(two, "it was late")
    run.close(one, output=given)
    run.end("done")
    tracer.close()
    with open_store(slow) as store:
        spans = {span.name: span for span in store.spans("run_1")}
        contents = {
            name: [store.payload(str(key)) for key in (spans[name].input_hash, spans[name].output_hash)]
            for name in ("one", "two")
        }
        assert store.balance("run_1").balanced
    assert contents == {
        "one": [{"list": [1]}, {"list": [1, 2, 3]}],
        "two": [{"list": [1]}, {"said": [{"list": [1, 2]}]}],
    }
    assert (spans["two"].status, spans["two"].error) == ("error", "it was late")


def test_a_segment_of_a_newer_version_is_left_as_it_is(
    slow: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("agentops.tracer.journal.FORMAT", 3)
    newer = recording(slow)
    newer.start_run(run_id="run_newer", thread_id="th_1", graph="g")
    monkeypatch.setattr("agentops.tracer.drain.FORMAT", 3)
    assert newer.flush()
    monkeypatch.undo()
    newer.start_run(run_id="run_unknown", thread_id="th_1", graph="g", input="x" * 1_000)
    newer.drainer.close()
    os.close(newer.journal._fd)
    newer.journal._closed = True
    before = newer.journal.path.read_bytes()
    tracer = recording(slow)
    tracer.start_run(run_id="run_ours", thread_id="th_2", graph="g").end("done")
    with caplog.at_level(logging.WARNING):
        tracer.close()
        catch_up(slow)
    (told,) = [record.getMessage() for record in caplog.records if "newer version" in record.getMessage()]
    assert "upgrade agentops-runtime" in told
    assert newer.journal.path.read_bytes() == before
    with open_store(slow) as store:
        assert store.run("run_ours").status == "done"
        assert store.run("run_newer").status == "running", "whether it lives is for the newer version to say"
        with pytest.raises(RunNotFound):
            store.run("run_unknown")
    monkeypatch.setattr("agentops.tracer.drain.FORMAT", 3)
    catch_up(slow)
    with open_store(slow) as store:
        assert {store.run(name).status for name in ("run_newer", "run_unknown")} == {"crashed"}
    assert not newer.journal.path.exists()


def test_a_segment_of_the_first_format_is_read(slow: Settings) -> None:
    tracer = recording(slow)
    run = tracer.start_run(run_id="run_1", thread_id="th_1", graph="g", input="asked")
    run.end("done", "said")
    tracer.drainer.close()
    tracer.journal.close()
    assert not any("input" in (event or {}) for event, _ in read(tracer.journal.path))
    tracer.journal.path.rename(tracer.journal.folder / "j_1.seg")
    catch_up(slow)
    with open_store(slow) as store:
        assert store.payload(str(store.run("run_1").output_hash)) == "said"
