"""Numbers of experiments on the screen are those of the report; the worst cases are the worst by each metric's own measure."""

from __future__ import annotations

import math
import random
from typing import Any

from tui_app import opened, press, said, settle
from tui_record import NOW, SECOND, Seeds

from agentops import Settings
from agentops.cli.terminal import _interval
from agentops.store import open_store
from agentops.store.pages import open_pages
from evals.metrics.registry import ENTRIES
from evals.report import Scale as ReportScale
from evals.report import report_of
from tui.screens.evals import CasesScreen, Scale, cases_of, measured, metric_parts
from tui.widgets.detail import Detail
from tui.widgets.table import Table

SCALES = {one.name: Scale(one.low, one.high if math.isfinite(one.high) else None, one.better) for one in ENTRIES.values()}
METRICS = ("faithfulness", "toxicity", "rubric", "latency_ms", "exact", "never_taken")


def experiment(
    seeds: Seeds, key: str, cases: dict[str, tuple[str, str | None]], metrics: tuple[str, ...], start: int = NOW
) -> None:
    about: dict[str, Any] = {"dataset": "d.jsonl", "dataset_hash": "b2:0", "graph": "rag", "status": "done"}
    seeds.events.append(
        {"t": "experiment", "ns": NOW, "id": key, "name": key, "cases": len(cases), "started_ns": start, **about}
        | {"ended_ns": start, "settings": {"metrics": list(metrics)}}
    )
    for place, (case, (status, run)) in enumerate(cases.items()):
        about = {"experiment_id": key, "case_id": case, "place": place, "status": status, "run_id": run}
        seeds.events.append({"t": "case", "ns": NOW, **about})


def score(
    seeds: Seeds, key: str, case: str, run: str, name: str, value: float | None, at: int = NOW, source: str = "code"
) -> None:
    about = {"experiment_id": key, "case_id": case, "run_id": run, "name": name, "value": value, "source": source}
    number = len(seeds.events)
    reason = "" if value is not None else "no_reference"
    seeds.events.append({"t": "score", "ns": at, "id": f"sc_{at}_{number}", "created_ns": at, "reason": reason, **about})


def test_means_intervals_and_reasons_are_those_of_the_report(settings: Settings) -> None:
    draw = random.Random(5)
    seeds = Seeds()
    cases: dict[str, tuple[str, str | None]] = {}
    for place in range(30):
        status = "failed" if place % 9 == 4 else "queued" if place % 9 == 7 else "done"
        run = None if status == "queued" else f"run_{place:02}"
        cases[f"case{place}"] = (status, run)
        if run is not None:
            seeds.run(run, thread_id=f"th_{place // 3}", status=status)
    experiment(seeds, "exp_1", cases, METRICS)
    for case, (status, run) in cases.items():
        for sitting in range(draw.choice((1, 2, 3)) if status == "done" else 0):
            for name in (*METRICS[:-1], "of_their_own"):
                value = float(draw.random() < 0.5) if name == "exact" else draw.random() * (5000 if name == "latency_ms" else 1)
                given = None if draw.random() < 0.1 else 1 + 4 * value if name == "rubric" else value
                score(seeds, "exp_1", case, str(run), name, given, NOW + sitting)
            score(seeds, "exp_1", case, str(run), "faithfulness", 0.0, NOW + 9, source="human")
    seeds.write(settings)
    scales = {
        one.name: ReportScale(one.low, one.high if math.isfinite(one.high) else None, one.better, one.binary)
        for one in ENTRIES.values()
    }
    with open_store(settings) as store, open_pages(settings) as pages:
        arm = report_of(store, experiment="exp_1", scales=scales).arms[0]
        found = cases_of(pages, "exp_1")
        threads = pages.threads({case.row.run_id for case in found if case.row.run_id})
        shown = measured(pages.experiment("exp_1"), found, SCALES, _interval, threads)
    assert [one.name for one in shown] == [one.name for one in arm.metrics] == [*METRICS, "of_their_own"]
    for mine, theirs in zip(shown, arm.metrics, strict=True):
        assert (mine.scored, mine.mean, mine.unscored) == (theirs.scored, theirs.interval.value, dict(theirs.unscored))
        wanted = None if theirs.interval.low is None else (theirs.interval.low, theirs.interval.high)
        assert mine.interval == wanted
        assert mine.scored + sum(mine.unscored.values()) == 30
    assert sum(one.interval is not None for one in shown) > 4


def two(settings: Settings) -> None:
    """Two experiments; the cases of the newer have three metrics of different scales."""
    seeds = Seeds()
    cases: dict[str, tuple[str, str | None]] = {name: ("done", f"run_{name}") for name in "abc"}
    for name in "abc":
        seeds.run(f"run_{name}")
    experiment(seeds, "exp_1", cases, ("faithfulness", "toxicity", "rubric", "latency_ms"))
    experiment(seeds, "exp_0", cases, ("faithfulness",), NOW - SECOND)
    values = {
        "a": {"faithfulness": 0.6, "toxicity": 0.9, "rubric": 5.0, "latency_ms": 10.0},
        "b": {"faithfulness": 0.5, "toxicity": 0.0, "rubric": 2.0, "latency_ms": 900.0},
        "c": {"faithfulness": 0.9, "toxicity": 0.1, "rubric": 4.0},
    }
    for case, given in values.items():
        score(seeds, "exp_1", case, f"run_{case}", "faithfulness", 0.0, NOW - 1)
        score(seeds, "exp_0", case, f"run_{case}", "faithfulness", 0.25)
        for name, value in given.items():
            score(seeds, "exp_1", case, f"run_{case}", name, value)
    seeds.write(settings)


async def test_the_worst_come_first_by_all_metrics_and_by_each(settings: Settings) -> None:
    two(settings)
    async with opened(settings, open_at="evals", scales=SCALES, size=(160, 40)) as (app, pilot):
        shown = {part.text.split()[0]: part.text for part in app.screen.query_one(Detail).parts if "n=" in part.text}
        assert "0.667" in shown["faithfulness"], "scores that were given again count once"
        assert "(less is better)" in shown["toxicity"]
        assert shown["toxicity"].count("█") == 13
        assert shown["rubric"].count("█") == 13
        assert "█" not in shown["latency_ms"]
        await press(pilot, "enter")
        assert isinstance(app.screen, CasesScreen)
        table = app.screen.query_one(Table)

        def order() -> str:
            return "".join(table.rows[key].row.case_id for key in table.keys)

        assert order() == "abc"
        assert "toxicity" in "".join(text for text, _ in table.pieces(0, 150))
        seen = {}
        for name in ("faithfulness", "toxicity", "rubric", "latency_ms"):
            await press(pilot, "down", "s")
            assert name in said(app, "#summary")
            assert table.cursor == 0
            seen[name] = order()
        assert seen == {"faithfulness": "bac", "toxicity": "acb", "rubric": "bca", "latency_ms": "bac"}
        assert "2 of 3 cases are scored, low is better" in said(app, "#summary")
        await press(pilot, "s")
        assert "all metrics" in said(app, "#summary")
        assert order() == "abc"


async def test_metrics_stay_where_the_list_is_answered_after_the_cursor_has_moved(settings: Settings) -> None:
    two(settings)
    async with opened(settings, open_at="evals", scales=SCALES) as (app, pilot):
        table = app.screen.query_one(Table)

        def means() -> str:
            return " ".join(part.text for part in app.screen.query_one(Detail).parts if "n=" in part.text)

        assert "0.667" in means()
        app.screen.read()
        table.move_to(1)
        await settle(pilot)
        assert table.row.row.id == "exp_0"
        assert "0.250" in means()
        app.screen.read()
        table.move_to(0)
        await settle(pilot)
        assert "0.667" in means()


def test_a_metric_that_nobody_knows_is_measured_by_its_own_values() -> None:
    assert Scale(0.0, 8.0).goodness(2.0) == 0.25
    assert Scale(1.0, 5.0, "low").goodness(2.0) == 0.75
    assert Scale(0.0, None, "low").goodness(2.0) is None
    assert Scale().goodness(7.0) == 1.0
    assert metric_parts(()) == []
