"""What a monitoring system is told of the record: counts of runs and spans, the balance, tokens, and histograms of durations.

Everything is summed by the database, in three passes over the spans; no span is read by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import ColumnElement, Row, Text, and_, case, cast, func, or_, select

from agentops.records import Footprint, Timing, Usage
from agentops.store import Store, unredacted
from agentops.store.tables import table

BOUNDS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
"""Upper bounds of the histograms' buckets in seconds; above the last one there is no bound."""


@dataclass(frozen=True, slots=True)
class Histogram:
    """`below` counts the durations up to each of `BOUNDS_S`."""

    count: int = 0
    seconds: float = 0.0
    below: tuple[int, ...] = (0,) * len(BOUNDS_S)

    def __add__(self, other: Histogram) -> Histogram:
        below = tuple(mine + theirs for mine, theirs in zip(self.below, other.below, strict=True))
        return Histogram(self.count + other.count, self.seconds + other.seconds, below)


@dataclass(frozen=True, slots=True)
class Sums:
    """The sums over a graph's runs of what `Store.balance` tells of each; `unbalanced` of them do not balance. `sittings` are the
    durations of its workflow spans that have ended: a run that was taken up again has several."""

    emitted: int
    stored: int
    sampled_out: int
    faults: int
    unbalanced: int
    sittings: Histogram


@dataclass(frozen=True, slots=True)
class Measures:
    """`runs` by graph and status, `graphs` by name; `spans` but for workflows by kind and status, the `durations` of those that
    have ended by kind; `usage`, `timing`, and the footprint of the last call that was answered (where its engine told one), by
    model. `truncated` payloads were cut. `positions` are how far the journal's segments have been read, `damaged` is how many of
    their records could not be."""

    runs: Mapping[tuple[str, str], int]
    graphs: Mapping[str, Sums]
    spans: Mapping[tuple[str, str], int]
    durations: Mapping[str, Histogram]
    usage: Mapping[str, Usage]
    timing: Mapping[str, Timing]
    footprints: Mapping[str, Footprint]
    truncated: int
    damaged: int
    positions: Mapping[str, int] = field(default_factory=dict)


def measure(store: Store) -> Measures:
    """
    Raises:
        StoreLocked, StoreBroken, RecordError
    """
    runs, payloads, places = table("run"), table("payload"), table("journal_position")
    spans: dict[tuple[str, str], int] = {}
    durations: dict[str, Histogram] = {}
    usage: dict[str, Usage] = {}
    timing: dict[str, Timing] = {}
    latest: dict[str, str] = {}
    for row in store._all(_by_kind()):
        spans[row.kind, row.status] = spans.get((row.kind, row.status), 0) + row.number
        durations[row.kind] = durations.get(row.kind, Histogram()) + _histogram(row)
        if row.kind == "generation":
            usage[row.model] = usage.get(row.model, Usage()) + Usage(*(int(getattr(row, name)) for name in _USAGE))
            timing[row.model] = timing.get(row.model, Timing()) + Timing(
                *(float(getattr(row, name)) for name in Timing.__slots__)
            )
            if row.status == "ok":
                latest[row.model] = row.latest.partition(" ")[2]
    segments = store._all(select(places))
    return Measures(
        runs={
            (row.graph, row.status): row.number
            for row in store._all(select(runs.c.graph, runs.c.status, func.count().label("number")).group_by("graph", "status"))
        },
        graphs={
            row.graph: Sums(
                int(row.emitted), int(row.stored), int(row.sampled_out), int(row.faults), int(row.unbalanced), _histogram(row)
            )
            for row in store._all(_by_graph())
        },
        spans=spans,
        durations=durations,
        usage=usage,
        timing=timing,
        footprints={model: held for model, span in latest.items() if (held := _footprint(store, span)) is not None},
        truncated=store._all(select(func.count()).select_from(payloads).where(payloads.c.truncated))[0][0],
        damaged=sum(row.lost for row in segments),
        positions={row.segment: row.position for row in segments},
    )


_USAGE = ("input_tokens", "output_tokens", "cached_tokens", "computed_tokens", "trimmed_tokens")


def _footprint(store: Store, span: str) -> Footprint | None:
    spans = table("span")
    for row in store._all(select(spans.c.attributes).where(spans.c.id == span)):
        held = {name: row.attributes[name] for name in Footprint.__slots__ if name in row.attributes}
        return Footprint(**held) if held else None
    return None


def _by_kind() -> Any:
    spans = table("span")
    keys = spans.c.kind, spans.c.status, func.coalesce(spans.c.model, "").label("model")
    sums = (func.sum(spans.c[name]).label(name) for name in (*_USAGE, *Timing.__slots__))
    # Nanoseconds have as many digits all the time, so that the last in the alphabet is the latest.
    latest = func.max(cast(spans.c.start_ns, Text).concat(" ").concat(spans.c.id)).label("latest")
    measured = _buckets(spans.c.duration_ns, spans.c.status != "open")
    return select(*keys, func.count().label("number"), latest, *sums, *measured).where(spans.c.kind != "workflow").group_by(*keys)


def _by_graph() -> Any:
    """The balance is counted under each workflow span, as its spans are numbered there."""
    spans, roots, runs = table("span"), table("span").alias("root"), table("run")
    last, stored = func.max(spans.c.seq).label("last"), func.count().label("stored")
    under = select(spans.c.run_id, spans.c.root_id, last, stored).group_by(spans.c.run_id, spans.c.root_id).subquery()
    # Few spans have it, and to read the attributes of all takes longer than all the rest.
    left_out = (
        select(spans.c.root_id, func.sum(unredacted(spans)).label("number"))
        .where(cast(spans.c.attributes, Text).contains('"unredacted"'))
        .group_by(spans.c.root_id)
        .subquery()
    )
    told = func.coalesce(roots.c.attributes["emitted"].as_integer(), 0)
    faults = func.coalesce(roots.c.attributes["faults"].as_integer(), 0) + func.coalesce(left_out.c.number, 0)
    emitted = case((told > under.c.last, told), else_=under.c.last)
    sampled_out = func.coalesce(roots.c.attributes["sampled_out"].as_integer(), 0)
    off = case((or_(emitted != under.c.stored + sampled_out, faults > 0), under.c.run_id))
    graph = func.coalesce(runs.c.graph, "").label("graph")
    return (
        select(
            graph,
            func.sum(emitted).label("emitted"),
            func.sum(under.c.stored).label("stored"),
            func.sum(sampled_out).label("sampled_out"),
            func.sum(faults).label("faults"),
            func.count(off.distinct()).label("unbalanced"),
            *_buckets(roots.c.duration_ns, roots.c.status != "open"),
        )
        .select_from(under)
        .outerjoin(roots, roots.c.id == under.c.root_id)
        .outerjoin(runs, runs.c.id == under.c.run_id)
        .outerjoin(left_out, left_out.c.root_id == under.c.root_id)
        .group_by(graph)
    )


def _buckets(duration: ColumnElement[Any], ended: ColumnElement[bool]) -> list[ColumnElement[Any]]:
    known = and_(ended, duration.is_not(None))
    bounds = (func.count().filter(known, duration <= int(bound * 1e9)).label(f"below{n}") for n, bound in enumerate(BOUNDS_S))
    spent = func.coalesce(func.sum(duration).filter(known), 0).label("spent")
    return [func.count().filter(known).label("ended"), spent, *bounds]


def _histogram(row: Row[Any]) -> Histogram:
    below = tuple(getattr(row, f"below{place}") for place in range(len(BOUNDS_S)))
    return Histogram(row.ended, int(row.spent) / 1e9, below)
