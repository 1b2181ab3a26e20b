"""What LangGraph and LangChain tell about a run, as spans.

A step is a chain with a `graph:step:N` tag. A chain that turns out to contain steps is a subgraph and becomes an agent
span then, with its true time of start. All other chains (channel writes, sequences, routers) are passed through: what
happens inside them belongs to the span around them; where a router goes is kept as `route` on its node.
The handler runs inline, so events come in order and in the context of what they tell about.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, ParamSpec
from uuid import UUID

from langchain_core.documents import Document
from langchain_core.messages import BaseMessage
from langchain_core.outputs import LLMResult
from langgraph.callbacks import GraphCallbackHandler, GraphInterruptEvent, GraphResumeEvent
from langgraph.errors import NodeTimeoutError
from langgraph.types import Send

from agentops.errors import BudgetSpent, RecordError
from agentops.records import Usage
from agentops.tracer.trace import RunTrace, Span

P = ParamSpec("P")
_STEP = "graph:step:"
_OUT_OF_TIME = "NodeTimeoutError: it had no more time"
_PUSH = "__pregel_push"
_HANDLER = "node_error_handler"
_HANDLES = "__error_handler__"
_UNNAMED = "LangGraph"
# What LangGraph and LangChain put into the tags and the metadata of a config by themselves, and what is a column of the record.
_TAGS = ("graph:step:", "seq:step:", "map:key:", "langsmith:")
_METADATA = ("langgraph_", "ls_", "lc_", "__", "agentops_")
_CONFIG = ("run_id", "thread_id", "checkpoint_ns", "checkpoint_id", "user", "revision_id")


def _safe(method: Callable[P, None]) -> Callable[P, None]:
    """A failure of ours is counted and swallowed; a journal that cannot be written, a spent budget, or a replay that cannot go on
    stops the run."""

    @wraps(method)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            method(*args, **kwargs)
        except (RecordError, BudgetSpent):
            raise
        except Exception:
            self: Any = args[0]
            self.agentops_run.fault()

    return guarded


@dataclass(frozen=True, slots=True)
class _Passed:
    """A chain that is no span, or not yet."""

    name: str
    parent: str
    payload: Any
    started_ns: int
    router: bool


class Taps(GraphCallbackHandler):
    """The callback handler of one run."""

    run_inline = True
    # LangChain swallows what a handler raises unless this is set; only RecordError and BudgetSpent leave the methods below.
    raise_error = True

    def __init__(self, run: RunTrace) -> None:
        super().__init__()
        self.agentops_run = run
        self._passed: dict[UUID, _Passed] = {}
        self._attempts: dict[tuple[str, str], int] = {}
        self._models: dict[UUID, Span] = {}
        self._cut: dict[str, Span] = {}
        """Nodes that were cancelled, by their namespaces: by a time limit of their own, if the graph goes on with them."""
        self._lock = threading.Lock()

    # Chains: steps, subgraphs, and what is passed through

    @_safe
    def on_chain_start(
        self,
        serialized: dict[str, Any] | None,
        inputs: Any,
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        tags: list[str] | None = None,
        metadata: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        run, data = self.agentops_run, metadata or {}
        name = str(kwargs.get("name") or data.get("langgraph_node") or "chain")
        way = data.get("langgraph_path", ())
        handled = _HANDLER in way and name.startswith(_HANDLES)
        if handled:
            name = f"{name.removeprefix(_HANDLES)} (error handler)"
        # A task of the functional API is called inside another task, and is given a path of its own.
        is_task = way[:1] == (_PUSH,) and way[-1] is True and name == data.get("langgraph_node")
        is_step = is_task or any(tag.startswith(_STEP) for tag in tags or ())
        if not is_step or name.startswith("__"):
            parent = run.parent(parent_run_id)
            # A router is a later part of the node itself. Parts of a sequence called inside a node say what a model said.
            router = (
                parent_run_id is not None
                and parent_run_id not in self._passed
                and kwargs.get("run_type") != "parser"
                and "seq:step:1" not in (tags or ())
                and any(tag.startswith("seq:step:") for tag in tags or ())
            )
            self._passed[run_id] = _Passed(name, parent, inputs, run.now_ns(), router)
            run.bind(run_id, parent)
            return
        if parent_run_id is not None:
            self._promote(parent_run_id)
        namespace = str(data.get("langgraph_checkpoint_ns", ""))
        levels = namespace.split("|")
        attributes: dict[str, Any] = {"triggers": [str(trigger) for trigger in data.get("langgraph_triggers", ())]}
        attributes |= self._labels(tags, data)
        if (checkpoint := run.checkpoint("|".join(levels[:-1]))) is not None:
            attributes["checkpoint"] = checkpoint
        if len(way) > 1 and way[0] == _PUSH:
            # Which of the packets sent to the same node it is.
            attributes["packet"] = "/".join(str(part) for part in way[1:] if not isinstance(part, bool))
        if (cut := self._cut.pop("|".join(levels[:-1]) if handled else namespace, None)) is not None:
            run.amend(cut, _OUT_OF_TIME)
        with self._lock:
            self._attempts[name, namespace] = attempt = self._attempts.get((name, namespace), 0) + 1
        opened = run.open(
            "node",
            name,
            parent=run.parent(parent_run_id),
            input=inputs,
            path=tuple(level.partition(":")[0] for level in levels[:-1]),
            attributes=attributes,
            node=name if handled else str(data.get("langgraph_node", name)),
            step=int(data.get("langgraph_step", 0)),
            task=levels[-1].partition(":")[2] or None,
            checkpoint_ns=namespace,
            attempt=attempt,
        )
        run.bind(run_id, opened.id)

    def _labels(self, tags: Sequence[str] | None, metadata: Mapping[str, Any]) -> dict[str, Any]:
        """The tags and the metadata of a config, without what LangGraph and LangChain put there and what all of the run has."""
        labels, found = self.agentops_run.labels, dict[str, Any]()
        if own := [tag for tag in tags or () if not tag.startswith(_TAGS) and tag not in labels.tags]:
            found["tags"] = own
        words = {
            name: value
            for name, value in metadata.items()
            if not name.startswith(_METADATA) and name not in _CONFIG and labels.metadata.get(name, _CONFIG) != value
        }
        return {**found, "metadata": words} if words else found

    def _promote(self, chain: UUID) -> None:
        """The chain has a step inside, so it is a graph: the root is the workflow span already, others are agents."""
        run = self.agentops_run
        with self._lock:
            passed = self._passed.get(chain)
            if passed is None or passed.parent == run.root_id:
                return
            del self._passed[chain]
        parent = run.find(passed.parent)
        name = passed.name if passed.name != _UNNAMED or parent is None else str(parent.row["name"])
        opened = run.open("agent", name, parent=passed.parent, input=passed.payload, started_ns=passed.started_ns)
        run.bind(chain, opened.id)

    @_safe
    def on_chain_end(self, outputs: Any, *, run_id: UUID, **kwargs: Any) -> None:
        self._end(run_id, outputs, None)

    @_safe
    def on_chain_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        self._end(run_id, None, error)

    def _end(self, run_id: UUID, output: Any, error: BaseException | None) -> None:
        run = self.agentops_run
        passed = self._passed.pop(run_id, None)
        closing = run.span_of(run_id)
        run.forget(run_id)
        if closing is None:
            return
        if isinstance(error, NodeTimeoutError):
            # Told to the node's graph, then to those around it. The first that was cut is meant; siblings were cancelled for it.
            inside = (
                key for key, cut in self._cut.items() if (cut.row["node"], cut.row["parent_id"]) == (error.node, closing.id)
            )
            if (first := next(inside, None)) is not None:
                run.amend(self._cut.pop(first), error)
        if passed is None:
            if closing.row["kind"] == "node":
                run.effects.leaving(run_id, run.way(closing.id))
            run.close(closing, output=output, error=error)
            if isinstance(error, asyncio.CancelledError) and closing.row["kind"] == "node":
                self._cut[str(closing.row.get("checkpoint_ns"))] = closing
        elif passed.router and error is None and (route := _route(output)):
            closing.set(route=route)

    @_safe
    def on_interrupt(self, event: GraphInterruptEvent) -> None:
        self.agentops_run.annotate(interrupts=len(event.interrupts), checkpoint=event.checkpoint_id)

    @_safe
    def on_resume(self, event: GraphResumeEvent) -> None:
        self.agentops_run.stands("|".join(event.checkpoint_ns), event.checkpoint_id)
        if not event.checkpoint_ns:
            self.agentops_run.annotate(resumed_from=event.checkpoint_id)

    @_safe
    def on_custom_event(self, name: str, data: Any, *, run_id: UUID, **kwargs: Any) -> None:
        self.agentops_run.event(name, data)

    # Models that are not ours

    def _model(
        self,
        asked: Any,
        run_id: UUID,
        parent_run_id: UUID | None,
        tags: list[str] | None,
        metadata: dict[str, Any] | None,
        extra: dict[str, Any],
    ) -> None:
        run, data = self.agentops_run, metadata or {}
        parent = run.parent(parent_run_id)
        if data.get("ls_provider") == "agentops":
            # The engine beneath it is wrapped and records the call itself.
            run.bind(run_id, parent)
            return
        run.admit(parent)
        parameters = extra.get("invocation_params") or {}
        name = data.get("ls_model_name") or parameters.get("model") or parameters.get("model_name") or parameters.get("_type")
        run.effects.foreign("model", str(name or "of LangChain"))
        kept = {key.removeprefix("ls_"): data[key] for key in ("ls_provider", "ls_temperature", "ls_max_tokens") if key in data}
        kept |= self._labels(tags, data)
        opened = run.open(
            "generation", "generate", parent=parent, input=asked, attributes=kept, model=str(name) if name else None
        )
        run.bind(run_id, opened.id)
        self._models[run_id] = opened

    @_safe
    def on_chat_model_start(
        self,
        serialized: dict[str, Any],
        messages: list[list[BaseMessage]],
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        tags: list[str] | None = None,
        metadata: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self._model({"messages": messages[0] if messages else []}, run_id, parent_run_id, tags, metadata, kwargs)

    @_safe
    def on_llm_start(
        self,
        serialized: dict[str, Any],
        prompts: list[str],
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        tags: list[str] | None = None,
        metadata: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self._model({"text": prompts[0] if prompts else ""}, run_id, parent_run_id, tags, metadata, kwargs)

    @_safe
    def on_llm_new_token(self, token: Any, *, run_id: UUID, **kwargs: Any) -> None:
        call = self._models.get(run_id)
        if call is not None and isinstance(token, str):
            attributes = call.row.setdefault("attributes", {})
            attributes["chunks"] = attributes.get("chunks", 0) + 1
            if "first_token_ms" not in call.row:
                call.row["first_token_ms"] = (self.agentops_run.now_ns() - call.row["start_ns"]) / 1e6
            self.agentops_run.token(token, call)

    @_safe
    def on_llm_end(self, response: LLMResult, *, run_id: UUID, **kwargs: Any) -> None:
        call = self._models.pop(run_id, None)
        self.agentops_run.forget(run_id)
        if call is None:
            return
        first = response.generations[0][0] if response.generations and response.generations[0] else None
        message = getattr(first, "message", None)
        output = message if message is not None else getattr(first, "text", "")
        reason = (getattr(first, "generation_info", None) or {}).get("finish_reason")
        if reason:
            call.set(finish_reason=str(reason))
        self.agentops_run.close(call, output=output, usage=_usage(message))

    @_safe
    def on_llm_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        call = self._models.pop(run_id, None)
        self.agentops_run.forget(run_id)
        if call is not None:
            self.agentops_run.close(call, error=error)

    # Tools and retrievers

    @_safe
    def on_tool_start(
        self,
        serialized: dict[str, Any],
        input_str: str,
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        inputs: dict[str, Any] | None = None,
        tags: list[str] | None = None,
        metadata: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        run = self.agentops_run
        if "agentops_tool" in (metadata or {}):
            # The toolbox that runs it has opened the span already, and closes it.
            parent = run.parent(parent_run_id)
            self._passed[run_id] = _Passed("tool", parent, None, run.now_ns(), router=False)
            run.bind(run_id, parent)
            return
        name = str((serialized or {}).get("name") or kwargs.get("name") or "tool")
        run.effects.foreign("tool", name)
        attributes = self._labels(tags, metadata or {})
        if call := kwargs.get("tool_call_id"):
            attributes["tool_call_id"] = str(call)
        asked = inputs if inputs is not None else input_str
        opened = run.open("tool", name, parent=run.parent(parent_run_id), input=asked, attributes=attributes)
        run.bind(run_id, opened.id)

    @_safe
    def on_tool_end(self, output: Any, *, run_id: UUID, **kwargs: Any) -> None:
        self._end(run_id, output, None)

    @_safe
    def on_tool_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        self._end(run_id, None, error)

    @_safe
    def on_retriever_start(
        self,
        serialized: dict[str, Any],
        query: str,
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        tags: list[str] | None = None,
        metadata: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        run = self.agentops_run
        name = str(kwargs.get("name") or (serialized or {}).get("name") or "retriever")
        run.effects.foreign("retriever", name)
        opened = run.open(
            "retrieval", name, parent=run.parent(parent_run_id), input=query, attributes=self._labels(tags, metadata or {})
        )
        run.bind(run_id, opened.id)

    @_safe
    def on_retriever_end(self, documents: Sequence[Document], *, run_id: UUID, **kwargs: Any) -> None:
        found = [
            {
                "id": document.id,
                "source": document.metadata.get("source"),
                "score": document.metadata.get("score"),
                "metadata": document.metadata,
                "text": document.page_content,
            }
            for document in documents
        ]
        self._end(run_id, found, None)

    @_safe
    def on_retriever_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        self._end(run_id, None, error)


def _route(output: Any) -> str:
    """Where a router sends: node names, in order."""
    choices = output if isinstance(output, list | tuple) else [output]
    names = [choice.node if isinstance(choice, Send) else choice for choice in choices]
    counts = Counter(str(name) for name in names if isinstance(name, str))
    return ", ".join(name if times == 1 else f"{name} x {times}" for name, times in counts.items())


def _usage(message: Any) -> Usage | None:
    told = getattr(message, "usage_metadata", None)
    if not told:
        return None
    given = int(told.get("input_tokens") or 0)
    cached = min(given, int((told.get("input_token_details") or {}).get("cache_read") or 0))
    return Usage(given, int(told.get("output_tokens") or 0), cached, given - cached)
