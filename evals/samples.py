"""A sample: what one run, or one turn of a conversation, gives to the metrics.

Metrics read nothing else, so that a score can be computed for a recorded run, for a case of a dataset, or for what a test
makes up, with the same code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from agentops.records import Message, ToolCall, Usage


@dataclass(frozen=True, slots=True)
class Context:
    """A piece of text that an answer could be made from: `id` is the document's, `source` where it is from."""

    id: str
    text: str
    source: str = ""


@dataclass(frozen=True, slots=True)
class Reference:
    """What was expected. What is not known is None; a metric that needs it leaves the sample unscored.

    `contexts` are ids of the documents that belong to the question; `trajectory` the tool calls in order; `schema` what the
    output must fit; `pattern` a regular expression that the answer must match; `topics` what may be talked about;
    `goal` what the user wanted to reach; `rubric` descriptions of the grades by their number, such as "1" to "5".
    """

    answer: str | None = None
    contexts: tuple[str, ...] | None = None
    trajectory: tuple[ToolCall, ...] | None = None
    schema: Mapping[str, Any] | None = None
    pattern: str | None = None
    topics: tuple[str, ...] | None = None
    goal: str | None = None
    rubric: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """One question and what came of it.

    `contexts` are what was retrieved for it, best first, across all searches, each document once. `cited` are places in
    `contexts`, from 0, by the number that the answer cites them with. `messages` is the conversation with its tool calls as
    `tool_calls`, in order. `spent` is the usage by the model's name; `latency_ms` counts from the start to the end of the
    run without the time spent waiting for people. `case_id` and `run_id` say what it is a sample of. `truncated` names the
    fields that are not whole, because the record cut them for their size or does not have them.
    """

    question: str
    answer: str
    contexts: tuple[Context, ...] = ()
    cited: Mapping[str, int] = field(default_factory=dict)
    messages: tuple[Message, ...] = ()
    tool_calls: tuple[ToolCall, ...] = ()
    output: Any = None
    usage: Usage = field(default_factory=Usage)
    latency_ms: float = 0.0
    spent: Mapping[str, Usage] = field(default_factory=dict)
    reference: Reference = field(default_factory=Reference)
    thread_id: str = ""
    run_id: str = ""
    case_id: str = ""
    truncated: frozenset[str] = frozenset()
