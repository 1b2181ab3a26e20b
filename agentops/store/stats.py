"""Sums over the record: how many, how long, how often in error, how many tokens, by graph, node, model or prompt version.

Percentiles are exact, by nearest rank: the least duration that so many of a hundred do not exceed. The database ranks them, so
that no span is read for them one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from sqlalchemy import ColumnElement, Row, Select, case, func, select

from agentops.records import Usage
from agentops.store import Store
from agentops.store.tables import table

Grouping = Literal["graph", "node", "model", "prompt"]
GROUPINGS: tuple[Grouping, ...] = get_args(Grouping)


@dataclass(frozen=True, slots=True)
class Group:
    """What has the same `key`: (graph,), (graph, node), (model,) or (prompt, version).

    `count` runs, or spans of that node, or model calls; `errors` of them failed or crashed. Durations are of those that have
    ended, in nanoseconds, `None` where none has. `usage` is by model, because models have prices.
    """

    key: tuple[str, ...]
    count: int
    errors: int
    p50_ns: int | None
    p95_ns: int | None
    usage: dict[str, Usage]

    @property
    def tokens(self) -> Usage:
        """Over all models."""
        return sum(self.usage.values(), Usage())


def groups(store: Store, by: Grouping, *, since_ns: int | None = None, graph: str | None = None) -> list[Group]:
    """Of the runs that began since, of one graph or of all; those with most time in all first."""
    spent = _usage(store, by, since_ns, graph)
    return [
        Group(key, row.number, int(row.errors), row.p50, row.p95, spent.get(key, {}))
        for row in store._all(_measured(by, since_ns, graph))
        for key in [_key(row, by)]
    ]


def _measured(by: Grouping, since_ns: int | None, graph: str | None) -> Select[Any]:
    runs, spans = table("run"), table("span")
    duration: ColumnElement[Any] = spans.c.duration_ns
    failed = spans.c.status.in_(("error", "crashed"))
    if by == "graph":
        # One that waits for a person has not ended, though it says since when it waits.
        duration = case((runs.c.status.in_(("done", "failed", "cancelled")), runs.c.ended_ns - runs.c.started_ns))
        failed = runs.c.status.in_(("failed", "crashed"))
    wanted: Select[Any] = select(*_columns(by), duration.label("ns"), case((failed, 1), else_=0).label("failed"))
    if by != "graph":
        wanted = wanted.join_from(spans, runs, runs.c.id == spans.c.run_id).where(_of_kind(by))
    one = _limited(wanted, since_ns, graph).subquery()
    keys = [one.c[f"key{place}"] for place in range(len(_columns(by)))]
    # Those without a duration come last, and the others' places count up to the number of them.
    place = func.row_number().over(partition_by=keys, order_by=(one.c.ns.is_(None), one.c.ns))
    ranked = select(one, place.label("place"), func.count(one.c.ns).over(partition_by=keys).label("ended")).subquery()
    names = [ranked.c[f"key{place}"] for place in range(len(keys))]

    def percentile(hundredths: int) -> ColumnElement[Any]:
        return func.max(case((ranked.c.place == (ranked.c.ended * hundredths + 99) // 100, ranked.c.ns)))

    return (
        select(
            *names,
            func.count().label("number"),
            func.sum(ranked.c.failed).label("errors"),
            percentile(50).label("p50"),
            percentile(95).label("p95"),
        )
        .group_by(*names)
        .order_by(func.sum(ranked.c.ns).desc().nulls_last(), *names)
    )


def _usage(store: Store, by: Grouping, since_ns: int | None, graph: str | None) -> dict[tuple[str, ...], dict[str, Usage]]:
    runs, spans = table("run"), table("span")
    names = ("input_tokens", "output_tokens", "cached_tokens", "computed_tokens", "trimmed_tokens")
    keys = _columns(by)
    model = func.coalesce(spans.c.model, "")
    query = (
        select(*keys, model.label("model"), *(func.sum(spans.c[name]).label(name) for name in names))
        .join_from(spans, runs, runs.c.id == spans.c.run_id)
        .where(spans.c.kind == "generation", *([_of_kind(by)] if by == "prompt" else []))
        .group_by(*keys, model)
    )
    found: dict[tuple[str, ...], dict[str, Usage]] = {}
    for row in store._all(_limited(query, since_ns, graph)):
        found.setdefault(_key(row, by), {})[row.model] = Usage(*(int(getattr(row, name)) for name in names))
    return found


def _columns(by: Grouping) -> list[ColumnElement[Any]]:
    runs, spans = table("run"), table("span")
    columns: dict[Grouping, Sequence[ColumnElement[Any]]] = {
        "graph": (runs.c.graph,),
        "node": (runs.c.graph, spans.c.node),
        "model": (spans.c.model,),
        "prompt": (spans.c.prompt_name, spans.c.prompt_version),
    }
    return [func.coalesce(column, "").label(f"key{place}") for place, column in enumerate(columns[by])]


def _of_kind(by: Grouping) -> ColumnElement[bool]:
    spans = table("span")
    if by == "node":
        return spans.c.kind == "node"
    return (spans.c.kind == "generation") & spans.c.prompt_name.is_not(None) if by == "prompt" else spans.c.kind == "generation"


def _limited(query: Select[Any], since_ns: int | None, graph: str | None) -> Select[Any]:
    runs = table("run")
    if since_ns is not None:
        query = query.where(runs.c.started_ns >= since_ns)
    return query if graph is None else query.where(runs.c.graph == graph)


def _key(row: Row[Any], by: Grouping) -> tuple[str, ...]:
    return tuple(getattr(row, f"key{place}") for place in range(len(_columns(by))))
