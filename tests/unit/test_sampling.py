"""A share of the runs keeps all its spans; what is not done always does, and what went is counted."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypedDict

import pytest
from langgraph.graph import START, StateGraph
from typer.testing import CliRunner

from agentops import Runtime, ScriptedEngine, Settings
from agentops.cli import app
from agentops.clock import SystemClock, UlidSource
from agentops.errors import NodeFailed, RecordError, SettingsError
from agentops.replay import replay
from agentops.retention import RECENT_S, Plan, Rule, plan, prune
from agentops.store import Store, open_store
from agentops.store.metrics import measure
from agentops.sync import run_sync
from agentops.tracer import open_tracer
from agentops.tracer.sampling import Sampling, load_sampling


class State(TypedDict, total=False):
    text: str


def graph(node: Callable[[State], State]) -> Any:
    return StateGraph(State).add_node("node", node).add_edge(START, "node").compile()


def says(state: State) -> State:
    return {"text": state["text"] + "!" * 50}


def fails(state: State) -> State:
    raise ValueError("no")


def sampled(settings: Settings, *shares: str) -> Settings:
    return replace(settings, record=replace(settings.record, sample=shares))


def later() -> int:
    """When what ended just now is not recent any more."""
    return SystemClock().now_ns() + (RECENT_S + 60) * 10**9


def thinned(settings: Settings) -> Plan:
    chosen = plan(settings, Rule(), now_ns=later())
    run_sync(prune(settings, chosen))
    return chosen


def kinds(store: Store, run: str) -> list[str]:
    return [span.kind for span in store.spans(run)]


def test_shares_are_read_and_kept() -> None:
    ids = [f"run_{number}" for number in range(4_000)]
    for share in (0.0, 0.1, 0.5, 1.0):
        kept = sum(Sampling(share).keeps(run, "rag") for run in ids) / len(ids)
        assert kept == pytest.approx(share, abs=0.02)
    both = Sampling(1.0, {"rag": 0.0})
    assert not any(both.keeps(run, "rag") for run in ids)
    assert all(both.keeps(run, "triage") for run in ids)
    less, more = ({run for run in ids if Sampling(share).keeps(run, "x")} for share in (0.2, 0.4))
    assert less < more


@pytest.mark.parametrize("text", ["", "x", "rag=", "1.5", "-0.1", "rag=nan", "=2"])
def test_what_is_no_share_is_refused(settings: Settings, text: str) -> None:
    with pytest.raises(SettingsError, match=r"record\.sample"):
        load_sampling(sampled(settings, text))
    with pytest.raises(SettingsError, match=r"record\.sample"):
        load_sampling(sampled(settings, "0.5", "0.6"))


def test_the_spans_of_done_runs_go_and_are_counted(either_settings: Settings) -> None:
    none = sampled(either_settings, "0")
    with Runtime(none, engine=ScriptedEngine()) as runtime:
        out = runtime.run(graph(says), {"text": "alone"}).run_id
        with pytest.raises(NodeFailed) as failed:
            runtime.run(graph(fails), {"text": "failed"})
    with Runtime(either_settings, engine=ScriptedEngine()) as runtime:
        whole = runtime.run(graph(says), {"text": "whole"}).run_id
    with open_store(either_settings) as store:
        before = store.run(out)
        assert store.sampled_out() == {out}
        assert store.balance(out).balanced
        inside = store.spans(out)[1].input_hash
    assert plan(none, Rule(), now_ns=SystemClock().now_ns()).thinned == []
    assert list(thinned(none).thinned) == [out]
    with open_store(either_settings) as store:
        assert kinds(store, out) == ["workflow"]
        assert kinds(store, whole) == kinds(store, failed.value.run_id or "") == ["workflow", "node"]
        balance = store.balance(out)
        assert (balance.emitted, balance.stored, balance.sampled_out, balance.balanced) == (2, 1, 1, True)
        assert store.run(out) == before
        assert before.output_hash is not None
        assert store.payload(before.output_hash) == {"text": "alone" + "!" * 50}
        # It is what the run was given, too.
        assert inside is not None
        assert store.payload(inside) == {"text": "alone"}
        assert store.checkpoints(out) == []
        assert store.checkpoints(whole) != []
        sums = measure(store).graphs["python:LangGraph"]
        assert (sums.sampled_out, sums.unbalanced) == (1, 0)
        assert store.sampled_out() == set()
    assert thinned(none).thinned == []


def test_a_run_that_was_sampled_out_can_be_forked_and_not_replayed(settings: Settings) -> None:
    none = sampled(settings, "0")
    made = graph(says)
    with Runtime(none, engine=ScriptedEngine()) as runtime:
        out = runtime.run(made, {"text": "a"}).run_id
        thinned(none)
        forked = runtime.fork(out, step=-1, changes={"text": "b"}, graph=made)
        assert forked.output == {"text": "b" + "!" * 50}
    with pytest.raises(RecordError, match="sampled out"):
        list(replay(settings, run=out, graph=made))


def test_runs_of_experiments_stay_whole(settings: Settings) -> None:
    none = sampled(settings, "0")
    with Runtime(none, engine=ScriptedEngine()) as runtime:
        out = runtime.run(graph(says), {"text": "a"}).run_id
    tracer = open_tracer(settings, clock=SystemClock(), ids=UlidSource())
    tracer.case(experiment_id="exp_1", case_id="one", place=0, status="done", run_id=out)
    tracer.close()
    assert thinned(none).thinned == []


def test_the_verbs_tell_of_it(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    none = sampled(settings, "0")
    with Runtime(none, engine=ScriptedEngine()) as runtime:
        out = runtime.run(graph(says), {"text": "a"}).run_id
    monkeypatch.setattr("agentops.retention.RECENT_S", -60)
    environment = {"AGENTOPS_PATHS_HOME": str(settings.paths.home), "AGENTOPS_RECORD_SAMPLE": "0"}

    def told(*arguments: str) -> Any:
        done = CliRunner().invoke(app, [*arguments, "--json"], env=environment)
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    assert told("prune", "--dry-run")["sampled_out"] == [out]
    assert told("prune", "--yes")["removed"]["spans"] == 1
    assert told("show", out)["balance"]["sampled_out"] == 1
    shown = CliRunner().invoke(app, ["show", out], env=environment).stdout
    assert "1 sampled out: balanced" in shown
