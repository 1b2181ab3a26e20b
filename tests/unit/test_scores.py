"""Scores, experiments and their cases: written through the journal, read from the store."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest

from agentops import Settings
from agentops.clock import SystemClock, UlidSource
from agentops.errors import RecordError
from agentops.records import Score
from agentops.store import open_store, open_writer
from agentops.tracer import Tracer, open_tracer
from agentops.tracer.journal import home_id


@pytest.fixture
def tracer(either_settings: Settings) -> Iterator[Tracer]:
    clock = SystemClock()
    opened = open_tracer(either_settings, clock=clock, ids=UlidSource(clock))
    yield opened
    opened.close()


def begin(tracer: Tracer, key: str, name: str, started_ns: int = 1) -> None:
    about = {"dataset": "cases.jsonl", "dataset_hash": tracer.content([{"id": "a"}]), "graph": "rag", "cases": 2}
    tracer.experiment(id=key, name=name, status="running", started_ns=started_ns, settings={"model": "m"}, **about)


def test_a_score_has_a_value_or_a_reason_and_is_never_nan() -> None:
    assert Score("s", 0.0, "code").value == 0
    for value, reason in ((math.nan, ""), (math.inf, ""), (None, ""), (1.0, "why")):
        with pytest.raises(ValueError, match="score 's'"):
            Score("s", value, "code", reason=reason)


def test_what_was_scored_is_read_back(tracer: Tracer, either_settings: Settings) -> None:
    first = Score("faithfulness", 0.5, "model", judged="log-probability", comment="claim 2", details={"claims": [1.0, 0.0]})
    second = Score("recall", None, "code", reason="no_reference")
    key = tracer.score(first, run_id="run_1", span_id="sp_1", experiment_id="exp_1", case_id="a", author="v1")
    tracer.score(second, run_id="run_2")
    tracer.flush()
    with open_store(either_settings) as store:
        (found,) = store.scores(run="run_1")
        assert (found.id, found.score, found.span_id, found.experiment_id, found.case_id) == (key, first, "sp_1", "exp_1", "a")
        assert found.author == "v1"
        assert [one.score for one in store.scores(name="recall")] == [second]
        assert [one.id for one in store.scores(experiment="exp_1")] == [key]
        assert store.scores(thread="th_1") == []


def test_an_experiment_keeps_what_it_began_with_and_its_cases_move_on(tracer: Tracer, either_settings: Settings) -> None:
    begin(tracer, "exp_1", "first")
    begin(tracer, "exp_2", "second", 2)
    for place, key in enumerate("ab"):
        tracer.case(experiment_id="exp_1", case_id=key, place=place, status="queued")
    tracer.case(experiment_id="exp_1", case_id="a", place=0, status="done", run_id="run_1")
    about = {"dataset": "other", "dataset_hash": "b2:0", "graph": "other", "cases": 9}
    tracer.experiment(id="exp_1", name="other", status="done", started_ns=5, settings={}, **about)
    tracer.flush()
    with open_store(either_settings) as store:
        done = store.experiment("exp_1")
        assert (done.name, done.status, done.cases, done.graph, done.started_ns) == ("first", "done", 2, "rag", 1)
        assert done.ended_ns
        assert store.payload(done.dataset_hash) == [{"id": "a"}]
        assert [(one.case_id, one.status, one.run_id) for one in store.cases("exp_1")] == [
            ("a", "done", "run_1"),
            ("b", "queued", None),
        ]
        assert store.experiment("last").id == store.experiment("second").id == "exp_2"
        for wrong in ("exp_", "nothing", ""):
            with pytest.raises(RecordError):
                store.experiment(wrong)


def test_an_experiment_whose_process_died_is_crashed(tracer: Tracer, either_settings: Settings) -> None:
    begin(tracer, "exp_1", "first")
    tracer.flush()
    with open_writer(either_settings) as writer:
        writer.bury([], home=home_id(tracer.journal.folder))
    with open_store(either_settings) as store:
        assert store.experiment("exp_1").status == "crashed"
