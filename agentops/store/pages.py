"""What a screen shows of the record: rows in pages by key, sums for meters, and a token that tells when something changed.

A list is a vector of keys in the order asked for (row numbers in the order in which they came, eight bytes each), and the rows
of the keys that are seen; no page is found by counting from the start. Payloads are read for one row at a time.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NamedTuple

import zstandard
from sqlalchemy import ColumnClause, Connection, Select, column, func, or_, select

from agentops.errors import RecordError, StoreTooNew
from agentops.records import RunStatus, SpanKind, SpanStatus
from agentops.settings import Settings
from agentops.store import Store
from agentops.store.opening import HEAD, REVISIONS, open_database
from agentops.store.tables import table

Sort = Literal["started", "time", "tokens", "graph", "status"]
SORTS: tuple[Sort, ...] = ("started", "time", "tokens", "graph", "status")
_ROWID: ColumnClause[int] = column("rowid")
_CHUNK = 500
NEWEST_SPANS = 20_000
"""Meters read the calls among so many spans: more would hold up the screen on a big record."""
NEWEST_INPUTS, INPUT_BYTES = 5_000, 32 * 1024 * 1024
"""Words are searched in the inputs of so many runs, the newest, and in so much JSON together."""


@dataclass(frozen=True, slots=True)
class RunFilter:
    """Which runs are wanted. An empty part wants all; several values of one part want any of them; every word of `words` must
    be in the id, thread, graph, error or input (letters of either case)."""

    statuses: tuple[str, ...] = ()
    graphs: tuple[str, ...] = ()
    threads: tuple[str, ...] = ()
    since_ns: int | None = None
    words: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RunLine:
    """A run as a list shows it. `segment` names the journal file that its process holds while it lives."""

    key: int
    id: str
    thread_id: str
    graph: str
    status: RunStatus
    started_ns: int
    ended_ns: int | None
    error: str | None
    pid: int
    segment: str
    input_hash: str | None
    input_tokens: int
    output_tokens: int
    cached_tokens: int

    @property
    def duration_ns(self) -> int | None:
        return None if self.ended_ns is None else self.ended_ns - self.started_ns


class SpanLine(NamedTuple):
    """A span as a trace shows it, without attributes and contents."""

    key: int
    id: str
    parent_id: str | None
    root_id: str
    kind: SpanKind
    name: str
    status: SpanStatus
    start_ns: int
    duration_ns: int | None
    input_tokens: int
    output_tokens: int
    cached_tokens: int


class CallLine(NamedTuple):
    """A model call as meters need it; times in milliseconds."""

    run_id: str
    model: str | None
    status: SpanStatus
    start_ns: int
    duration_ns: int | None
    input_tokens: int
    output_tokens: int
    cached_tokens: int
    queue_ms: float
    prefill_ms: float
    decode_ms: float


def open_pages(settings: Settings, *, wait_s: float = 0.25) -> Pages:
    """The record that is there; `wait_s` is how long one reading waits for a lock.

    Raises:
        StoreLocked, StoreTooNew, StoreBroken, RecordError: among them that there is no record, or an older one.
    """
    database = open_database(settings)
    with database.translated():
        found = database.version(wait_s)
    if found != HEAD:
        place = database.where
        said = f"there is no record at {place}" if found is None else f"the record at {place} is of an older version"
        raise RecordError(said, hint="any verb that reads it makes or upgrades it: agentops runs")
    return Pages(replace(settings, record=replace(settings.record, lock_timeout_s=wait_s)))


class Pages(Store):
    """A reader for a screen. It belongs to one thread; close it."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._place = self._database.identity()
        self._watch: Connection | None = None
        self._seen = -1
        self._inputs: dict[str, str] = {}
        self.searched: int | None = None
        """In how many inputs the words of the last list were looked for, where not in all; the newest were."""

    def close(self) -> None:
        if self._watch is not None:
            self._watch.close()
        super().close()

    def change(self) -> int:
        """A number that differs from the one before when somebody has written since.

        Raises:
            RecordError: the record is gone, or is another one than was opened.
            StoreTooNew: it was upgraded meanwhile.
            StoreLocked, StoreBroken, StoreUnavailable
        """
        if self._database.identity() != self._place:
            raise RecordError(f"the record at {self._database.where} was replaced by another", hint="it is opened anew")
        with self._database.translated():
            if self._watch is not None and self._watch.invalidated:
                # The server went away since.
                self._watch.close()
                self._watch = None
            if self._watch is None:
                self._watch = self._engine.connect()
            now = self._database.changes(self._watch)
            if now != self._seen:
                schema = str(self._watch.exec_driver_sql("SELECT version_num FROM alembic_version").scalar_one())
                if schema not in REVISIONS:
                    raise StoreTooNew(
                        f"the record is now one of a newer version of this program (schema {schema}, this one knows {HEAD})",
                        hint="upgrade agentops-runtime, and open the screen again",
                    )
                self._seen = now
        return now

    def run_keys(self, wanted: RunFilter, sort: Sort, *, descending: bool = True, limit: int | None = None) -> array[int]:
        """Keys of the runs wanted, in order; the first `limit` of them."""
        runs = table("run")
        order = {
            "started": (runs.c.started_ns, runs.c.id),
            "time": (runs.c.ended_ns - runs.c.started_ns, runs.c.id),
            "tokens": (runs.c.input_tokens + runs.c.output_tokens, runs.c.id),
            "graph": (runs.c.graph, runs.c.started_ns, runs.c.id),
            "status": (runs.c.status, runs.c.started_ns, runs.c.id),
        }[sort]
        # Runs without an end come where SQLite puts them by itself.
        ordered = [one.desc().nulls_last() if descending else one.asc().nulls_first() for one in order]
        return self._keys(self._wanted(wanted).order_by(*ordered).limit(limit))

    def new_run_keys(self, wanted: RunFilter, after: int) -> array[int]:
        """Keys above `after` of runs wanted, newest first: what came since a vector was read."""
        runs = table("run")
        return self._keys(self._wanted(wanted).where(after < _ROWID).order_by(runs.c.started_ns.desc(), runs.c.id.desc()))

    def last_run_key(self) -> int:
        """The highest key of all runs, 0 where there are none."""
        return int(self._plain(select(func.coalesce(func.max(_ROWID), 0)).select_from(table("run")))[0][0])

    def run_lines(self, keys: Iterable[int]) -> dict[int, RunLine]:
        """The rows of these keys; what is gone is left out."""
        runs = table("run")
        columns = [runs.c[name] for name in _RUN_LINE]
        found: dict[int, RunLine] = {}
        for part in _parts(keys):
            for row in self._plain(select(_ROWID, *columns).select_from(runs).where(_ROWID.in_(part))):
                found[row[0]] = RunLine(*row)
        return found

    def run_line(self, run_id: str) -> RunLine | None:
        """One run by its whole id."""
        runs = table("run")
        rows = self._plain(select(_ROWID).select_from(runs).where(runs.c.id == run_id))
        return self.run_lines([rows[0][0]]).get(rows[0][0]) if rows else None

    def statuses(self) -> dict[str, int]:
        """How many runs there are of each status."""
        runs = table("run")
        return {row[0]: row[1] for row in self._plain(select(runs.c.status, func.count()).group_by(runs.c.status))}

    def span_lines(self, run_id: str, *, after: int = 0) -> list[SpanLine]:
        """A run's spans in the order in which they started, those with a key above `after`."""
        spans = table("span")
        query = _span_columns().where(spans.c.run_id == run_id).order_by(spans.c.start_ns, spans.c.seq, spans.c.id)
        if after:
            query = query.where(after < _ROWID)
        return [SpanLine._make(row) for row in self._plain(query)]

    def span_lines_of(self, keys: Iterable[int]) -> list[SpanLine]:
        """The spans of these keys as they are now."""
        return [SpanLine._make(row) for part in _parts(keys) for row in self._plain(_span_columns().where(_ROWID.in_(part)))]

    def calls(self, *, since_ns: int = 0) -> list[CallLine]:
        """The model calls among the newest spans that are kept, those that started since; in the order of their keys."""
        spans = table("span")
        last = select(_ROWID).select_from(spans).order_by(_ROWID.desc()).limit(NEWEST_SPANS).subquery()
        newest = select(func.min(last.c.rowid)).scalar_subquery()
        query = (
            select(*(spans.c[name] for name in CallLine._fields))
            .where(newest <= _ROWID, spans.c.kind == "generation", spans.c.start_ns >= since_ns)
            .order_by(_ROWID)
        )
        return [CallLine._make(row) for row in self._plain(query)]

    def threads(self, run_ids: Iterable[str]) -> dict[str, str]:
        """The thread of each of these runs."""
        runs = table("run")
        wanted, found = list(run_ids), {}
        for at in range(0, len(wanted), _CHUNK):
            query = select(runs.c.id, runs.c.thread_id).where(runs.c.id.in_(wanted[at : at + _CHUNK]))
            found.update({row[0]: row[1] for row in self._plain(query)})
        return found

    def case_counts(self) -> dict[str, dict[str, int]]:
        """How many cases of each experiment are in which status."""
        cases = table("experiment_case")
        grouped = select(cases.c.experiment_id, cases.c.status, func.count()).group_by(cases.c.experiment_id, cases.c.status)
        found: dict[str, dict[str, int]] = {}
        for experiment, status, count in self._plain(grouped):
            found.setdefault(experiment, {})[status] = count
        return found

    def _wanted(self, wanted: RunFilter) -> Select[Any]:
        """The keys of the runs wanted, without an order."""
        query = _filtered(wanted)
        self.searched = None
        if wanted.words:
            runs = table("run")
            inputs = self._input_texts(query)
            for word in wanted.words:
                small = word.lower()
                listed = self._database.listed([key for key, text in inputs.items() if small in text])
                places = (_has(runs.c[name], word) for name in ("id", "thread_id", "graph", "error"))
                query = query.where(or_(*places, runs.c.input_hash.in_(listed)))
        return query

    def _input_texts(self, query: Select[Any]) -> dict[str, str]:
        """What the newest of these runs were started with, in small letters, by the hash; it is kept for the next question."""
        runs, payloads = table("run"), table("payload")
        newest = (
            query.with_only_columns(payloads.c.hash, payloads.c.size)
            .join(payloads, payloads.c.hash == runs.c.input_hash)
            .order_by(runs.c.started_ns.desc(), runs.c.id.desc())
            .limit(NEWEST_INPUTS + 1)
        )
        keys: set[str] = set()
        left = INPUT_BYTES
        for place, (key, size) in enumerate(self._plain(newest)):
            left -= 0 if key in keys else size
            if place == NEWEST_INPUTS or left < 0:
                self.searched = place
                break
            keys.add(key)
        missing = [key for key in keys if key not in self._inputs]
        self._inputs = {key: text for key, text in self._inputs.items() if key in keys}
        unpacked = zstandard.ZstdDecompressor()
        for at in range(0, len(missing), _CHUNK):
            for row in self._plain(select(payloads).where(payloads.c.hash.in_(missing[at : at + _CHUNK]))):
                # What is damaged has no words, and says so where it is opened.
                with suppress(ValueError, RecursionError, zstandard.ZstdError):
                    value = json.loads(unpacked.decompress(row.data, max_output_size=row.size))
                    self._inputs[row.hash] = "\n".join(_strings(value)).lower()
        return self._inputs

    def _plain(self, query: Select[Any]) -> list[Any]:
        return list(self._all(query))

    def _keys(self, query: Select[Any]) -> array[int]:
        with self._database.translated(), self._engine.connect() as connection:
            return array("q", connection.execute(query).scalars())


def _filtered(wanted: RunFilter) -> Select[Any]:
    """By all parts but the words."""
    runs = table("run")
    query = select(_ROWID).select_from(runs)
    for place, values in ((runs.c.status, wanted.statuses), (runs.c.thread_id, wanted.threads)):
        if values:
            query = query.where(place.in_(values))
    if wanted.graphs:
        # `rag`, or a name in a file's or manifest's reference: `/there/mine.py:graph` is found by `mine.py` and `graph`.
        query = query.where(or_(*(_called(runs.c.graph, name) for name in wanted.graphs)))
    if wanted.since_ns is not None:
        query = query.where(runs.c.started_ns >= wanted.since_ns)
    return query


def _strings(value: Any) -> Iterator[str]:
    """All text in a JSON value, without the names of fields."""
    left = [value]
    while left:
        match left.pop():
            case str(text):
                yield text
            case list(items):
                left += items
            case dict(items):
                left += items.values()


def _has(place: Any, text: str) -> Any:
    return place.icontains(text, autoescape=True)


def _called(place: Any, name: str) -> Any:
    ends = (place.iendswith(mark + name, autoescape=True) for mark in ("/", ":"))
    return or_(
        func.lower(place) == func.lower(name), *ends, place.istartswith(f"{name}:", autoescape=True), _has(place, f"/{name}:")
    )


def _span_columns() -> Select[Any]:
    spans = table("span")
    return select(_ROWID, *(spans.c[name] for name in SpanLine._fields[1:])).select_from(spans)


def _parts(keys: Iterable[int]) -> Iterable[Sequence[int]]:
    listed = list(keys)
    return (listed[at : at + _CHUNK] for at in range(0, len(listed), _CHUNK))


_RUN_LINE = [spec.name for spec in fields(RunLine) if spec.name != "key"]
