"""Reports: made from a real record, drawn in four forms, and the page seen by a real browser."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt
from pypdf import PdfReader
from rich.console import Console

from agentops import Settings
from agentops.clock import SystemClock, UlidSource
from agentops.errors import RecordError, RunNotFound, UsageError
from agentops.records import Score
from agentops.store import CaseRow, Store, open_store
from agentops.tracer import Tracer, open_tracer
from evals.report import (
    Arm,
    Bar,
    MetricResult,
    Report,
    Scale,
    compare,
    failures,
    parse_bars,
    report_of,
    to_html,
    to_json,
    to_markdown,
    to_terminal,
)
from evals.report.build import opened
from evals.report.markdown import code
from evals.report.plots import ticks
from evals.report.words import bounds, number
from evals.samples import Reference, Sample
from evals.statistics import Interval, estimate

SCALES = {
    "faithfulness": Scale(0, 1),
    "exact": Scale(0, 1, binary=True),
    "toxicity": Scale(0, 1, "low"),
    "latency_ms": Scale(0, None, "low"),
}
FIRST = {f"case-{place:02}": (1.0 if place % 3 else 0.2 + place / 100, float(place % 2)) for place in range(24)}
SECOND = {key: (min(1.0, one + 0.3), 1.0) for key, (one, _) in FIRST.items()}

HOSTILE = (
    "[bold]owned[/nope] <script>document.title='owned'</script></script></style></title></pre></textarea>"
    "<style>*{display:none}</style>"
    '"\'><img src=x onerror="document.title=\'owned\'"><svg onload="document.title=\'owned\'"><a href="javascript:owned()">a</a>'
    "--><!-- <iframe src=//owned.example></iframe> &lt;b&gt; \x1b]0;owned\x07\x1b[2J\x1b[31m \u202egnp.exe\u2066 \ud800 \x00"
    " | a \\| b `x` ``y`` **owned** [owned](javascript:owned()) ![owned](http://owned.example/x.png) @owned #1 https://owned.example"
    " [link=http://owned.example]x[/link]"
)


class Record:
    """Writes experiments as an evaluation does."""

    def __init__(self, tracer: Tracer) -> None:
        self.tracer = tracer

    def run(self, run_id: str, thread_id: str = "", status: Any = "done") -> None:
        trace = self.tracer.start_run(run_id=run_id, thread_id=thread_id or f"th_{run_id}", graph="rag", input={"question": "q"})
        trace.end(status, {"answer": "a"}, error="it broke" if status == "failed" else None)

    def experiment(self, key: str, name: str, cases: int = 24, dataset: str = "b2:1", status: Any = "done", **more: Any) -> None:
        about = {"dataset": "cases.jsonl", "dataset_hash": dataset, "graph": "rag", "settings": {"model": "m"}, **more}
        self.tracer.experiment(id=key, name=name, status=status, cases=cases, started_ns=len(key) + ord(key[-1]), **about)

    def case(
        self,
        experiment: str,
        key: str,
        scores: Mapping[str, float | str],
        *,
        status: Any = "done",
        thread: str = "",
        place: int = 0,
    ) -> str:
        run_id = f"run_{experiment}_{key}"
        self.run(run_id, thread, status)
        self.tracer.case(experiment_id=experiment, case_id=key, place=place, status=status, run_id=run_id)
        for name, value in scores.items():
            score = (
                Score(name, None, "code", reason=value) if isinstance(value, str) else Score(name, value, "model", judged="asked")
            )
            self.tracer.score(score, run_id=run_id, experiment_id=experiment, case_id=key, author="v1")
        return run_id

    def filled(self, key: str, name: str, values: Mapping[str, tuple[float, float]], **more: Any) -> None:
        self.experiment(key, name, len(values), **more)
        for place, (case, (faithful, exact)) in enumerate(values.items()):
            scores = {"faithfulness": faithful, "exact": exact, "toxicity": 0.1, "latency_ms": 800.0 + 7 * place}
            self.case(key, case, scores, place=place)


@pytest.fixture
def record(settings: Settings) -> Iterator[Record]:
    clock = SystemClock()
    tracer = open_tracer(settings, clock=clock, ids=UlidSource(clock))
    yield Record(tracer)
    tracer.close()


def read(record: Record, settings: Settings) -> Store:
    record.tracer.flush()
    return open_store(settings)


def sample(row: CaseRow) -> Sample:
    return Sample(f"What is {row.case_id}?", "It is this.", reference=Reference(answer="That."), run_id=row.run_id or "")


def trace(run_id: str) -> list[str]:
    return [f"run {run_id}", "└─ generate  12 tokens"]


def shown(report: Report, width: int = 160) -> str:
    out = io.StringIO()
    Console(file=out, width=width, force_terminal=True, color_system="truecolor").print(to_terminal(report))
    return out.getvalue()


def test_a_report_tells_every_number_with_its_interval_and_every_case_without_a_score(record: Record, settings: Settings) -> None:
    record.experiment("exp_1", "first", 6)
    for place, faithful in enumerate((1.0, 0.5, 0.75)):
        record.case("exp_1", f"c{place}", {"faithfulness": faithful, "recall": "no_reference"}, place=place)
    record.case("exp_1", "c3", {"faithfulness": "the judge timed out", "recall": 0.5}, place=3)
    record.case("exp_1", "c4", {}, status="failed", place=4)
    record.tracer.case(experiment_id="exp_1", case_id="c5", place=5, status="queued")
    with read(record, settings) as store:
        report = report_of(store, experiment="first", scales=SCALES, sample=sample, trace=trace)
    (arm,) = report.arms
    faithfulness, recall = arm.metrics
    assert faithfulness.interval == estimate([1.0, 0.5, 0.75])
    assert faithfulness.unscored == {"the judge timed out": 1, "the run failed": 1, "not run yet": 1}
    assert recall.unscored == {"no_reference": 3, "the run failed": 1, "not run yet": 1}
    assert (recall.interval.value, recall.interval.low, recall.interval.method) == (0.5, None, "none: one value")
    assert all(one.scored + sum(one.unscored.values()) == one.asked == 6 for one in arm.metrics)
    assert [case.id for case in arm.worst("faithfulness", 2)] == ["c1", "c2"]
    assert [case.id for case in arm.worst("faithfulness", 100)] == ["c1", "c2"], "none is listed that is as good as can be"
    assert [case.trace for case in arm.cases] == [(), *(tuple(trace(f"run_exp_1_c{place}")) for place in (1, 2, 3)), (), ()]
    assert arm.cases[4].error == "it broke"
    assert arm.cases[0].reference == "That."
    text = shown(report)
    for wanted in ("faithfulness", "0.750", bounds(faithfulness.interval), "3/6", "1 the judge timed out", "one value"):
        assert wanted in text


def test_what_does_not_add_up_is_no_result() -> None:
    with pytest.raises(ValueError, match="1 scored and 1 not, of 3"):
        MetricResult("m", Scale(), estimate([1.0]), 3, {"a": 1.0}, {"no_reference": 1})


def test_cases_of_one_thread_count_as_one(record: Record, settings: Settings) -> None:
    record.experiment("exp_1", "first", 12)
    for place in range(12):
        score = {"faithfulness": 0.1 + 0.2 * (place // 3) + 0.01 * place}
        record.case("exp_1", f"c{place}", score, thread=f"th_{place // 3}", place=place)
    with read(record, settings) as store:
        report = report_of(store, experiment="exp_1")
    interval = report.arms[0].metrics[0].interval
    assert (interval.n, interval.clusters, interval.method) == (12, 4, "bootstrap, clustered")
    alone = estimate(list(report.arms[0].metrics[0].values.values()))
    assert interval.low is not None
    assert alone.low is not None
    assert interval.low < alone.low
    assert report.notes == ("the 12 cases come from 4 threads: intervals are clustered by thread",)


def test_an_unfinished_experiment_and_a_changed_metric_are_noted(record: Record, settings: Settings) -> None:
    record.experiment("exp_1", "first", 5, status="failed")
    run_id = record.case("exp_1", "c0", {"faithfulness": 0.5})
    record.case("exp_1", "c1", {"faithfulness": 0.5}, place=1)
    record.tracer.score(Score("faithfulness", 0.9, "model"), run_id=run_id, experiment_id="exp_1", case_id="c0", author="v2")
    with read(record, settings) as store:
        report = report_of(store, experiment="exp_1")
    assert report.arms[0].metrics[0].values == {"c0": 0.9, "c1": 0.5}, "the latest score counts"
    for part, note in zip(("is failed", "3 of 5 cases", "2 versions"), report.notes, strict=True):
        assert part in note
        assert note in " ".join(re.sub(r"\x1b\[[\d;]*m", "", shown(report)).split())
        assert note in to_html(report)


def test_a_metric_that_was_asked_for_and_never_scored_is_in_the_report(record: Record, settings: Settings) -> None:
    record.experiment("exp_1", "first", 1, settings={"metrics": ["exact", "recall"]})
    record.case("exp_1", "c0", {"recall": 1.0}, status="failed")
    with read(record, settings) as store:
        report = report_of(store, experiment="exp_1")
    assert [(one.name, one.scored, dict(one.unscored)) for one in report.arms[0].metrics] == [
        ("exact", 0, {"the run failed": 1}),
        ("recall", 1, {}),
    ]
    assert failures(report, parse_bars(["exact=0"])) == ("exact has no score in 1 case (the run failed: 1)",)


def test_recorded_runs_are_reported_on_without_an_experiment(record: Record, settings: Settings) -> None:
    for place in range(3):
        record.run(f"run_{place}", "th_1" if place < 2 else "th_2")
        record.tracer.score(Score("exact", float(place > 0), "code"), run_id=f"run_{place}")
    with read(record, settings) as store:
        report = report_of(store, runs=["run_0", "run_1", "run_2", "run_0"], sample=sample)
        assert report.title == "3 recorded runs"
        assert report.arms[0].metrics[0].values == {"run_0": 0.0, "run_1": 1.0, "run_2": 1.0}
        assert report.arms[0].metrics[0].interval.clusters == 2
        with pytest.raises(UsageError, match="no runs"):
            report_of(store, runs=[])
        with pytest.raises(RunNotFound):
            report_of(store, runs=["run_9"])


def test_people_and_the_judge(record: Record, settings: Settings) -> None:
    record.experiment("exp_1", "first", 20)
    for place in range(20):
        run_id = record.case("exp_1", f"c{place}", {"faithfulness": (place % 10) / 10}, place=place)
        good = float(place % 10 >= 4)
        record.tracer.score(Score("faithfulness", 1 - good, "human"), run_id=run_id, author="ann")
        record.tracer.score(Score("faithfulness", good, "human", comment="after a second look"), run_id=run_id, author="ann")
        if place < 10:
            record.tracer.score(Score("faithfulness", good if place else 1.0, "human"), run_id=run_id, author="ben")
        record.tracer.score(Score("thumbs", good, "human"), run_id=run_id, author="ann")
    with read(record, settings) as store:
        report = report_of(store, experiment="exp_1", scales=SCALES)
    (arm,) = report.arms
    assert [one.name for one in arm.metrics] == ["faithfulness"], "what people said is no metric's score"
    agreed, thumbs = arm.people
    assert (agreed.people, agreed.cases) == (("ann", "ben"), 20)
    assert agreed.interval.value == pytest.approx((12 - 0.5 + 1) / 20), "ann and ben differ in one case"
    assert agreed.judge is not None
    assert agreed.judge.value is not None
    assert 0.3 < agreed.judge.value < 0.9
    assert agreed.among is not None
    assert agreed.among.value is not None
    assert 0.7 < agreed.among.value < 1
    assert (thumbs.name, thumbs.interval.value, thumbs.interval.method) == ("thumbs", 0.6, "Wilson")
    assert (thumbs.judge, thumbs.among) == (None, None), "there is no metric of that name, and one person"
    (calibrated,) = arm.calibrations
    assert (calibrated.against, calibrated.calibration.n) == ("faithfulness", 19), "people do not agree on one"
    for text in (shown(report), to_html(report)):
        assert "after a second look" in text
        assert "ann, ben" in text


def test_two_experiments_are_compared_case_by_case(record: Record, settings: Settings) -> None:
    record.filled("exp_1", "before", FIRST)
    record.filled("exp_2", "after", SECOND)
    with read(record, settings) as store:
        report = compare(store, "before", "after", scales=SCALES, sample=sample, trace=trace, worst=2)
        back = compare(store, "after", "before", scales=SCALES)
        with pytest.raises(UsageError, match="same experiment"):
            compare(store, "before", "exp_1")
        with pytest.raises(RecordError):
            compare(store, "before", "never")
    comparison = report.comparison
    assert comparison is not None
    assert back.comparison is not None
    by_name = {one.name: one for one in comparison.metrics}
    faithful, exact, toxic = (by_name[name] for name in ("faithfulness", "exact", "toxicity"))
    assert (faithful.higher, faithful.same, faithful.lower) == (8, 16, 0)
    assert (faithful.verdict, exact.verdict, toxic.verdict) == ("better", "better", "not shown")
    assert [one.verdict for one in back.comparison.metrics] == ["worse", "worse", "not shown", "not shown"]
    assert exact.test == "exact McNemar"
    assert exact.p == pytest.approx(2 / 2**12)
    assert exact.p_holm == pytest.approx(4 * 2 / 2**12), "the smallest of four"
    assert (toxic.p, toxic.difference.value, toxic.difference.low) == (1.0, 0.0, None)
    assert {one.metric for one in comparison.changes} == {"faithfulness", "exact"}
    assert comparison.changes[0].gain == 1.0
    assert back.comparison.changes[0].gain == -1.0
    assert len({one.case_id for one in comparison.changes}) == 16
    assert len(opened(report, 2)) == 4
    assert sum(bool(case.trace) for arm in report.arms for case in arm.cases) == 8
    for text in (shown(report), to_markdown(report), to_html(report)):
        assert "better" in text
        assert number(faithful.difference.value, signed=True) in text


def test_different_datasets_are_only_compared_over_common_cases_and_only_when_asked(record: Record, settings: Settings) -> None:
    record.filled("exp_1", "before", FIRST)
    record.filled("exp_2", "after", {key: SECOND[key] for key in list(SECOND)[2:]} | {"new": (1.0, 1.0)}, dataset="b2:2")
    record.filled("exp_3", "other", {"else": (1.0, 1.0)}, dataset="b2:3")
    with read(record, settings) as store:
        with pytest.raises(UsageError, match="different datasets") as refused:
            compare(store, "exp_1", "exp_2")
        assert "--common" in refused.value.hint
        found = compare(store, "exp_1", "exp_2", common=True).comparison
        with pytest.raises(UsageError, match="no case is in both"):
            compare(store, "exp_1", "exp_3", common=True)
    assert found is not None
    assert (found.common, found.alone) == (22, (("case-00", "case-01"), ("new",)))


def test_a_case_scored_in_one_experiment_alone_is_in_no_pair(record: Record, settings: Settings) -> None:
    for key, missing in (("exp_1", "c0"), ("exp_2", "c1")):
        record.experiment(key, key, 4)
        for place in range(4):
            value = "no_reference" if f"c{place}" == missing else 0.1 * place
            record.case(key, f"c{place}", {"recall": value, "of " + key: 1.0}, place=place)
    with read(record, settings) as store:
        report = compare(store, "exp_1", "exp_2")
    assert report.comparison is not None
    (recall,) = report.comparison.metrics
    assert (recall.difference.n, recall.only_first, recall.only_second) == (2, 1, 1)
    assert "compared: of exp_1, of exp_2" in report.notes[-1]


def made(values: list[float], better: str = "high") -> Report:
    result = MetricResult("m", Scale(0, 1, better), estimate(values), 3, dict(zip("abc", values, strict=False)), unscored(values))
    return Report("t", (Arm("", "x", (), (), (result,)),))


def unscored(values: list[float]) -> dict[str, int]:
    return {"no_reference": 3 - len(values)} if len(values) < 3 else {}


def test_a_bar_is_held_against_the_mean() -> None:
    bars = parse_bars(["m=.6"])
    assert bars == (Bar("m", 0.6),)
    assert failures(made([0.5, 0.6, 0.7]), bars) == (), "the interval reaches below"
    (line,) = failures(made([0.5, 0.5, 0.7]), bars)
    assert "mean of 0.567 (3 scored, interval 0.500 to 0.700); it must be 0.6 at least" in line
    assert failures(made([0.5, 0.5, 0.7], "low"), bars) == ()
    (line,) = failures(made([0.7, 0.6, 0.6], "low"), bars)
    assert "may be 0.6 at most" in line
    (line,) = failures(made([]), bars)
    assert line == "m has no score in 3 cases (no_reference: 3)"
    (line,) = failures(made([1.0]), parse_bars(["other=0"]))
    assert line == "other was not measured (measured: m)"


@pytest.mark.parametrize("text", ["m", "m=", "=.5", "m=high", "m=nan", "m=inf", "", "m=.5=.6"])
def test_a_bar_that_is_none_is_refused_before_anything_is_computed(text: str) -> None:
    with pytest.raises(UsageError, match="no bar") as refused:
        parse_bars([text])
    assert "--fail-under" in refused.value.hint
    with pytest.raises(UsageError, match="two bars"):
        parse_bars(["m=1", " m = 0.5"])


def test_a_bar_fails_where_more_than_one_in_twenty_have_no_score() -> None:
    def of(scored: int, **missing: int) -> Report:
        values = {str(place): 1.0 for place in range(scored)}
        result = MetricResult("m", Scale(0, 1), estimate([1.0] * scored), scored + sum(missing.values()), values, missing)
        return Report("t", (Arm("", "x", (), (), (result,)),))

    bars = parse_bars(["m=.5"])
    (line,) = failures(of(1, timeout=99), bars)
    assert line == "m was scored in 1 of 100 cases (timeout: 99); at most 5% may have no score"
    assert failures(of(94, timeout=6), bars) != ()
    assert failures(of(95, timeout=5), bars) == ()
    assert failures(of(19, no_reference=981, timeout=1), bars) == (), "what could not be asked does not count"
    assert failures(of(19, **{"no claims": 9, "no citations": 9}), bars) == (), "nor do refusals"
    (line,) = failures(of(18, no_reference=81, timeout=1), bars)
    assert line.startswith("m was scored in 18 of 19 cases (timeout: 1)")


def test_what_happens_to_be_0_or_1_is_no_rate_and_no_probability(record: Record, settings: Settings) -> None:
    for key in ("exp_1", "exp_2"):
        record.experiment(key, key, 12)
        for place in range(12):
            good = float(place % 3 > 0 or (key == "exp_2" and place > 3))
            run_id = record.case(key, f"c{place}", {"exact": good, "faithfulness": good, "mine": good}, place=place)
            for name, value in (("thumbs", float(place % 2)), ("helpful", float(place % 2)), ("faithfulness", place / 12)):
                record.tracer.score(Score(name, value, "human"), run_id=run_id, author="ann")
    with read(record, settings) as store:
        (arm,) = report_of(store, experiment="exp_1", scales=SCALES).arms
        comparison = compare(store, "exp_1", "exp_2", scales=SCALES).comparison
    methods = {one.name: one.interval.method for one in arm.metrics}
    assert methods == {"exact": "Wilson", "faithfulness": "bootstrap", "mine": "bootstrap"}
    assert {one.name: one.interval.method for one in arm.people} == {
        "thumbs": "Wilson",
        "helpful": "bootstrap",
        "faithfulness": "bootstrap",
    }
    assert comparison is not None
    assert [one.test for one in comparison.metrics] == ["exact McNemar", *["sign-flip permutation"] * 2]
    against = {one.name: one.against for one in arm.calibrations}
    assert against == {"exact": "thumbs", "faithfulness": "thumbs"}, "grades are no outcomes, and who knows what mine is"


@pytest.mark.parametrize("threads", [False, True])
@pytest.mark.parametrize("moved", [0, 1, 2])
def test_two_experiments_that_differ_in_hardly_a_case_are_compared(
    record: Record, settings: Settings, moved: int, threads: bool
) -> None:
    for key in ("exp_1", "exp_2"):
        record.experiment(key, key, 8)
        for place in range(8):
            group = place // 2 if threads else place
            better = key == "exp_2" and group < moved
            scores = {"faithfulness": 0.9 if better else 0.5, "exact": float(better)}
            record.case(key, f"c{place}", scores, thread=f"th_{key}_{group}" if threads else "", place=place)
    with read(record, settings) as store:
        comparison = compare(store, "exp_1", "exp_2", scales=SCALES).comparison
    assert comparison is not None
    assert [one.p for one in comparison.metrics] == [pytest.approx(0.5 if moved == 2 else 1.0)] * 2


def test_the_json_is_json(record: Record, settings: Settings) -> None:
    record.filled("exp_1", "before", FIRST)
    record.filled("exp_2", "after", SECOND)
    with read(record, settings) as store:
        report = compare(store, "before", "after", scales=SCALES, sample=sample)
    plain = json.loads(json.dumps(to_json(report), allow_nan=False))
    assert plain["version"] == 1
    assert plain["comparison"]["metrics"][0]["difference"]["low"] > 0
    assert plain["arms"][1]["metrics"][0]["interval"]["n"] == 24
    assert plain["arms"][0]["cases"][3]["scores"]["exact"]["judged"] == "asked"


def test_nothing_scored_is_said_in_every_form(record: Record, settings: Settings) -> None:
    record.experiment("exp_1", "empty", 0)
    with read(record, settings) as store:
        report = report_of(store, experiment="exp_1", trace=trace)
    for text in (shown(report), to_markdown(report), to_html(report)):
        assert "o metric has scored anything yet" in text


@pytest.mark.parametrize(
    ("value", "signed", "text"),
    [
        (None, False, "–"),
        (0.5, False, "0.500"),
        (-0.0001, True, "0.000"),
        (-0.25, True, "−0.250"),
        (0.25, True, "+0.250"),
        (12.345, False, "12.35"),
        (1234.5, False, "1,234"),
    ],
)
def test_numbers_are_written_in_one_way(value: float | None, signed: bool, text: str) -> None:
    assert number(value, signed=signed) == text


def test_ticks_are_round_and_within() -> None:
    assert ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert ticks(0, 2610, 4) == pytest.approx([0, 1000, 2000])
    assert ticks(-0.31, 0.31) == pytest.approx([-0.2, 0, 0.2])
    assert ticks(3, 3) == [3]


@pytest.mark.parametrize("width", [80, 160])
def test_a_terminal_of_any_width_shows_whole_numbers(record: Record, settings: Settings, width: int) -> None:
    record.filled("exp_1", "before", FIRST)
    record.filled("exp_2", "after", SECOND)
    with read(record, settings) as store:
        both = compare(store, "before", "after", scales=SCALES, sample=sample)
    for report in (both, single(both)):
        lines = re.sub(r"\x1b\[[\d;]*m", "", shown(report, width)).split("\n")
        assert max(map(len, lines)) <= width
        metrics = report.comparison.metrics if report.comparison else report.arms[0].metrics
        for one in metrics:
            interval = one.interval if isinstance(one, MetricResult) else one.difference
            said = bounds(interval, signed=not isinstance(one, MetricResult))
            assert any(one.name in line and said in line for line in lines), (one.name, said)


@pytest.fixture
def hostile(record: Record, settings: Settings) -> Report:
    """Every text that a report shows is hostile."""
    text = HOSTILE.encode("utf-8", "replace").decode()
    for key in ("exp_1", "exp_2"):
        about: dict[str, Any] = {"dataset": text, "graph": text, "error": text, "settings": {"model": text}, "status": "failed"}
        record.tracer.experiment(id=key, name=key + text, cases=12, started_ns=1, dataset_hash="b2:1", **about)
        for place in range(12):
            value = place / 12 if key == "exp_1" else 1 - place / 12
            record.case(key, f"{place} {text}", {text: value, "exact": text}, place=place)
            person = Score(text, float(place > 5), "human", comment=text)
            record.tracer.score(person, run_id=f"run_{key}_{place} {text}", author=text)

    def said(row: CaseRow) -> Sample:
        return Sample(HOSTILE, HOSTILE, reference=Reference(answer=HOSTILE), run_id=row.run_id or "")

    with read(record, settings) as store:
        keys = [one.id for one in store.experiments()]
        assert len(keys) == 2
        report = compare(store, "exp_1", "exp_2", sample=said, trace=lambda _: [HOSTILE] * 3)
    return replace(report, notes=(*report.notes, HOSTILE), title=HOSTILE)


def single(report: Report) -> Report:
    return replace(report, arms=report.arms[:1], comparison=None)


def test_no_text_can_move_a_terminal(hostile: Report) -> None:
    for report in (hostile, single(hostile)):
        text = shown(report, 200)
        assert "document.title" in text
        assert "[bold]" in text, "rich's own markup is text too"
        bare = re.sub(r"\x1b\[[\d;]*m", "", text)
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", bare)


def test_no_text_is_markup_in_a_pull_request(hostile: Report) -> None:
    reader = MarkdownIt("commonmark", {"html": True}).enable("table")
    for report in (hostile, single(hostile)):
        text = to_markdown(report)
        assert len(text) < 65_536
        tokens = [inner for token in reader.parse(text) for inner in (token, *(token.children or ()))]
        kinds = {token.type for token in tokens}
        assert "code_inline" in kinds
        assert not kinds & {"link_open", "image", "html_inline"}
        html = {token.content.strip() for token in tokens if token.type == "html_block"}
        assert all(re.fullmatch(r"(<details><summary>[\w ]+</summary>|</details>)", one) for one in html)
        assert not [token.content for token in tokens if token.type == "text" and "owned" in token.content]
        rows = [row.count("<td") for row in reader.render(text).split("</tr>") if "<td" in row]
        assert set(rows) <= {5, 6, 9}, "no text ends a cell"


@pytest.mark.parametrize("text", ["`", "``", "a`b", "`a`", "a``b`c", " a ", "a|b"])
def test_a_code_span_holds_what_it_is_given(text: str) -> None:
    (token,) = MarkdownIt().parse(code(text))[1].children or ()
    assert (token.type, token.content) == ("code_inline", text.strip())
    assert code("") == code("\x1b[2J") == ""


def test_a_long_report_still_fits_into_a_comment(record: Record, settings: Settings) -> None:
    record.experiment("exp_1", "wide", 20)
    for place in range(20):
        record.case("exp_1", f"c{place}", {f"{'m' * 100}{number}": 0.5 for number in range(20)}, place=place)
    with read(record, settings) as store:
        report = report_of(store, experiment="exp_1", sample=lambda row: Sample("long " * 100, "a"))
    text = to_markdown(report, worst=20)
    assert len(text) <= 60_100
    assert text.endswith("The rest did not fit into a comment.\n")
    assert text.count("<details>") == text.count("</details>") == 1, "nothing after it is folded away"


def test_ten_megabytes_in_a_cell_do_not_reach_the_page(record: Record, settings: Settings) -> None:
    record.experiment("exp_1", "big", 1)
    record.case("exp_1", "c0", {"exact": 0.0})
    with read(record, settings) as store:
        report = report_of(
            store,
            experiment="exp_1",
            sample=lambda row: Sample("q" * 10_000_000, "a" * 10_000_000),
            trace=lambda _: ["t" * 100_000] * 10_000,
        )
    text = to_html(report)
    assert len(text) < 400_000
    assert "(9,992,000 more characters)" in text
    assert "(9,600 more lines)" in text


_ELEMENTS = """
html head meta title style body header main section footer h1 h2 h3 h4 p div dl dt dd table thead tbody tr th td bdi b br a code
pre span figure figcaption details summary svg g line circle rect text title
"""
ELEMENTS = set(_ELEMENTS.split())
VOID = {"meta", "br"}


class Elements(HTMLParser):
    """Everything that a page is made of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.unbalanced: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.unbalanced.append(tag)


def check_inert(text: str) -> None:
    """Nothing but the page's own elements, no handlers, no addresses."""
    elements = Elements(text).found
    assert {tag for tag, _ in elements} <= ELEMENTS
    names = {name for _, attributes in elements for name in attributes}
    assert not [name for name in names if name.startswith("on") or name in ("src", "srcset", "style", "xlink:href")]
    links = [attributes["href"] or "" for _, attributes in elements if "href" in attributes]
    assert links
    assert all(re.fullmatch(r"#case-\d+", link) for link in links)
    assert sum(tag == "style" for tag, _ in elements) == 1


def test_no_text_is_markup_on_the_page(hostile: Report) -> None:
    for report in (hostile, single(hostile)):
        text = to_html(report)
        check_inert(text)
        assert not Elements(text).unbalanced
        assert "&lt;script&gt;document.title=&#x27;owned" in text
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", text)


def test_the_search_for_what_is_not_inert_finds_it(hostile: Report) -> None:
    text = to_html(hostile)
    for bad in ("<script>1</script>", '<p onclick="x">', '<img src="x">', '<a href="javascript:x">', "<style></style>"):
        with pytest.raises(AssertionError):
            check_inert(text.replace("</main>", bad + "</main>"))


def test_the_page_may_load_and_run_nothing(hostile: Report) -> None:
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', to_html(hostile))
    assert re.fullmatch(r"default-src 'none'; style-src 'sha256-[\w+/=]+'; base-uri 'none'; form-action 'none'", policy)


NO_BROWSER = "no chromium here: apt-get install chromium"


class Browser:
    def __init__(self, program: str, folder: Path) -> None:
        self._command = [program, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--no-first-run"]
        self._command += [f"--user-data-dir={folder / 'profile'}", "--disable-background-networking", "--disable-sync"]
        self._folder = folder

    def open(self, page: str, *flags: str) -> tuple[str, list[str]]:
        """What the browser prints, and what its console says."""
        file = self._folder / "page.html"
        file.write_text(page, encoding="utf-8")
        done = subprocess.run([*self._command, *flags, file.as_uri()], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout, re.findall(r"(?m)^.*CONSOLE.*$", done.stderr)


@pytest.fixture
def browser(tmp_path: Path) -> Browser:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip(NO_BROWSER)
    return Browser(found, tmp_path)


def test_a_browser_shows_the_page_and_nothing_in_it_runs(hostile: Report, browser: Browser) -> None:
    loud = to_html(hostile).replace("</main>", "<script>document.title = 'owned'</script></main>")
    _, console = browser.open(loud, "--dump-dom")
    assert len(console) == 1, "the policy would stop a script, and the console would tell"
    for report in (hostile, single(hostile)):
        dom, console = browser.open(to_html(report), "--dump-dom")
        assert console == []
        check_inert(dom)
        title = re.search(r"<title>(.*?)</title>", dom)
        assert title is not None
        assert title[1].startswith("[bold]owned[/nope] &lt;script&gt;document.title='owned'")


def test_a_browser_draws_the_numbers_and_the_plots(record: Record, settings: Settings, browser: Browser, tmp_path: Path) -> None:
    record.filled("exp_1", "before", FIRST)
    record.filled("exp_2", "after", SECOND)
    with read(record, settings) as store:
        report = compare(store, "before", "after", scales=SCALES, sample=sample, trace=trace)
    page = to_html(report)
    _, console = browser.open(page, f"--print-to-pdf={tmp_path / 'page.pdf'}", "--no-pdf-header-footer")
    assert console == []
    printed = " ".join(" ".join(sheet.extract_text() for sheet in PdfReader(tmp_path / "page.pdf").pages).split())
    metrics = report.comparison.metrics if report.comparison else ()
    for one in metrics:
        assert one.name in printed
        assert bounds(one.difference, signed=True) in printed, "the numbers can be seen"
    assert "What is case-00?" in printed
    pictures = []
    for scheme in ("0", "1"):
        shot = tmp_path / f"{scheme}.png"
        flags = (f"--screenshot={shot}", "--window-size=1200,1600", f"--blink-settings=preferredColorScheme={scheme}")
        browser.open(page, *flags)
        pictures.append(shot.read_bytes())
    assert pictures[0] != pictures[1], "dark and light"
    hidden = page.replace(' class="mark"', ' class="nothing" visibility="hidden"')
    browser.open(
        hidden, f"--screenshot={tmp_path / 'hidden.png'}", "--window-size=1200,1600", "--blink-settings=preferredColorScheme=1"
    )
    assert (tmp_path / "hidden.png").read_bytes() != pictures[1], "the plots can be seen"


def test_plots_take_any_numbers() -> None:
    from evals.report.plots import change, distribution, forest

    none = Interval(None, None, None, 0, 0, "none: no values")
    assert "no score" in forest([("m", none)], 0, 1)
    same = estimate([2.0, 2.0])
    for drawn in (forest([("m", same)], 2, 2), distribution([2.0] * 100, 2, 2, same), change(1, 1, 1, 1, 0)):
        assert "nan" not in drawn
        assert "inf" not in drawn
        Elements(drawn)
    assert distribution([0.5] * 60, 0, 1, same).count('class="dot"') == 60
    assert distribution([0.5] * 61, 0, 1, same).count('class="bar"') == 1
