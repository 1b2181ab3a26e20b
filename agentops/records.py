"""The vocabulary: what the parts of the runtime say to each other, as frozen values.

One word a thing. Nothing here does input or output, and nothing here knows LangGraph, torch or SQL.
Times are integer nanoseconds UTC, durations carry their unit in the name.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]

Effect = Literal["none", "read", "write"]
"""What a tool does outside: none: it only computes.  read: it looks at something.  write: it changes something."""

Policy = Literal["allow", "ask", "deny"]
"""What happens when a model calls a tool. allow: it runs.  ask: a person decides first.  deny: it never runs."""

RunStatus = Literal["queued", "running", "waiting", "done", "failed", "cancelled", "crashed"]
"""queued: not started, or its process was told to end and it stopped at a step boundary; it goes on when it is resumed.
running: a live process works on it.  waiting: for a person's answer.  done: it reached the end.
failed: a node raised or a limit was met.  cancelled: its user stopped it.  crashed: its process died."""

SpanKind = Literal[
    "workflow", "agent", "node", "generation", "retrieval", "embedding", "rerank", "tool", "memory", "evaluator", "event"
]
"""memory: an operation on a LangGraph store, which outlives threads.  event: what a node tells its graph's custom stream."""

SpanStatus = Literal["open", "ok", "error", "interrupted", "cancelled", "crashed"]
"""open: started and not ended.  interrupted: paused for a person, not an error.  crashed: its process died while it was open."""

FinishReason = Literal["stop", "length", "cancelled"]
"""stop: end token, stop string, or a constraint fulfilled.  length: the token limit.  cancelled: the caller left."""


def content_hash(data: str | bytes) -> str:
    """`b2:` and 32 hex digits of BLAKE2b over the UTF-8 bytes: names prompts, documents and payloads by what they are."""
    raw = data.encode() if isinstance(data, str) else data
    return "b2:" + hashlib.blake2b(raw, digest_size=16).hexdigest()


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation as a chat model sees it."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Constraint:
    """What the output must match.

    json_schema: `value` is a JSON schema (a dict).  regex: `value` is a pattern.  choice: `value` is a list of strings.
    lark: `value` is a grammar in Lark's notation whose rule `start` is the whole output.
    """

    kind: Literal["json_schema", "regex", "choice", "lark"]
    value: Any


@dataclass(frozen=True, slots=True)
class Request:
    """One model call. Exactly one of `messages` (the chat template is applied) and `text` (taken as it is) is given.

    `max_tokens` bounds the output. `temperature` 0 is greedy. `stop` strings and `stop_tokens` end the output and are not part
    of its text. `seed` makes sampling reproducible. `tenant` keeps cached prefixes apart. `trim` allows cutting the oldest part
    of a prompt that does not fit; the usage then says how many tokens were cut.

    Before a token is chosen: `repetition_penalty` divides positive logits (and multiplies negative ones) of tokens that the
    prompt or the output has, `presence_penalty` is taken off those of the output, `logit_bias` is added by token, the
    constraint rules out. Then, where one is drawn: `top_k` likeliest, those at least `min_p` times as likely as the likeliest,
    and of these the fewest whose shares reach `top_p`. `top_logprobs` asks for so many likeliest tokens at each place.
    `n` answers are made from one prompt, which is computed once; what is streamed is the first of them. Requests of different
    `thread`s take turns, so that none waits for all that another has asked; inside a run it is the run's, where none is given.
    Those of a higher `priority` go first all the same. What has no whole answer `deadline_s` seconds after it was asked ends with
    `DeadlinePassed`; 0 is no deadline.
    """

    messages: tuple[Message, ...] = ()
    text: str | None = None
    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    constraint: Constraint | None = None
    tenant: str = ""
    trim: bool = False
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop_tokens: tuple[int, ...] = ()
    top_logprobs: int = 0
    n: int = 1
    thread: str = ""
    priority: int = 0
    deadline_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one call or the sum of several. `cached_tokens` of the `input_tokens` came from the KV cache;
    the rest was computed: `cached_tokens + computed_tokens == input_tokens`, always.
    `trimmed_tokens` were cut from the prompt before and are not part of `input_tokens`."""

    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    computed_tokens: int = 0
    trimmed_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.input_tokens + other.input_tokens,
            self.output_tokens + other.output_tokens,
            self.cached_tokens + other.cached_tokens,
            self.computed_tokens + other.computed_tokens,
            self.trimmed_tokens + other.trimmed_tokens,
        )


@dataclass(frozen=True, slots=True)
class Timing:
    """Where a call's time went, or the sum of several. `first_token_ms` counts from when the request arrived."""

    queue_ms: float = 0.0
    prefill_ms: float = 0.0
    decode_ms: float = 0.0
    first_token_ms: float = 0.0

    def __add__(self, other: Timing) -> Timing:
        return Timing(
            self.queue_ms + other.queue_ms,
            self.prefill_ms + other.prefill_ms,
            self.decode_ms + other.decode_ms,
            self.first_token_ms + other.first_token_ms,
        )


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a call held, and what its engine held when the call ended. Blocks are those of the KV cache: the call's own, and the
    pool's in use (pinned ones among them), cached and free. `waiting` requests stood in the queue. `peak_memory_bytes` is the
    process's, on a GPU what was taken there. `energy_mj` is what the whole card used meanwhile, 0 where it is not measured;
    `shared` says that others were computed meanwhile, so that it is not this call's alone."""

    blocks: int = 0
    used_blocks: int = 0
    pinned_blocks: int = 0
    cached_blocks: int = 0
    free_blocks: int = 0
    waiting: int = 0
    peak_memory_bytes: int = 0
    energy_mj: int = 0
    shared: bool = False


@dataclass(frozen=True, slots=True)
class Completion:
    """One of several answers to the same request; as the fields of `Generation`."""

    text: str
    finish_reason: FinishReason
    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] = ()


@dataclass(frozen=True, slots=True)
class Generation:
    """The result of one model call. `logprobs` has one natural logarithm a generated token, aligned with `tokens`; so has
    `top_logprobs`, where it was asked for, the likeliest tokens there with theirs. They are the model's own, before anything
    the request asks for changed them. `others` are the second and later of `n` answers."""

    text: str
    finish_reason: FinishReason
    usage: Usage
    timing: Timing
    model: str
    device: str
    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] = ()
    others: tuple[Completion, ...] = ()
    footprint: Footprint = Footprint()


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of output as it is made; the pieces of a call concatenate to `Generation.text`."""

    text: str


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """Asks for the log-probability of each of `choices` after the same prefix (chat `messages` or plain `text`); the rest as in
    `Request`."""

    choices: tuple[str, ...]
    messages: tuple[Message, ...] = ()
    text: str | None = None
    tenant: str = ""
    thread: str = ""
    priority: int = 0
    deadline_s: float = 0.0


@dataclass(frozen=True, slots=True)
class ChoiceScore:
    """`logprobs` has one value a token of `text` after the prefix; `total` is their sum, `mean` their average."""

    text: str
    logprobs: tuple[float, ...]

    @property
    def total(self) -> float:
        return sum(self.logprobs)

    @property
    def mean(self) -> float:
        return sum(self.logprobs) / max(1, len(self.logprobs))


@dataclass(frozen=True, slots=True)
class Scores:
    """Choices in the order asked, with what the call cost."""

    choices: tuple[ChoiceScore, ...]
    usage: Usage
    timing: Timing
    model: str
    device: str
    footprint: Footprint = Footprint()

    @property
    def best(self) -> ChoiceScore:
        """The choice with the highest mean log-probability a token."""
        return max(self.choices, key=lambda choice: choice.mean)


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What an engine runs: `revision` is a content hash of the folder's weights and tokenizer."""

    name: str
    revision: str
    architecture: str
    context_tokens: int
    vocabulary: int
    parameters: int
    weight_bytes: int
    quantization: str
    device: str


@dataclass(frozen=True, slots=True)
class Document:
    """A stored piece of text: `id` is stable for the same source and position, `hash` is that of `text`.

    `metadata` is flat, scalars only. Ingestion fills `source` (path as given), `title`, `heading` (path joined by " > "),
    `start` and `end` (character offsets in the parsed text).
    """

    id: str
    text: str
    hash: str
    metadata: Mapping[str, str | int | float | bool] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Leg:
    """Where one way of searching placed a hit: `rank` from 1 and that way's own `score`."""

    rank: int
    score: float


@dataclass(frozen=True, slots=True)
class Hit:
    """A ranked result. `score` is the fused one; `vector` and `lexical` are the legs that found it."""

    document: Document
    score: float
    vector: Leg | None = None
    lexical: Leg | None = None


SearchMode = Literal["hybrid", "vector", "lexical"]


@dataclass(frozen=True, slots=True)
class Query:
    """A search. `k` results at most; `mode` picks the legs."""

    text: str
    collection: str
    k: int = 8
    mode: SearchMode = "hybrid"


@dataclass(frozen=True, slots=True)
class Retrieval:
    """The answer to a `Query`: hits best first, the collection's `generation` (rises with every change), times in ms.

    `error` is set where nothing could be searched and the settings say to go on without: there are no hits then."""

    query: Query
    hits: tuple[Hit, ...]
    generation: int
    embed_ms: float = 0.0
    search_ms: float = 0.0
    error: str = ""


@dataclass(frozen=True, slots=True)
class PromptVersion:
    """A prompt as it was used: `version` is the content hash of its template."""

    name: str
    version: str
    template: str


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A tool to be run with these arguments. `id` stays the same when a run is taken up again: a tool that remembers the
    ids it has done does nothing twice."""

    name: str
    arguments: dict[str, Any]
    id: str


ToolStatus = Literal["ok", "failed", "refused", "denied"]
"""ok: it ran.  failed: it raised, took too long, is not there, or its arguments or result are off.  refused: a person said no.
denied: the policy says no."""


@dataclass(frozen=True, slots=True)
class ToolResult:
    """What came of a call. `content` is text for the model to read: the result, or what went wrong. `call` is the one that was
    run, which differs from the one proposed where a person edited it."""

    call: ToolCall
    status: ToolStatus
    content: str


@dataclass(frozen=True, slots=True)
class Interrupt:
    """A question to a person that a run waits with.

    approval: `content` is what is to be approved, as it is or edited; the answer is a `Decision`.  question: the answer is
    what `schema` (a JSON schema) asks for, anything where there is none.  pause: a stop set on the graph itself; no answer
    is needed to go on. `node` is the node that asks, after the names of the subgraphs around it.
    """

    id: str
    kind: Literal["approval", "question", "pause"]
    question: str
    node: str
    content: Any = None
    schema: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """A person's answer to an approval. `content` replaces what was proposed when it is edited; `reason` is for the model."""

    kind: Literal["approve", "edit", "reject"]
    content: Any = None
    reason: str = ""


ScoreSource = Literal["code", "model", "human"]

ExperimentStatus = Literal["running", "done", "failed", "cancelled", "crashed"]


@dataclass(frozen=True, slots=True)
class Score:
    """A named value about a run, a span, or a case of an experiment: scored, or unscored with the reason, never NaN.

    `judged` says how a model's verdict came about: "asked", or how it was computed from what the model finds likely. `comment`
    is for people: which claim, which words. `details` is JSON.

    Raises:
        ValueError: the value is not finite, or there are both a value and a reason, or neither.
    """

    name: str
    value: float | None
    source: ScoreSource
    reason: str = ""
    judged: str = ""
    comment: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.value is None) == (not self.reason):
            raise ValueError(f"score '{self.name}' needs a value, or the reason why it has none")
        if self.value is not None and not math.isfinite(self.value):
            raise ValueError(f"score '{self.name}' is {self.value}, which is no value")


@dataclass(frozen=True, slots=True)
class NodeBudget:
    """What a node may cost in one sitting of a run; 0 is no limit. `steps` is how often it may begin, `seconds` how long it may
    take each time; the rest is for all its tasks together, with what is called inside of it."""

    steps: int = 0
    model_calls: int = 0
    tokens: int = 0
    seconds: float = 0.0
    money: float = 0.0


@dataclass(frozen=True, slots=True)
class Labels:
    """What a run is told apart by: the user it is for, tags, and any other words. Nodes find them in the config, where LangChain
    keeps them: the user under `metadata`, by the name of `user`."""

    user: str = ""
    tags: tuple[str, ...] = ()
    metadata: Mapping[str, str | int | float | bool] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Budget:
    """What one sitting of a run (from its start, or from where it is taken up again, to its next pause) may cost.
    `steps` are supersteps of the graph, `model_calls` generations and scorings, `tokens` those computed and those put out.
    `money` is what the prices in the settings make of them, 0 no limit; a model without a price does not count. `nodes` are
    limits of single nodes by their names."""

    steps: int
    model_calls: int
    tokens: int
    seconds: float
    money: float = 0.0
    nodes: Mapping[str, NodeBudget] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RunResult:
    """How a run ended. `output` is the graph's final state, or what was reached of it; `interrupts` are pending questions
    when it waits."""

    run_id: str
    thread_id: str
    status: RunStatus
    output: Any
    usage: Usage
    duration_ms: float
    error: str | None = None
    interrupts: tuple[Interrupt, ...] = ()


@dataclass(frozen=True, slots=True)
class RunStarted:
    """The run is on record and about to begin."""

    run_id: str
    thread_id: str


@dataclass(frozen=True, slots=True)
class StepStarted:
    """A node begins. `path` names enclosing subgraphs, outermost first; `span` is its id on record, which tells it from
    others of the same name that run beside it."""

    run_id: str
    node: str
    step: int
    path: tuple[str, ...] = ()
    span: str = ""


@dataclass(frozen=True, slots=True)
class StepEnded:
    """A node is over. `detail` is one short line for a person, or empty."""

    run_id: str
    node: str
    step: int
    status: SpanStatus
    duration_ms: float
    detail: str = ""
    span: str = ""


@dataclass(frozen=True, slots=True)
class Token:
    """Text as a model makes it inside `node`; `span` is that of the step."""

    run_id: str
    node: str
    text: str
    span: str = ""


RunEvent = RunStarted | StepStarted | StepEnded | Token | RunResult
"""What `Runtime.stream` yields: `RunStarted` first, the `RunResult` last."""
