"""Tools as people declare them, and the calls that a toolbox runs inside real runs: what comes back, and what is on record."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypedDict

import pytest
from langchain_core.tools import BaseTool, InjectedToolArg, InjectedToolCallId, StructuredTool
from langchain_core.tools import tool as langchain_tool
from langgraph.graph import END, START, StateGraph
from langgraph.prebuilt import InjectedState, ToolRuntime
from langgraph.runtime import Runtime as NodeRuntime
from langgraph.runtime import get_runtime
from pydantic import BaseModel, Field

from agentops import Context, Runtime, ScriptedEngine, Settings, people
from agentops.errors import AnswerUnfit, GraphBroken, ToolError
from agentops.graph import load_graph
from agentops.records import Decision, Effect, Policy, Request, ToolCall, ToolResult
from agentops.settings import ToolSettings
from agentops.store import SpanRow, open_store
from agentops.tools import Toolbox, effect_of, tool
from agentops.tracer import catch_up


@tool(effect="none")
def add(a: int, b: int = 2) -> int:
    """Adds two numbers.

    Args:
        a: the first number
        b: the second
    """
    return a + b


@tool(effect="read")
async def look(text: str) -> str:
    """Looks a text up in the documents."""
    found = await get_runtime(Context).context.search(text)
    return f"{len(found.hits)} hits"


class State(TypedDict, total=False):
    calls: list[ToolCall]
    results: list[ToolResult]


def graph(box: Toolbox) -> Any:
    """One node that performs all calls."""

    async def act(state: State, runtime: NodeRuntime[Context]) -> State:
        return {"results": [await runtime.context.perform(box, call) for call in state["calls"]]}

    made = StateGraph(State, context_schema=Context)
    made.add_node("act", act)
    made.add_edge(START, "act")
    made.add_edge("act", END)
    return made.compile()


class NoIndex:
    """Finds nothing, which is all that is asked of it here."""

    def collections(self) -> list[Any]:
        return []

    async def search(self, query: Any) -> Any:
        from agentops.records import Retrieval

        return Retrieval(query, (), 0)

    def close(self) -> None: ...


@pytest.fixture
def runtime(settings: Settings) -> Iterator[Runtime]:
    embedder: Any = object()
    index: Any = NoIndex()
    with Runtime(settings, engine=ScriptedEngine(), index=index, embedder=embedder) as opened:
        yield opened


def call(name: str, **arguments: Any) -> ToolCall:
    return ToolCall(name, arguments, f"call_{name}")


def perform(runtime: Runtime, box: Toolbox, *calls: ToolCall) -> list[ToolResult]:
    done = runtime.run(graph(box), {"calls": list(calls)})
    assert done.status == "done", done
    results: list[ToolResult] = done.output["results"]
    return results


def tool_spans(settings: Settings, run_id: str) -> list[SpanRow]:
    catch_up(settings)
    with open_store(settings) as store:
        return [span for span in store.spans(run_id) if span.kind == "tool"]


# Declaring


def test_name_description_and_schema_come_from_the_function() -> None:
    box = Toolbox([add, look])
    assert box.descriptions() == {"add": "Adds two numbers.", "look": "Looks a text up in the documents."}
    schema = box.schema("add")
    assert schema["properties"]["a"] == {"description": "the first number", "title": "A", "type": "integer"}
    assert schema["required"] == ["a"]
    assert schema["additionalProperties"] is False
    assert (effect_of(add), effect_of(look)) == ("none", "read")
    assert box.parameters("add") == "- a (integer): the first number\n- b (integer, optional): the second"
    assert "add" in box
    assert len(box) == 2


def test_a_plain_function_is_a_tool_that_writes() -> None:
    def note(text: str) -> None:
        """Keeps a note."""

    box = Toolbox([note])
    assert effect_of(next(iter(box))) == "write"
    assert box.policy("note") == "ask"


class Place(BaseModel):
    name: str
    zip: str = ""


def test_types_are_told_to_the_model_in_words() -> None:
    @tool
    def go(
        to: Place,
        by: Literal["bus", "rail"],
        on: date | None = None,
        stops: list[Place] = [],  # noqa: B006
        seats: int | str = 1,
        more: Any = None,
    ) -> None:
        """Goes somewhere."""

    assert Toolbox([go]).parameters("go").splitlines() == [
        "- to (object with name, zip)",
        '- by (one of "bus", "rail")',
        "- on (string, date, optional)",
        "- stops (list of object with name, zip, optional)",
        "- seats (integer or string, optional)",
        "- more (anything, optional)",
    ]


def undocumented(text: str) -> str:
    return text


def untyped(text) -> str:  # type: ignore[no-untyped-def]
    """Takes anything."""
    return str(text)


def starred(*texts: str) -> str:
    """Takes several."""
    return "".join(texts)


def in_place(text: str, /) -> str:
    """Takes one by its place."""
    return text


class Opaque:
    pass


def opaque(thing: Opaque) -> str:
    """Takes what JSON does not have."""
    return str(thing)


def lookahead(code: Annotated[str, Field(pattern="(?=a)b")]) -> str:
    """Takes a pattern that no grammar knows."""
    return code


class Endless(BaseModel):
    inner: Endless


def endless(tree: Endless) -> str:
    """Takes a tree without leaves."""
    return str(tree)


def with_state(text: str, state: Annotated[dict[str, Any], InjectedState]) -> str:
    """Wants a graph's state."""
    return text


def with_runtime(text: str, runtime: ToolRuntime) -> str:
    """Wants what ToolNode gives."""
    return text


def with_injected(text: str, user: Annotated[str, InjectedToolArg]) -> str:
    """Wants what nobody gives."""
    return text


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (undocumented, "no docstring"),
        (untyped, "'text' has no type"),
        (starred, "'texts' cannot be given by name"),
        (in_place, "'text' cannot be given by name"),
        (opaque, "tool 'opaque'"),
        (lookahead, "look-a"),
        (endless, "have no end"),
        (with_state, "only LangGraph's ToolNode can fill its argument 'state'"),
        (with_runtime, "only LangGraph's ToolNode can fill its argument 'runtime'"),
        (with_injected, "can fill its argument 'user'"),
        (lambda text: text, "no name for a tool"),
    ],
)
def test_what_cannot_be_a_tool_is_refused_when_it_is_declared(function: Any, why: str) -> None:
    with pytest.raises(ToolError, match=why) as refused:
        tool(function)
    assert refused.value.hint


def test_somebody_elses_tool_that_cannot_be_called_is_refused_by_the_box() -> None:
    with pytest.raises(ToolError, match="'state'"):
        Toolbox([langchain_tool(with_state)])
    with pytest.raises(ToolError, match="'runtime'"):
        Toolbox([langchain_tool(with_runtime)])


def test_a_wrong_effect_name_or_policy_is_refused() -> None:
    with pytest.raises(ToolError, match="no effect 'writes'"):
        tool(effect="writes")(starred)  # type: ignore[call-overload]
    with pytest.raises(ToolError, match="'a b' is no name"):
        tool(name="a b")(add.func)  # type: ignore[arg-type]
    with pytest.raises(ToolError, match="policy for 'ad', which is no tool here") as unknown:
        Toolbox([add], policy={"ad": "deny"})
    assert "add" in unknown.value.hint
    with pytest.raises(ToolError, match="'maybe' is no policy"):
        Toolbox([add], policy={"add": "maybe"})  # type: ignore[dict-item]


def test_two_tools_of_one_name_are_refused() -> None:
    with pytest.raises(ToolError, match="two tools are called 'add'"):
        Toolbox([add, add])
    with pytest.raises(ToolError, match="two tools are called 'add'"):
        Toolbox([add]).joined([add])
    assert [one.name for one in Toolbox([add]).joined([look])] == ["add", "look"]


def test_two_tools_of_one_name_in_a_graph_show_the_line(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        'from agentops.tools import Toolbox, tool\n\n@tool\ndef one(text: str) -> str:\n    """Does."""\n    return text\n\n'
        "box = Toolbox([one, one])\ngraph = None\n"
    )
    with pytest.raises(GraphBroken, match="two tools are called 'one'") as broken:
        load_graph(str(tmp_path / "mine.py"))
    assert broken.value.line == 8


# Policies


@pytest.mark.parametrize("effect", ["none", "read", "write"])
@pytest.mark.parametrize("own", [None, "allow", "ask", "deny"])
@pytest.mark.parametrize("said", [(), ("allow",), ("ask",), ("deny",), ("allow", "ask"), ("allow", "deny"), ("ask", "deny")])
def test_the_operator_has_the_last_word_but_for_the_graphs_deny(
    effect: Effect, own: Policy | None, said: tuple[Policy, ...]
) -> None:
    @tool(effect=effect)
    def act(text: str) -> str:
        """Acts."""
        return text

    box = Toolbox([act], policy={"act": own} if own else None)
    plain = own or ("ask" if effect == "write" else "allow")
    assert box.policy("act") == plain
    operator = ToolSettings(**dict.fromkeys(said, ("act",)))
    strictest = next((word for word in ("deny", "ask", "allow") if word in said), plain)
    assert box.policy("act", operator) == ("deny" if own == "deny" else strictest)


def test_a_policy_is_asked_for_a_tool_that_is_there() -> None:
    with pytest.raises(ToolError, match="no tool 'sub'"):
        Toolbox([add]).policy("sub")


# Performing


def test_plain_and_asynchronous_tools_run_and_are_on_record(runtime: Runtime, settings: Settings) -> None:
    box = Toolbox([add, look])
    done = runtime.run(graph(box), {"calls": [call("add", a=1), call("look", text="x")]})
    assert [(result.status, result.content) for result in done.output["results"]] == [("ok", "3"), ("ok", "0 hits")]
    first, second = tool_spans(settings, done.run_id)
    assert (first.name, first.status) == ("add", "ok")
    about = {"call": "call_add", "effect": "none", "policy": "allow", "status": "ok"}
    assert first.attributes == {**about, "code": first.attributes["code"]}
    with open_store(settings) as store:
        assert store.payload(first.output_hash or "") == "3"
        (search,) = [span for span in store.spans(done.run_id) if span.kind == "retrieval"]
    assert search.parent_id == second.id


def test_a_plain_tool_runs_beside_the_event_loop_and_knows_its_run(runtime: Runtime) -> None:
    seen: list[Any] = []

    @tool(effect="none")
    def where() -> str:
        """Says where it runs."""
        seen.append((threading.current_thread(), get_runtime(Context).context.k))
        return "here"

    assert perform(runtime, Toolbox([where]), call("where"))[0].content == "here"
    assert seen[0][0].daemon
    assert seen[0][1] == 8


@pytest.mark.parametrize("is_async", [False, True])
def test_the_calls_id_is_put_in_and_is_not_the_models(runtime: Runtime, is_async: bool) -> None:
    def once(text: str, call_id: Annotated[str, InjectedToolCallId]) -> str:
        """Does something once."""
        return f"{text} {call_id}"

    async def later(text: str, call_id: Annotated[str, InjectedToolCallId]) -> str:
        """Does something once."""
        return f"{text} {call_id}"

    box = Toolbox([tool(effect="none", name="once")(later if is_async else once)])
    assert list(box.schema("once")["properties"]) == ["text"]
    (result,) = perform(runtime, box, call("once", text="a"))
    assert result.content == "a call_once"
    assert result.call.arguments == {"text": "a"}
    (forged,) = perform(runtime, box, call("once", text="a", call_id="mine"))
    assert forged.status == "failed"


class Sum(BaseTool):
    """Somebody else's tool, a class with a plain method."""

    name: str = "sum"
    description: str = "Adds."

    def _run(self, a: int, b: int) -> int:
        assert threading.current_thread().daemon
        return a + b


@langchain_tool
def negate(a: int) -> int:
    """Negates."""
    assert threading.current_thread().daemon
    return -a


def test_tools_that_were_not_declared_here_work_too(runtime: Runtime) -> None:
    box = Toolbox([Sum(), negate], policy={"sum": "allow", "negate": "allow"})
    results = perform(runtime, box, call("sum", a=1, b=2), call("negate", a=3))
    assert [(result.status, result.content) for result in results] == [("ok", "3"), ("ok", "-3")]
    assert Toolbox([negate]).policy("negate") == "ask"


@dataclass
class Point:
    x: int
    when: date


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("as it is", "as it is"),
        ("", ""),
        (None, "null"),
        ({"a": [1, "é"]}, '{"a": [1, "é"]}'),
        ([Point(1, date(2024, 2, 29))], '[{"x": 1, "when": "2024-02-29"}]'),
        (float("nan"), "NaN"),
        ([float("inf")], "[Infinity]"),
        ({"b", "c", "a"}, '["a", "b", "c"]'),
        (Decimal("1.10"), '"1.10"'),
        (b"bytes", '"bytes"'),
        (Path("a/b"), '"a/b"'),
        ("half \ud800 a pair", "half ? a pair"),
    ],
)
@pytest.mark.parametrize("is_async", [False, True])
def test_a_result_is_text_or_becomes_json(runtime: Runtime, value: Any, text: str, is_async: bool) -> None:
    def give() -> Any:
        """Gives."""
        return value

    async def later() -> Any:
        """Gives."""
        return value

    made = tool(effect="none", name="give")(later if is_async else give)
    assert perform(runtime, Toolbox([made]), call("give"))[0] == ToolResult(call("give"), "ok", text)


def test_a_denied_call_is_not_run_and_marked(runtime: Runtime, settings: Settings) -> None:
    ran: list[str] = []

    @tool(effect="read")
    def peek(text: str) -> str:
        """Peeks."""
        ran.append(text)
        return text

    done = runtime.run(graph(Toolbox([peek], policy={"peek": "deny"})), {"calls": [call("peek", text="x")]})
    assert done.output["results"][0].status == "denied"
    assert not ran
    (span,) = tool_spans(settings, done.run_id)
    assert span.attributes == {"call": "call_peek", "status": "denied", "effect": "read", "policy": "deny"}
    assert span.status == "ok"


# People


@tool(effect="write")
def send(to: str, text: Annotated[str, Field(min_length=1)]) -> str:
    """Sends a text."""
    return f"sent to {to}: {text}"


def asked(runtime: Runtime, *calls: ToolCall, box: Toolbox | None = None) -> tuple[str, Any]:
    made = graph(box or Toolbox([send, add]))
    waiting = runtime.run(made, {"calls": list(calls)})
    assert waiting.status == "waiting"
    return waiting.run_id, made


def test_an_approved_call_runs_once_and_its_one_span_says_who_decided(runtime: Runtime, settings: Settings) -> None:
    run_id, made = asked(runtime, call("send", to="ann", text="hi"))
    assert tool_spans(settings, run_id) == []
    done = runtime.resume(run_id, answer=Decision("approve"), graph=made)
    assert done.output["results"] == [ToolResult(call("send", to="ann", text="hi"), "ok", "sent to ann: hi")]
    (span,) = tool_spans(settings, run_id)
    about = {"call": "call_send", "effect": "write", "policy": "ask", "decision": "approve", "status": "ok"}
    assert span.attributes == {**about, "code": span.attributes["code"]}


def test_a_refused_call_says_why_and_is_no_error(runtime: Runtime, settings: Settings) -> None:
    run_id, made = asked(runtime, call("send", to="ann", text="hi"))
    done = runtime.resume(run_id, answer=Decision("reject", reason="too short"), graph=made)
    (result,) = done.output["results"]
    assert (result.status, result.content) == ("refused", "a person refused to run send: too short")
    (span,) = tool_spans(settings, run_id)
    assert (span.status, span.attributes["status"], span.attributes["decision"]) == ("ok", "refused", "reject")


def test_an_edited_call_runs_as_edited_and_one_that_does_not_fit_still_waits(runtime: Runtime) -> None:
    run_id, made = asked(runtime, call("send", to="ann", text="hi"))
    for content in ({"to": "ann"}, {"to": "ann", "text": ""}, {"to": "ann", "text": "x", "bcc": "eve"}, "text"):
        with pytest.raises(AnswerUnfit, match="does not fit"):
            runtime.resume(run_id, answer=Decision("edit", content), graph=made)
    done = runtime.resume(run_id, answer=Decision("edit", {"to": "bob", "text": "hello"}), graph=made)
    (result,) = done.output["results"]
    assert result.content == "sent to bob: hello"
    assert result.call == replace(call("send", to="bob", text="hello"))


def test_calls_of_one_node_are_asked_for_one_after_another(runtime: Runtime) -> None:
    run_id, made = asked(runtime, call("send", to="a", text="1"), call("add", a=1), call("send", to="b", text="2"))
    again = runtime.resume(run_id, answer=Decision("approve"), graph=made)
    assert again.status == "waiting"
    assert again.interrupts[0].content == {"to": "b", "text": "2"}
    done = runtime.resume(run_id, answer=Decision("reject"), graph=made)
    assert [result.status for result in done.output["results"]] == ["ok", "ok", "refused"]


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("policy", ["allow", "ask"])
def test_a_tool_may_ask_a_person_itself(runtime: Runtime, settings: Settings, is_async: bool, policy: Policy) -> None:
    def order(what: str) -> str:
        """Orders something."""
        return f"{people.ask('how many?', schema={'type': 'integer'})} of {what}"

    async def later(what: str) -> str:
        """Orders something."""
        return order(what)

    box = Toolbox([tool(effect="write", name="order")(later if is_async else order)], policy={"order": policy})
    run_id, made = asked(runtime, call("order", what="nails"), box=box)
    if policy == "ask":
        assert runtime.resume(run_id, answer=Decision("approve"), graph=made).status == "waiting"
    done = runtime.resume(run_id, answer=7, graph=made)
    assert done.output["results"][0].content == "7 of nails"
    assert [span.status for span in tool_spans(settings, run_id)] == ["interrupted", "ok"]


# Arguments by a model


def propose(runtime: Runtime, *answers: str, tokens: int = 256) -> list[Request]:
    """Has a call of `send` written, performed without asking, and gives what the engine was asked."""
    engine = ScriptedEngine(list(answers))
    box = Toolbox([send], policy={"send": "allow"})

    async def act(state: State, runtime: NodeRuntime[Context]) -> State:
        context = replace(runtime.context, engine=engine)
        made = await context.propose("write", box, "send", max_tokens=tokens)
        return {"results": [await context.perform(box, made)]}

    made = StateGraph(State, context_schema=Context)
    made.add_node("act", act)
    made.add_edge(START, "act")
    made.add_edge("act", END)
    compiled = made.compile()
    loaded = replace(load_graph("rag"), compiled=compiled)
    object.__setattr__(loaded, "prompts", _Prompts())
    done = runtime.run(loaded, {})
    assert done.output["results"][0].content == "sent to ann: hi"
    return engine.requests


class _Prompts:
    instead: ClassVar[dict[str, Any]] = {}

    def get(self, name: str) -> Any:
        from agentops.records import Message

        class Chosen:
            version = None

            def render(self, **values: object) -> tuple[Message, ...]:
                return (Message("user", name),)

        return Chosen()


def test_arguments_are_asked_for_under_a_bounded_schema(runtime: Runtime) -> None:
    (request,) = propose(runtime, '{"to": "ann", "text": "hi"}')
    assert request.constraint is not None
    form = request.constraint.value
    assert form["required"] == ["to", "text"]
    assert all(0 < part["maxLength"] <= 640 for part in form["properties"].values())
    assert form["properties"]["text"]["minLength"] == 1


def test_arguments_that_were_cut_are_asked_for_again_smaller_and_never_taken(runtime: Runtime) -> None:
    with pytest.raises(ToolError, match="may need 56 tokens, and 10 are given"):
        propose(runtime, tokens=10)
    first, second = propose(runtime, '{"to": "ann", "text": "' + "a " * 70 + '"}', '{"to": "ann", "text": "hi"}', tokens=64)
    assert first.constraint is not None
    assert second.constraint is not None
    sizes = [request.constraint.value["properties"]["text"]["maxLength"] for request in (first, second) if request.constraint]
    assert sizes[0] > sizes[1]

    wordy = '{"to": "ann", "text": "' + "a " * 70 + '"}'
    with pytest.raises(ToolError, match="wrote no arguments that fit 'send': they were cut after 64 tokens"):
        propose(runtime, wordy, wordy, tokens=64)


async def test_performing_outside_a_run_works_and_records_nothing() -> None:
    result = await Toolbox([add]).perform(call("add", a=1, b=1))
    assert (result.status, result.content) == ("ok", "2")


async def test_many_calls_at_once_do_not_disturb_each_other() -> None:
    box = Toolbox([add])
    results = await asyncio.gather(*(box.perform(call("add", a=a, b=b)) for a, b in itertools.product(range(8), range(8))))
    assert [result.content for result in results] == [str(a + b) for a, b in itertools.product(range(8), range(8))]


def test_a_declared_tool_is_a_langchain_tool() -> None:
    assert isinstance(add, StructuredTool)
    assert add.invoke({"a": 1}) == "3"
