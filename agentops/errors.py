"""Every error a user can meet, as one tree. Each says what happened (`str(error)`) and how to mend it (`error.hint`).

    AgentOpsError                     exit code 1
    ├── UsageError                    exit code 2: the call itself is off
    │   ├── SettingsError
    │   └── AnswerUnfit               an answer is not what the waiting run asked for; it still waits
    ├── ModelError
    │   ├── ModelNotFound
    │   ├── ModelBroken               unreadable, cut off, or shapes that contradict the config
    │   ├── ModelUnsafe               something in the folder could execute code; nothing was loaded
    │   ├── ModelUnsupported
    │   └── DownloadFailed
    ├── EngineError
    │   ├── PromptTooLong             carries both token counts
    │   ├── InputTooLarge
    │   ├── ConstraintInvalid
    │   ├── EngineOverloaded
    │   ├── DeadlinePassed            the request's time was over before its answer was whole
    │   └── EngineClosed
    ├── GraphError
    │   ├── GraphNotFound
    │   ├── GraphBroken               the user's file does not import; carries file and line
    │   ├── NodeFailed                a node raised while the graph ran
    │   ├── StateUnfit                a value of the state cannot be kept; the run stopped at a step boundary
    │   └── BudgetSpent               the run has had its steps, model calls, tokens, seconds or money
    ├── PromptError
    ├── ToolError                     tools of one name, or a server of tools that does not start
    ├── RetrievalError
    │   ├── CollectionNotFound
    │   ├── CollectionMismatch        the collection was made with another embedder
    │   ├── RetrieverUnavailable      no server answers, or not in time, or it refuses the user
    │   └── DocumentError             one document cannot be read
    ├── RecordError
    │   ├── RunNotFound
    │   ├── ReplayDiverged            the graph does something else than is on record; carries where and what
    │   ├── StoreUnavailable          no server answers, or it refuses the user
    │   ├── StoreLocked
    │   ├── StoreTooNew
    │   ├── StoreBroken
    │   └── JournalFull               the disk takes no more; the run stopped at a step boundary
    ├── ThreadBusy                    another process runs this thread
    │   └── LeaseLost                 another process took the thread over, or the connection broke; the run can be resumed
    ├── RunDrained                    exit code 143: its process was told to end, it goes on when it is resumed
    └── RunCancelled                  exit code 130

The command line prints these without a traceback; any other exception is a defect of ours.
This module knows nothing of terminals, logging or the libraries beneath.
"""

from __future__ import annotations

from typing import ClassVar


class AgentOpsError(Exception):
    """Root of the tree. `hint` is one sentence telling the user what to do next, or an empty string."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(AgentOpsError):
    """The command, flag or argument cannot be right."""

    exit_code = 2


class SettingsError(UsageError):
    """A setting has an unknown name or a value out of its range; the message names its source."""


class AnswerUnfit(UsageError):
    """A waiting run asked for something else than it was answered; nothing was run and it still waits."""


class ModelError(AgentOpsError):
    """A model folder cannot be found, read or trusted."""


class ModelNotFound(ModelError):
    """No such model name, folder or hub id."""


class ModelBroken(ModelError):
    """The folder is incomplete or contradicts itself."""


class ModelUnsafe(ModelError):
    """The folder asks for code to be run (pickle, `auto_map`, ...); it was not loaded."""


class ModelUnsupported(ModelError):
    """The architecture or quantization is not one that this engine runs."""


class DownloadFailed(ModelError):
    """Neither the hub nor the package registry gave the file, or what they gave has another checksum."""


class EngineError(AgentOpsError):
    """A request to the model engine cannot be served."""


class PromptTooLong(EngineError):
    """The prompt and the tokens asked for do not fit into the context."""

    def __init__(self, prompt_tokens: int, output_tokens: int, context_tokens: int) -> None:
        super().__init__(
            f"the prompt has {prompt_tokens:,} tokens and {output_tokens:,} were asked for, "
            f"but the model's context holds {context_tokens:,}",
            hint="shorten the input, ask for fewer tokens, or pass --trim to cut the oldest part of the prompt",
        )
        self.prompt_tokens = prompt_tokens
        self.output_tokens = output_tokens
        self.context_tokens = context_tokens


class InputTooLarge(EngineError):
    """An input is above the size limit; it was refused before any work was done on it."""


class ConstraintInvalid(EngineError):
    """A JSON schema, regular expression or list of choices cannot be compiled."""


class EngineOverloaded(EngineError):
    """The queue is full. `retry_after_s` is a guess at when a place will be free."""

    def __init__(self, message: str, *, retry_after_s: float, hint: str = "") -> None:
        super().__init__(message, hint=hint or f"try again in about {retry_after_s:.1f} s")
        self.retry_after_s = retry_after_s


class DeadlinePassed(EngineError):
    """There was no whole answer `deadline_s` seconds after the request; it was ended and holds nothing any more."""


class EngineClosed(EngineError):
    """The engine was closed while the request waited or ran."""


class GraphError(AgentOpsError):
    """A graph cannot be found, loaded or finished."""


class GraphNotFound(GraphError):
    """No graph of that name or at that path."""


class GraphBroken(GraphError):
    """The user's file does not import. The message shows the file's own line."""

    def __init__(self, message: str, *, file: str, line: int | None, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.file = file
        self.line = line


class NodeFailed(GraphError):
    """A node raised. `run_id` names the recorded run, `node` the node where it is known."""

    def __init__(self, message: str, *, run_id: str, node: str | None = None, hint: str = "") -> None:
        super().__init__(message, hint=hint or f"see every step with: agentops show {run_id}")
        self.run_id = run_id
        self.node = node


class StateUnfit(GraphError):
    """A value that a node returned, or that a run began with, cannot be kept in a checkpoint as what it is."""


class BudgetSpent(GraphError):
    """The run has had what it may have of `budget` ("steps", "model_calls", "tokens", "seconds" or
    "money"), or its `node` has, where one is named. It can be resumed."""

    def __init__(self, message: str, *, budget: str, node: str = "", hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.budget = budget
        self.node = node


class ToolError(AgentOpsError):
    """Tools cannot be offered: two have one name, or the server that has them does not start."""


class PromptError(AgentOpsError):
    """A prompt is missing, or its variables and the values given for them differ."""


class RetrievalError(AgentOpsError):
    """The index cannot be read or written."""


class CollectionNotFound(RetrievalError):
    """No collection of that name; the hint lists those there are."""


class CollectionMismatch(RetrievalError):
    """The collection's vectors come from another embedder."""


class RetrieverUnavailable(RetrievalError):
    """The server that keeps the documents does not answer, not in time, or refuses the user."""


class DocumentError(RetrievalError):
    """One document cannot be read: empty, encrypted, not text, or of an unknown kind."""


class RecordError(AgentOpsError):
    """The record of runs cannot be read or written."""


class RunNotFound(RecordError):
    """No run of that id (or more than one starts with it)."""


class ReplayDiverged(RecordError):
    """A replayed graph does something else than is on record: `node` (the nodes around it, outermost first), `field`, and what
    was `recorded` and is `new` there, as JSON values."""

    def __init__(self, message: str, *, node: str, field: str, recorded: object, new: object, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.node = node
        self.field = field
        self.recorded = recorded
        self.new = new


class StoreUnavailable(RecordError):
    """The server that keeps the record does not answer, not in time, or refuses the user."""


class StoreLocked(RecordError):
    """Another process holds the store for longer than the time-out."""


class StoreTooNew(RecordError):
    """The store was written by a newer version of this program."""


class StoreBroken(RecordError):
    """The store is not a database of this program, or is damaged."""


class JournalFull(RecordError):
    """An event cannot be written; the run stops rather than go on unrecorded."""


class ThreadBusy(AgentOpsError):
    """Another run, maybe in another process, is active on this thread."""


class LeaseLost(ThreadBusy):
    """The right to write this thread is gone: the connection that held it broke, or another process has it. The run stopped, and
    wrote nothing since."""


class RunDrained(AgentOpsError):
    """The run stopped at a step boundary because its process was told to end (SIGTERM). `run_id` names it."""

    exit_code = 143

    def __init__(self, message: str, *, run_id: str, hint: str = "") -> None:
        super().__init__(message, hint=hint or f"go on with: agentops resume {run_id}")
        self.run_id = run_id


class RunCancelled(AgentOpsError):
    """The run was stopped by its user. `run_id` names it."""

    exit_code = 130

    def __init__(self, message: str, *, run_id: str, hint: str = "") -> None:
        super().__init__(message, hint=hint or f"go on with: agentops resume {run_id}")
        self.run_id = run_id
