"""The store: what has been recorded, for reading. The record's only SQL is in this package.

`open_store` gives the reader, which never writes to the file; `open_writer` the writer, for the journal's drainer.
The store does not know how events come about, nor the journal's files.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields
from typing import Any, Literal

import zstandard
from sqlalchemy import ColumnElement, FromClause, Integer, Row, Select, Text, cast, exists, func, select, tuple_, union

from agentops.errors import RecordError, RunNotFound
from agentops.records import Interrupt, PromptVersion, RunStatus, Score, Timing, Usage
from agentops.settings import Settings
from agentops.store.opening import open_database
from agentops.store.removing import Removed
from agentops.store.rows import Balance, CaseRow, CheckpointRow, ExperimentRow, RunRow, ScoreRow, SpanRow, ThreadRow
from agentops.store.tables import table
from agentops.store.writing import StoreWriter, open_writer

__all__ = [
    "Balance",
    "CaseRow",
    "CheckpointRow",
    "ExperimentRow",
    "Removed",
    "RunRow",
    "ScoreRow",
    "SpanRow",
    "Store",
    "StoreWriter",
    "ThreadRow",
    "open_store",
    "open_writer",
]


def open_store(settings: Settings) -> Store:
    """The record that `record.url` names, or that of `paths.home`, made when it is missing, upgraded when it is older.

    Raises:
        StoreLocked, StoreTooNew, StoreBroken, StoreUnavailable, RecordError
    """
    open_database(settings).ensure()
    return Store(settings)


class Store:
    """A reader of the record. Usable from several threads; close it, or use it as a context manager."""

    def __init__(self, settings: Settings) -> None:
        self._database = open_database(settings)
        self._engine = self._database.reader()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._engine.dispose()

    def _all(self, query: Select[Any]) -> list[Row[Any]]:
        with self._database.translated(), self._engine.connect() as connection:
            return list(connection.execute(query))

    def runs(
        self,
        *,
        status: RunStatus | None = None,
        graph: str | None = None,
        thread: str | None = None,
        since_ns: int | None = None,
        limit: int = 50,
        before: str | None = None,
    ) -> list[RunRow]:
        """Runs, newest first. `before` is the id of the last run of the page before."""
        runs = table("run")
        query = select(runs).order_by(runs.c.started_ns.desc(), runs.c.id.desc()).limit(limit)
        for column, wanted in ((runs.c.status, status), (runs.c.graph, graph), (runs.c.thread_id, thread)):
            if wanted is not None:
                query = query.where(column == wanted)
        if since_ns is not None:
            query = query.where(runs.c.started_ns >= since_ns)
        if before is not None:
            last = self.run(before)
            query = query.where(tuple_(runs.c.started_ns, runs.c.id) < tuple_(last.started_ns, last.id))
        return [_run_row(row) for row in self._all(query)]

    def run(self, prefix: str) -> RunRow:
        """A run by its id, a unique beginning of it (with or without `run_`), or the word `last`.

        Raises:
            RunNotFound: none, or more than one.
        """
        if prefix == "last":
            newest = self.runs(limit=1)
            if not newest:
                raise RunNotFound("nothing has been recorded yet", hint='start with: agentops run rag "a question"')
            return newest[0]
        return _run_row(self._by_prefix("run", "run_", prefix))

    def span(self, prefix: str) -> SpanRow:
        """A span by its id or a unique beginning of it.

        Raises:
            RunNotFound: none, or more than one.
        """
        return _span_row(self._by_prefix("span", "sp_", prefix))

    def _by_prefix(self, name: Literal["run", "span"], kind: str, prefix: str) -> Row[Any]:
        ids = table(name).c.id
        exact = self._all(select(table(name)).where(ids == prefix))
        start = prefix if prefix.startswith(kind) else kind + prefix.upper()
        found = exact or self._all(select(table(name)).where(ids >= start, ids < start + "\U0010ffff").order_by(ids).limit(4))
        if not prefix or not found:
            raise RunNotFound(f"no {name} is called '{prefix}'", hint="list what there is with: agentops runs")
        if len(found) > 1:
            several = ", ".join(row.id for row in found[:3]) + (", ..." if len(found) > 3 else "")
            raise RunNotFound(f"more than one {name} starts with '{prefix}': {several}", hint="give more of the id")
        return found[0]

    def spans(self, run_id: str) -> list[SpanRow]:
        """A run's spans in the order in which they started."""
        spans = table("span")
        query = select(spans).where(spans.c.run_id == run_id).order_by(spans.c.start_ns, spans.c.seq, spans.c.id)
        return [_span_row(row) for row in self._all(query)]

    def payload(self, hash: str) -> Any:
        """The JSON value that a run's or span's `input_hash` or `output_hash` names.

        Raises:
            RecordError: it is not in the store, or damaged.
        """
        rows = self._all(select(table("payload")).where(table("payload").c.hash == hash))
        if not rows:
            raise RecordError(f"the content {hash} is not in the record")
        try:
            return json.loads(zstandard.ZstdDecompressor().decompress(rows[0].data, max_output_size=rows[0].size))
        except (ValueError, zstandard.ZstdError) as error:
            raise RecordError(f"the content {hash} is damaged: {error}") from error

    def has(self, hash: str) -> bool:
        """Whether a content is there."""
        payloads = table("payload")
        return bool(self._all(select(payloads.c.hash).where(payloads.c.hash == hash)))

    def forks(self) -> dict[str, str]:
        """The run that each run which is a fork was made from, by ids."""
        spans = table("span")
        origin = spans.c.attributes["forked_from"]
        query = select(spans.c.run_id, origin.label("origin")).where(
            spans.c.kind == "workflow", cast(spans.c.attributes, Text).contains('"forked_from"')
        )
        return {row.run_id: str(row.origin) for row in self._all(query)}

    def inputs(self, runs: Sequence[RunRow]) -> dict[str, Any]:
        """What runs were started with, by their ids; runs whose input is not in the store are left out."""
        found: dict[str, Any] = {}
        for run in runs:
            if run.input_hash is not None:
                with suppress(RecordError):
                    found[run.id] = self.payload(run.input_hash)
        return found

    def pending(self, run: RunRow) -> tuple[Interrupt, ...]:
        """What a waiting run asks for; what was cut in the record for its size is left out.

        Raises:
            RecordError: it is damaged.
        """
        asked = self.payload(run.pending_hash) if run.status == "waiting" and run.pending_hash else []
        whole = [one for one in asked if isinstance(one, dict) and set(one) == _INTERRUPT] if isinstance(asked, list) else []
        return tuple(Interrupt(**one) for one in whole)

    def thread(self, thread_id: str) -> ThreadRow:
        """
        Raises:
            RecordError: no run of that thread was recorded.
        """
        threads, runs = table("thread"), table("run")
        count = select(func.count()).where(runs.c.thread_id == threads.c.id).scalar_subquery()
        rows = self._all(select(threads, count.label("runs")).where(threads.c.id == thread_id))
        if not rows:
            raise RecordError(f"no thread is called '{thread_id}'", hint="list the runs with their threads: agentops runs")
        return ThreadRow(**rows[0]._mapping)

    def prompt(self, version: str) -> PromptVersion:
        """
        Raises:
            RecordError: no such version was used in a recorded run.
        """
        prompts = table("prompt_version")
        rows = self._all(select(prompts).where(prompts.c.version == version).order_by(prompts.c.first_seen_ns).limit(1))
        if not rows:
            raise RecordError(f"no prompt has the version '{version}'")
        return PromptVersion(rows[0].name, rows[0].version, rows[0].template)

    def checkpoints(self, run_id: str) -> list[CheckpointRow]:
        """The states that a run went through, in order, of each workflow span in turn."""
        rows, spans = table("checkpoint"), table("span")
        query = (
            select(rows)
            .join(spans, spans.c.id == rows.c.root_id)
            .where(rows.c.run_id == run_id)
            .order_by(spans.c.start_ns, spans.c.id, rows.c.place)
        )
        return [CheckpointRow(**_picked(_CHECKPOINT, row)) for row in self._all(query)]

    def whole(self, hash: str) -> Any:
        """As `payload`, of what was kept whole.

        Raises:
            RecordError: it is not in the store, damaged, or was cut for its size.
        """
        payloads = table("payload")
        if self._all(select(payloads.c.hash).where(payloads.c.hash == hash, payloads.c.truncated)):
            raise RecordError(f"the content {hash} was cut for its size", hint="raise record.payload_bytes before it is recorded")
        return self.payload(hash)

    def scores(
        self, *, run: str | None = None, thread: str | None = None, experiment: str | None = None, name: str | None = None
    ) -> list[ScoreRow]:
        """Scores of a run, of all runs of a thread, or of an experiment, in the order in which they were given."""
        scores, runs = table("score"), table("run")
        query = select(scores).order_by(scores.c.created_ns, scores.c.id)
        for column, wanted in ((scores.c.run_id, run), (scores.c.experiment_id, experiment), (scores.c.name, name)):
            if wanted is not None:
                query = query.where(column == wanted)
        if thread is not None:
            query = query.where(scores.c.run_id.in_(select(runs.c.id).where(runs.c.thread_id == thread)))
        return [
            ScoreRow(score=Score(**_picked(_SCORE, row) | {"comment": row.comment or ""}), **_picked(_SCORED, row))
            for row in self._all(query)
        ]

    def experiments(self, *, limit: int = 50) -> list[ExperimentRow]:
        """Experiments, newest first."""
        rows = table("experiment")
        query = select(rows).order_by(rows.c.started_ns.desc(), rows.c.id.desc()).limit(limit)
        return [ExperimentRow(**_picked(_EXPERIMENT, row)) for row in self._all(query)]

    def experiment(self, prefix: str) -> ExperimentRow:
        """An experiment by its id, a unique beginning of it, its name (the newest of that name), or the word `last`.

        Raises:
            RecordError: none, or more than one.
        """
        newest = self.experiments(limit=10_000)
        named = [one for one in newest if one.name == prefix or prefix == "last"][:1]
        start = prefix if prefix.startswith("exp_") else "exp_" + prefix.upper()
        found = named or [one for one in newest if prefix and one.id.startswith(start)]
        if len(found) != 1:
            said = f"no experiment is called '{prefix}'" if not found else f"more than one experiment starts with '{prefix}'"
            raise RecordError(said, hint="list them with: agentops experiments")
        return found[0]

    def cases(self, experiment_id: str) -> list[CaseRow]:
        """The cases of an experiment in the order of its dataset."""
        rows = table("experiment_case")
        query = select(rows).where(rows.c.experiment_id == experiment_id).order_by(rows.c.place)
        return [CaseRow(**_picked(_CASE, row)) for row in self._all(query)]

    def case_runs(self) -> set[str]:
        """The ids of all runs that cases of experiments became."""
        rows = table("experiment_case")
        return {row.run_id for row in self._all(select(rows.c.run_id).where(rows.c.run_id.is_not(None)).distinct())}

    def pinned(self) -> set[str]:
        """The ids of the runs that stay whatever the rule of retention says."""
        return set(self._column(select(table("pin").c.run_id)))

    def sampled_out(self) -> set[str]:
        """The ids of done runs that were sampled out and have their spans still."""
        spans, runs = table("span"), table("run")
        told = cast(spans.c.attributes, Text)
        marked = select(spans.c.run_id).where(
            spans.c.kind == "workflow", told.contains('"sampled"'), ~told.contains('"sampled_out"')
        )
        return set(self._column(select(runs.c.id).where(runs.c.status == "done", runs.c.id.in_(marked))))

    def _column(self, query: Select[Any]) -> list[Any]:
        return [row[0] for row in self._all(query)]

    def balance(self, run_id: str) -> Balance:
        """Whether everything that the run emitted is here."""
        spans, payloads = table("span"), table("payload")
        mine = spans.c.run_id == run_id
        counted = self._all(
            select(
                spans.c.root_id,
                func.max(spans.c.seq).label("last"),
                func.count().label("stored"),
                # By its text: SQLite gives a number, and Postgres an error for what is no truth value.
                func.count().filter(cast(spans.c.attributes["orphan"], Text).in_(("true", "1"))).label("orphans"),
                func.coalesce(func.sum(unredacted(spans)), 0).label("unredacted"),
            )
            .where(mine)
            .group_by(spans.c.root_id)
        )
        roots = {
            row.id: row.attributes
            for row in self._all(select(spans.c.id, spans.c.attributes).where(mine, spans.c.kind == "workflow"))
        }
        used = union(select(spans.c.input_hash).where(mine), select(spans.c.output_hash).where(mine))
        cut = self._all(select(func.count()).where(payloads.c.truncated, payloads.c.hash.in_(used)))
        named = used.subquery()
        there = exists().where(payloads.c.hash == named.c.input_hash)
        lost = self._all(select(func.count()).where(named.c.input_hash.is_not(None), ~there))
        return Balance(
            emitted=sum(max(row.last, int(roots.get(row.root_id, {}).get("emitted", 0))) for row in counted),
            stored=sum(row.stored for row in counted),
            truncated=int(cut[0][0]),
            faults=sum(int(attributes.get("faults", 0)) for attributes in roots.values())
            + sum(row.unredacted for row in counted),
            orphans=sum(row.orphans for row in counted),
            sampled_out=sum(int(attributes.get("sampled_out", 0)) for attributes in roots.values()),
            missing=int(lost[0][0]),
        )


def unredacted(spans: FromClause) -> ColumnElement[int]:
    """How many texts of a span were left out because they could not be redacted; null where none was."""
    return cast(cast(spans.c.attributes["unredacted"], Text), Integer)


def _run_row(row: Row[Any]) -> RunRow:
    return RunRow(usage=_usage(row), tags=tuple(row.tags), **_picked(_RUN, row))


def _span_row(row: Row[Any]) -> SpanRow:
    timing = Timing(row.queue_ms, row.prefill_ms, row.decode_ms, row.first_token_ms)
    return SpanRow(usage=_usage(row), timing=timing, **_picked(_SPAN, row))


def _usage(row: Row[Any]) -> Usage:
    return Usage(row.input_tokens, row.output_tokens, row.cached_tokens, row.computed_tokens, row.trimmed_tokens)


def _picked(names: Sequence[str], row: Row[Any]) -> dict[str, Any]:
    values = row._mapping
    return {name: values[name] for name in names}


_RUN = [spec.name for spec in fields(RunRow) if spec.name not in ("usage", "tags")]
_CHECKPOINT = [spec.name for spec in fields(CheckpointRow)]
_SCORE = [spec.name for spec in fields(Score)]
_SCORED = [spec.name for spec in fields(ScoreRow) if spec.name != "score"]
_EXPERIMENT = [spec.name for spec in fields(ExperimentRow)]
_CASE = [spec.name for spec in fields(CaseRow)]
_INTERRUPT = {spec.name for spec in fields(Interrupt)}
_SPAN = [spec.name for spec in fields(SpanRow) if spec.name not in ("usage", "timing")]
