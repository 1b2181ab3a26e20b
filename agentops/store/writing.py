"""Writes journal events into the tables: many at a time, in one transaction with the position they were read up to.

Applying the same events twice changes nothing. An event that makes no sense is counted and passed over, so that it
cannot hold up those behind it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import zstandard
from sqlalchemy import JSON, ColumnElement, Connection, Engine, Table, bindparam, delete, func, select, true, update
from sqlalchemy.dialects.sqlite import insert
from sqlmodel import AutoString

from agentops.settings import Settings
from agentops.store.opening import database_path, translated, writing_engine
from agentops.store.tables import table

log = logging.getLogger("agentops.store")

Event = Mapping[str, Any]
USAGE = ("input_tokens", "output_tokens", "cached_tokens", "computed_tokens", "trimmed_tokens")
# What a later event of a run may change; the rest stays as it was when the run began.
_RUN_CHANGES = ("status", "ended_ns", "output_hash", "pending_hash", "error", "pid", "segment")

_EXPERIMENT_CHANGES = ("status", "ended_ns", "error", "pid", "segment")
_KINDS = ("payload", "prompt", "thread", "run", "span", "checkpoint", "score", "experiment", "case")


@contextmanager
def open_writer(settings: Settings, *, timeout_s: float | None = None) -> Iterator[StoreWriter]:
    """The store for writing, once no other process writes.

    Raises:
        StoreLocked: not within `timeout_s` (`record.lock_timeout_s` when not given).
        StoreTooNew, StoreBroken, RecordError
    """
    wait_s = settings.record.lock_timeout_s if timeout_s is None else timeout_s
    with writing_engine(settings, wait_s) as engine, translated(database_path(settings)):
        yield StoreWriter(engine)


class StoreWriter:
    """Made by `open_writer`; errors of the database leave its block as ours. A `shared` record is written by several homes: of
    what another one writes nothing is taken for dead here."""

    def __init__(self, engine: Engine, *, shared: bool = False) -> None:
        self._engine = engine
        self._shared = shared
        self._compressor = zstandard.ZstdCompressor(level=3)
        self.rejected = 0

    def positions(self) -> dict[str, int]:
        """How far each segment has been read."""
        positions = table("journal_position")
        with self._engine.begin() as connection:
            return {row.segment: row.position for row in connection.execute(select(positions))}

    def apply(self, events: Iterable[Event], positions: Mapping[str, int], lost: Mapping[str, int]) -> None:
        """Stores the events and the positions after them, both or neither."""
        rows = self._rows(events)
        with self._engine.begin() as connection:
            _upsert(connection, table("payload"), rows["payload"], ())
            _upsert(connection, table("prompt_version"), rows["prompt"], ())
            _upsert(connection, table("thread"), rows["thread"], ("last_ns",))
            _upsert(connection, table("run"), rows["run"], _RUN_CHANGES)
            spans = table("span")
            _upsert(connection, spans, rows["span"], tuple(column.name for column in spans.columns if not column.primary_key))
            _sum_usage(connection, sorted({row["run_id"] for row in rows["span"] if row["kind"] == "generation"}))
            _upsert(connection, table("checkpoint"), rows["checkpoint"], ())
            _upsert(connection, table("score"), rows["score"], ())
            _upsert(connection, table("experiment"), rows["experiment"], _EXPERIMENT_CHANGES)
            _upsert(connection, table("experiment_case"), rows["case"], ("run_id", "status", "error"))
            marks = [{"segment": name, "position": place, "lost": lost.get(name, 0)} for name, place in positions.items()]
            if marks:
                place = table("journal_position")
                statement = insert(place)
                changes = {"position": statement.excluded.position, "lost": place.c.lost + statement.excluded.lost}
                connection.execute(statement.on_conflict_do_update(index_elements=["segment"], set_=changes), marks)

    def bury(self, live: Sequence[str], *, home: str) -> int:
        """Marks as crashed what runs or is open in none of the home's live segments; returns the number of runs."""
        with self._engine.begin() as connection:
            crashed = 0
            for name, alive in (("span", "open"), ("experiment", "running"), ("run", "running")):
                rows = table(name)
                dead = update(rows).where(rows.c.status == alive, rows.c.segment.not_in(live), self._of(home, rows.c.segment))
                crashed = connection.execute(dead.values(status="crashed")).rowcount
            return crashed

    def forget(self, existing: Sequence[str], *, home: str) -> None:
        """Drops the positions of the home's segments that are gone."""
        segments = table("journal_position").c.segment
        with self._engine.begin() as connection:
            connection.execute(delete(segments.table).where(segments.not_in(existing), self._of(home, segments)))

    def _of(self, home: str, segment: ColumnElement[str]) -> ColumnElement[bool]:
        # In a home's own file everything is its own, also what was written before segments were named after their home.
        return segment.startswith(f"{home}-", autoescape=True) if self._shared else true()

    def _rows(self, events: Iterable[Event]) -> dict[str, list[dict[str, Any]]]:
        found: dict[str, dict[Any, dict[str, Any]]] = {kind: {} for kind in _KINDS}
        for event in events:
            try:
                self._place(event, found)
            except (KeyError, TypeError, ValueError, OverflowError) as error:
                self.rejected += 1
                log.warning("a journal event makes no sense and was passed over: %s", error)
        return {kind: list(rows.values()) for kind, rows in found.items()}

    def _place(self, event: Event, found: dict[str, dict[Any, dict[str, Any]]]) -> None:
        match event["t"]:
            case "payload":
                if event["hash"] not in found["payload"]:
                    raw = event["data"]
                    row = {**event, "data": self._compressor.compress(raw), "size": len(raw)}
                    found["payload"][event["hash"]] = _fit("payload", row)
            case "prompt":
                row = _fit("prompt_version", {**event, "first_seen_ns": event["ns"]})
                found["prompt"].setdefault((row["name"], row["version"]), row)
            case "run":
                row = _fit("run", event)
                first = found["run"].setdefault(row["id"], row)
                first.update({name: row[name] for name in _RUN_CHANGES})
                ns = int(event["ns"])
                thread = {"id": row["thread_id"], "created_ns": ns, "last_ns": ns}
                found["thread"].setdefault(row["thread_id"], thread)["last_ns"] = ns
            case "span":
                row = _fit("span", event)
                found["span"][row["id"]] = row
            case "checkpoint":
                row = _fit("checkpoint", event)
                found["checkpoint"][row["root_id"], row["place"]] = row
            case "score":
                row = _fit("score", event)
                found["score"][row["id"]] = row
            case "experiment":
                row = _fit("experiment", event)
                found["experiment"].setdefault(row["id"], row).update({name: row[name] for name in _EXPERIMENT_CHANGES})
            case "case":
                row = _fit("experiment_case", event)
                found["case"][row["experiment_id"], row["case_id"]] = row
            case other:
                raise ValueError(f"unknown kind {other!r}")


@cache
def _columns(name: str) -> list[tuple[str, type | None, bool, bool]]:
    """Name, type (`None` for JSON), whether it may be empty, and whether it must be given."""
    found: list[tuple[str, type | None, bool, bool]] = []
    for column in table(name).columns:
        named = column.name in ("run_id", "root_id", "thread_id", "status", "kind", "name")
        needed = column.primary_key or (named and not column.nullable)
        if isinstance(column.type, JSON):
            found.append((column.name, None, False, False))
        else:
            kind = str if isinstance(column.type, AutoString) else column.type.python_type
            found.append((column.name, kind, bool(column.nullable), needed))
    return found


def _fit(name: str, event: Event) -> dict[str, Any]:
    """A row of exactly the table's columns, each of the column's type."""
    row: dict[str, Any] = {}
    for column, kind, nullable, needed in _columns(name):
        value = event.get(column)
        if kind is None:
            row[column] = value if isinstance(value, dict | list) else ([] if column == "tags" else {})
        elif value is None:
            if needed:
                raise ValueError(f"{name}.{column} is missing")
            row[column] = None if nullable else kind()
        elif kind is int:
            row[column] = number = int(value)
            if not -(2**63) <= number < 2**63:
                raise OverflowError(f"{name}.{column} is out of range")
        elif kind is float:
            row[column] = float(value)
        elif isinstance(value, kind):
            row[column] = value
        else:
            raise TypeError(f"{name}.{column} is a {type(value).__name__}")
    return row


def _upsert(connection: Connection, target: Table, rows: list[dict[str, Any]], changes: Sequence[str]) -> None:
    if not rows:
        return
    statement = insert(target)
    keys = [column.name for column in target.primary_key]
    if changes:
        statement = statement.on_conflict_do_update(
            index_elements=keys, set_={name: statement.excluded[name] for name in changes}
        )
    else:
        statement = statement.on_conflict_do_nothing(index_elements=keys)
    connection.execute(statement, rows)


def _sum_usage(connection: Connection, run_ids: list[str]) -> None:
    """A run's tokens are the sum over its generations, whichever process made them and however often it was resumed."""
    if not run_ids:
        return
    runs, spans = table("run"), table("span")
    sums = {
        name: select(func.coalesce(func.sum(spans.c[name]), 0))
        .where(spans.c.run_id == bindparam("the_run"), spans.c.kind == "generation")
        .scalar_subquery()
        for name in USAGE
    }
    statement = update(runs).where(runs.c.id == bindparam("the_run")).values(sums)
    connection.execute(statement, [{"the_run": run_id} for run_id in run_ids])
