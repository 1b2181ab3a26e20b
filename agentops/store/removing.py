"""Takes runs out of the record, with all that belongs to them and to nothing else, and gives the room back.

Contents and prompts are shared: each is kept once, whoever said it. They go with the last row that names them, in a column, in
JSON, or in a content that is itself a list of contents (what an embedding gave, a dataset). What waits in the journal is not
looked at: who removes drains it first, in the same turn of writing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import zstandard
from sqlalchemy import (
    Column,
    Connection,
    Engine,
    MetaData,
    Select,
    Table,
    Text,
    cast,
    delete,
    exists,
    func,
    insert,
    select,
    tuple_,
    union,
    update,
)

from agentops.store.kinds import WORD
from agentops.store.tables import table

_HASH = re.compile(r"b2:[0-9a-f]{32}")
_COLUMNS = {"run": ("input_hash", "output_hash", "pending_hash"), "span": ("input_hash", "output_hash")}
_JSON = {"run": "settings", "span": "attributes", "score": "details", "experiment": "settings"}
_ROWS = 2_000


@dataclass(frozen=True, slots=True)
class Removed:
    """What was removed. `threads` are those that have no run any more; `content_bytes` is what the contents took, compressed."""

    runs: int = 0
    spans: int = 0
    scores: int = 0
    threads: tuple[str, ...] = ()
    contents: int = 0
    content_bytes: int = 0
    prompts: int = 0

    def __add__(self, other: Removed) -> Removed:
        return Removed(
            self.runs + other.runs,
            self.spans + other.spans,
            self.scores + other.scores,
            self.threads + other.threads,
            self.contents + other.contents,
            self.content_bytes + other.content_bytes,
            self.prompts + other.prompts,
        )


def remove(connection: Connection, run_ids: Iterable[str], *, keep_results: bool = False) -> Removed:
    """Removes these runs within the caller's transaction; ids that are not there are passed over.

    Experiments stay, without the runs of their cases. With `keep_results` so do the scores that were given in an experiment.
    """
    runs, spans, scores, cases = table("run"), table("span"), table("score"), table("experiment_case")
    with _listed(connection, "removed_run", run_ids) as gone:

        def having(column: Any) -> Any:
            return column.in_(select(gone.c.value))

        threads = set(connection.execute(select(runs.c.thread_id).where(having(runs.c.id))).scalars())
        contents = _named(connection, gone)
        used = select(spans.c.prompt_version, spans.c.prompt_name).where(
            having(spans.c.run_id), spans.c.prompt_version.is_not(None)
        )
        prompts = {(version, name) for version, name in connection.execute(used.distinct())}

        dead_scores = delete(scores).where(having(scores.c.run_id))
        if keep_results:
            dead_scores = dead_scores.where(scores.c.experiment_id.is_(None))
        counted = {"scores": connection.execute(dead_scores).rowcount}
        connection.execute(update(cases).where(having(cases.c.run_id)).values(run_id=None))
        for name in ("checkpoint", "pin"):
            connection.execute(delete(table(name)).where(having(table(name).c.run_id)))
        counted["spans"] = connection.execute(delete(spans).where(having(spans.c.run_id))).rowcount
        counted["runs"] = connection.execute(delete(runs).where(having(runs.c.id))).rowcount
    dead_threads = _without_runs(connection, threads)
    content_count, content_bytes = _remove_contents(connection, contents)
    return Removed(
        **counted,
        threads=dead_threads,
        contents=content_count,
        content_bytes=content_bytes,
        prompts=_remove_prompts(connection, prompts),
    )


def thin(connection: Connection, run_ids: Iterable[str]) -> Removed:
    """Removes all spans of these runs but the workflow spans, which say how many went (`sampled_out`), within the caller's
    transaction; with them their states, and the contents that nothing else names."""
    spans, states = table("span"), table("checkpoint")
    with _listed(connection, "thinned_run", run_ids) as gone:
        mine = spans.c.run_id.in_(select(gone.c.value))
        contents = _named(connection, gone)
        used = select(spans.c.prompt_version, spans.c.prompt_name).where(mine, spans.c.prompt_version.is_not(None))
        prompts = {(version, name) for version, name in connection.execute(used.distinct())}
        roots = list(connection.execute(select(spans.c.id, spans.c.attributes).where(mine, spans.c.kind == "workflow")))
        below = select(spans.c.root_id, func.count().label("count")).where(mine, spans.c.kind != "workflow")
        counts = {row.root_id: row[1] for row in connection.execute(below.group_by(spans.c.root_id))}
        connection.execute(delete(states).where(states.c.run_id.in_(select(gone.c.value))))
        removed = connection.execute(delete(spans).where(mine, spans.c.kind != "workflow")).rowcount
        for row in roots:
            told = {**row.attributes, "sampled_out": counts.get(row.id, 0) + int(row.attributes.get("sampled_out", 0))}
            connection.execute(update(spans).where(spans.c.id == row.id).values(attributes=told))
    content_count, content_bytes = _remove_contents(connection, contents)
    return Removed(
        spans=removed, contents=content_count, content_bytes=content_bytes, prompts=_remove_prompts(connection, prompts)
    )


def shrink(engine: Engine, *, whole: bool = False) -> None:
    """Gives the room of what was removed back. A file of SQLite gets smaller, and what was in it cannot be read from it any more.

    Postgres uses the room again; with `whole` its tables are written anew, which nothing else can use meanwhile.
    """
    raw = engine.raw_connection()
    try:
        driver: Any = raw.driver_connection
        if engine.dialect.name == "sqlite":
            driver.execute("VACUUM")
            driver.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            return
        driver.rollback()
        driver.autocommit = True
        try:
            driver.execute("VACUUM (FULL, ANALYZE)" if whole else "VACUUM (ANALYZE)")
        finally:
            driver.autocommit = False
    finally:
        raw.close()


def _remove_contents(connection: Connection, hashes: Collection[str]) -> tuple[int, int]:
    payloads = table("payload")
    with _listed(connection, "removed_content", hashes) as listed:
        needed = _needed(connection, listed) if hashes else set()
    with _listed(connection, "removed_content", set(hashes) - needed) as listed:
        dead = payloads.c.hash.in_(select(listed.c.value))
        size = connection.execute(select(func.sum(func.length(payloads.c.data))).where(dead)).scalar()
        return connection.execute(delete(payloads).where(dead)).rowcount, int(size or 0)


def _remove_prompts(connection: Connection, keys: set[tuple[str, str]]) -> int:
    prompts, spans = table("prompt_version"), table("span")
    removed = 0
    if keys:
        used = select(spans.c.prompt_version, spans.c.prompt_name).where(spans.c.prompt_version.is_not(None)).distinct()
        keys = keys - {(row[0], row[1]) for row in connection.execute(used)}
    for version, name in keys:
        gone = delete(prompts).where(tuple_(prompts.c.version, prompts.c.name) == tuple_(version, name))
        removed += connection.execute(gone).rowcount
    return removed


def _without_runs(connection: Connection, threads: Collection[str]) -> tuple[str, ...]:
    rows, runs = table("thread"), table("run")
    with _listed(connection, "removed_thread", threads) as listed:
        dead = listed.c.value.not_in(select(runs.c.thread_id).where(runs.c.thread_id.in_(select(listed.c.value))))
        found = tuple(sorted(connection.execute(select(listed.c.value).where(dead)).scalars()))
        still = exists().where(runs.c.thread_id == rows.c.id)
        connection.execute(delete(rows).where(rows.c.id.in_(select(listed.c.value)), ~still))
    return found


def _named(connection: Connection, gone: Table) -> set[str]:
    """The contents that the runs name, those in lists of contents too."""
    found: set[str] = set()
    for name, key in (("run", "id"), ("span", "run_id"), ("score", "run_id")):
        rows = table(name)
        mine = rows.c[key].in_(select(gone.c.value))
        for column in _COLUMNS.get(name, ()):
            query = select(rows.c[column]).where(mine, rows.c[column].is_not(None)).distinct()
            found.update(connection.execute(query).scalars())
        found |= _in_json(connection, name, mine)
    spans = table("span")
    lists = select(spans.c.output_hash).where(spans.c.run_id.in_(select(gone.c.value)), spans.c.kind == "embedding")
    return found | _in_lists(connection, lists)


def _needed(connection: Connection, listed: Table) -> set[str]:
    """Those of the listed contents that something in the record still names."""
    found: set[str] = set()
    for name, columns in (*_COLUMNS.items(), ("experiment", ("dataset_hash",))):
        for column in (table(name).c[column] for column in columns):
            found.update(connection.execute(select(column).where(column.in_(select(listed.c.value))).distinct()).scalars())
    for name in _JSON:
        found |= _in_json(connection, name)
    spans, experiments = table("span"), table("experiment")
    embedded = select(spans.c.output_hash).where(spans.c.kind == "embedding", spans.c.output_hash.is_not(None))
    return found | _in_lists(connection, union(embedded, select(experiments.c.dataset_hash)))


def _in_json(connection: Connection, name: str, *where: Any) -> set[str]:
    text = cast(table(name).c[_JSON[name]], Text)
    query = select(text).where(text.contains("b2:"), *where)
    return {one for (value,) in _streamed(connection, query) for one in _HASH.findall(value)}


def _in_lists(connection: Connection, hashes: Any) -> set[str]:
    payloads = table("payload")
    unpacked = zstandard.ZstdDecompressor()
    query = select(payloads.c.data, payloads.c.size).where(payloads.c.hash.in_(hashes))
    found: set[str] = set()
    for data, size in _streamed(connection, query):
        # What is damaged names nothing that could be read.
        with suppress(ValueError, zstandard.ZstdError):
            found.update(_HASH.findall(json.dumps(json.loads(unpacked.decompress(data, max_output_size=size)))))
    return found


def _streamed(connection: Connection, query: Select[Any]) -> Iterable[Any]:
    return connection.execute(query, execution_options={"yield_per": _ROWS})


@contextmanager
def _listed(connection: Connection, name: str, values: Iterable[str]) -> Iterator[Table]:
    """A table of these values while the block lasts: there may be more than a statement takes."""
    made = Table(name, MetaData(), Column("value", WORD, primary_key=True), prefixes=["TEMPORARY"])
    made.create(connection, checkfirst=False)
    rows: Sequence[dict[str, str]] = [{"value": value} for value in sorted(set(values))]
    if rows:
        connection.execute(insert(made), rows)
    yield made
    made.drop(connection, checkfirst=False)
