"""Graphs: what their nodes are given to work with, and graphs as they are run.

Where a graph is found is the matter of `project`, how it is imported that of `loading`.
This module does not run graphs and records nothing.
"""

from __future__ import annotations

import inspect
import json
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import CellType
from typing import TYPE_CHECKING, Any

from agentops.checkpoints import schema_types
from agentops.choice import Option, choose
from agentops.clock import Clock, SystemClock, UlidSource
from agentops.engine import Engine, generate
from agentops.errors import UsageError
from agentops.grounding import Relevance, relevance
from agentops.loading import compile_graph, import_graph
from agentops.project import locate
from agentops.prompts import PromptLibrary
from agentops.records import (
    Constraint,
    Decision,
    Generation,
    Query,
    Request,
    Retrieval,
    ScoreRequest,
    Scores,
    ToolCall,
    ToolResult,
    content_hash,
)
from agentops.retrieval import Embedder, Retriever
from agentops.settings import ToolSettings
from agentops.tracer import Effects, tagged
from agentops.tracer.effects import repeats

if TYPE_CHECKING:
    from langchain_core.tools import BaseTool
    from langgraph.graph.state import CompiledStateGraph

    from agentops.tools import Toolbox


@dataclass(frozen=True)
class Context:
    """What a node gets as `runtime.context` in a graph built with `context_schema=Context`.

    `files` is the only folder to write in. `tools` are those of the MCP servers that the settings name, for a graph that
    puts them beside its own: `toolbox.joined(context.tools)`. A node that takes times from `clock`, random numbers from `random`
    and ids from `new_id` is replayed exactly; one that names what it does outside by `idempotency_key` does it once.
    """

    engine: Engine
    retriever: Retriever
    embedder: Embedder
    prompts: PromptLibrary
    collection: str
    k: int
    seed: int
    trim: bool = False
    files: Path = Path("files")
    tools: tuple[BaseTool, ...] = ()
    tool_settings: ToolSettings = field(default_factory=ToolSettings)
    clock: Clock = field(default_factory=SystemClock)
    effects: Effects = field(default_factory=Effects)

    def random(self) -> float:
        """A random number from 0 up to 1, the same when the run is replayed."""
        return self.effects.random()

    def new_id(self, prefix: str) -> str:
        """An id that no other call gives, the same when the run is replayed: `prefix_` and a ULID."""
        return self.effects.value("id", lambda: UlidSource().new(prefix))

    def idempotency_key(self, *about: object) -> str:
        """A name for something that this node is about to do outside: the same when the node runs again because its process died,
        it failed or was resumed; another one for what another task, another thread or a fork does, and each time that a node asks
        for one with the same `about` again. What has been done under a key need not be done again.
        """
        return self.effects.value("id", lambda: "key_" + _once(about))

    async def ask(
        self,
        prompt: str,
        /,
        *,
        max_tokens: int = 256,
        temperature: float = 0.0,
        stop: Sequence[str] = (),
        schema: dict[str, Any] | None = None,
        choices: Sequence[str] | None = None,
        pattern: str | None = None,
        **values: object,
    ) -> Generation:
        """The model's answer to a prompt of the graph's folder, with `values` in its holes.

        `schema`, `choices` or `pattern` (a regular expression) constrain the output.

        Raises:
            PromptError, EngineError
        """
        chosen = self.prompts.get(prompt)
        constraint = None
        if schema is not None:
            constraint = Constraint("json_schema", schema)
        elif choices is not None:
            constraint = Constraint("choice", list(choices))
        elif pattern is not None:
            constraint = Constraint("regex", pattern)
        request = Request(
            messages=chosen.render(**values),
            max_tokens=max_tokens,
            temperature=temperature,
            seed=self.seed,
            stop=tuple(stop),
            constraint=constraint,
            trim=self.trim,
        )
        with tagged(prompt=chosen.version):
            return await generate(self.engine, request)

    async def score(self, prompt: str, choices: Sequence[str], /, **values: object) -> Scores:
        """How likely the model finds each choice as the answer to a prompt, in natural logarithms."""
        chosen = self.prompts.get(prompt)
        with tagged(prompt=chosen.version):
            return await self.engine.score(ScoreRequest(tuple(choices), messages=chosen.render(**values)))

    async def search(self, text: str, *, k: int | None = None, collection: str | None = None) -> Retrieval:
        """
        Raises:
            CollectionNotFound, RetrievalError
        """
        return await self.retriever.search(Query(text, collection or self.collection, k or self.k))

    async def relevance(self, question: str, texts: Sequence[str], prompt: str, *, shortlist: int = 10) -> list[Relevance]:
        """The texts that have most to do with the question, best first. `prompt` has one hole, `{text}`, and asks for a
        question that the text answers.

        Raises:
            PromptError, EngineError
        """
        chosen = self.prompts.get(prompt)
        with tagged(prompt=chosen.version):
            return await relevance(
                self.engine, self.embedder, question, texts, lambda text: chosen.render(text=text), shortlist=shortlist
            )

    async def choose(self, prompt: str, request: str, options: Mapping[str, str]) -> list[Option]:
        """Which of the options (what each is for, by name) a request is for, best first. `prompt` has one hole, `{text}`,
        for what an option is for, and asks for a request that it serves.

        Raises:
            PromptError, EngineError
        """
        chosen = self.prompts.get(prompt)
        with tagged(prompt=chosen.version):
            return await choose(self.engine, self.embedder, request, options, lambda text: chosen.render(text=text))

    async def propose(self, prompt: str, toolbox: Toolbox, tool: str, /, *, max_tokens: int = 256, **values: Any) -> ToolCall:
        """A call of `tool` with arguments that the model writes, held to the tool's schema while it does: they fit it, and are
        not cut at `max_tokens`.

        A call that is kept in the state has the same id when the run is taken up again.

        Raises:
            ToolError: no such tool, its schema cannot be held to, or not within so many tokens; or the engine does not hold
                the model to it.  PromptError, EngineError
        """

        async def ask(form: dict[str, Any]) -> Generation:
            return await self.ask(prompt, max_tokens=max_tokens, schema=form, **values)

        arguments = await toolbox.write(tool, ask, max_tokens=max_tokens)
        return ToolCall(tool, arguments, self.effects.value("id", lambda: "call_" + _once([tool, arguments])))

    async def perform(self, toolbox: Toolbox, call: ToolCall) -> ToolResult:
        """Runs a call under the policy of the toolbox and the settings; never raises for what a tool does wrong. Where a
        person has to be asked the run waits here, and the node runs again from its beginning when there is an answer."""
        return await toolbox.perform(call, self.tool_settings)


def _once(about: Any) -> str:
    """Names something that a task does. The task is the same each time it runs; equal deeds are told apart by their number."""
    from langgraph.config import get_config

    place = get_config().get("configurable", {})
    said = json.dumps([str(place.get("thread_id", "")), str(place.get("checkpoint_ns", "")), about], sort_keys=True, default=repr)
    return content_hash(f"{said} {repeats(said)}").removeprefix("b2:")[:20]


@dataclass(frozen=True)
class LoadedGraph:
    """A compiled graph and how to find it again: `reference` is `rag`, `/path/file.py:attribute`,
    `/path/langgraph.json:name` or `python:NAME`."""

    name: str
    reference: str
    compiled: CompiledStateGraph[Any, Any, Any, Any]
    prompts: PromptLibrary

    @property
    def uses_context(self) -> bool:
        schema = getattr(self.compiled, "context_schema", None)
        return isinstance(schema, type) and issubclass(schema, Context)

    @property
    def state_types(self) -> frozenset[type]:
        """Types that the states of this graph and of its subgraphs consist of, and those that a `Context` gives to nodes."""
        graphs = [self.compiled, *(inner for _, inner in self.compiled.get_subgraphs(recurse=True))]
        given = (Generation, Scores, Retrieval, Relevance, Option, ToolResult, Decision, Request)
        return schema_types(
            *given, *(schema for one in graphs for schema in getattr(getattr(one, "builder", None), "schemas", {}))
        )

    @property
    def tools(self) -> frozenset[str]:
        """Names of the tools that stand in the files of this graph and of the graphs it uses: by themselves, in a list or dict,
        or in a toolbox. Tools that are made while it runs are not among them."""
        return frozenset(_tools(self.compiled, set()))

    def as_input(self, text: str) -> Any:
        """A command line's text as this graph's input: a JSON object as it is, else under `question`, `messages`,
        or the only text field that the input schema has.

        Raises:
            UsageError: no field fits, or the object has one that the graph does not.
        """
        schema = getattr(getattr(self.compiled, "builder", None), "input_schema", None)
        hints = typing.get_type_hints(schema) if schema is not None else {}
        if text.lstrip().startswith("{"):
            try:
                given = json.loads(text)
            except (json.JSONDecodeError, RecursionError) as error:
                raise UsageError(
                    f"the input starts like a JSON object but is none: {error}",
                    hint='quote it for the shell: \'{"key": "value"}\'',
                ) from error
            if hints and (strange := [key for key in given if key not in hints]):
                raise UsageError(
                    f"graph '{self.name}' has no field '{strange[0]}'", hint=f"the graph's fields are: {', '.join(hints)}"
                )
            return given
        if "question" in hints:
            return {"question": text}
        if "messages" in hints:
            return {"messages": [{"role": "user", "content": text}]}
        words = [name for name, hint in hints.items() if hint is str]
        if len(words) == 1:
            return {words[0]: text}
        fields = ", ".join(hints) or "none"
        raise UsageError(
            f"graph '{self.name}' takes no plain text", hint=f"give a JSON object as input; the graph's fields are: {fields}"
        )


def _tools(found: Any, seen: set[int]) -> Iterator[str]:
    """Names of tools in what a graph's nodes can see, and in what those of its subgraphs can."""
    from langchain_core.tools import BaseTool
    from langgraph.graph import StateGraph
    from langgraph.pregel import Pregel

    from agentops.tools import Toolbox

    if id(found) in seen:
        return
    seen.add(id(found))
    if isinstance(found, BaseTool):
        yield found.name
    elif isinstance(found, dict | list | tuple | Toolbox):
        for one in list(found.values() if isinstance(found, dict) else found):
            if isinstance(one, BaseTool):
                yield one.name
    elif isinstance(found, StateGraph | Pregel):
        for node in dict(found.nodes).values():
            bound = getattr(node, "bound", None) or getattr(node, "runnable", None)
            function: Any = getattr(bound, "func", None) or getattr(bound, "afunc", None)
            function = inspect.unwrap(getattr(function, "func", function))
            visible = getattr(function, "__globals__", {})
            inside = [cell.cell_contents for cell in getattr(function, "__closure__", None) or () if cell != CellType()]
            if id(visible) not in seen:
                seen.add(id(visible))
                inside += visible.values()
            for one in (bound, *inside):
                yield from _tools(one, seen)


def load_graph(reference: str, *, recorded: bool = False) -> LoadedGraph:
    """The graph that `reference` names: one of the current folder or of the package by its name, `path/to/file.py:attribute`,
    or `path/to/langgraph.json:name`. A reference that is on record (`recorded`) means the same in every folder.

    Raises:
        GraphNotFound: no such name, file or attribute.
        GraphBroken: it raises when imported; file, line and text of the line are shown.
    """
    target = locate(reference, recorded=recorded)
    compiled, file = import_graph(target)
    return LoadedGraph(target.name, target.reference, compiled, PromptLibrary(target.prompts(file)))


def adopt_graph(graph: Any, name: str | None = None) -> LoadedGraph:
    """A graph object of the caller's: compiled, or a builder that is compiled here.

    Raises:
        GraphNotFound: it is neither.
    """
    compiled = compile_graph(graph, "the object given")
    label = name or getattr(compiled, "name", None) or "graph"
    return LoadedGraph(label, f"python:{label}", compiled, PromptLibrary(None))
