"""Replay: runs a recorded thread again with all that came from outside taken from the record, and proves it the same.

The graph's own code runs, in a folder that is thrown away, and is recorded like any run; the two records are then compared. A
request that is not on record is where they diverge. What stands in for models, indexes, tools and clocks is in `recording`.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import dropwhile
from pathlib import Path
from typing import Any

from langgraph.cache.memory import InMemoryCache
from langgraph.checkpoint.base import BaseCheckpointSaver

from agentops.checkpoints import lease, open_checkpointer
from agentops.clock import SystemClock, UlidSource
from agentops.diff import Difference, Side, first_difference, unequal
from agentops.errors import AgentOpsError, AnswerUnfit, RecordError, ReplayDiverged, UsageError
from agentops.recording import (
    RecordEnded,
    Recording,
    ReplayedEffects,
    ReplayedEmbedder,
    ReplayedEngine,
    ReplayedIndex,
    ReplayedStore,
    diverged,
    endless,
)
from agentops.records import Budget, NodeBudget
from agentops.settings import Settings
from agentops.store import CheckpointRow, RunRow, SpanRow, Store, open_store
from agentops.sync import run_sync
from agentops.tracer import catch_up

_SHOWN = ("node", "question", "content")
_UNBOUNDED = 10**9


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
    catch_up(settings, wait=True)
    with open_store(settings) as store, ExitStack() as stack:
        wanted = store.run(run) if run is not None else None
        thread_id = wanted.thread_id if wanted else store.thread(str(thread)).id
        told = {wanted.id} if wanted else {row.id for row in _runs(store, thread_id)}
        last = wanted.id if wanted else ""
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="agentops-replay-")))
        sittings, cache = _sittings(store, thread_id, until=last), InMemoryCache[Any]()
        for row in _runs(store, thread_id):
            mine = [root for root in sittings if root.run_id == row.id]
            if not mine:
                continue
            if "forked_from" in mine[0].attributes:
                raise UsageError(
                    f"run {row.id} is a fork and did not begin at the beginning", hint="a fork is run again with: agentops fork"
                )
            again = _Again(store, settings, home, row, mine, graph, prompts, cache)
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
        cache: InMemoryCache[Any],
    ) -> None:
        from agentops.graph import LoadedGraph, adopt_graph, load_graph
        from agentops.prompts import Prompt, PromptLibrary

        self._store = store
        self._row = row
        # What was cancelled in line before it had begun did nothing.
        self._sittings = sittings = list(dropwhile(_idle, sittings))
        if not sittings:
            raise RecordError(f"run {row.id} cannot be replayed: it was cancelled before it began")
        self._settings = replace(
            settings, paths=replace(settings.paths, home=home), record=replace(settings.record, url="", redact=())
        )
        if graph is None and row.graph.startswith("python:"):
            raise UsageError(
                f"run {row.id} is of a graph object made in Python",
                hint="replay it there: replay(settings, run=..., graph=graph)",
            )
        if graph is None:
            loaded = load_graph(row.graph, recorded=True)
        elif isinstance(graph, str):
            loaded = load_graph(graph)
        else:
            loaded = graph if isinstance(graph, LoadedGraph) else adopt_graph(graph, row.graph.removeprefix("python:"))
        loaded = replace(loaded, reference=row.graph)
        if gone := store.balance(row.id).sampled_out:
            raise RecordError(
                f"run {row.id} cannot be replayed: it was sampled out, and {gone} of its spans are gone",
                hint="its checkpoints are there: agentops fork; what is kept is said by record.sample",
            )
        if parts := sum(span.redacted for span in store.spans(row.id)):
            raise RecordError(
                f"run {row.id} cannot be replayed exactly: {parts} parts of its texts were redacted before they were recorded",
                hint="what it went on with is in its checkpoints: agentops fork",
            )
        _refuse_own_threads(loaded.compiled, store.spans(row.id))
        # Its checkpoints and its cache are outside: those of the replay are thrown away.
        own = {"checkpointer": None, "cache": cache if loaded.compiled.cache is not None else None}
        self._graph = replace(loaded, compiled=loaded.compiled.copy(own))
        if prompts is not None:
            self._graph = replace(self._graph, prompts=PromptLibrary(prompts))
        elif key := next((root.attributes["prompts"] for root in sittings if "prompts" in root.attributes), None):
            instead = [Prompt(name, text) for name, text in store.whole(key).items()]
            self._graph = replace(self._graph, prompts=loaded.prompts.replaced(instead))
        self._answered: Counter[str] = Counter()
        self._unasked: Difference | None = None
        self._ended: dict[str, str] = {}
        """Workflow spans that have no end on record, and why."""

    def run(self) -> Replayed:
        gone: ReplayDiverged | None = None
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
                    gone = recording.trouble
                    break
                case RecordEnded():
                    self._ended[root.id] = str(recording.trouble)
                    run_sync(self._forget_cut())
                case RecordError():
                    raise recording.trouble
            if recording.trouble is None:
                self._unasked = self._unasked or recording.unasked
        return self._compared(gone)

    def _sit(self, recording: Recording, place: int) -> None:
        from agentops.runtime import Runtime

        root = recording.root
        limits = root.attributes.get("budget") or {}
        budget = Budget(
            steps=int(limits.get("steps", _UNBOUNDED)),
            model_calls=int(limits.get("model_calls", _UNBOUNDED)),
            tokens=int(limits.get("tokens", _UNBOUNDED)),
            seconds=float(_UNBOUNDED),
            nodes={name: replace(NodeBudget(**one), seconds=0.0, money=0.0) for name, one in limits.get("nodes", {}).items()},
        )
        runtime = Runtime(
            _as_recorded(self._settings, root.attributes.get("settings") or self._row.settings),
            engine=ReplayedEngine(recording),
            index=ReplayedIndex(recording),
            embedder=ReplayedEmbedder(recording),
            ids=_Ids(self._row.id),
            effects=ReplayedEffects(recording),
            clock=SystemClock(),
        )
        given = recording.content(root.input_hash)
        graph = self._graph
        if graph.compiled.store is not None:
            graph = replace(graph, compiled=graph.compiled.copy({"store": ReplayedStore(recording)}))
        with runtime:
            if place == 0:
                runtime.run(graph, given, thread=self._row.thread_id, budget=budget)
                return
            if _idle(root):
                runtime.cancel(self._row.id)
                return
            answers = given.get("answers") if isinstance(given, dict) else None
            values = {key: one["value"] for key, one in (answers or {}).items() if isinstance(one, dict) and "value" in one}
            again = self._asked_again(values, place)
            try:
                runtime.resume(self._row.id, answers=again, graph=graph, budget=budget)
            except AnswerUnfit:
                # With a task that failed LangGraph keeps its answer, and with one whose process died it does not.
                runtime.resume(self._row.id, graph=graph, budget=budget)

    async def _forget_cut(self) -> None:
        """A node is stopped where it ends, and LangGraph keeps what it has written. The process that died had kept nothing."""
        async with lease(self._settings, self._row.thread_id) as held, open_checkpointer(held, frozenset()) as saver:
            await saver.aforget_failed(self._row.thread_id)

    def _asked_again(self, values: Mapping[str, Any], place: int) -> dict[str, Any]:
        """The recorded answers by the ids that their interrupts have now, which are others in every run. Those that look the same
        are told apart by their place among each other."""
        with open_store(self._settings) as store:
            waiting = _waiting(store, _roots(store, self._row.id))
        asked = _waiting(self._store, self._sittings[:place])
        found = {}
        for key, value in values.items():
            old: Mapping[str, Any] = next((one for one in asked if one["id"] == key), {})
            alike = [one["id"] for one in asked if _question(one) == _question(old)]
            new = [one for one in waiting if _question(one) == _question(old)]
            if key not in alike or len(new) <= alike.index(key):
                node, nearest = str(old.get("node", "")), next((one for one in waiting if one["node"] == old.get("node")), None)
                path, one, two = unequal(_question(old), _question(nearest) if nearest else None)
                raise diverged(node, f"interrupt{path}", one, two, "something else is asked")
            # What was shown is bound to an approval by a hash that the answer brings along.
            bound = old.get("kind") == "approval" and isinstance(value, dict)
            kept = {name: item for name, item in value.items() if name != "of"} if bound else value
            found[new[alike.index(key)]["id"]] = kept
        return found

    def _compared(self, gone: ReplayDiverged | None) -> Replayed:
        run_id, roots = self._row.id, [root.id for root in self._sittings]
        catch_up(self._settings, wait=True)
        with open_store(self._settings) as new:
            again = new.run(run_id)
            again_roots = [span.id for span in _roots(new, run_id)]
            steps = tuple(_supersteps(self._store.checkpoints(run_id), new.checkpoints(run_id), roots, again_roots))

            def short(span: SpanRow) -> bool:
                return span.root_id in self._ended and (span.kind == "workflow" or endless(span))

            def stopped(span: SpanRow) -> bool:
                return gone is not None and span.status in ("error", "cancelled")

            one = Side(self._store, run_id, roots[: len(again_roots)], inside_tools=False, cut=short)
            two = Side(new, run_id, inside_tools=False, cut=stopped)
            difference = first_difference(one, two)
            same = self._row.output_hash == again.output_hash or one.content(self._row.output_hash) == two.content(
                again.output_hash
            )
        if gone is not None and (difference is None or difference.node == gone.node):
            difference = Difference(gone.node, "", "", gone.field, gone.recorded, gone.new)
        difference = difference or self._unasked
        ended = self._ended.get(roots[-1], "")
        complete = roots[-1] == _roots(self._store, run_id)[-1].id
        return Replayed(
            run_id=run_id,
            thread_id=self._row.thread_id,
            graph=self._row.graph,
            supersteps=steps,
            recorded_status=self._row.status,
            replayed_status=again.status,
            output_same=bool(ended) or not complete or same,
            answered=dict(self._answered),
            difference=difference,
            ended_early=ended,
        )


def _roots(store: Store, run_id: str) -> list[SpanRow]:
    return sorted((span for span in store.spans(run_id) if span.kind == "workflow"), key=lambda span: (span.start_ns, span.id))


def _refuse_own_threads(compiled: Any, spans: Sequence[SpanRow]) -> None:
    """
    Raises:
        RecordError: a node called a graph with checkpoints of its own, which a replay would change.
    """
    by_id = {span.id: span for span in spans}
    for span in spans:
        above = by_id.get(span.parent_id or "")
        while above is not None and above.kind != "node":
            above = by_id.get(above.parent_id or "")
        if above is None or not span.checkpoint_ns or span.kind != "node":
            continue
        # A graph that is called with a `configurable` of its own knows nothing of the one around it.
        if not span.checkpoint_ns.startswith(above.checkpoint_ns or ""):
            inner = [graph for _, graph in compiled.get_subgraphs(recurse=True)]
            if not inner or any(isinstance(graph.checkpointer, BaseCheckpointSaver) for graph in inner):
                raise RecordError(
                    f"{above.name} calls a graph that keeps checkpoints of its own, which a replay would change",
                    hint="without a thread and a checkpointer of its own it is recorded as part of the run",
                )


def _question(asked: Mapping[str, Any]) -> dict[str, Any]:
    """What a person sees of an interrupt; its id is another one in every run."""
    return {name: asked.get(name) for name in _SHOWN}


def _idle(root: SpanRow) -> bool:
    """Whether it only tells that the run was cancelled while nobody worked on it."""
    return bool(root.attributes.get("idle"))


def _waiting(store: Store, sittings: Sequence[SpanRow]) -> list[dict[str, Any]]:
    """The interrupts that the last sitting which waited was left with."""
    keys = [root.attributes["pending"] for root in sittings if root.attributes.get("pending")]
    return list(store.whole(keys[-1])) if keys else []


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


def _as_recorded(settings: Settings, recorded: Mapping[str, Any]) -> Settings:
    """The settings that a sitting was made with, with nothing outside."""
    sources = {**settings.sources, **dict.fromkeys(recorded, "the record")}
    made = replace(settings, paths=replace(settings.paths, files=None), flags={}, sources=sources)
    for key, value in recorded.items():
        section, _, name = key.partition(".")
        part = getattr(made, section, None)
        if part is not None and hasattr(part, name) and key != "tools.mcp":
            chosen = tuple(value) if isinstance(getattr(part, name), tuple) else value
            made = replace(made, **{section: replace(part, **{name: chosen})})
    return replace(made, tools=replace(made.tools, mcp=None))
