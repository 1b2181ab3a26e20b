"""Experiments: every case is run and scored, or says why not; what was done stays, whatever ends the rest."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import util
from pathlib import Path
from typing import Any, TypedDict

import pytest
from langgraph.graph import END, START, StateGraph
from langgraph.types import interrupt

from agentops import Runtime, ScriptedEngine, Settings
from agentops.clock import SystemClock, UlidSource
from agentops.errors import CollectionNotFound, UsageError
from agentops.graph import LoadedGraph, adopt_graph
from agentops.records import Score
from agentops.retrieval.embed import HashEmbedder
from agentops.store import CaseRow, ScoreRow, Store, open_store
from agentops.tracer import Tracer, catch_up, open_tracer
from evals.datasets import Dataset, dataset_of
from evals.experiment import Tally, begin, carry_out, judge, score_runs
from evals.metrics import Metric
from evals.metrics.registry import ENTRIES, chosen, fitting, make_metrics, needs_embedder, needs_model
from evals.reading import Samples
from evals.report import report_of
from evals.samples import Reference, Sample

AGENTOPS = [str(Path(sys.executable).with_name("agentops"))]


class State(TypedDict, total=False):
    question: str
    history: list[dict[str, str]]
    answer: str


class Length:
    """A metric of this test's: how long the answer is, a hundredth a character."""

    name, low, high, better = "length", 0.0, 1.0, "high"

    def __init__(self, version: str = "1", fail: Callable[[Sample], None] | None = None) -> None:
        self.version, self.fail = version, fail
        self.seen: list[str] = []

    async def score(self, sample: Sample) -> Score:
        self.seen.append(sample.question)
        if self.fail is not None:
            self.fail(sample)
        return Score(self.name, len(sample.answer) / 100, "code")


class Expected:
    name, low, high, better, version = "expected", 0.0, 1.0, "high", "1"

    async def score(self, sample: Sample) -> Score:
        if sample.reference.answer is None:
            return Score(self.name, None, "code", reason="no_reference")
        return Score(self.name, float(sample.answer == sample.reference.answer), "code")


def graph(answer: Callable[[State], Any]) -> LoadedGraph:
    built = StateGraph(State)
    built.add_node("answer", answer)
    built.add_edge(START, "answer")
    built.add_edge("answer", END)
    return adopt_graph(built, "echo")


async def echo(state: State) -> State:
    history = [*state.get("history", ()), {"question": state["question"], "answer": state["question"].upper()}]
    return {"answer": state["question"].upper(), "history": history}


@contextmanager
def opened(settings: Settings) -> Iterator[tuple[Runtime, Tracer]]:
    clock = SystemClock()
    tracer = open_tracer(settings, clock=clock, ids=UlidSource(clock))
    with Runtime(settings, engine=ScriptedEngine(()), embedder=HashEmbedder()) as runtime:
        yield runtime, tracer
    tracer.close()


def go(settings: Settings, data: Dataset, node: Any, *metrics: Any, again: str = "", **options: Any) -> tuple[str, Tally]:
    made = graph(node)
    with opened(settings) as (runtime, tracer):
        key = again or begin(tracer, data, made, name="mine", settings={})
        return key, asyncio.run(carry_out(runtime, tracer, key, made, metrics, **options))


@contextmanager
def record(settings: Settings) -> Iterator[Store]:
    catch_up(settings)
    with open_store(settings) as store:
        yield store


def cases(settings: Settings, key: str) -> list[CaseRow]:
    with record(settings) as store:
        return store.cases(key)


def scores(settings: Settings, key: str) -> list[ScoreRow]:
    with record(settings) as store:
        return store.scores(experiment=key)


DATA = dataset_of("d.jsonl", [{"id": "a", "question": "one", "answer": "ONE"}, {"id": "b", "question": "two", "answer": "x"}])


def test_every_case_is_run_kept_and_scored(settings: Settings) -> None:
    told: list[tuple[int, int]] = []
    key, tally = go(settings, DATA, echo, Length(), Expected(), told=lambda done, total: told.append((done, total)))
    assert tally == Tally(cases=2, run=2, failed=0, judged=4, asked=4, scored=4, unscored=0)
    assert told == [(0, 2), (1, 2), (2, 2)]
    with record(settings) as store:
        row = store.experiment("mine")
        assert (row.id, row.status, row.cases, row.dataset_hash) == (key, "done", 2, DATA.hash)
        found = store.cases(key)
        assert [(one.case_id, one.status, one.place) for one in found] == [("a", "done", 0), ("b", "done", 1)]
        assert [store.payload(store.run(one.run_id or "").output_hash or "")["answer"] for one in found] == ["ONE", "TWO"]
        by_case = {(one.case_id, one.score.name): one.score.value for one in store.scores(experiment=key)}
        assert by_case == {("a", "length"): 0.03, ("b", "length"): 0.03, ("a", "expected"): 1.0, ("b", "expected"): 0.0}
        arm = report_of(store, experiment=key, sample=Samples(store)).arms[0]
        assert [(case.question, case.answer, case.reference) for case in arm.cases] == [
            ("one", "ONE", "ONE"),
            ("two", "TWO", "x"),
        ]


def test_a_case_that_fails_is_on_record_with_its_error_and_the_others_go_on(settings: Settings) -> None:
    def fragile(state: State) -> State:
        if state["question"] == "one":
            raise ValueError("no luck")
        return {"answer": "fine"}

    key, tally = go(settings, DATA, fragile, Length(), Expected())
    assert (tally.failed, tally.asked, tally.scored, tally.unscored) == (1, 4, 2, 2)
    failed, fine = cases(settings, key)
    assert (failed.status, fine.status) == ("failed", "done")
    assert "ValueError: no luck" in (failed.error or "")
    (length,) = (one.score for one in scores(settings, key) if one.case_id == "a" and one.score.name == "length")
    assert length.value is None
    assert length.reason.startswith("failed: ")
    assert "no luck" in length.reason
    _, again = go(settings, DATA, fragile, Length(), Expected(), again=key)
    assert (again.run, again.judged, len(scores(settings, key))) == (0, 0, 4)


def test_a_metric_that_raises_hangs_or_lies_leaves_the_case_unscored(settings: Settings) -> None:
    class Slow(Length):
        name = "slow"

        async def score(self, sample: Sample) -> Score:
            await asyncio.sleep(30)
            raise AssertionError

    class Beyond(Length):
        name = "beyond"

        async def score(self, sample: Sample) -> Score:
            return Score("beyond", 7.0, "code")

    class Other(Length):
        name = "other"

        async def score(self, sample: Sample) -> Score:
            return Score("length", 0.5, "code")

    def broken(sample: Sample) -> None:
        raise KeyError("verdict")

    key, tally = go(settings, DATA, echo, Length(fail=broken), Slow(), Beyond(), Other(), timeout_s=0.05)
    assert (tally.asked, tally.scored, tally.unscored) == (8, 0, 8)
    reasons = {one.score.name: one.score.reason for one in scores(settings, key)}
    assert reasons == {
        "length": "KeyError: 'verdict'",
        "slow": "timeout after 0.05 s",
        "beyond": "the value 7.0 is out of its range, 0.0 to 1.0",
        "other": "the metric gave a score of 'length'",
    }


def test_what_a_judge_scored_before_it_went_down_stays_and_the_rest_is_scored_later(settings: Settings) -> None:
    data = dataset_of("d", [{"id": f"c{number}", "question": f"q {number}"} for number in range(6)])
    calls = iter(range(100))

    def down_half_way(sample: Sample) -> None:
        if next(calls) >= 3:
            raise ConnectionError("not reachable")

    key, first = go(settings, data, echo, Length(fail=down_half_way), concurrency=1)
    assert (first.scored, first.unscored, first.asked) == (3, 3, 6)
    before = scores(settings, key)
    later = Length()
    _, second = go(settings, data, echo, later, again=key, concurrency=1)
    assert (second.run, second.judged, second.scored, second.unscored) == (0, 3, 6, 0)
    assert later.seen == ["q 3", "q 4", "q 5"]
    assert scores(settings, key)[:6] == before
    newer = Length(version="2")
    _, third = go(settings, data, echo, newer, again=key)
    assert (third.run, third.judged, third.asked, third.scored) == (0, 6, 6, 6)


def test_at_most_so_many_cases_at_a_time(settings: Settings) -> None:
    data = dataset_of("d", [{"question": f"q {number}"} for number in range(9)])
    now, most = 0, 0

    async def counted(state: State) -> State:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.02)
        now -= 1
        return {"answer": "x"}

    go(settings, data, counted, Length(), concurrency=3)
    assert most == 3


def test_turns_of_a_thread_are_asked_in_order_and_those_after_a_failure_fail(settings: Settings) -> None:
    rows = [
        {"id": "s1", "question": "one", "thread": "s"},
        {"id": "t1", "question": "alpha", "thread": "t"},
        {"id": "s2", "question": "two", "thread": "s"},
        {"id": "t2", "question": "bad", "thread": "t"},
        {"id": "t3", "question": "gamma", "thread": "t"},
        {"id": "alone", "question": "three"},
    ]

    called = []

    async def node(state: State) -> State:
        called.append(state["question"])
        if state["question"] == "bad":
            raise ValueError("bad")
        return await echo(state)

    key, tally = go(settings, dataset_of("d", rows), node, Length())
    assert (tally.asked, tally.scored, tally.unscored, tally.failed) == (6, 4, 2, 2)
    # Carried out again, what failed is told again and not run.
    _, again = go(settings, dataset_of("d", rows), node, Length(), again=key)
    assert (again.run, again.asked, again.scored, again.unscored, again.failed) == (0, 6, 4, 2, 2)
    by_id = {one.case_id: one for one in cases(settings, key)}
    assert by_id["t3"].run_id is None
    assert "turn 't2' before it did not end" in (by_id["t3"].error or "")
    assert "gamma" not in called, "a turn after one that did not end would be asked of another conversation"
    reasons = {one.case_id: one.score.reason for one in scores(settings, key)}
    assert reasons == {
        **dict.fromkeys(("s1", "s2", "t1", "alone"), ""),
        "t2": "failed: answer: ValueError: bad",
        "t3": "failed: turn 't2' before it did not end",
    }
    with record(settings) as store:
        threads = {key: store.run(one.run_id).thread_id for key, one in by_id.items() if one.run_id}
        last = store.payload(store.run(by_id["s2"].run_id or "").output_hash or "")
        assert store.experiment(key).status == "done"
    assert [turn["question"] for turn in last["history"]] == ["one", "two"]
    assert threads["s1"] == threads["s2"] != threads["t1"]
    assert len(set(threads.values())) == 3


def test_what_has_failed_is_run_again_when_that_is_asked_for(settings: Settings) -> None:
    rows = [
        {"id": "t1", "question": "alpha", "thread": "t"},
        {"id": "t2", "question": "beta", "thread": "t"},
        {"id": "t3", "question": "gamma", "thread": "t"},
        {"id": "alone", "question": "delta"},
        {"id": "fine", "question": "epsilon"},
    ]
    down, called = True, []

    async def node(state: State) -> State:
        called.append(state["question"])
        if down and state["question"] in ("beta", "delta"):
            raise ConnectionError("down")
        return await echo(state)

    data = dataset_of("d", rows)
    key, first = go(settings, data, node, Length())
    assert (first.failed, first.scored) == (3, 2)
    down = False
    called.clear()
    _, again = go(settings, data, node, Length(), again=key, retry_failed=True)
    assert sorted(called) == ["beta", "delta", "gamma"], "what is done is not run again"
    assert again == Tally(cases=5, run=3, failed=0, judged=3, asked=5, scored=5, unscored=0)
    with record(settings) as store:
        runs = {one.case_id: store.run(one.run_id or "") for one in store.cases(key)}
        last = store.payload(runs["t3"].output_hash or "")
        (arm,) = report_of(store, experiment=key).arms
    assert [turn["question"] for turn in last["history"]] == ["alpha", "beta", "gamma"], "each turn once"
    assert len({runs[turn].thread_id for turn in ("t1", "t2", "t3")}) == 1
    assert arm.metrics[0].scored == 5


def test_a_run_that_waits_for_a_person_is_scored_as_it_stands(settings: Settings) -> None:
    def asks(state: State) -> State:
        return {"answer": interrupt("may I?")}

    key, tally = go(settings, dataset_of("d", [{"question": "one"}]), asks, Length())
    assert [one.status for one in cases(settings, key)] == ["waiting"]
    assert (tally.asked, tally.scored) == (1, 1)


def test_what_ends_every_case_ends_the_experiment(settings: Settings) -> None:
    from agentops.graph import load_graph

    with opened(settings) as (runtime, tracer):
        made = load_graph("rag")
        key = begin(tracer, DATA, made, settings={})
        with pytest.raises(CollectionNotFound):
            asyncio.run(carry_out(runtime, tracer, key, made, [Length()], collection="nowhere"))
    with record(settings) as store:
        row = store.experiment(key)
        assert row.status == "failed"
        assert "nowhere" in (row.error or "")


def test_a_case_too_large_to_be_kept_whole_is_refused_before_anything_is_run(settings: Settings) -> None:
    data = dataset_of("d", [{"id": "big", "question": "x" * 600_000, "answer": "y" * 600_000}])
    with opened(settings) as (_, tracer), pytest.raises(UsageError, match=r"case 'big' has 1,200,0\d\d bytes"):
        begin(tracer, data, graph(echo), settings={})


async def test_cancelled_it_is_on_record_as_cancelled_and_goes_on_from_there(settings: Settings) -> None:
    data = dataset_of("d", [{"id": f"c{number}", "question": f"q {number}"} for number in range(4)])
    started = asyncio.Event()
    stuck = True

    async def node(state: State) -> State:
        if stuck and state["question"] == "q 2":
            started.set()
            await asyncio.sleep(60)
        return await echo(state)

    made = graph(node)
    clock = SystemClock()
    tracer = open_tracer(settings, clock=clock, ids=UlidSource(clock))
    async with Runtime(settings, engine=ScriptedEngine(())) as runtime:
        key = begin(tracer, data, made, settings={})
        task = asyncio.create_task(carry_out(runtime, tracer, key, made, [Length()], concurrency=1))
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        with record(settings) as store:
            assert store.experiment(key).status == "cancelled"
            assert [one.status for one in store.cases(key)] == ["done", "done", "cancelled", "queued"]
        stuck = False
        tally = await carry_out(runtime, tracer, key, made, [Length()], concurrency=1)
    tracer.close()
    assert (tally.run, tally.scored, tally.unscored, tally.asked) == (2, 4, 0, 4)


SLOW = """
    import asyncio, pathlib, sys, time
    from typing import TypedDict
    from langgraph.graph import END, START, StateGraph

    class State(TypedDict, total=False):
        question: str
        history: list[str]
        answer: str

    async def answer(state):
        log = pathlib.Path(__file__).with_suffix(".log")
        with log.open("a") as file:
            file.write(state["question"] + "\\n")
        stuck = pathlib.Path(__file__).with_suffix(".stuck")
        if stuck.exists() and state["question"] in stuck.read_text().splitlines():
            await asyncio.sleep(60)
        return {"answer": state["question"].upper(), "history": [*state.get("history", ()), state["question"]]}

    def blocking(state):
        with pathlib.Path(__file__).with_suffix(".log").open("a") as file:
            file.write(state["question"] + "\\n")
        if state["question"] == "q 3":
            time.sleep(60)
        return {"answer": state["question"].upper()}

    def graph_of(node):
        graph = StateGraph(State)
        graph.add_node("answer", node)
        graph.add_edge(START, "answer")
        graph.add_edge("answer", END)
        return graph

    graph, blocked = graph_of(answer), graph_of(blocking)
"""


def stuck(
    tmp_path: Path, environment: dict[str, str], rows: list[dict[str, str]], questions: set[str], *more: str
) -> subprocess.Popen[str]:
    """A child process that runs an experiment and is in the middle of these questions, which take a minute."""
    file, data = tmp_path / "slow.py", tmp_path / "cases.jsonl"
    file.write_text(textwrap.dedent(SLOW))
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    file.with_suffix(".stuck").write_text("\n".join(questions))
    log = file.with_suffix(".log")
    words = ["--dataset", str(data), "--concurrency", str(len(questions)), *more]
    child = subprocess.Popen(
        [*AGENTOPS, "eval", *words], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while (
        not (log.exists() and questions <= set(log.read_text().splitlines()))
        and time.monotonic() < deadline
        and child.poll() is None
    ):
        time.sleep(0.05)
    assert child.poll() is None, child.communicate()[1]
    return child


ROWS = [{"id": f"c{n}", "question": f"q {n}", "answer": f"Q {n}"} for n in range(5)]


@pytest.mark.parametrize("node", ["graph", "blocked"])
def test_ctrl_c_ends_it_at_once_and_says_how_to_go_on(
    tmp_path: Path, environment: dict[str, str], settings: Settings, node: str
) -> None:
    child = stuck(tmp_path, environment, ROWS, {"q 3"}, "--graph", f"{tmp_path / 'slow.py'}:{node}", "--metrics", "exact")
    began = time.monotonic()
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=30)
    assert time.monotonic() - began < 10
    assert (child.returncode, out) == (130, "")
    assert "Traceback" not in err
    assert "error: the experiment was stopped; what was done is on record" in err
    (command,) = re.findall(r"go on with: agentops (.+)", err)
    with record(settings) as store:
        before = store.experiment("last")
        assert before.status == "cancelled"
        assert [one.status for one in store.cases(before.id)] == ["done", "done", "done", "cancelled", "queued"]
        assert [one.score.value for one in store.scores(experiment=before.id)] == [1, 1, 1]
    if node == "blocked":
        return
    (tmp_path / "slow.stuck").unlink()
    done = subprocess.run([*AGENTOPS, *command.split(), "--json"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "5 cases, 2 run now, 2 judged now; 5 scored + 0 unscored = 5 asked" in done.stderr
    assert json.loads(done.stdout)["arms"][0]["metrics"][0]["interval"]["value"] == 1


def test_killed_it_is_taken_up_where_it_was(tmp_path: Path, environment: dict[str, str], settings: Settings) -> None:
    rows = ROWS + [{"id": f"t{n}", "question": f"turn {n}", "thread": "t"} for n in range(2)]
    graph, log = f"{tmp_path / 'slow.py'}:graph", tmp_path / "slow.log"
    # One is a case by itself and the other the second turn of a conversation.
    half = {"q 3", "turn 1"}
    words = ["--graph", graph, "--metrics", "exact,latency_ms", "--name", "killed"]
    child = stuck(tmp_path, environment, rows, half, *words)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    with record(settings) as store:
        before = store.experiment("killed")
        assert before.status == "crashed"
        assert Counter(one.status for one in store.cases(before.id)) == {"done": 5, "running": 2}
        kept = store.scores(experiment=before.id)
        assert 8 <= len(kept) <= 10, "the last of either was perhaps not acknowledged yet"
    (tmp_path / "slow.stuck").unlink()
    done = subprocess.run([*AGENTOPS, "eval", "--resume", "killed", "--json"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "2 run now" in done.stderr
    assert "14 asked" in done.stderr
    assert Counter(log.read_text().splitlines()) == Counter({row["question"]: 1 for row in rows}) + Counter(half)
    with record(settings) as store:
        assert store.experiment("killed").status == "done"
        after = store.scores(experiment=before.id)
        assert after[: len(kept)] == kept
        assert Counter((one.case_id, one.score.name) for one in after) == Counter(
            {(row["id"], name): 1 for row in rows for name in ("exact", "latency_ms")}
        )
        runs = {one.case_id: one.run_id for one in store.cases(before.id)}
        assert store.payload(store.run(runs["t1"] or "").output_hash or "")["history"] == ["turn 0", "turn 1"]
        assert store.run(runs["t0"] or "").thread_id == store.run(runs["t1"] or "").thread_id
    assert len(json.loads(done.stdout)["arms"][0]["cases"]) == 7


def test_recorded_runs_are_scored_once_a_version(settings: Settings) -> None:
    metric = Length()
    with opened(settings) as (runtime, tracer):
        made = graph(echo)
        ids = [runtime.run(made, text).run_id for text in ("one", "three")]
        first = asyncio.run(score_runs(runtime, tracer, [*ids, ids[0]], [metric]))
        again = asyncio.run(score_runs(runtime, tracer, ids, [metric, Expected()]))
    assert first == Tally(cases=2, run=0, failed=0, judged=2, asked=2, scored=2, unscored=0)
    assert (again.judged, again.asked, again.scored, again.unscored) == (2, 4, 2, 2)
    with record(settings) as store:
        (length, expected) = store.scores(run=ids[0])
    assert (length.score.value, length.author, expected.score.reason) == (0.03, "1", "no_reference")
    assert length.experiment_id is None


async def test_a_judgement_is_never_lost(settings: Settings) -> None:
    def unlucky(sample: Sample) -> None:
        raise [KeyError("x"), TimeoutError(), OSError(), AssertionError("y")][len(sample.question) % 4]

    found = [await judge(Length(fail=unlucky), Sample("q" * number, "a")) for number in range(500)]
    assert sum(one.value is None and bool(one.reason) for one in found) == 500


# --- the registry ---


async def test_the_registry_says_of_every_metric_what_it_is(settings: Settings, environment: dict[str, str]) -> None:
    engine, embedder = ScriptedEngine(()), HashEmbedder()
    async with make_metrics(["all"], settings, engine=lambda: engine, embedder=lambda: embedder) as made:
        assert [metric.name for metric in made] == list(ENTRIES)
        for metric in made:
            entry = ENTRIES[metric.name]
            assert (metric.low, metric.high, metric.better) == (entry.low, entry.high, entry.better), metric.name
            assert metric.version


async def test_the_registry_knows_all_that_there_are(settings: Settings) -> None:
    from evals.judge import open_judge
    from evals.metrics.native import native_metrics
    from evals.metrics.ragas import ragas_metrics

    embedder = HashEmbedder()
    known: dict[str, Metric] = native_metrics() | ragas_metrics(open_judge(settings, ScriptedEngine(()), embedder), embedder)
    assert {*known, "hallucination", "toxicity"} == set(ENTRIES)


async def test_native_metrics_open_no_model(settings: Settings) -> None:
    def none() -> Any:
        raise AssertionError("a model was opened")

    async with make_metrics(["exact", "mrr"], settings, engine=none, embedder=none) as made:
        assert [metric.name for metric in made] == ["exact", "mrr"]
    if util.find_spec("ragas") is not None:
        calls = ["tool_call_accuracy", "tool_call_f1"]
        assert not needs_model(calls, settings)
        assert not needs_embedder(calls)
        async with make_metrics(calls, settings, engine=none, embedder=none) as made:
            sample = Sample("q", "a", reference=Reference(trajectory=()))
            assert [(await metric.score(sample)).value for metric in made] == [1, 1]


def test_a_name_that_is_none_is_told_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="no metric is called 'faithfullness'") as error:
        chosen(["mrr", "faithfullness"])
    assert error.value.hint == "did you mean faithfulness?"
    assert chosen(["mrr", "mrr", "exact"]) == ("mrr", "exact")
    assert set(chosen(["all"])) == set(ENTRIES)


def test_metrics_are_taken_where_their_reference_is_there() -> None:
    plain = fitting([Reference()])
    assert "faithfulness" in plain
    assert not {"recall_at_5", "context_recall", "trajectory_strict"} & set(plain)
    assert {"recall_at_5", "mrr"} <= set(fitting([Reference(), Reference(contexts=("a",))]))


def test_importing_it_loads_nothing_heavy() -> None:
    code = (
        "import sys, evals.datasets, evals.metrics.registry; "
        "print(sorted({'torch','ragas','langgraph','numpy','sqlmodel','scipy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ.copy())
    assert done.stdout.strip() == "[]"
