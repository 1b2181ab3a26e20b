"""Sums over the record are what a plain count over its rows gives, and runs that are there are in them."""

from __future__ import annotations

import csv
import io
import json
import math
import random
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict

import pytest
from langgraph.graph import START, StateGraph
from langgraph.runtime import Runtime as Node
from typer.testing import CliRunner

from agentops import Context, Runtime, ScriptedEngine, Settings
from agentops.cli import app
from agentops.engine import generate
from agentops.records import Message, Request, Usage
from agentops.store import open_store, open_writer
from agentops.store.stats import GROUPINGS, Group, Grouping, groups


def seeded(count: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Runs and spans of every kind and status, with numbers that repeat."""
    draw = random.Random(4)
    runs, spans = [], []
    for number in range(count):
        status = draw.choice(["done", "done", "done", "failed", "waiting", "running", "crashed", "cancelled", "queued"])
        began = 1_000 + number
        ended = None if status in ("running", "crashed") else began + draw.choice([5, 10, 10, 500])
        run = {"id": f"run_{number:03}", "thread_id": "th_1", "graph": draw.choice(["rag", "./a.py:graph"]), "status": status}
        runs.append({"t": "run", "ns": began, "started_ns": began, "ended_ns": ended, "segment": "a.seg", **run})
        for place in range(draw.randrange(5)):
            kind = draw.choice(["node", "generation", "tool"])
            span = {"id": f"sp_{number:03}_{place}", "run_id": run["id"], "root_id": f"sp_{number:03}_0", "seq": place + 1}
            span |= {
                "kind": kind,
                "name": "x",
                "status": draw.choice(["ok", "ok", "error", "open", "crashed"]),
                "start_ns": began,
            }
            span |= {"duration_ns": None if span["status"] in ("open", "crashed") else draw.randrange(1, 30)}
            span |= {"node": draw.choice(["a", "b", None]), "segment": "a.seg"}
            if kind == "generation":
                tokens, cached = draw.randrange(100), draw.randrange(10)
                span |= {"model": draw.choice(["m", "n"]), "prompt_name": draw.choice(["p", None]), "prompt_version": "b2:1"}
                span |= {"input_tokens": tokens + cached, "cached_tokens": cached, "computed_tokens": tokens, "output_tokens": 3}
            spans.append({"t": "span", "ns": began, **span})
    return runs, spans


def counted(runs: list[Any], spans: list[Any], by: Grouping, since: int, graph: str | None) -> dict[tuple[str, ...], Group]:
    of = {run["id"]: run for run in runs if run["started_ns"] >= since and graph in (None, run["graph"])}
    keys: dict[Grouping, Callable[[Any], tuple[Any, ...]]] = {
        "graph": lambda one: (of[one.get("run_id", one["id"])]["graph"],),
        "node": lambda one: (of[one["run_id"]]["graph"], one["node"]),
        "model": lambda one: (one["model"],),
        "prompt": lambda one: (one["prompt_name"], one["prompt_version"]),
    }
    mine = [span for span in spans if span["run_id"] in of]
    calls = [span for span in mine if span["kind"] == "generation" and (by != "prompt" or span["prompt_name"])]
    units = {"graph": list(of.values()), "node": [one for one in mine if one["kind"] == "node"]}.get(by, calls)
    found: dict[tuple[str, ...], list[Any]] = defaultdict(list)
    for one in units:
        found[tuple(part or "" for part in keys[by](one))].append(one)
    spent: dict[tuple[str, ...], dict[str, Usage]] = defaultdict(lambda: defaultdict(Usage))
    for call in calls:
        key = tuple(part or "" for part in keys[by](call))
        spent[key][call["model"]] += Usage(call["input_tokens"], 3, call["cached_tokens"], call["computed_tokens"])

    def took(one: Any) -> int | None:
        if by != "graph":
            return one["duration_ns"]  # type: ignore[no-any-return]
        return one["ended_ns"] - one["started_ns"] if one["status"] in ("done", "failed", "cancelled") else None

    def at(one: list[Any], share: float) -> int | None:
        times = sorted(ns for part in one if (ns := took(part)) is not None)
        return times[math.ceil(share * len(times)) - 1] if times else None

    bad = ("failed", "crashed", "error")
    return {
        key: Group(key, len(one), sum(p["status"] in bad for p in one), at(one, 0.5), at(one, 0.95), dict(spent.get(key, {})))
        for key, one in found.items()
    }


@pytest.mark.parametrize("graph", [None, "rag"])
@pytest.mark.parametrize("since", [0, 1_100])
@pytest.mark.parametrize("by", GROUPINGS)
def test_they_are_what_a_plain_count_gives(either_settings: Settings, by: Grouping, since: int, graph: str | None) -> None:
    runs, spans = seeded(200)
    with open_writer(either_settings) as writer:
        writer.apply([*runs, *spans], {}, {})
    with open_store(either_settings) as store:
        found = groups(store, by, since_ns=since or None, graph=graph)
    assert {one.key: one for one in found} == counted(runs, spans, by, since, graph)
    assert len(found) == len({one.key for one in found})


class State(TypedDict, total=False):
    said: str


def told(settings: Settings, *arguments: str) -> str:
    environment = {"AGENTOPS_PATHS_HOME": str(settings.paths.home), "AGENTOPS_COST_PRICES": "scripted=2/1/10"}
    done = CliRunner().invoke(app, ["stats", *arguments], env=environment)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_runs_are_told_as_a_table_as_json_and_as_csv(settings: Settings) -> None:
    async def ask(state: State, runtime: Node[Context]) -> State:
        done = await generate(runtime.context.engine, Request(messages=(Message("user", "what is tea?"),), max_tokens=20))
        return {"said": done.text}

    graph = StateGraph(State, context_schema=Context).add_node("ask", ask).add_edge(START, "ask").compile()
    assert told(settings) == "nothing on record\n"
    with Runtime(settings, engine=ScriptedEngine({"": "a leaf in water"})) as runtime:
        first = runtime.run(graph, {"said": ""})
        runtime.run(graph, {"said": ""})
    rows = json.loads(told(settings, "--json"))
    assert list(rows) == ["graph", "node", "model", "prompt"]
    (of_graph,), (of_node,), (of_model,) = rows["graph"], rows["node"], rows["model"]
    assert (of_graph["count"], of_graph["errors"], of_node["node"], of_model["model"]) == (2, 0, "ask", "scripted")
    assert of_graph["p95_ms"] >= of_graph["p50_ms"] > of_node["p50_ms"] >= of_model["p50_ms"] > 0
    usage = first.usage
    assert of_model["output_tokens"] == of_graph["output_tokens"] == 2 * usage.output_tokens
    assert of_model["cached_tokens"] > 0
    computed = of_model["input_tokens"] - of_model["cached_tokens"]
    assert of_model["cost"] == pytest.approx((2 * computed + of_model["cached_tokens"] + 10 * of_model["output_tokens"]) / 1e6)
    lines = list(csv.DictReader(io.StringIO(told(settings, "--by", "node", "--csv"))))
    assert [(line["by"], line["part"], line["count"]) for line in lines] == [("node", "ask", "2")]
    table = told(settings, "--since", "1h")
    assert all(word in table for word in ("graph", "node", "model", "scripted", "ask", "cost"))
    assert told(settings, "--since", "2100-01-01") == "nothing on record\n"


def test_what_is_no_grouping_is_refused(settings: Settings, tmp_path: Path) -> None:
    from agentops.errors import UsageError

    done = CliRunner().invoke(app, ["stats", "--by", "weather"], env={"AGENTOPS_PATHS_HOME": str(tmp_path)})
    assert isinstance(done.exception, UsageError)
    assert "graph, node, model, prompt" in str(done.exception.hint)


def test_a_model_without_a_price_leaves_the_cost_open(settings: Settings) -> None:
    runs, spans = seeded(50)
    with open_writer(settings) as writer:
        writer.apply([*runs, *spans], {}, {})
    environment = {"AGENTOPS_PATHS_HOME": str(settings.paths.home), "AGENTOPS_COST_PRICES": "m=1/1/1"}
    rows = json.loads(CliRunner().invoke(app, ["stats", "--json"], env=environment).stdout)
    assert {row["model"]: row["cost"] is None for row in rows["model"]} == {"m": False, "n": True}
    assert all(row["cost"] is None for row in rows["graph"])
