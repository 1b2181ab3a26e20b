"""The record's tables. Rows are written by `StoreWriter` and read through `Store`; nothing else touches them.

Times are integer nanoseconds UTC. Inputs and outputs are named by the hash of their JSON and kept once in `payload`.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import JSON, BigInteger, Column, Index, Integer, LargeBinary, Table, Text
from sqlmodel import Field, SQLModel

from agentops.store.kinds import NUMBER


def _ns(*, nullable: bool = False) -> Any:
    return Field(default=None, sa_column=Column(BigInteger, nullable=nullable))


def _text() -> Any:
    return Field(default=None, sa_column=Column(Text))


class Thread(SQLModel, table=True):
    """A conversation."""

    id: str = Field(primary_key=True)
    created_ns: int = _ns()
    last_ns: int = _ns()


class Run(SQLModel, table=True):
    """One invocation of a graph on a thread. The token columns are the sums over its generation spans; `pending_hash` names
    what it asks for while it waits, `told_ns` is when what may change was told."""

    __table_args__ = (Index("ix_run_status", "status"), Index("ix_run_started", "started_ns", "id"))

    id: str = Field(primary_key=True)
    thread_id: str = Field(index=True)
    graph: str = Field(index=True)
    status: str
    started_ns: int = _ns()
    ended_ns: int | None = _ns(nullable=True)
    input_hash: str | None = None
    output_hash: str | None = None
    pending_hash: str | None = None
    error: str | None = _text()
    pid: int = 0
    segment: str = ""
    settings: dict[str, Any] = Field(default_factory=dict, sa_column=Column(JSON, nullable=False))
    tags: list[str] = Field(default_factory=list, sa_column=Column(JSON, nullable=False))
    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    computed_tokens: int = 0
    trimmed_tokens: int = 0
    told_ns: int = Field(default=0, sa_column=Column(BigInteger, nullable=False, server_default="0"))


class Span(SQLModel, table=True):
    """A timed unit of a run. `seq` counts from 1 under each workflow span, whose id is `root_id`."""

    __table_args__ = (Index("ix_span_run", "run_id", "root_id", "seq"), Index("ix_span_status", "status"))

    id: str = Field(primary_key=True)
    run_id: str
    root_id: str
    parent_id: str | None = None
    seq: int
    kind: str
    name: str
    status: str
    start_ns: int = _ns()
    duration_ns: int | None = _ns(nullable=True)
    segment: str = ""
    node: str | None = None
    step: int | None = None
    task: str | None = None
    checkpoint_ns: str | None = None
    attempt: int | None = None
    input_hash: str | None = None
    output_hash: str | None = None
    error: str | None = _text()
    model: str | None = None
    prompt_name: str | None = None
    prompt_version: str | None = None
    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    computed_tokens: int = 0
    trimmed_tokens: int = 0
    queue_ms: float = 0.0
    prefill_ms: float = 0.0
    decode_ms: float = 0.0
    first_token_ms: float = 0.0
    attributes: dict[str, Any] = Field(default_factory=dict, sa_column=Column(JSON, nullable=False))


class Payload(SQLModel, table=True):
    """JSON, compressed with zstd; `size` is that of the JSON in bytes, `truncated` says that something was cut."""

    hash: str = Field(primary_key=True)
    data: bytes = Field(sa_column=Column(LargeBinary, nullable=False))
    size: int
    truncated: bool = False


class PromptVersion(SQLModel, table=True):
    """A template by its content hash, and when it was first used under that name."""

    __tablename__ = "prompt_version"

    version: str = Field(primary_key=True)
    name: str = Field(primary_key=True)
    template: str = Field(sa_column=Column(Text, nullable=False))
    first_seen_ns: int = _ns()


class Checkpoint(SQLModel, table=True):
    """What a graph's state was after a superstep, by the hash of its JSON. `place` counts from 1 under each workflow span;
    `graph` names the subgraphs around it, outermost first, with slashes between."""

    __table_args__ = (Index("ix_checkpoint_run", "run_id", "root_id", "place"),)

    root_id: str = Field(primary_key=True)
    place: int = Field(primary_key=True)
    run_id: str
    graph: str = ""
    step: int
    source: str
    hash: str
    ns: int = _ns()


class Score(SQLModel, table=True):
    """A named value about a run, one of its spans, or a case; `value` is empty where there is a `reason` why it is not scored."""

    __table_args__ = (Index("ix_score_name", "name", "created_ns"),)

    id: str = Field(primary_key=True)
    run_id: str = Field(index=True)
    span_id: str | None = None
    experiment_id: str | None = Field(default=None, index=True)
    case_id: str | None = None
    name: str
    value: float | None = None
    reason: str = ""
    source: str
    judged: str = ""
    author: str = ""
    comment: str | None = _text()
    details: dict[str, Any] = Field(default_factory=dict, sa_column=Column(JSON, nullable=False))
    created_ns: int = _ns()


class Experiment(SQLModel, table=True):
    """A dataset run through a graph and scored. `dataset_hash` names the dataset's payload."""

    __table_args__ = (Index("ix_experiment_started", "started_ns", "id"),)

    id: str = Field(primary_key=True)
    name: str
    dataset: str
    dataset_hash: str
    graph: str
    status: str
    cases: int = 0
    started_ns: int = _ns()
    ended_ns: int | None = _ns(nullable=True)
    pid: int = 0
    segment: str = ""
    error: str | None = _text()
    settings: dict[str, Any] = Field(default_factory=dict, sa_column=Column(JSON, nullable=False))


class ExperimentCase(SQLModel, table=True):
    """One row of a dataset in an experiment: the run it became, or why it became none."""

    __tablename__ = "experiment_case"

    experiment_id: str = Field(primary_key=True)
    case_id: str = Field(primary_key=True)
    place: int
    run_id: str | None = Field(default=None, index=True)
    status: str
    error: str | None = _text()


class Pin(SQLModel, table=True):
    """A run that stays whatever the rule of retention says."""

    run_id: str = Field(primary_key=True)
    ns: int = _ns()


class JournalPosition(SQLModel, table=True):
    """How far a journal segment has been read; `lost` counts its damaged records."""

    __tablename__ = "journal_position"

    segment: str = Field(primary_key=True)
    position: int = _ns()
    lost: int = 0


for _row in (Thread, Run, Span, Payload, PromptVersion, Checkpoint, Score, Experiment, ExperimentCase, JournalPosition):
    for _column in SQLModel.metadata.tables[str(_row.__tablename__)].columns:
        # Of an `int` 32 bits would be kept in Postgres.
        if type(_column.type) is Integer:
            _column.type = NUMBER


def table(name: str) -> Table:
    return SQLModel.metadata.tables[name]
