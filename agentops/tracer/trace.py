"""Runs and spans as they happen: what is going on now, written to the journal before and after it happens.

Every span event is the whole row as it is known at that time, so a reader may apply it twice and a crash leaves an honest
open span. A run's spans are numbered from 1; the numbers stored tell whether one is missing. A resumed run keeps its id
and gets one more workflow span for each time it is taken up again.
This module knows no SQL; of LangGraph it only knows where the current run is found.
"""

from __future__ import annotations

import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from dataclasses import asdict, dataclass
from functools import cached_property, wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar
from uuid import UUID

from agentops.errors import AgentOpsError, JournalFull
from agentops.records import (
    Labels,
    PromptVersion,
    RunStatus,
    SpanKind,
    SpanStatus,
    StepEnded,
    StepStarted,
    Timing,
    Token,
    Usage,
)
from agentops.tracer.journal import Event
from agentops.tracer.meter import Meter
from agentops.tracer.payload import public, state_hash

if TYPE_CHECKING:
    from agentops.tracer.effects import Effects
    from agentops.tracer.recorder import Tracer
    from agentops.tracer.taps import Taps

LiveEvent = StepStarted | StepEnded | Token
P = ParamSpec("P")
T = TypeVar("T")
_NOTHING: Any = object()
_STACK_CHARACTERS = 20_000
_LAST_WORD_CHARACTERS = 2_000


class Span:
    """An open span. Set what is learned on the way; the trace that opened it writes it."""

    __slots__ = ("path", "row", "step")

    def __init__(self, row: Event, path: tuple[str, ...], step: str = "") -> None:
        self.row = row
        self.path = path
        self.step = step

    @property
    def id(self) -> str:
        return str(self.row["id"])

    def set(self, **attributes: Any) -> None:
        """Adds attributes; values that are not numbers, strings, booleans or lists of them are kept as text."""
        self.row.setdefault("attributes", {}).update(attributes)


class Handle:
    """What `span()` gives to its block: `set(...)` attributes, and `output` when there is one. Records nothing outside a run."""

    def __init__(self, span: Span | None) -> None:
        self._span = span
        self.output: Any = _NOTHING

    @property
    def id(self) -> str | None:
        return self._span.id if self._span else None

    def set(self, **attributes: Any) -> None:
        if self._span:
            self._span.set(**attributes)


@dataclass(frozen=True, slots=True)
class _Own:
    """A span that our own code opened, and the LangChain run it was opened in."""

    run: RunTrace
    span: str
    under: UUID | None


_own: ContextVar[_Own | None] = ContextVar("agentops_span", default=None)
_tags: ContextVar[Mapping[str, Any]] = ContextVar("agentops_tags", default={})  # noqa: B039 - never mutated


@contextmanager
def tagged(**attributes: Any) -> Iterator[None]:
    """Attributes for every span opened inside the block. `prompt=PromptVersion(...)` names the prompt that is used."""
    token = _tags.set({**_tags.get(), **attributes})
    try:
        yield
    finally:
        _restore(_tags, token)


Way = tuple[tuple[str, int, str, int], ...]
"""Where something happens: node, superstep, number of the packet it was sent, and attempt, innermost node first."""


def way(span_id: str | None, row: Callable[[str], Mapping[str, Any] | None]) -> Way:
    """The nodes around a span, itself among them; `row` gives a span by its id."""
    found: list[tuple[str, int, str, int]] = []
    while span_id is not None and (at := row(span_id)) is not None:
        if at["kind"] == "node":
            packet = str((at.get("attributes") or {}).get("packet", ""))
            found.append((str(at["node"]), int(at.get("step") or 0), packet, int(at.get("attempt") or 1)))
        span_id = at.get("parent_id")
    return tuple(found)


@contextmanager
def span(kind: SpanKind, name: str, input: Any = None) -> Iterator[Handle]:
    """A span around own code, the child of what is running now. Works around `await` too; outside a run it records nothing."""
    place = locate()
    if place is None:
        yield Handle(None)
        return
    run, parent, under = place
    opened = run.open(kind, name, parent=parent, input=input)
    handle = Handle(opened)
    token = _own.set(_Own(run, opened.id, under))
    try:
        yield handle
    except BaseException as error:
        run.close(opened, error=error)
        raise
    else:
        run.close(opened, output=handle.output)
    finally:
        _restore(_own, token)


def _restore(variable: ContextVar[Any], token: Any) -> None:
    try:
        variable.reset(token)
    except ValueError:
        # The block was left in another context (a generator closed elsewhere): nothing of ours is set there.
        return


def locate() -> tuple[RunTrace, str, UUID | None] | None:
    """Where code that is running now belongs: (run, parent span, LangChain run id), or `None` outside any run.

    LangChain keeps the current run in a context variable, which asyncio tasks, `asyncio.gather` and `asyncio.to_thread`
    carry along; so the enclosing node is found wherever the call is made from.
    """
    own = _own.get()
    # Not loaded means that no graph is running; importing it would cost two seconds.
    config_module = sys.modules.get("langchain_core.runnables.config")
    config = config_module.var_child_runnable_config.get() if config_module else None
    manager = (config or {}).get("callbacks")
    under: UUID | None = getattr(manager, "parent_run_id", None)
    for handler in reversed(getattr(manager, "handlers", ())):
        run = getattr(handler, "agentops_run", None)
        if isinstance(run, RunTrace) and under is not None:
            return run, run.parent(under), under
    return (own.run, own.span, own.under) if own else None


def carried(function: Callable[P, T]) -> Callable[P, T]:
    """The function, bound to where it is handed over: what it calls in a thread or a pool of the caller's own is recorded there.

    Tasks and `asyncio.to_thread` need no such help. Without it, what is called in a bare thread is on record as an orphan.
    """
    here = copy_context()

    @wraps(function)
    def there(*args: P.args, **kwargs: P.kwargs) -> T:
        # A context can be entered once at a time; calls may overlap.
        return here.copy().run(function, *args, **kwargs)

    return there


class RunTrace:
    """One run being recorded. Made by `Tracer.start_run`; all methods may be called from any thread."""

    def __init__(self, tracer: Tracer, row: Event, effects: Effects, meter: Meter | None = None) -> None:
        self.tracer = tracer
        self.effects = effects
        self.run_id: str = row["id"]
        self.thread_id: str = row["thread_id"]
        self._row = row
        self._wall_ns: int = row["started_ns"] - tracer.clock.monotonic_ns()
        self._lock = threading.RLock()
        self._open: dict[str, Span] = {}
        self._langchain: dict[UUID, str] = {}
        self._listeners: list[Callable[[LiveEvent], None]] = []
        self._usage = Usage()
        self._meter = meter
        self._emitted = 0
        self._faults = 0
        self._states = 0
        self._checkpoints: dict[str, str] = {}
        self._asked: Counter[tuple[str, str]] = Counter()
        self.step = 0
        """The superstep of the outermost graph that is going on, as far as its checkpoints have told."""
        self._full: JournalFull | None = None
        self._root: Span | None = None

    def now_ns(self) -> int:
        """The wall clock as it went on since the run began: it is set back for nobody, and what came later is later."""
        return self._wall_ns + self.tracer.clock.monotonic_ns()

    @cached_property
    def handler(self) -> Taps:
        """A LangGraph callback handler to put into `config["callbacks"]`."""
        from agentops.tracer.taps import Taps

        return Taps(self)

    @cached_property
    def labels(self) -> Labels:
        """What the run is told apart by."""
        return Labels(**self._row["settings"].get("labels", {}))

    @property
    def usage(self) -> Usage:
        """The sum over the generations of this run so far, since it was started or taken up again."""
        return self._usage

    @property
    def root_id(self) -> str:
        """The workflow span's id."""
        return self._root.id if self._root else ""

    def listen(self, callback: Callable[[LiveEvent], None]) -> None:
        """Calls back with every step's start and end and every token, in the thread where they happen."""
        self._listeners.append(callback)

    def admit(self, parent: str) -> None:
        """To be called before every model call, with the span it is made in.

        Raises:
            BudgetSpent: the run may make no more of them.
        """
        if self._meter is not None:
            self._meter.admit(self._nodes(parent))

    def check(self) -> None:
        """
        Raises:
            JournalFull: an event of this run could not be written; the run must stop.
        """
        if self._full is not None:
            raise self._full

    def start(self, name: str, payload: Any) -> None:
        """Writes the run and its workflow span, before any work.

        Raises:
            JournalFull: nothing was started.
        """
        events = [self._row]
        self._root = self._make("workflow", name, None)
        if payload is not None:
            self._root.row["input_hash"] = self._row["input_hash"] = self.tracer.payload(payload, events, self._root.row)
        self._open[self._root.id] = self._root
        self._put(self._root, events, {})

    def end(self, status: RunStatus, output: Any = None, error: BaseException | str | None = None, pending: Any = None) -> None:
        """Closes the workflow span and whatever is still open under it, and writes how the run ended. Never raises.
        `pending` is what it waits for.

        Where the disk has no room for that, the bare end is written, with `output_left_out` on the workflow span. When not
        even that can be (`check` tells), the run is found as crashed once its process is gone.
        """
        try:
            self._end(status, output, error, pending)
        except JournalFull as full:
            self._full = full
        except Exception:
            self.fault()

    def _end(self, status: RunStatus, output: Any, error: BaseException | str | None, pending: Any) -> None:
        events: list[Event] = []
        row = {**self._row, "status": status, "ended_ns": self.now_ns(), "segment": self.tracer.journal.segment}
        about = self._root.row if self._root else None
        if output is not None:
            row["output_hash"] = self.tracer.payload(output, events, about)
        if pending:
            row["pending_hash"] = self.tracer.payload(pending, events, about)
        if error is not None:
            row["error"] = _message(error)
        with self._lock:
            left, self._open = list(self._open.values()), {}
        for span in reversed(left):
            if span is self._root:
                span.set(emitted=self._emitted, faults=self._faults)
                if status == "done" and not self._faults and not self.tracer.sampling.keeps(self.run_id, self._row["graph"]):
                    # Its spans go when runs are pruned next: what is on record by then is more than the journal knows.
                    span.set(sampled="out")
                span.row["output_hash"] = row.get("output_hash")
                if "pending_hash" in row:
                    span.set(pending=row["pending_hash"])
                self._finish(span, _SPAN_STATUS.get(status, "ok"), error)
            else:
                self._finish(span, "interrupted" if status in ("waiting", "queued") else "cancelled", None)
            events.append(span.row)
        row["ns"] = self.now_ns()
        try:
            self.tracer.write([*events, row], last_word=True)
        except JournalFull:
            self._end_barely(row, [event for event in events if self._root and event is self._root.row], output is not None)

    def _end_barely(self, row: Event, root: list[Event], had_output: bool) -> None:
        """The run and its workflow span alone, small enough for the space kept back for them."""
        for event in (*root, row):
            event.pop("output_hash", None)
            event.pop("pending_hash", None)
            if "error" in event:
                event["error"] = event["error"][:_LAST_WORD_CHARACTERS]
        for event in root:
            kept = {name: count for name, count in event["attributes"].items() if name in ("redacted", "unredacted")}
            event["attributes"] = {"emitted": self._emitted, "faults": self._faults, **kept}
            if had_output:
                event["attributes"]["output_left_out"] = True
        self.tracer.write([*root, row], last_word=True)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Calls made in the block outside any node are recorded under the workflow span."""
        token = _own.set(_Own(self, self.root_id, None))
        try:
            yield
        finally:
            _restore(_own, token)

    def fault(self) -> None:
        """Counts a failure of the recording itself, which must not hurt the run."""
        self._faults += 1
        self.tracer.fault()

    # Spans

    def place(self) -> tuple[RunTrace, str, dict[str, Any]]:
        """Where code that is running now belongs: (run, parent span, notes). What runs outside of every node, in a thread of its
        own, belongs to this run by way of the object it was called on, and is noted as an orphan."""
        if (found := locate()) is not None:
            return found[0], found[1], {}
        return self, self.root_id, {"orphan": True}

    def parent(self, under: UUID | None) -> str:
        """The span in which something under a LangChain run belongs; our own innermost span there comes first."""
        own = _own.get()
        if own is not None and own.run is self and own.under == under:
            return own.span
        return self._langchain.get(under, self.root_id) if under else self.root_id

    def bind(self, langchain: UUID, span_id: str) -> None:
        """Things under that LangChain run belong to that span from now on."""
        self._langchain[langchain] = span_id

    def span_of(self, langchain: UUID) -> Span | None:
        """The open span bound to a LangChain run."""
        return self._open.get(self._langchain.get(langchain, ""))

    def find(self, span_id: str) -> Span | None:
        """An open span by its id."""
        return self._open.get(span_id)

    def way(self, span_id: str) -> Way:
        """The nodes around an open span, itself among them, innermost first."""
        with self._lock:
            return way(span_id, lambda key: held.row if (held := self._open.get(key)) else None)

    def _nodes(self, span_id: str) -> set[str]:
        return {node for node, *_ in self.way(span_id)}

    def annotate(self, **attributes: Any) -> None:
        """Attributes of the workflow span, written with its end."""
        if self._root is not None:
            self._root.set(**attributes)

    def describe(self, **attributes: Any) -> None:
        """Attributes of the workflow span, written now, for one that may have no end.

        Raises:
            JournalFull
        """
        self.annotate(**attributes)
        if self._root is not None:
            self._write([self._root.row])

    def keep(self, value: Any, *, of: Span | None = None, redact: bool = True) -> str:
        """Puts a JSON value on record and returns its hash. It is part of what a span tells, else of the workflow; what is
        nobody's text is kept as it is, without `redact`.

        Raises:
            JournalFull
        """
        events: list[Event] = []
        about = of or self._root
        key = self.tracer.payload(value, events, about.row if about else None, redact=redact)
        self._write(events)
        return key

    def note(self, span_id: str, kind: str, value: Any) -> None:
        """Adds something that came from outside (a time, a random number, an id) to what is noted of an open span."""
        with self._lock:
            if (noting := self._open.get(span_id)) is not None:
                noting.row.setdefault("attributes", {}).setdefault("noted", {}).setdefault(kind, []).append(value)

    def state(self, namespace: str, step: int, source: str, values: Mapping[str, Any], checkpoint: str) -> None:
        """Writes what the state of the graph of that namespace is after a superstep, by its hash. `values` are those of all
        channels, `checkpoint` is the id of what was saved of it.

        Raises:
            JournalFull
        """
        self.stands(namespace, checkpoint)
        graph = "/".join(level.partition(":")[0] for level in namespace.split("|") if level)
        with self._lock:
            self._states = place = self._states + 1
            if not graph:
                self.step = step + 1
        about = {"run_id": self.run_id, "root_id": self.root_id, "place": place, "graph": graph, "step": step, "source": source}
        self._write([{"t": "checkpoint", **about, "hash": state_hash(public(values)), "ns": self.now_ns()}])

    def event(self, name: str, value: Any) -> None:
        """Writes that something was told by the code that is running now.

        Raises:
            JournalFull
        """
        run, parent, notes = self.place()
        run.close(run.open("event", name, parent=parent, attributes=notes), output=value)

    def stands(self, namespace: str, checkpoint: str) -> None:
        """The graph of that namespace goes on from that checkpoint."""
        self._checkpoints[namespace] = checkpoint

    def checkpoint(self, namespace: str) -> str | None:
        """The checkpoint that the next step of the graph of that namespace starts from, by its id, where it is known."""
        return self._checkpoints.get(namespace)

    def repeats(self, span_id: str, what: str) -> int:
        """How often this was asked before of the node that a span is in, since that node began."""
        with self._lock:
            held = self._open.get(span_id)
            key = held.step if held else "", what
            self._asked[key] += 1
            return self._asked[key] - 1

    def forget(self, langchain: UUID) -> None:
        self._langchain.pop(langchain, None)

    def open(
        self,
        kind: SpanKind,
        name: str,
        *,
        parent: str,
        input: Any = _NOTHING,
        attributes: Mapping[str, Any] | None = None,
        path: tuple[str, ...] | None = None,
        started_ns: int | None = None,
        **columns: Any,
    ) -> Span:
        """Writes a new span. `started_ns` is when (`now_ns`), where it began before this call.

        Raises:
            JournalFull, BudgetSpent: the caller must let it stop the run.
        """
        if kind == "node" and self._meter is not None:
            self._meter.check()
            if not path:
                self._meter.step(columns.get("step", 0))
        opened = self._make(kind, name, parent, path, started_ns, columns)
        if kind == "node" and self._meter is not None:
            self._meter.entered(str(opened.row["node"]), opened.id)
        self._guarded(self._begin, opened, input, attributes or {})
        if "seq" not in opened.row:
            # It could not be recorded: the gap shows.
            with self._lock:
                self._emitted = opened.row["seq"] = self._emitted + 1
        if kind == "node":
            self._tell(StepStarted(self.run_id, opened.row["node"], opened.row.get("step", 0), opened.path, opened.id))
        return opened

    def _make(
        self,
        kind: SpanKind,
        name: str,
        parent: str | None,
        path: tuple[str, ...] | None = None,
        started_ns: int | None = None,
        columns: Mapping[str, Any] | None = None,
    ) -> Span:
        started_ns = started_ns or self.now_ns()
        with self._lock:
            above = self._open.get(parent or "")
        row: Event = {
            "t": "span",
            "ns": started_ns,
            "id": self.tracer.ids.new("sp"),
            "run_id": self.run_id,
            "parent_id": parent,
            "kind": kind,
            "name": name,
            "status": "open",
            "start_ns": started_ns,
            "segment": self.tracer.journal.segment,
        }
        row["root_id"] = self.root_id or row["id"]
        if above is not None:
            # A generation says in which node it happened without a walk up the tree.
            row.update({key: above.row[key] for key in ("node", "step") if key in above.row})
        row.update(columns or {})
        step = row["id"] if kind == "node" else above.step if above else ""
        return Span(row, path if path is not None else above.path if above else (), step)

    def _begin(self, opened: Span, payload: Any, attributes: Mapping[str, Any]) -> None:
        events: list[Event] = []
        tags = dict(_tags.get())
        prompt = tags.pop("prompt", None)
        if isinstance(prompt, PromptVersion):
            opened.row.update(prompt_name=prompt.name, prompt_version=prompt.version)
            self.tracer.prompt(prompt, events)
        if tags or attributes:
            opened.set(**tags, **attributes)
        carried: Event = {}
        if payload is not _NOTHING and payload is not None:
            carried = self.tracer.carried("input", payload, opened.row, events)
        with self._lock:
            self._open[opened.id] = opened
        self._put(opened, events, carried)

    def _put(self, opened: Span, events: list[Event], carried: Event) -> None:
        """Writes a new span under the next number. Only what was acknowledged has one: a process that is killed leaves no gap."""
        with self._lock:
            opened.row["seq"] = self._emitted + 1
            self._write([*events, {**opened.row, **carried}])
            self._emitted += 1

    def close(
        self,
        closing: Span,
        *,
        status: SpanStatus | None = None,
        output: Any = _NOTHING,
        error: BaseException | str | None = None,
        usage: Usage | None = None,
        timing: Timing | None = None,
        **columns: Any,
    ) -> None:
        """Writes how a span ended. A status that is not given follows from the error. Closing twice is harmless.

        Raises:
            JournalFull: the caller must let it stop the run.
        """
        with self._lock:
            if self._open.pop(closing.id, None) is None:
                return
            if usage is not None:
                self._usage += usage
                if self._meter is not None:
                    model = str(columns.get("model") or closing.row.get("model") or "")
                    self._meter.used(usage, model, self._nodes(closing.row["parent_id"]))
            if self._meter is not None:
                self._meter.left(closing.id)
        status = status or _status_of(error)
        closing.row.update(columns)
        self._guarded(self._finish, closing, status, error if status == "error" else None, usage, timing)
        self._guarded(self._conclude, closing, output)
        if closing.row["kind"] == "node":
            row = closing.row
            route = row.get("attributes", {}).get("route")
            detail = row.get("error") or (f"→ {route}" if route else "")
            milliseconds = row.get("duration_ns", 0) / 1e6
            step, said = row.get("step", 0), _line(str(detail))
            self._tell(StepEnded(self.run_id, row["node"], step, status, milliseconds, said, closing.id))

    def amend(self, closed: Span, error: BaseException | str) -> None:
        """Writes of a span that has ended that it was an error, which was not known then."""
        closed.row.update(status="error", error=_message(error), ns=self.now_ns())
        self._write([closed.row])

    def _finish(
        self,
        closing: Span,
        status: SpanStatus,
        error: BaseException | str | None,
        usage: Usage | None = None,
        timing: Timing | None = None,
    ) -> None:
        row = closing.row
        row["status"] = status
        row["ns"] = now_ns = self.now_ns()
        row["duration_ns"] = now_ns - row["start_ns"]
        row["segment"] = self.tracer.journal.segment
        if usage is not None:
            row.update(asdict(usage))
        if timing is not None:
            row.update(asdict(timing))
        if error is not None:
            row["error"] = _message(error)
            if isinstance(error, BaseException):
                closing.set(error_type=f"{type(error).__module__}.{type(error).__qualname__}")
                if error.args != (str(error),) and all(isinstance(one, bool | int | float | str | None) for one in error.args):
                    closing.set(error_args=list(error.args))
                if isinstance(error, AgentOpsError):
                    # What its handler may look at beside the words.
                    told = {name: value for name, value in vars(error).items() if isinstance(value, bool | int | float | str)}
                    closing.set(error_fields=told)
                closing.set(stack="".join(traceback.format_exception(error))[-_STACK_CHARACTERS:])

    def _conclude(self, closing: Span, output: Any) -> None:
        events: list[Event] = []
        carried: Event = {}
        if output is not _NOTHING and output is not None:
            carried = self.tracer.carried("output", output, closing.row, events)
        self._write([*events, {**closing.row, **carried}])

    def token(self, text: str, call: Span) -> None:
        """Passes a piece of a model's output on to those who listen; it is not recorded by itself."""
        if text and self._listeners:
            self._tell(Token(self.run_id, call.row.get("node") or "", text, call.step))

    def _tell(self, event: LiveEvent) -> None:
        for listener in self._listeners:
            try:
                listener(event)
            except Exception:
                self.fault()

    def _write(self, events: list[Event]) -> None:
        self.check()
        self.tracer.write(events)

    def _guarded(self, action: Callable[..., None], *arguments: Any) -> None:
        try:
            action(*arguments)
        except JournalFull as full:
            self._full = full
            raise
        except Exception:
            self.fault()


_SPAN_STATUS: dict[RunStatus, SpanStatus] = {
    "failed": "error",
    "cancelled": "cancelled",
    "waiting": "interrupted",
    "queued": "interrupted",
    "crashed": "crashed",
}


def _status_of(error: BaseException | str | None) -> SpanStatus:
    if error is None:
        return "ok"
    names = {kind.__name__ for kind in type(error).__mro__}
    if "ParentCommand" in names:
        return "ok"
    if "GraphBubbleUp" in names:
        return "interrupted"
    if names & {"CancelledError", "KeyboardInterrupt", "GeneratorExit"}:
        return "cancelled"
    return "error"


def _message(error: BaseException | str) -> str:
    if isinstance(error, str):
        return error
    text = str(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _line(text: str) -> str:
    first = text.strip().split("\n", 1)[0]
    return first if len(first) <= 200 else first[:199] + "…"
