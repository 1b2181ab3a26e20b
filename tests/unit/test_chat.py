"""The LangChain face: langchain's own suite for chat models, and what that suite does not ask."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, SystemMessage, ToolMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_tests.unit_tests import ChatModelUnitTests
from pydantic import BaseModel

from agentops.engine.chat import EngineChatModel
from agentops.engine.scripted import ScriptedEngine
from agentops.errors import UsageError
from agentops.records import Constraint, Message


class TestLangChainSuite(ChatModelUnitTests):
    @property
    def chat_model_class(self) -> type[EngineChatModel]:
        return EngineChatModel

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"engine": ScriptedEngine({"": "hello there"})}


class Verdict(BaseModel):
    """A verdict."""

    supported: bool
    why: str


def chat(*answers: Any, **fields: Any) -> tuple[EngineChatModel, ScriptedEngine]:
    engine = ScriptedEngine(list(answers))
    return EngineChatModel(engine=engine, **fields), engine


def test_messages_reach_the_engine_in_its_own_words() -> None:
    model, engine = chat("fine")
    turns = [
        SystemMessage("be brief"),
        HumanMessage([{"type": "text", "text": "how are "}, {"type": "text", "text": "you"}]),
        AIMessage("well"),
        ToolMessage("42", tool_call_id="1"),
    ]
    answer = model.invoke(turns)
    assert answer.content == "fine"
    assert engine.requests[0].messages == (
        Message("system", "be brief"),
        Message("user", "how are you"),
        Message("assistant", "well"),
        Message("tool", "42"),
    )


def test_usage_and_the_reason_it_ended_are_reported() -> None:
    model, _ = chat("one two three four", "one two")
    cut = model.invoke("a b c", max_tokens=3)
    whole = model.invoke("a b c")
    assert cut.response_metadata["finish_reason"] == "length"
    assert cut.content == "one two three"
    assert whole.response_metadata["finish_reason"] == "stop"
    assert cut.usage_metadata is not None
    assert whole.usage_metadata is not None
    assert cut.usage_metadata["output_tokens"] == 3
    assert cut.usage_metadata["input_token_details"] == {"cache_read": 0}
    assert whole.usage_metadata["input_token_details"]["cache_read"] == whole.usage_metadata["input_tokens"] - 1


def test_bound_options_win_over_the_models_own_and_the_calls_over_both() -> None:
    model, engine = chat("a", "b", "c", seed=1, temperature=0.5, stop=["END"])
    model.invoke("x")
    model.bind(seed=2).invoke("x")
    model.bind(seed=2).invoke("x", seed=3, stop=["."])
    assert [request.seed for request in engine.requests] == [1, 2, 3]
    assert [request.stop for request in engine.requests] == [("END",), ("END",), (".",)]
    assert {request.temperature for request in engine.requests} == {0.5}


def test_an_option_given_as_none_is_not_given() -> None:
    model, engine = chat("a", "b", seed=1, max_tokens=7)
    model.bind(max_tokens=None, temperature=None, constraint=None).invoke("x")
    model.bind(seed=None).invoke("x")
    assert [(request.max_tokens, request.temperature, request.seed) for request in engine.requests] == [(7, 0, 1), (7, 0, None)]


async def test_streaming_yields_pieces_and_sums_to_one_message_with_usage() -> None:
    model, _ = chat("one two three", "one two three")
    for pieces in ([piece async for piece in model.astream("q")], list(model.stream("q"))):
        assert len([piece for piece in pieces if piece.content]) == 3
        whole = pieces[0]
        for piece in pieces[1:]:
            whole = whole + piece
        assert isinstance(whole, AIMessageChunk)
        assert whole.content == "one two three"
        assert whole.usage_metadata is not None
        assert whole.usage_metadata["output_tokens"] == 3


async def test_leaving_a_stream_cancels_the_engines_work() -> None:
    model, engine = chat("one two three four five")
    stream = model.astream("q")
    async for _ in stream:
        break
    await stream.aclose()  # type: ignore[attr-defined]
    # LangChain leaves its inner generator to the event loop's finaliser, which needs a turn.
    await asyncio.sleep(0.01)
    assert engine.cancelled == 1


def test_structured_output_is_a_constraint_on_the_engine() -> None:
    model, engine = chat('{"supported": true, "why": "line 2"}', '{"supported": false, "why": ""}', '{"n": 3}')
    assert model.with_structured_output(Verdict).invoke("q") == Verdict(supported=True, why="line 2")
    both = model.with_structured_output(Verdict, include_raw=True).invoke("q")
    assert isinstance(both, dict)
    assert both["parsed"] == Verdict(supported=False, why="")
    assert both["parsing_error"] is None
    schema = {"title": "Count", "type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    assert model.with_structured_output(schema).invoke("q") == {"n": 3}
    constraint = engine.requests[0].constraint
    assert constraint is not None
    assert constraint.kind == "json_schema"
    assert set(constraint.value["properties"]) == {"supported", "why"}


def test_a_choice_can_be_bound() -> None:
    model, engine = chat("no")
    bound = ChatPromptTemplate.from_template("{q}?") | model.bind(constraint=Constraint("choice", ["yes", "no"]))
    assert bound.invoke({"q": "is it"}).content == "no"
    assert engine.requests[0].constraint == Constraint("choice", ["yes", "no"])


def test_what_it_does_not_know_is_refused_not_ignored() -> None:
    model, engine = chat("x")
    with pytest.raises(UsageError, match="frequency_penalty"):
        model.invoke("q", frequency_penalty=1.0)
    with pytest.raises(UsageError, match="image_url"):
        model.invoke([HumanMessage([{"type": "image_url", "image_url": {"url": "http://x/"}}])])
    assert engine.requests == []


def test_tracers_recognise_the_provider() -> None:
    model, _ = chat(temperature=0.2)
    assert model._get_ls_params(max_tokens=9) == {
        "ls_provider": "agentops",
        "ls_model_type": "chat",
        "ls_model_name": "scripted",
        "ls_temperature": 0.2,
        "ls_max_tokens": 9,
    }
