"""Writes journal events into the tables: many at a time, in one transaction with the position they were read up to.

Applying the same events twice changes nothing. An event that makes no sense is counted and passed over, so that it
cannot hold up those behind it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from operator import itemgetter
from typing import Any

import zstandard
from sqlalchemy import JSON, ColumnElement, Connection, Engine, Table, delete, func, literal_column, select, true, update
from sqlalchemy.dialects import postgresql, registry, sqlite
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError
from sqlmodel import AutoString

from agentops.settings import Settings
from agentops.store.opening import Database, json_text, open_database
from agentops.store.removing import Removed, remove, shrink, thin
from agentops.store.tables import table

log = logging.getLogger("agentops.store")

Event = Mapping[str, Any]
USAGE = ("input_tokens", "output_tokens", "cached_tokens", "computed_tokens", "trimmed_tokens")
# What a later event of a run may change; the rest stays as it was when the run began.
_RUN_CHANGES = ("status", "ended_ns", "output_hash", "pending_hash", "error", "pid", "segment", "told_ns")
# The home of a run tells it in order. Of several that share a store, one that had died may bring what it knew long after another
# went on with the run.
_STILL_NEWS: ColumnElement[bool] = literal_column(
    "substr(excluded.segment, 1, 31) = substr(run.segment, 1, 31) OR excluded.told_ns >= run.told_ns"
)

_EXPERIMENT_CHANGES = ("status", "ended_ns", "error", "pid", "segment")
_INSERTS: Mapping[str, Callable[[Table], Any]] = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}
_INTEGER = 2**63
_TOLD_ONCE = ("input_hash", "output_hash")
_SENSELESS = (KeyError, TypeError, ValueError, OverflowError)
_CHUNK = 500
_KINDS = ("payload", "prompt", "thread", "run", "span", "checkpoint", "score", "experiment", "case")


@contextmanager
def open_writer(settings: Settings, *, timeout_s: float | None = None) -> Iterator[StoreWriter]:
    """The store for writing, once no other process writes.

    Raises:
        StoreLocked: not within `timeout_s` (`record.lock_timeout_s` when not given).
        StoreTooNew, StoreBroken, StoreUnavailable, RecordError
    """
    database = open_database(settings)
    with database.writer(settings.record.lock_timeout_s if timeout_s is None else timeout_s) as engine:
        yield StoreWriter(engine, database)


class StoreWriter:
    """Made by `open_writer`; errors of the database leave its block as ours."""

    def __init__(self, engine: Engine, database: Database) -> None:
        self._engine = engine
        self._database = database
        self._compressor = zstandard.ZstdCompressor(level=1)
        self.rejected = 0

    def positions(self) -> dict[str, int]:
        """How far each segment has been read."""
        positions = table("journal_position")
        with self._engine.begin() as connection:
            return {row.segment: row.position for row in connection.execute(select(positions))}

    def apply(self, events: Iterable[Event], positions: Mapping[str, int], lost: Mapping[str, int]) -> None:
        """Stores the events and the positions after them, both or neither; what the database refuses for what it is is counted
        and passed over."""
        given, rejected = list(events), self.rejected
        try:
            self._store(self._rows(given), positions, lost)
        except DBAPIError as error:
            if not _unfit(error):
                raise
            self.rejected = rejected
            if len(given) == 1:
                self._pass_over(error.orig or error)
                self._store(self._rows(()), positions, lost)
            else:
                self.apply(given[: len(given) // 2], {}, {})
                self.apply(given[len(given) // 2 :], positions, lost)

    def _store(self, rows: dict[str, list[dict[str, Any]]], positions: Mapping[str, int], lost: Mapping[str, int]) -> None:
        with self._engine.begin() as connection:
            upsert = partial(self._upsert, connection)
            upsert("payload", rows["payload"])
            upsert("prompt_version", rows["prompt"])
            upsert("thread", rows["thread"], ("last_ns",))
            upsert("run", rows["run"], _RUN_CHANGES)
            upsert("span", rows["span"], _changing("span"))
            _sum_usage(connection, sorted({row["run_id"] for row in rows["span"] if row["kind"] == "generation"}))
            upsert("checkpoint", rows["checkpoint"])
            upsert("score", rows["score"])
            upsert("experiment", rows["experiment"], _EXPERIMENT_CHANGES)
            upsert("experiment_case", rows["case"], ("run_id", "status", "error"))
            marks = [{"segment": name, "position": place, "lost": lost.get(name, 0)} for name, place in positions.items()]
            if marks:
                place = table("journal_position")
                statement = _INSERTS[connection.dialect.name](place)
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

    def remove(self, run_ids: Iterable[str], *, keep_results: bool = False) -> Removed:
        """Removes runs with all that belongs to them alone, at once or not at all. Drain the journal before, in the same turn.

        A process that lives names a content for some minutes without giving it again: see `Tracer.payload`. Where one that said
        what is removed still runs, what it says anew in that time may not be found in the record.
        """
        with self._engine.begin() as connection:
            return remove(connection, run_ids, keep_results=keep_results)

    def pin(self, run_id: str, ns: int) -> None:
        """The run stays whatever the rule of retention says; pinning twice changes nothing."""
        with self._engine.begin() as connection:
            self._upsert(connection, "pin", [{"run_id": run_id, "ns": ns}])

    def unpin(self, run_id: str) -> bool:
        """The run goes when the rule says so; False where it was not pinned."""
        pins = table("pin")
        with self._engine.begin() as connection:
            return connection.execute(delete(pins).where(pins.c.run_id == run_id)).rowcount > 0

    def thin(self, run_ids: Iterable[str]) -> Removed:
        """Removes the spans of runs that were sampled out, see `removing.thin`; of recent ones as for `remove`."""
        with self._engine.begin() as connection:
            return thin(connection, run_ids)

    def shrink(self, *, whole: bool = False) -> None:
        """Gives the room of what was removed back, see `removing.shrink`; for a big record it takes a while."""
        shrink(self._engine, whole=whole)

    def _of(self, home: str, segment: ColumnElement[str]) -> ColumnElement[bool]:
        # In a home's own file everything is its own, also what was written before segments were named after their home.
        return segment.startswith(f"{home}-", autoescape=True) if self._database.shared else true()

    def _upsert(self, connection: Connection, name: str, rows: list[dict[str, Any]], changes: tuple[str, ...] = ()) -> None:
        if rows:
            text, order = _upserting(name, changes, connection.dialect.name, connection.dialect.driver)
            # They are fitted to the columns already; to bind them one by one once more takes three times as long as storing.
            values = list(map(order, rows)) if order else [self._database.stored(row, _json_columns(name)) for row in rows]
            connection.exec_driver_sql(text, values)

    def _rows(self, events: Iterable[Event]) -> dict[str, list[dict[str, Any]]]:
        found: dict[str, dict[Any, Any]] = {kind: {} for kind in _KINDS}
        for event in events:
            try:
                self._place(event, found)
            except _SENSELESS as error:
                self._pass_over(error)
        spans = [row for told in found.pop("span").values() if (row := self._last(told)) is not None]
        return {"span": spans, **{kind: list(rows.values()) for kind, rows in found.items()}}

    def _last(self, told: list[Event]) -> dict[str, Any] | None:
        """The row of the last that makes sense of the events of a span, each of which is the whole row as it was then, but for
        its contents, which are told once."""
        found: dict[str, Any] | None = None
        for event in reversed(told):
            if found is None:
                try:
                    found = _fit("span", event)
                except _SENSELESS as error:
                    self._pass_over(error)
            else:
                found |= {name: event[name] for name in _TOLD_ONCE if found[name] is None and isinstance(event.get(name), str)}
        return found

    def _pass_over(self, error: BaseException) -> None:
        self.rejected += 1
        log.warning("a journal event makes no sense and was passed over: %s", error)

    def _place(self, event: Event, found: dict[str, dict[Any, Any]]) -> None:
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
                row = _fit("run", {**event, "told_ns": event["ns"]})
                first = found["run"].setdefault(row["id"], row)
                first.update({name: row[name] for name in _RUN_CHANGES})
                ns = int(event["ns"])
                thread = {"id": row["thread_id"], "created_ns": ns, "last_ns": ns}
                found["thread"].setdefault(row["thread_id"], thread)["last_ns"] = ns
            case "span":
                found["span"].setdefault(event["id"], []).append(event)
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


def _unfit(error: DBAPIError) -> bool:
    """Whether it is a row's own fault: a value out of bounds, or longer than an index of Postgres takes."""
    limit = str(getattr(error.orig, "sqlstate", None)).startswith("54")
    return limit or isinstance(error, DataError | IntegrityError)


@cache
def _columns(name: str) -> list[tuple[str, type | None, Any, bool]]:
    """Name, type (`None` for JSON), what stands for a value that is not there, and whether there must be one."""
    found: list[tuple[str, type | None, Any, bool]] = []
    for column in table(name).columns:
        named = column.name in ("run_id", "root_id", "thread_id", "status", "kind", "name")
        needed = column.primary_key or (named and not column.nullable)
        if isinstance(column.type, JSON):
            found.append((column.name, None, "[]" if column.name == "tags" else "{}", False))
        else:
            kind = str if isinstance(column.type, AutoString) else column.type.python_type
            found.append((column.name, kind, None if column.nullable else kind(), needed))
    return found


def _fit(name: str, event: Event) -> dict[str, Any]:
    """A row of exactly the table's columns, each of the column's type, JSON as text."""
    row: dict[str, Any] = {}
    given = event.get
    for column, kind, nothing, needed in _columns(name):
        value = given(column)
        if value is None:
            if needed:
                raise ValueError(f"{name}.{column} is missing")
            row[column] = nothing
        elif kind is None:
            row[column] = json_text(value) if isinstance(value, dict | list) else nothing
        elif kind is int:
            row[column] = number = int(value)
            if not -_INTEGER <= number < _INTEGER:
                raise OverflowError(f"{name}.{column} is out of range")
        elif type(value) is kind:
            row[column] = value
        elif kind is float:
            row[column] = float(value)
        else:
            raise TypeError(f"{name}.{column} is a {type(value).__name__}")
    return row


@cache
def _upserting(
    name: str, changes: tuple[str, ...], dialect: str, driver: str
) -> tuple[str, Callable[[Any], tuple[Any, ...]] | None]:
    """The statement that adds rows of a table, or changes what may change of them, and what puts a row in the order of its
    parameters where these have no names."""
    target = table(name)
    statement = _INSERTS[dialect](target)
    keys = [column.name for column in target.primary_key]
    if changes:
        now: dict[str, Any] = {name: statement.excluded[name] for name in changes}
        if name == "span":
            now |= {once: func.coalesce(now[once], target.c[once]) for once in _TOLD_ONCE}
        news = _STILL_NEWS if name == "run" else None
        statement = statement.on_conflict_do_update(index_elements=keys, set_=now, where=news)
    else:
        statement = statement.on_conflict_do_nothing(index_elements=keys)
    compiled = statement.compile(dialect=registry.load(f"{dialect}.{driver}")())
    return str(compiled), itemgetter(*compiled.positiontup) if compiled.positiontup else None


@cache
def _json_columns(name: str) -> tuple[str, ...]:
    return tuple(column.name for column in table(name).columns if isinstance(column.type, JSON))


@cache
def _changing(name: str) -> tuple[str, ...]:
    return tuple(column.name for column in table(name).columns if not column.primary_key)


def _sum_usage(connection: Connection, run_ids: list[str]) -> None:
    """A run's tokens are the sum over its generations, whichever process made them and however often it was resumed."""
    runs, spans = table("run"), table("span")
    for at in range(0, len(run_ids), _CHUNK):
        mine = spans.c.run_id.in_(run_ids[at : at + _CHUNK]), spans.c.kind == "generation"
        sums = select(spans.c.run_id, *(func.sum(spans.c[name]).label(name) for name in USAGE)).where(*mine)
        told = sums.group_by(spans.c.run_id).subquery()
        connection.execute(update(runs).where(runs.c.id == told.c.run_id).values({name: told.c[name] for name in USAGE}))
