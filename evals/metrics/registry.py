"""The metrics by name: what each needs to be made, what it reads of a sample, and its scale.

Names and scales are known without loading what computes them, so that a wrong name is told before a model is loaded, and old
scores can be reported without one. `make_metrics` makes those that are asked for, and opens the judge once for all of them.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import util
from typing import TYPE_CHECKING, Literal

from agentops.errors import UsageError
from agentops.text import one_line
from evals.metrics import Metric
from evals.samples import Reference

if TYPE_CHECKING:
    from agentops.engine import Engine
    from agentops.retrieval import Embedder
    from agentops.settings import Settings

Group = Literal["native", "ragas", "hallucination", "toxicity"]


@dataclass(frozen=True, slots=True)
class Entry:
    """A metric that can be made. `reads` are the fields of a sample that it depends on, `expects` those of the reference;
    `judged` says that a judge gives verdicts for it, `binary` that a case is at one of its bounds and never between, and `own`
    that it is taken without being asked for wherever what it depends on is there."""

    name: str
    group: Group
    reads: frozenset[str]
    expects: frozenset[str] = frozenset()
    low: float = 0.0
    high: float = 1.0
    better: str = "high"
    judged: bool = False
    binary: bool = False
    own: bool = False


def _entry(name: str, group: Group, reads: str, expects: str = "", **about: object) -> Entry:
    return Entry(name, group, frozenset(reads.split()), frozenset(expects.split()), **about)  # type: ignore[arg-type]


_SAID = "question answer contexts"

ENTRIES: Mapping[str, Entry] = {
    entry.name: entry
    for entry in (
        _entry("faithfulness", "ragas", _SAID, judged=True, own=True),
        _entry("answer_relevancy", "ragas", "question answer", judged=True, own=True),
        _entry("context_precision", "ragas", "question contexts", "answer", judged=True),
        _entry("context_precision_without_reference", "ragas", _SAID, judged=True),
        _entry("context_recall", "ragas", "question contexts", "answer", judged=True, own=True),
        _entry("factual_correctness", "ragas", "question answer", "answer", judged=True, own=True),
        _entry("topic_adherence", "ragas", "messages tool_calls question answer", "topics", judged=True, own=True),
        _entry("agent_goal_accuracy", "ragas", "messages tool_calls question answer", "goal", judged=True, binary=True, own=True),
        _entry("tool_call_accuracy", "ragas", "tool_calls", "trajectory"),
        _entry("tool_call_f1", "ragas", "tool_calls", "trajectory", own=True),
        _entry("rubric", "ragas", "question answer contexts", "rubric", low=1.0, high=5.0, judged=True, own=True),
        _entry("hallucination", "hallucination", _SAID, better="low", judged=True, own=True),
        _entry("toxicity", "toxicity", "answer", better="low", own=True),
        _entry("citations_resolve", "native", "answer cited contexts output", own=True),
        _entry("citations_support", "native", "answer cited contexts output", own=True),
        _entry("recall_at_5", "native", "contexts", "contexts", own=True),
        _entry("recall_at_10", "native", "contexts", "contexts"),
        _entry("ndcg_at_5", "native", "contexts", "contexts"),
        _entry("ndcg_at_10", "native", "contexts", "contexts", own=True),
        _entry("mrr", "native", "contexts", "contexts", own=True),
        _entry("trajectory_strict", "native", "tool_calls", "trajectory", binary=True, own=True),
        _entry("trajectory_unordered", "native", "tool_calls", "trajectory", binary=True),
        _entry("trajectory_subset", "native", "tool_calls", "trajectory", binary=True),
        _entry("trajectory_superset", "native", "tool_calls", "trajectory", binary=True),
        _entry("json_schema", "native", "output answer", "schema", binary=True, own=True),
        _entry("exact", "native", "answer", "answer", binary=True),
        _entry("regex", "native", "answer", "pattern", binary=True, own=True),
        _entry("latency_ms", "native", "", high=math.inf, better="low", own=True),
        _entry("tokens", "native", "", high=math.inf, better="low", own=True),
        _entry("cost", "native", "", high=math.inf, better="low"),
    )
}
"""All metrics. Which ones there are, and their scales, are held to what makes them by a test."""


def chosen(names: Iterable[str]) -> tuple[str, ...]:
    """Names of metrics, each once; `all` stands for all of them.

    Raises:
        UsageError: there is no such metric.
    """
    found: dict[str, None] = {}
    for name in names:
        if name == "all":
            found.update(dict.fromkeys(ENTRIES))
        elif name in ENTRIES:
            found[name] = None
        else:
            near = get_close_matches(name, ENTRIES, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(ENTRIES)}"
            raise UsageError(f"no metric is called '{one_line(name, 60)}'", hint=hint)
    return tuple(found)


def fitting(references: Iterable[Reference]) -> tuple[str, ...]:
    """The metrics that are taken where none are asked for: those that say something without a reference, and those whose
    reference some of the cases have. Where ragas is not installed, its metrics are left out."""
    given = {name for one in references for name in Reference.__dataclass_fields__ if getattr(one, name) is not None}
    judged = util.find_spec("ragas") is not None
    return tuple(
        entry.name for entry in ENTRIES.values() if entry.own and entry.expects <= given and (judged or entry.group != "ragas")
    )


def needs_model(names: Iterable[str], settings: Settings) -> bool:
    """Whether one of these metrics needs the engine: to be asked, or to find things likely."""
    asks_elsewhere = bool(settings.judge.url) and settings.judge.how != "computed"
    return any(ENTRIES[name].group == "hallucination" or (ENTRIES[name].judged and not asks_elsewhere) for name in names)


def needs_judge(names: Iterable[str]) -> bool:
    """Whether a judge gives verdicts for one of these metrics."""
    return any(ENTRIES[name].judged for name in names)


def needs_embedder(names: Iterable[str]) -> bool:
    """Whether one of these metrics compares vectors."""
    return any(ENTRIES[name].judged or ENTRIES[name].group == "toxicity" for name in names)


@asynccontextmanager
async def make_metrics(
    names: Sequence[str], settings: Settings, *, engine: Callable[[], Engine], embedder: Callable[[], Embedder]
) -> AsyncIterator[list[Metric]]:
    """The metrics of these names, in their order; what they open is closed at the end. `engine` and `embedder` are called where
    one of them needs it.

    Raises:
        UsageError: a name is wrong, or what a metric needs is not installed.
        SettingsError: the judge's settings, or the prices, cannot be right.
    """
    from evals.judge import open_judge

    wanted = chosen(names)
    groups = {ENTRIES[name].group for name in wanted}
    judge = None
    if needs_judge(wanted):
        # The same judge for whatever is asked for, since the versions of the metrics name it.
        judge = open_judge(settings, engine() if needs_model(wanted, settings) else None, embedder())
    try:
        made: dict[str, Metric] = {}
        if "native" in groups:
            from agentops.prices import load_prices
            from evals.metrics.native import native_metrics

            made |= native_metrics(prices=load_prices(settings) if "cost" in wanted else None)
        if "hallucination" in groups:
            from evals.metrics.hallucination import Hallucination

            made["hallucination"] = Hallucination(engine(), judge)
        if "toxicity" in groups:
            from evals.metrics.toxicity import Toxicity

            made["toxicity"] = Toxicity(embedder())
        if "ragas" in groups:
            from evals.metrics.ragas import ragas_metrics

            made |= ragas_metrics(judge, embedder() if needs_embedder(wanted) else None)
        yield [made[name] for name in wanted]
    finally:
        if judge is not None:
            await judge.close()
