"""What the record gives to its readers: frozen values, detached from any database.

`input_hash` and `output_hash` are names for `Store.payload`. Times are nanoseconds UTC.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from agentops.records import ExperimentStatus, RunStatus, Score, SpanKind, SpanStatus, Timing, Usage


@dataclass(frozen=True, slots=True)
class RunRow:
    """A run. `ended_ns` is None while it runs, and for a crashed one, whose end nobody saw; for a waiting one it is when it
    began to wait. `pending_hash` names what it then asks for."""

    id: str
    thread_id: str
    graph: str
    status: RunStatus
    started_ns: int
    ended_ns: int | None
    input_hash: str | None
    output_hash: str | None
    pending_hash: str | None
    error: str | None
    pid: int
    usage: Usage
    settings: Mapping[str, Any]
    tags: tuple[str, ...]

    @property
    def duration_ns(self) -> int | None:
        return None if self.ended_ns is None else self.ended_ns - self.started_ns


@dataclass(frozen=True, slots=True)
class SpanRow:
    """A span. `root_id` is its workflow span; `seq` its number under it, in the order of starts."""

    id: str
    run_id: str
    root_id: str
    parent_id: str | None
    seq: int
    kind: SpanKind
    name: str
    status: SpanStatus
    start_ns: int
    duration_ns: int | None
    node: str | None
    step: int | None
    task: str | None
    checkpoint_ns: str | None
    attempt: int | None
    input_hash: str | None
    output_hash: str | None
    error: str | None
    model: str | None
    prompt_name: str | None
    prompt_version: str | None
    usage: Usage
    timing: Timing
    attributes: Mapping[str, Any]

    @property
    def redacted(self) -> int:
        """How often a text of it is not what it was: taken out in part, or left out."""
        return int(self.attributes.get("redacted", 0)) + int(self.attributes.get("unredacted", 0))


@dataclass(frozen=True, slots=True)
class ThreadRow:
    id: str
    created_ns: int
    last_ns: int
    runs: int


@dataclass(frozen=True, slots=True)
class CheckpointRow:
    """A state after a superstep; `hash` is that of its values as JSON. `source` is input, loop, update or fork."""

    run_id: str
    root_id: str
    place: int
    graph: str
    step: int
    source: str
    hash: str


@dataclass(frozen=True, slots=True)
class ScoreRow:
    """A score and what it is about. `author` is the person's name, or the metric's version."""

    id: str
    run_id: str
    span_id: str | None
    experiment_id: str | None
    case_id: str | None
    score: Score
    author: str
    created_ns: int


@dataclass(frozen=True, slots=True)
class ExperimentRow:
    """An experiment. `cases` is how many it has; `dataset_hash` names the dataset as it was, for `Store.payload`."""

    id: str
    name: str
    dataset: str
    dataset_hash: str
    graph: str
    status: ExperimentStatus
    cases: int
    started_ns: int
    ended_ns: int | None
    error: str | None
    settings: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class CaseRow:
    """A case of an experiment: `place` is its number in the dataset, from 0."""

    experiment_id: str
    case_id: str
    place: int
    run_id: str | None
    status: RunStatus
    error: str | None


@dataclass(frozen=True, slots=True)
class Balance:
    """Whether all that a run told is kept. `emitted` spans were opened, `stored` ones are here; `truncated` payloads were cut;
    `faults` were counted where recording failed, texts that could not be redacted and were left out among them; `orphans` are
    spans whose place in the graph is not known; `sampled_out` ones went by the rule of `record.sample`; `missing` contents are
    named by a span and not here."""

    emitted: int
    stored: int
    truncated: int
    faults: int
    orphans: int = 0
    sampled_out: int = 0
    missing: int = 0

    @property
    def balanced(self) -> bool:
        return self.emitted == self.stored + self.sampled_out and self.faults == self.missing == 0
