"""All that a span keeps, looked at where it is read: in the store, and in what `agentops show` prints."""

from __future__ import annotations

import operator
import sys
from typing import Annotated, Any, TypedDict

import pytest
from langchain_core.language_models import GenericFakeChatModel
from langchain_core.messages import AIMessage
from langchain_core.runnables import RunnableConfig
from langgraph.cache.memory import InMemoryCache
from langgraph.graph import START, StateGraph
from langgraph.runtime import Runtime as Node
from langgraph.types import CachePolicy, RetryPolicy, Send, interrupt

from agentops import Context, Runtime, ScriptedEngine, Settings
from agentops.cli import main
from agentops.engine import generate
from agentops.engine.local import LocalEngine
from agentops.errors import NodeFailed, UsageError
from agentops.records import Labels, Message, PromptVersion, Request
from agentops.store import SpanRow, open_store
from agentops.tracer import catch_up, tagged

ASK = Request(messages=(Message("user", "Say hello."),), max_tokens=4)
PROMPT = PromptVersion("greeting", "b2:0", "Say hello.")
LABELS = Labels("ada", ("nightly",), {"build": 7})


class State(TypedDict, total=False):
    said: Annotated[list[str], operator.add]
    q: str


def spans_of(settings: Settings, run_id: str) -> dict[str, SpanRow]:
    catch_up(settings, wait=True)
    with open_store(settings) as store:
        return {span.name if span.kind != "workflow" else "run": span for span in store.spans(run_id)}


def test_a_span_says_where_it_is_from_how_long_it_took_and_what_it_cost(settings: Settings, engine: LocalEngine) -> None:
    async def asks(state: State, runtime: Node[Context]) -> State:
        with tagged(prompt=PROMPT):
            first = await generate(runtime.context.engine, ASK)
            return {"said": [first.text]}

    inner: Any = StateGraph(State, context_schema=Context).add_node("asks", asks).add_edge(START, "asks").compile()
    left = [ConnectionError("not yet")]

    async def tries(state: State) -> State:
        if left:
            raise left.pop()
        return {"said": ["x" * 5_000]}

    outer: Any = StateGraph(State, context_schema=Context).add_node("inner", inner)
    outer.add_node("tries", tries, retry_policy=RetryPolicy(initial_interval=0.001, jitter=False))
    graph = (
        outer.add_edge(START, "inner").add_conditional_edges("inner", lambda _: [Send("tries", {"q": "?"})], ["tries"]).compile()
    )
    with Runtime(settings, engine=engine) as runtime:
        run = runtime.run(graph, {"q": "?"}, labels=LABELS)
    catch_up(settings, wait=True)
    with open_store(settings) as store:
        row, spans = store.run(run.run_id), store.spans(run.run_id)
        assert row.tags == LABELS.tags
        root, inner_node, agent, asking, said, failed, tried = spans
        assert [span.name for span in spans[1:]] == ["inner", "inner", "asks", "generate", "tries", "tries"]
        assert root.attributes["settings"]["labels"] == {"user": "ada", "tags": ["nightly"], "metadata": {"build": 7}}
        states = {state.graph: state for state in reversed(store.checkpoints(run.run_id))}
        assert states.keys() == {"", "inner"}
        for span in spans:
            assert (span.run_id, span.root_id, span.status) == (run.run_id, root.id, "error" if span is failed else "ok")
            assert span.duration_ns is not None
            assert 0 <= span.duration_ns <= (root.duration_ns or 0)
            assert span.start_ns >= root.start_ns
            assert span.input_hash
            assert span.output_hash or span is failed
        assert [span.parent_id for span in spans] == [None, root.id, inner_node.id, agent.id, asking.id, root.id, root.id]
        assert (asking.node, asking.step, said.node, said.step) == ("asks", 1, "asks", 1)
        assert (inner_node.node, inner_node.step, tried.node, tried.step) == ("inner", 1, "tries", 2)
        assert (failed.attempt, tried.attempt) == (1, 2)
        assert failed.task == tried.task is not None
        assert tried.checkpoint_ns == f"tries:{tried.task}"
        assert asking.checkpoint_ns == f"inner:{inner_node.task}|asks:{asking.task}"
        assert len({span.attributes["checkpoint"] for span in (inner_node, asking, tried)}) == 3
        assert failed.attributes["checkpoint"] == tried.attributes["checkpoint"]
        assert failed.error == "ConnectionError: not yet"
        assert failed.attributes["error_type"] == "builtins.ConnectionError"
        assert "raise left.pop()" in failed.attributes["stack"]
        assert (said.prompt_name, said.prompt_version) == ("greeting", PROMPT.version)
        assert (said.model, said.attributes["device"]) == (engine.info.name, engine.info.device)
        assert said.usage.cached_tokens + said.usage.computed_tokens == said.usage.input_tokens > 0
        assert said.usage.output_tokens > 0
        assert said.timing.prefill_ms > 0
        assert 0 < said.timing.first_token_ms <= (said.duration_ns or 0) / 1e6
        assert said.timing.decode_ms > 0
        assert said.attributes["chunks"] > 0
        assert store.payload(tried.output_hash or "") == {"said": ["x" * 5_000]}


def test_the_checkpoint_of_a_span_is_the_one_its_step_started_from(settings: Settings) -> None:
    """Also where a run is taken up again, which writes no checkpoint before its first step."""
    found: list[str] = []

    async def a(state: State, runtime: Node[Context]) -> State:
        assert runtime.execution_info is not None
        found.append(runtime.execution_info.checkpoint_id)
        return {"said": [str(interrupt("?"))]} if len(found) < 3 else {}

    builder: Any = StateGraph(State, context_schema=Context).add_node("a", a).add_node("b", a)
    inner = builder.add_edge(START, "a").add_edge("a", "b").compile()
    graph: Any = StateGraph(State, context_schema=Context).add_node("inner", inner).add_edge(START, "inner").compile()
    with Runtime(settings, engine=ScriptedEngine([])) as runtime:
        run = runtime.run(graph, {"q": "?"})
        runtime.resume(run.run_id, answer="yes", graph=graph)
    catch_up(settings, wait=True)
    with open_store(settings) as store:
        spans = [span for span in store.spans(run.run_id) if span.name in "ab"]
    assert len(found) == 3
    assert [span.attributes["checkpoint"] for span in spans] == found


def test_a_model_of_langchain_has_its_first_token_its_chunks_and_its_labels(settings: Settings) -> None:
    async def asks(state: State, config: RunnableConfig) -> State:
        model: Any = GenericFakeChatModel(messages=iter([AIMessage("one two three")])).with_config(
            tags=["fake"], metadata={"tier": "a"}
        )
        return {"said": [str(part.content) async for part in model.astream("hi", config)]}

    builder: Any = StateGraph(State).add_node("asks", asks)
    graph = builder.add_edge(START, "asks").compile()
    with Runtime(settings, engine=ScriptedEngine([])) as runtime:
        run = runtime.run(graph, {"q": "?"}, labels=LABELS)
    spans = spans_of(settings, run.run_id)
    said = spans["generate"]
    assert said.attributes["chunks"] == 5
    assert said.timing.first_token_ms > 0
    assert (said.attributes["tags"], said.attributes["metadata"]) == (["fake"], {"tier": "a"})
    assert "metadata" not in spans["asks"].attributes
    assert "tags" not in spans["asks"].attributes


def test_nodes_find_the_labels_in_their_config_also_when_the_run_is_taken_up_again(settings: Settings) -> None:
    found: list[Any] = []

    async def a(state: State, config: RunnableConfig) -> State:
        found.append((config["metadata"]["user"], config["metadata"]["build"], "nightly" in config["tags"]))
        interrupt("?")
        return {}

    builder: Any = StateGraph(State).add_node("a", a)
    graph = builder.add_edge(START, "a").compile()
    with Runtime(settings, engine=ScriptedEngine([])) as runtime:
        run = runtime.run(graph, {"q": "?"}, labels=LABELS)
        runtime.resume(run.run_id, answer="yes", graph=graph)
        with pytest.raises(UsageError, match="cannot keep 'run_id'"):
            runtime.run(graph, {"q": "?"}, labels=Labels(metadata={"run_id": "x"}))
    assert found == [("ada", 7, True)] * 2


def test_a_cached_node_says_so(settings: Settings) -> None:
    async def a(state: State) -> State:
        return {"said": ["a"]}

    builder: Any = StateGraph(State).add_node("a", a, cache_policy=CachePolicy())
    graph = builder.add_edge(START, "a").compile(cache=InMemoryCache())
    with Runtime(settings, engine=ScriptedEngine([])) as runtime:
        first, second = (runtime.run(graph, {"q": "?"}).run_id for _ in range(2))
    assert "cached" not in spans_of(settings, first)["a"].attributes
    assert spans_of(settings, second)["a"].attributes["cached"] is True


def test_show_prints_what_a_span_keeps(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def shown_of(span: str) -> str:
        monkeypatch.setattr(sys, "argv", ["agentops", "show", "last", "--span", span])
        capsys.readouterr()
        with pytest.raises(SystemExit):
            main()
        return capsys.readouterr().out

    monkeypatch.setenv("AGENTOPS_PATHS_HOME", str(settings.paths.home))

    async def a(state: State) -> State:
        raise ValueError("no")

    builder: Any = StateGraph(State).add_node("a", a)
    graph = builder.add_edge(START, "a").compile()
    with Runtime(settings, engine=ScriptedEngine([])) as runtime, pytest.raises(NodeFailed) as failed:
        runtime.run(graph, {"q": "?"}, labels=LABELS)
    span = spans_of(settings, failed.value.run_id)["a"]
    shown = shown_of("a")
    ids = (span.id, span.run_id, span.parent_id, span.task, span.checkpoint_ns, span.attributes["checkpoint"])
    for kept in (*ids, "builtins.ValueError"):
        assert str(kept) in shown
    assert "'user': 'ada'" in shown_of("1")
