"""Replay: runs a recorded thread again with all that came from outside taken from the record, and proves it the same.

No model, index, server, tool or clock is there to be called: what stands in their places answers from the record what was
answered at the same place of the graph, to the same request. The graph's own code runs, in a folder that is thrown away, and
is recorded like any run; the two records are then compared. A request that is not on record is where they diverge.
"""

from __future__ import annotations

import asyncio
import base64
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Never, TypeVar

from agentops.clock import SystemClock, UlidSource
from agentops.diff import Difference, Side, first_difference, unequal
from agentops.errors import AgentOpsError, RecordError, ReplayDiverged, UsageError
from agentops.records import (
    Budget,
    ChoiceScore,
    Delta,
    Document,
    Generation,
    Hit,
    Interrupt,
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
from agentops.settings import Settings
from agentops.store import CheckpointRow, RunRow, SpanRow, Store, open_store
from agentops.tracer import Effects, Way, asked, catch_up, locate, to_plain, way

if TYPE_CHECKING:
    import numpy as np
    from langchain_core.tools import BaseTool
    from numpy.typing import NDArray

T = TypeVar("T", int, float, str)
E = TypeVar("E", bound=AgentOpsError)

_KINDS = ("generation", "embedding", "retrieval", "tool")
_SHOWN = ("node", "question", "content")
_SETTLING_S = 2.0
_UNBOUNDED = 10**9


class _EndedError(AgentOpsError):
    """The record has no end of a call: the run was stopped, or its process died, while it was under way."""


@dataclass(frozen=True, slots=True)
class Superstep:
    """A state of a graph (`graph`: the subgraphs around it, with slashes between) and its hashes, recorded and replayed. A side
    that did not get there has none."""

    graph: str
    step: int
    recorded: str | None
    replayed: str | None


@dataclass(frozen=True, slots=True)
class Replayed:
    """What came of replaying a run. `answered` counts the calls that the record answered, by their kind; nothing else was there
    to be called. `ended_early` says why the recorded run stopped where it could not by itself; until there it is compared."""

    run_id: str
    thread_id: str
    graph: str
    supersteps: tuple[Superstep, ...]
    recorded_status: str
    replayed_status: str
    output_same: bool
    answered: Mapping[str, int]
    difference: Difference | None
    ended_early: str = ""

    @property
    def same(self) -> bool:
        return self.difference is None and self.output_same and all(each.recorded == each.replayed for each in self.supersteps)


def replay(
    settings: Settings, *, run: str | None = None, thread: str | None = None, graph: Any = None, prompts: Path | None = None
) -> Iterator[Replayed]:
    """Replays a run, or every run of a thread, in order. Runs that came before on the same thread are replayed too, so that the
    state is there, and not told. `graph` is needed for a run of a graph object; `prompts` is a folder that replaces the graph's.

    Raises:
        RunNotFound, RecordError: something that is needed is not on record, or was cut for its size.
        GraphError: the graph cannot be loaded.
    """
    catch_up(settings)
    with open_store(settings) as store, ExitStack() as stack:
        wanted = store.run(run) if run is not None else None
        thread_id = wanted.thread_id if wanted else store.thread(str(thread)).id
        told = {wanted.id} if wanted else {row.id for row in _runs(store, thread_id)}
        last = wanted.id if wanted else ""
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="agentops-replay-")))
        sittings = _sittings(store, thread_id, until=last)
        for row in _runs(store, thread_id):
            mine = [root for root in sittings if root.run_id == row.id]
            if not mine:
                continue
            again = _Again(store, settings, home, row, mine, graph, prompts)
            found = again.run()
            if row.id in told:
                yield found
            elif not found.same:
                raise RecordError(
                    f"run {row.id}, which came before on thread {thread_id}, is not the same any more",
                    hint=f"see where: agentops replay {row.id}",
                )
            if row.id == last:
                return


def _runs(store: Store, thread_id: str) -> list[RunRow]:
    return list(reversed(store.runs(thread=thread_id, limit=100_000)))


def _sittings(store: Store, thread_id: str, until: str) -> list[SpanRow]:
    """The workflow spans of a thread's runs in the order in which they began, up to the last one of the run `until`."""
    roots = [span for row in _runs(store, thread_id) for span in store.spans(row.id) if span.kind == "workflow"]
    roots.sort(key=lambda span: (span.start_ns, span.id))
    ends = [place for place, root in enumerate(roots) if root.run_id == until]
    return roots[: ends[-1] + 1] if ends else roots


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
        in_tools: set[str] = set()
        self._effects: dict[Way, list[SpanRow]] = {}
        self._noted: dict[tuple[Way, str], list[Any]] = {}
        for span in spans:
            if span.parent_id in in_tools:
                in_tools.add(span.id)
                continue
            place = way(span.id, rows.get)
            if span.kind == "tool":
                in_tools.add(span.id)
            # A tool call that was refused or denied came to nothing that the graph's own code does not do again.
            if span.kind in _KINDS and (span.kind != "tool" or "code" in span.attributes):
                self._effects.setdefault(place, []).append(span)
            for kind, values in (span.attributes.get("noted") or {}).items():
                self._noted.setdefault((place, kind), []).extend(values)

    @property
    def rest(self) -> int:
        """How many effects that have an end were not asked for yet."""
        return sum(not _endless(span) for spans in self._effects.values() for span in spans)

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
        if _endless(found):
            # What happens beside it comes to its end first, as it did.
            for _ in range(int(_SETTLING_S / 0.01)):
                if not self.rest:
                    break
                await asyncio.sleep(0.01)
            raise self.told(_EndedError(f"the record of {found.name} has no end: {found.status}"))
        return found

    def find(self, kind: str, name: str, given: Any, about: Mapping[str, Any]) -> SpanRow:
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
            raise self.diverged(node, f"{kind} {name}", None, plain, "this is not on record")
        path, one, two = unequal(self.content(likely[0].input_hash), plain)
        if path or one != two:
            raise self.diverged(node, f"{kind} {name}, input{path}", one, two, "it is given something else")
        path, one, two = unequal({key: likely[0].attributes.get(key) for key in about}, about)
        raise self.diverged(node, f"{kind} {name}, {path.lstrip('.')}", one, two, "it is asked in another way")

    def noted(self, kind: str) -> Any:
        """The next value that was noted where this is called.

        Raises:
            ReplayDiverged: there is none.
        """
        place, node = _here()
        with self._lock:
            values = self._noted.get((place, kind))
            if values:
                self.answered["noted"] += 1
                return values.pop(0)
        raise self.diverged(node, kind, None, None, "it is asked for more often than is on record")

    def diverged(self, node: str, field: str, recorded: Any, new: Any, why: str) -> ReplayDiverged:
        return self.told(_diverged(node, field, recorded, new, why))


def _here() -> tuple[Way, str]:
    place = locate()
    if place is None:
        return (), ""
    run, parent, _ = place
    found = run.way(parent)
    return found, " / ".join(node for node, *_ in reversed(found))


def _diverged(node: str, field: str, recorded: Any, new: Any, why: str) -> ReplayDiverged:
    return ReplayDiverged(f"{node or 'the graph'}: {field}: {why}", node=node, field=field, recorded=recorded, new=new)


def _endless(span: SpanRow) -> bool:
    return span.status in ("open", "crashed") or (span.status == "cancelled" and not {"result", "partial"} & set(span.attributes))


def _raised(span: SpanRow) -> BaseException:
    """What a recorded call raised, as an exception of the same class where that is loaded, with the same words."""
    kind, told = str(span.attributes.get("error_type", "")), str(span.error or "")
    module, _, name = kind.rpartition(".")
    found = getattr(sys.modules.get(module), name, None)
    text = told.removeprefix(f"{name}: ") if told != name else ""
    if not (isinstance(found, type) and issubclass(found, Exception)):
        return RuntimeError(told)
    made: BaseException = found.__new__(found)
    Exception.__init__(made, text)
    if isinstance(made, AgentOpsError):
        made.hint = ""
    return made


def _as_row(span: SpanRow) -> dict[str, Any]:
    names = ("kind", "node", "step", "attempt", "attributes", "parent_id")
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
        span = await self._recording.take("generation", "generate", given, parameters)
        if (result := span.attributes.get("result")) is not None:
            made = self._recording.content(result)
            answer = Generation(**{**made, "usage": Usage(**made["usage"]), "timing": Timing(**made["timing"])})
            answer = replace(answer, tokens=tuple(answer.tokens), logprobs=tuple(answer.logprobs))
            if answer.text:
                yield Delta(answer.text)
            yield answer
            return
        for text in span.attributes.get("partial", ()):
            yield Delta(str(text))
        if span.status == "error":
            raise _raised(span)
        # The caller left here.
        raise self._recording.diverged(*_named(span), span.status, "read on", "more of it is read than was")

    async def score(self, request: ScoreRequest) -> Scores:
        given, _ = asked(request)
        span = await self._recording.take("generation", "score", given, {})
        if span.status == "error":
            raise _raised(span)
        made = self._recording.content(span.attributes.get("result"))
        choices = tuple(ChoiceScore(one["text"], tuple(one["logprobs"])) for one in made["choices"])
        return Scores(choices, Usage(**made["usage"]), Timing(**made["timing"]), made["model"], made["device"])

    async def close(self) -> None:
        return


class ReplayedEmbedder:
    """An `Embedder` without a model."""

    def __init__(self, recording: Recording) -> None:
        self._recording = recording

    name = "recorded"
    revision = "recorded"

    @property
    def dimensions(self) -> int:
        raise _nothing("how long vectors are")

    def count_tokens(self, text: str) -> int:
        raise _nothing("how many tokens a text has for the embedder")

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        import numpy as np

        span = self._recording.find("embedding", "embed", list(texts), {})
        if _endless(span):
            raise self._recording.told(_EndedError("the record of an embedding has no end"))
        if span.status == "error":
            raise _raised(span)
        vectors = [base64.b64decode(self._recording.content(one)) for one in self._recording.content(span.output_hash)]
        return np.frombuffer(b"".join(vectors), np.float32).reshape(len(texts), -1).copy()


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


class ReplayedEffects(Effects):
    """Times, ids, random numbers and tools' results as they are on record."""

    def __init__(self, recording: Recording) -> None:
        self._recording = recording

    def value(self, kind: str, make: Callable[[], T]) -> T:
        noted: T = self._recording.noted(kind)
        if (place := locate()) is not None:
            run, parent, _ = place
            run.note(parent, kind, noted)
        return noted

    async def tool(self, call: ToolCall, perform: Callable[[], Awaitable[ToolResult]]) -> ToolResult:
        span = await self._recording.take("tool", call.name, call.arguments, {})
        place = locate()
        opened = place[0].find(place[1]) if place else None
        code = opened.row["attributes"].get("code") if opened else None
        theirs = {name for name, *_ in self._server_tools() or ()}
        if code != span.attributes["code"] and call.name not in theirs:
            was = span.attributes["code"]
            raise self._recording.diverged(_here()[1], f"tool {call.name}, its code", was, code, "the tool is another one")
        if span.attributes.get("status") == "failed":
            return ToolResult(call, "failed", str(span.attributes["result"]))
        if span.status != "ok":
            raise _raised(span)
        return ToolResult(call, "ok", self._recording.content(span.output_hash))

    def server_tools(self) -> Sequence[BaseTool] | None:
        if (offered := self._server_tools()) is None:
            return ()
        from langchain_core.tools import StructuredTool

        from agentops.tools import with_effect

        async def unreachable(**_: Any) -> Never:
            raise _nothing("what a tool would do")

        made = [
            StructuredTool(name=name, description=about, args_schema=schema, coroutine=unreachable)
            for name, about, schema in offered
        ]
        return [with_effect(one, "write") for one in made]

    def _server_tools(self) -> list[Any] | None:
        key = self._recording.root.attributes.get("server_tools")
        return self._recording.content(key) if key else None


def _nothing(what: str) -> RecordError:
    return RecordError(f"the record does not say {what}", hint="a graph that asks for it cannot be replayed")


def _named(span: SpanRow) -> tuple[str, str]:
    return _here()[1], f"{span.kind} {span.name}"


class _Ids:
    """Gives the run its recorded id."""

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id
        self._other = UlidSource()

    def new(self, prefix: str) -> str:
        return self._run_id if prefix == "run" else self._other.new(prefix)


class _Again:
    """One run, replayed sitting by sitting in a home of its own."""

    def __init__(
        self,
        store: Store,
        settings: Settings,
        home: Path,
        row: RunRow,
        sittings: Sequence[SpanRow],
        graph: Any,
        prompts: Path | None,
    ) -> None:
        from agentops.graph import adopt_graph, load_graph
        from agentops.prompts import PromptLibrary

        self._store = store
        self._row = row
        self._sittings = sittings
        self._settings = _as_recorded(settings, home, row)
        if graph is None and row.graph.startswith("python:"):
            raise UsageError(
                f"run {row.id} is of a graph object made in Python",
                hint="replay it there: replay(settings, run=..., graph=graph)",
            )
        if graph is None:
            loaded = load_graph(row.graph, recorded=True)
        else:
            loaded = load_graph(graph) if isinstance(graph, str) else adopt_graph(graph, row.graph.removeprefix("python:"))
            loaded = replace(loaded, reference=row.graph)
        self._graph = replace(loaded, prompts=PromptLibrary(prompts)) if prompts else loaded
        self._answered: Counter[str] = Counter()
        self._ended = ""

    def run(self) -> Replayed:
        diverged: ReplayDiverged | None = None
        for place, root in enumerate(self._sittings):
            recording = Recording(self._store, root)
            try:
                self._sit(recording, place)
            except ReplayDiverged as error:
                recording.trouble = recording.trouble or error
            except AgentOpsError:
                pass  # how it failed is on both records
            self._answered += recording.answered
            # A node may have caught what was raised in it.
            match recording.trouble:
                case ReplayDiverged():
                    diverged = recording.trouble
                    break
                case _EndedError():
                    self._ended = str(recording.trouble)
                case RecordError():
                    raise recording.trouble
        return self._compared(diverged)

    def _sit(self, recording: Recording, place: int) -> None:
        from agentops.runtime import Runtime

        root = recording.root
        limits = root.attributes.get("budget") or {}
        budget = Budget(
            steps=int(limits.get("steps", _UNBOUNDED)),
            model_calls=int(limits.get("model_calls", _UNBOUNDED)),
            tokens=int(limits.get("tokens", _UNBOUNDED)),
            seconds=float(_UNBOUNDED),
        )
        runtime = Runtime(
            self._settings,
            engine=ReplayedEngine(recording),
            index=ReplayedIndex(recording),
            embedder=ReplayedEmbedder(recording),
            ids=_Ids(self._row.id),
            effects=ReplayedEffects(recording),
            clock=SystemClock(),
        )
        given = recording.content(root.input_hash)
        with runtime:
            if place == 0:
                runtime.run(self._graph, given, thread=self._row.thread_id, budget=budget)
                return
            answers = given.get("answers") if isinstance(given, dict) else None
            values = {key: one["value"] for key, one in (answers or {}).items() if isinstance(one, dict) and "value" in one}
            runtime.resume(self._row.id, answers=self._asked_again(values, place), graph=self._graph, budget=budget)

    def _asked_again(self, values: Mapping[str, Any], place: int) -> dict[str, Any]:
        """The recorded answers by the ids that their interrupts have now, which are others in every run."""
        asked: dict[str, Any] = {}
        for root in self._sittings[:place]:
            for one in self._store.whole(root.attributes["pending"]) if root.attributes.get("pending") else ():
                asked[one["id"]] = one
        with open_store(self._settings) as store:
            waiting = list(store.pending(store.run(self._row.id)))
        found = {}
        for key, value in values.items():
            old = asked.get(key, {})
            new = next((one for one in waiting if _question(one) == {name: old.get(name) for name in _SHOWN}), None)
            if new is None:
                node, nearest = str(old.get("node", "")), next((one for one in waiting if one.node == old.get("node")), None)
                path, one, two = unequal({name: old.get(name) for name in _SHOWN}, _question(nearest) if nearest else None)
                raise _diverged(node, f"interrupt{path}", one, two, "something else is asked")
            waiting.remove(new)
            # What was shown is bound to the answer by a hash that the answer brings along.
            found[new.id] = {name: item for name, item in value.items() if name != "of"} if isinstance(value, dict) else value
        return found

    def _compared(self, diverged: ReplayDiverged | None) -> Replayed:
        run_id, roots = self._row.id, [root.id for root in self._sittings]
        catch_up(self._settings)
        with open_store(self._settings) as new:
            again = new.run(run_id)
            again_roots = [span.id for span in _roots(new, run_id)]
            steps = tuple(_supersteps(self._store.checkpoints(run_id), new.checkpoints(run_id), roots, again_roots))
            one = Side(self._store, run_id, roots, inside_tools=False)
            two = Side(new, run_id, inside_tools=False)
            difference = first_difference(one, two)
        if diverged is not None:
            difference = Difference(diverged.node, "", "", diverged.field, diverged.recorded, diverged.new)
        elif self._ended:
            difference = None
        complete = roots[-1] == _roots(self._store, run_id)[-1].id
        return Replayed(
            run_id=run_id,
            thread_id=self._row.thread_id,
            graph=self._row.graph,
            supersteps=steps,
            recorded_status=self._row.status,
            replayed_status=again.status,
            output_same=bool(self._ended) or not complete or self._row.output_hash == again.output_hash,
            answered=dict(self._answered),
            difference=difference,
            ended_early=self._ended,
        )


def _roots(store: Store, run_id: str) -> list[SpanRow]:
    return sorted((span for span in store.spans(run_id) if span.kind == "workflow"), key=lambda span: (span.start_ns, span.id))


def _question(asked: Interrupt) -> dict[str, Any]:
    """What a person sees of an interrupt; its id is another one in every run."""
    shown: dict[str, Any] = to_plain({name: getattr(asked, name) for name in _SHOWN})
    return shown


def _supersteps(
    old: Sequence[CheckpointRow], new: Sequence[CheckpointRow], roots: Sequence[str], again: Sequence[str]
) -> Iterator[Superstep]:
    """States side by side, sitting by sitting. Those of subgraphs that ran side by side came in any order."""
    recorded: dict[tuple[int, str, int], list[str]] = {}
    replayed: dict[tuple[int, str, int], list[str]] = {}
    for row in old:
        if row.root_id in roots:
            recorded.setdefault((roots.index(row.root_id), row.graph, row.step), []).append(row.hash)
    for row in new:
        replayed.setdefault((again.index(row.root_id), row.graph, row.step), []).append(row.hash)
    for key in [*recorded, *(key for key in replayed if key not in recorded)]:
        one, two = Counter(recorded.get(key, ())), Counter(replayed.get(key, ()))
        both = sorted((one & two).elements())
        alone = sorted((one - two).elements()), sorted((two - one).elements())
        pairs: list[tuple[str | None, str | None]] = [(each, each) for each in both]
        for place in range(max(map(len, alone))):
            left, right = (side[place] if place < len(side) else None for side in alone)
            pairs.append((left, right))
        for left, right in pairs:
            yield Superstep(key[1], key[2], left, right)


def _as_recorded(settings: Settings, home: Path, row: RunRow) -> Settings:
    """The settings that the run was made with, in another home, and with nothing outside."""
    made = replace(settings, paths=replace(settings.paths, home=home, files=None), flags={})
    for key, value in row.settings.items():
        section, _, name = key.partition(".")
        part = getattr(made, section, None)
        if part is not None and hasattr(part, name) and key != "tools.mcp":
            chosen = tuple(value) if isinstance(getattr(part, name), tuple) else value
            made = replace(made, **{section: replace(part, **{name: chosen})})
    return replace(made, tools=replace(made.tools, mcp=None))
