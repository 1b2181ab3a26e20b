"""Recordings: what a graph got from outside in one sitting of a run, and stand-ins that give it again.

Each stand-in has the face of what it stands for and nothing behind it: it answers from the record what was answered at the same
place of the graph to the same request, and says where there is no such answer.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import sys
import threading
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Never, TypeVar
from uuid import UUID

from langchain_core.callbacks import AsyncCallbackHandler, BaseCallbackHandler
from langgraph.store.base import BaseStore, GetOp, Item, ListNamespacesOp, Op, Result, SearchItem, SearchOp

from agentops.diff import Difference, unequal
from agentops.errors import AgentOpsError, RecordError, ReplayDiverged
from agentops.records import (
    ChoiceScore,
    Completion,
    Delta,
    Document,
    Footprint,
    Generation,
    Hit,
    Leg,
    ModelInfo,
    Query,
    Request,
    Retrieval,
    ScoreRequest,
    Scores,
    Timing,
    ToolCall,
    ToolResult,
    Usage,
)
from agentops.store import SpanRow, Store
from agentops.tracer import Effects, Way, asked, locate, to_plain, way
from agentops.tracer.stores import told
from agentops.tracer.wrappers import PARAMETERS

if TYPE_CHECKING:
    import numpy as np
    from langchain_core.tools import BaseTool
    from numpy.typing import NDArray

T = TypeVar("T", int, float, str)
E = TypeVar("E", bound=AgentOpsError)

_KINDS = ("generation", "embedding", "retrieval", "tool", "memory")
_SETTLING_S = 2.0
_CANCELLING_S = 0.05


class RecordEnded(AgentOpsError):
    """The record has no end of a call: the run was stopped, or its process died, while it was under way."""


class Recording:
    """The effects of one sitting of a run, by the place in the graph where they happened, each given once."""

    def __init__(self, store: Store, root: SpanRow) -> None:
        self._store = store
        self.root = root
        self._lock = threading.Lock()
        self.answered: Counter[str] = Counter()
        self.trouble: AgentOpsError | None = None
        """Why it cannot go on as on record: the first thing that was told so."""
        spans = [span for span in store.spans(root.run_id) if span.root_id == root.id]
        rows = {span.id: _as_row(span) for span in spans}
        self._spans = {span.id: span for span in spans}
        in_tools: set[str] = set()
        self._effects: dict[Way, list[SpanRow]] = {}
        self._noted: dict[tuple[Way, Parts, str], list[Any]] = {}
        self._nodes: dict[Way, SpanRow] = {}
        self._left: set[Way] = set()
        for span in spans:
            if span.parent_id in in_tools:
                in_tools.add(span.id)
                continue
            place = way(span.id, rows.get)
            if span.kind == "node":
                self._nodes[place] = span
            if span.kind == "tool":
                in_tools.add(span.id)
            # A tool call that was refused or denied came to nothing that the graph's own code does not do again.
            if span.kind in _KINDS and (span.kind != "tool" or "code" in span.attributes):
                self._effects.setdefault(place, []).append(span)
            # What a tool was given from outside is in its result.
            for kind, values in ((span.attributes.get("noted") or {}) if span.kind != "tool" else {}).items():
                self._noted.setdefault((place, parts(span.id, rows.get), kind), []).extend(values)

    @property
    def rest(self) -> int:
        """How many effects that have an end were not asked for yet, and how many nodes that have one have not come to it."""
        calls = sum(not endless(span) for spans in self._effects.values() for span in spans)
        nodes = (span for place, span in self._nodes.items() if place not in self._left)
        return calls + sum(not endless(span) and not span.attributes.get("cached") for span in nodes)

    @property
    def unasked(self) -> Difference | None:
        """A value on record that nobody asked for."""
        for (place, _, kind), values in self._noted.items():
            if values and not self.cut(place):
                return Difference(_named_way(place), "", "", kind, values[0], None)
        return None

    def left(self, place: Way) -> None:
        """To be called when a node is done or has failed."""
        self._left.add(place)

    def cut(self, place: Way) -> SpanRow | None:
        """The node there, or the workflow, where the record has no end of it: the run was stopped before, or its process died."""
        for inner in range(len(place)):
            if (node := self._nodes.get(place[inner:])) is not None:
                return node if endless(node) else None
        return self.root if endless(self.root) else None

    def content(self, hash: str | None) -> Any:
        try:
            return None if hash is None else self._store.whole(hash)
        except RecordError as error:
            raise self.told(error) from error

    def told(self, trouble: E) -> E:
        """Keeps in mind why the replay cannot go on, whoever catches it."""
        self.trouble = self.trouble or trouble
        return trouble

    async def take(self, kind: str, name: str, given: Any, about: Mapping[str, Any]) -> SpanRow:
        """The recorded call with this input at the place where it is made now.

        Raises:
            ReplayDiverged: there is none.
            Exception: what the call raised.
        """
        found = self.find(kind, name, given, about)
        if endless(found):
            await self.held(found)
        return found

    async def held(self, span: SpanRow) -> Never:
        """Where the record of a call or a node has no end: waits for whoever cut it short to do so again.

        Raises:
            RecordEnded: nobody does; it was the run that was stopped.
        """
        above = self._spans.get(span.parent_id or "")
        while above is not None and (above.kind != "node" or endless(above)):
            above = self._spans.get(above.parent_id or "")
        if above is not None:
            # The node went on without it, by a time limit that takes its time.
            await asyncio.sleep((above.duration_ns or 0) / 1e9 + _SETTLING_S)
        # What happens beside it comes to its end first, as it did.
        for _ in range(int(_SETTLING_S / 0.01)):
            if not self.rest:
                break
            await asyncio.sleep(0.01)
        # A failure beside it cancels it.
        await asyncio.sleep(_CANCELLING_S)
        raise self.ended(span)

    def take_now(self, kind: str, name: str, given: Any, about: Mapping[str, Any]) -> SpanRow:
        """As `take`, for calls that cannot wait for what happens beside them."""
        found = self.find(kind, name, given, about)
        if endless(found):
            raise self.ended(found)
        return found

    def ended(self, span: SpanRow) -> RecordEnded:
        return self.told(RecordEnded(f"the record of {span.name} has no end: {span.status}"))

    def find(self, kind: str, name: str, given: Any, about: Mapping[str, Any]) -> SpanRow:
        """The recorded call, or what has no end there and might have made it."""
        plain, about = to_plain(given), to_plain(about)
        place, node = _here()
        with self._lock:
            held = self._effects.get(place, [])
            likely = [span for span in held if (span.kind, span.name) == (kind, name)]
            for span in likely:
                same = {key: span.attributes.get(key) for key in about} == about
                if same and self.content(span.input_hash) == plain:
                    held.remove(span)
                    self.answered[kind] += 1
                    return span
        if not likely:
            if (open_end := self.cut(place)) is not None:
                return open_end
            raise self.divergence(node, f"{kind} {name}", None, plain, "this is not on record")
        path, one, two = unequal(self.content(likely[0].input_hash), plain)
        if path or one != two:
            raise self.divergence(node, f"{kind} {name}, input{path}", one, two, "it is given something else")
        path, one, two = unequal({key: likely[0].attributes.get(key) for key in about}, about)
        raise self.divergence(node, f"{kind} {name}, {path.lstrip('.')}", one, two, "it is asked in another way")

    def noted(self, kind: str, make: Callable[[], T]) -> T:
        """The next value that was noted where this is called; a new one where a node that has no end on record asks for more.

        Raises:
            ReplayDiverged: there is none.
        """
        place, node = _here()
        with self._lock:
            values = self._noted.get((place, _parts_here(), kind))
            if values:
                self.answered["noted"] += 1
                found: T = values.pop(0)
                return found
        if self.cut(place) is not None:
            return make()
        raise self.divergence(node, kind, None, None, "it is asked for more often than is on record")

    def divergence(self, node: str, field: str, recorded: Any, new: Any, why: str) -> ReplayDiverged:
        return self.told(diverged(node, field, recorded, new, why))


def _here() -> tuple[Way, str]:
    place = locate()
    if place is None:
        return (), ""
    run, parent, _ = place
    found = run.way(parent)
    return found, _named_way(found)


def _named_way(place: Way) -> str:
    return " / ".join(node for node, *_ in reversed(place))


Parts = tuple[str, ...]
"""Spans of a node's own inside of it, innermost first: their kinds and names."""


def parts(span_id: str | None, row: Callable[[str], Mapping[str, Any] | None]) -> Parts:
    """The spans between one and the node around it, itself among them; `row` gives a span by its id."""
    found: list[str] = []
    while span_id is not None and (at := row(span_id)) is not None and at["kind"] not in ("node", "workflow"):
        found.append(f"{at['kind']} {at['name']}")
        span_id = at.get("parent_id")
    return tuple(found)


def _parts_here() -> Parts:
    if (place := locate()) is None:
        return ()
    run, parent, _ = place
    return parts(parent, lambda key: found.row if (found := run.find(key)) else None)


def diverged(node: str, field: str, recorded: Any, new: Any, why: str) -> ReplayDiverged:
    return ReplayDiverged(f"{node or 'the graph'}: {field}: {why}", node=node, field=field, recorded=recorded, new=new)


def endless(span: SpanRow) -> bool:
    """Whether the record does not say how it ended: a stream that its reader left has an end."""
    return span.status in ("open", "crashed") or (
        span.status == "cancelled" and "result" not in span.attributes and not span.attributes.get("left")
    )


def _raised(span: SpanRow) -> BaseException:
    """What a recorded call raised, as an exception of the same class where that is loaded, with the same words, and with the
    same fields where it is one of ours."""
    kind, told = str(span.attributes.get("error_type", "")), str(span.error or "")
    module, _, name = kind.rpartition(".")
    found = getattr(sys.modules.get(module), name, None)
    given = span.attributes.get("error_args") or [told.removeprefix(f"{name}: ") if told != name else ""]
    if not (isinstance(found, type) and issubclass(found, Exception)):
        return RuntimeError(told)
    made: BaseException = found.__new__(found)
    Exception.__init__(made, *given)
    if isinstance(made, AgentOpsError):
        vars(made).update({"hint": "", **(span.attributes.get("error_fields") or {})})
    return made


def _as_row(span: SpanRow) -> dict[str, Any]:
    names = ("kind", "name", "node", "step", "attempt", "attributes", "parent_id")
    return {name: getattr(span, name) for name in names}


class ReplayedEngine:
    """An `Engine` without a model: it answers what is on record."""

    def __init__(self, recording: Recording) -> None:
        self._recording = recording

    @property
    def info(self) -> ModelInfo:
        about = self._recording.root.attributes.get("engine")
        if not isinstance(about, dict):
            raise RecordError("the record does not say which model there was", hint="the run was recorded by an older version")
        return ModelInfo(**about)

    async def stream(self, request: Request) -> AsyncIterator[Delta | Generation]:
        given, parameters = asked(request)
        span = self._recording.find("generation", "generate", given, {name: parameters.get(name) for name in PARAMETERS})
        if (result := span.attributes.get("result")) is not None:
            answer = _generation(self._recording.content(result))
            for text in _pieces(answer.text, span.attributes.get("pieces", ())):
                yield Delta(text)
            yield answer
            return
        for text in span.attributes.get("partial", ()):
            yield Delta(str(text))
        if endless(span):
            await self._recording.held(span)
        if span.status == "error":
            raise _raised(span)
        # The caller left here.
        raise self._recording.divergence(*_named(span), span.status, "read on", "more of it is read than was")

    async def score(self, request: ScoreRequest) -> Scores:
        given, _ = asked(request)
        span = await self._recording.take("generation", "score", given, {})
        if span.status == "error":
            raise _raised(span)
        made = self._recording.content(span.attributes.get("result"))
        choices = tuple(ChoiceScore(one["text"], tuple(one["logprobs"])) for one in made["choices"])
        return Scores(choices, model=made["model"], device=made["device"], **_measures(made))

    async def close(self) -> None:
        return


def _generation(made: dict[str, Any]) -> Generation:
    whole = _measures(made)
    others = tuple(Completion(**{**one, **_listed(one)}) for one in made.get("others", ()))
    return Generation(**{**made, **_listed(made), **whole, "others": others})


def _measures(made: dict[str, Any]) -> dict[str, Any]:
    footprint = Footprint(**made.get("footprint", {}))
    return {"usage": Usage(**made["usage"]), "timing": Timing(**made["timing"]), "footprint": footprint}


def _listed(made: dict[str, Any]) -> dict[str, Any]:
    top = tuple(tuple((token, logprob) for token, logprob in place) for place in made.get("top_logprobs", ()))
    return {"tokens": tuple(made["tokens"]), "logprobs": tuple(made["logprobs"]), "top_logprobs": top}


def _pieces(text: str, lengths: Sequence[int]) -> Iterator[str]:
    """A text in the pieces in which it came, in one where that is not on record."""
    place = 0
    for length in lengths if sum(lengths) == len(text) else [len(text)]:
        yield text[place : place + length]
        place += length


class ReplayedEmbedder:
    """An `Embedder` without a model."""

    def __init__(self, recording: Recording) -> None:
        self._recording = recording

    name = "recorded"
    revision = "recorded"

    @property
    def dimensions(self) -> int:
        raise self._recording.told(_nothing("how long vectors are"))

    def count_tokens(self, text: str) -> int:
        raise self._recording.told(_nothing("how many tokens a text has for the embedder"))

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        import numpy as np

        span = self._recording.take_now("embedding", "embed", list(texts), {})
        if span.status == "error":
            raise _raised(span)
        vectors = [base64.b64decode(self._recording.content(one)) for one in self._recording.content(span.output_hash)]
        shape = len(texts), span.attributes["dimensions"] if not vectors else -1
        return np.frombuffer(b"".join(vectors), np.float32).reshape(shape).copy()


class ReplayedIndex:
    """An `Index` without documents."""

    def __init__(self, recording: Recording) -> None:
        self._recording = recording

    async def search(self, query: Query) -> Retrieval:
        about = {"collection": query.collection, "k": query.k, "mode": query.mode}
        span = await self._recording.take("retrieval", "search", query.text, about)
        notes = span.attributes
        if span.status == "error" and "hits" not in notes:
            raise _raised(span)
        hits = tuple(_hit(one) for one in self._recording.content(span.output_hash) or ())
        times = notes.get("embed_ms", 0.0), notes.get("search_ms", 0.0)
        return Retrieval(query, hits, int(notes.get("generation", 0)), *times, error=span.error or "")

    def upsert(self, *_: Any) -> Never:
        raise _nothing("how documents were written")

    delete = drop = collections = sources = upsert

    def close(self) -> None:
        return


def _hit(made: Mapping[str, Any]) -> Hit:
    legs = {name: Leg(**made[name]) for name in ("vector", "lexical") if name in made}
    return Hit(Document(made["id"], made["text"], made["hash"], made["metadata"]), made["score"], **legs)


class ReplayedStore(BaseStore):
    """A LangGraph store with nothing in it."""

    __slots__ = ("_recording",)

    def __init__(self, recording: Recording) -> None:
        self._recording = recording

    def batch(self, ops: Iterable[Op]) -> list[Result]:
        return [self._result(op, self._recording.take_now("memory", *told(op), {})) for op in ops]

    async def abatch(self, ops: Iterable[Op]) -> list[Result]:
        return [self._result(op, await self._recording.take("memory", *told(op), {})) for op in ops]

    def _result(self, op: Op, span: SpanRow) -> Result:
        if span.status == "error":
            raise _raised(span)
        made = self._recording.content(span.output_hash)
        match op:
            case GetOp():
                return Item(**made) if made else None
            case SearchOp():
                return [SearchItem(**{**one, "namespace": tuple(one["namespace"])}) for one in made]
            case ListNamespacesOp():
                return [tuple(one) for one in made]
        return None


class _Quiet(logging.Filter):
    """LangChain warns of what a handler raises; the end of a record is no fault."""

    def filter(self, record: logging.LogRecord) -> bool:
        return RecordEnded.__name__ not in record.getMessage()


logging.getLogger("langchain_core.callbacks.manager").addFilter(_Quiet())


class _Ends(AsyncCallbackHandler):
    """Keeps a node from ending that has no end on record: what it would write is not there when the run is taken up again."""

    raise_error = True

    def __init__(self, recording: Recording, open_ends: dict[UUID, SpanRow]) -> None:
        self._recording = recording
        self._open_ends = open_ends

    async def on_chain_end(self, outputs: Any, *, run_id: UUID, **kwargs: Any) -> None:
        if (node := self._open_ends.pop(run_id, None)) is not None:
            await self._recording.held(node)


class ReplayedEffects(Effects):
    """Times, ids, random numbers and tools' results as they are on record."""

    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        self._open_ends: dict[UUID, SpanRow] = {}

    @property
    def handlers(self) -> Sequence[BaseCallbackHandler]:  # type: ignore[override]
        return (_Ends(self._recording, self._open_ends),)

    def leaving(self, call: UUID, place: Way) -> None:
        self._recording.left(place)
        if (node := self._recording.cut(place)) is not None:
            self._open_ends[call] = node

    def value(self, kind: str, make: Callable[[], T]) -> T:
        noted = self._recording.noted(kind, make)
        if (place := locate()) is not None:
            run, parent, _ = place
            run.note(parent, kind, noted)
        return noted

    async def tool(self, call: ToolCall, perform: Callable[[], Awaitable[ToolResult]]) -> ToolResult:
        span = await self._recording.take("tool", call.name, call.arguments, {})
        place = locate()
        opened = place[0].find(place[1]) if place else None
        code = opened.row["attributes"].get("code") if opened else None
        if code != span.attributes["code"]:
            was = span.attributes["code"]
            raise self._recording.divergence(_here()[1], f"tool {call.name}, its code", was, code, "the tool is another one")
        if span.attributes.get("status") == "failed":
            return ToolResult(call, "failed", str(span.attributes["result"]))
        if span.status == "interrupted":
            raise self._recording.told(
                RecordError(
                    f"the tool {call.name} asks a person by itself, and a replay does not run it to ask again",
                    hint="let the node ask, or give the tool the policy 'ask'",
                )
            )
        if span.status != "ok":
            raise _raised(span)
        return ToolResult(call, "ok", self._recording.content(span.output_hash))

    def foreign(self, kind: str, name: str) -> None:
        where = _here()[1] or "the graph"
        raise self._recording.told(
            RecordError(
                f"{where} calls a {kind} of its own, {name}; it was not called, and nothing on record stands for it",
                hint="let nodes ask what their context gives (engine, search, tools in a Toolbox), and record the run again",
            )
        )

    def server_tools(self) -> Sequence[BaseTool] | None:
        if (key := self._recording.root.attributes.get("server_tools")) is None:
            return ()
        from langchain_core.tools import StructuredTool

        from agentops.tools import with_effect

        async def unreachable(**_: Any) -> Never:
            raise _nothing("what a tool would do")

        made = [
            StructuredTool(name=name, description=about, args_schema=schema, coroutine=unreachable)
            for name, about, schema in self._recording.content(key)
        ]
        return [with_effect(one, "write") for one in made]


def _nothing(what: str) -> RecordError:
    return RecordError(f"the record does not say {what}", hint="a graph that asks for it cannot be replayed")


def _named(span: SpanRow) -> tuple[str, str]:
    return _here()[1], f"{span.kind} {span.name}"
