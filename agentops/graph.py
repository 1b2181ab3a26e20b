"""Graphs: finds and loads them, and what their nodes are given to work with.

A graph is named as the project's own (`rag`), or as `file.py:attribute`. Loading a user's file gives it a stable private
module name, so that types it defines mean the same in every process that reads its checkpoints.
This module does not run graphs and records nothing.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import linecache
import sys
import traceback
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from agentops.checkpoint import schema_types
from agentops.choice import Option, choose
from agentops.engine import Engine, generate
from agentops.errors import GraphBroken, GraphNotFound, UsageError
from agentops.grounding import Relevance, relevance
from agentops.prompts import PromptLibrary
from agentops.records import (
    Constraint,
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
from agentops.tracer import tagged

if TYPE_CHECKING:
    from langchain_core.tools import BaseTool
    from langgraph.graph.state import CompiledStateGraph

    from agentops.tools import Toolbox


@dataclass(frozen=True)
class Context:
    """What a node gets as `runtime.context` in a graph built with `context_schema=Context`.

    `files` is the only folder to write in. `tools` are those of the MCP servers that the settings name, for a graph that
    puts them beside its own: `toolbox.joined(context.tools)`.
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
        """A call of `tool` with arguments that the model writes, held to the tool's schema while it does.

        A call that is kept in the state has the same id when the run is taken up again.

        Raises:
            ToolError: no such tool.  PromptError, EngineError
        """
        schema = toolbox.schema(tool)
        made = await self.ask(prompt, max_tokens=max_tokens, schema=schema, **values) if schema.get("properties") else None
        try:
            arguments = json.loads(made.text) if made else {}
        except ValueError:
            # Cut at max_tokens; performing it says what is missing.
            arguments = {}
        return ToolCall(tool, arguments, _call_id(tool, arguments))

    async def perform(self, toolbox: Toolbox, call: ToolCall) -> ToolResult:
        """Runs a call under the policy of the toolbox and the settings; never raises for what a tool does wrong. Where a
        person has to be asked the run waits here, and the node runs again from its beginning when there is an answer."""
        return await toolbox.perform(call, self.tool_settings)


def _call_id(tool: str, arguments: Any) -> str:
    """The task of the graph that makes a call is the same each time it runs; two calls of one task differ in what they ask."""
    from langgraph.config import get_config

    task = str(get_config().get("configurable", {}).get("checkpoint_ns", ""))
    return "call_" + content_hash(json.dumps([task, tool, arguments], sort_keys=True)).removeprefix("b2:")[:20]


@dataclass(frozen=True)
class LoadedGraph:
    """A compiled graph and how to find it again: `reference` is `rag`, `/path/file.py:attribute` or `python:NAME`."""

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
        schemas = getattr(getattr(self.compiled, "builder", None), "schemas", {})
        return schema_types(*schemas)

    def as_input(self, text: str) -> Any:
        """A command line's text as this graph's input: a JSON object as it is, else under `question`, `messages`,
        or the only text field that the input schema has.

        Raises:
            UsageError: no field fits.
        """
        if text.lstrip().startswith("{"):
            try:
                return json.loads(text)
            except (json.JSONDecodeError, RecursionError) as error:
                raise UsageError(
                    f"the input starts like a JSON object but is none: {error}",
                    hint='quote it for the shell: \'{"key": "value"}\'',
                ) from error
        schema = getattr(getattr(self.compiled, "builder", None), "input_schema", None)
        hints = typing.get_type_hints(schema) if schema is not None else {}
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


def own_graphs() -> list[str]:
    """Names of the graphs that come with the package."""
    spec = importlib.util.find_spec("graphs")
    folders = list(spec.submodule_search_locations or []) if spec else []
    return sorted(file.stem for folder in folders for file in Path(folder).glob("*.py") if not file.stem.startswith("_"))


def load_graph(reference: str) -> LoadedGraph:
    """The graph that `reference` names.

    Raises:
        GraphNotFound: no such name, file or attribute.
        GraphBroken: the file raises when imported; file, line and text of the line are shown.
    """
    if ".py" in reference or "/" in reference:
        path, _, attribute = reference.partition(":")
        file = Path(path).expanduser().absolute()
        if not file.is_file():
            raise GraphNotFound(f"there is no file {path}", hint="name a graph as path/to/file.py:attribute")
        return _from_module(_import_file(file), attribute or "graph", file.stem, f"{file}:{attribute or 'graph'}", file.parent)
    if reference not in own_graphs():
        raise GraphNotFound(
            f"no graph is called '{reference}'",
            hint=f"there are: {', '.join(own_graphs())}; a graph of your own is path/to/file.py:attribute",
        )
    module = importlib.import_module(f"graphs.{reference}")
    return _from_module(module, "graph", reference, reference, Path(str(module.__file__)).parent)


def adopt_graph(graph: Any, name: str | None = None) -> LoadedGraph:
    """A graph object of the caller's: compiled, or a builder that is compiled here.

    Raises:
        GraphNotFound: it is neither.
    """
    compiled = _compile(graph, "the object given")
    label = name or getattr(compiled, "name", None) or "graph"
    return LoadedGraph(label, f"python:{label}", compiled, PromptLibrary(None))


def _from_module(module: ModuleType, attribute: str, name: str, reference: str, folder: Path) -> LoadedGraph:
    from langgraph.graph import StateGraph
    from langgraph.pregel import Pregel

    try:
        found = getattr(module, attribute)
    except AttributeError:
        graphs = [key for key, value in vars(module).items() if isinstance(value, StateGraph | Pregel)]
        hint = f"it has: {', '.join(graphs)}" if graphs else "the file defines no graph"
        raise GraphNotFound(f"{reference.rpartition(':')[0] or name} has no '{attribute}'", hint=hint) from None
    try:
        if callable(found) and not isinstance(found, StateGraph | Pregel):
            found = found()
        compiled = _compile(found, f"'{attribute}'")
    except GraphNotFound:
        raise
    except Exception as error:
        raise _broken_in(error, Path(str(module.__file__))) from error
    return LoadedGraph(name, reference, compiled, PromptLibrary(folder / "prompts"))


def _compile(graph: Any, what: str) -> Any:
    from langgraph.graph import StateGraph
    from langgraph.pregel import Pregel

    if isinstance(graph, StateGraph):
        return graph.compile()
    if isinstance(graph, Pregel):
        return graph
    raise GraphNotFound(
        f"{what} is a {type(graph).__name__}, not a LangGraph graph", hint="give a StateGraph or what its compile() returns"
    )


def _import_file(file: Path) -> ModuleType:
    name = "agentops_graph_" + hashlib.blake2b(str(file).encode(), digest_size=8).hexdigest()
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise GraphNotFound(f"{file} is not a Python file", hint="name a graph as path/to/file.py:attribute")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(file.parent))
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        sys.modules.pop(name, None)
        raise _broken(error, error.filename or str(file), error.lineno) from error
    except Exception as error:
        sys.modules.pop(name, None)
        raise _broken_in(error, file) from error
    finally:
        sys.path.remove(str(file.parent))
    return module


def _broken_in(error: Exception, file: Path) -> GraphBroken:
    """Where in the user's folder an error came from; the library's own frames say nothing to its user."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).parent == file.parent]
    return _broken(error, frames[-1].filename if frames else str(file), frames[-1].lineno if frames else None)


def _broken(error: Exception, file: str, line: int | None) -> GraphBroken:
    linecache.checkcache(file)
    text = linecache.getline(file, line).rstrip() if line else ""
    said = error.msg if isinstance(error, SyntaxError) else str(error)
    place = f"{file}, line {line}" if line else file
    shown = f"\n  {line} | {text}" if text else ""
    return GraphBroken(
        f"{place}: {type(error).__name__}: {said}{shown}",
        file=file,
        line=line,
        hint="mend that line and run again" if line else "mend the file and run again",
    )
