"""What a checkpoint would give back as something else is refused when it is written, with the node and the field that have it."""

from __future__ import annotations

import dataclasses
import fractions
import operator
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Any, TypedDict

import pytest
from langgraph.graph import START, StateGraph
from langgraph.types import Command, Interrupt, Send, interrupt
from pydantic import BaseModel

from agentops import Runtime, ScriptedEngine
from agentops.checkpoints import lease, open_checkpointer
from agentops.errors import SettingsError, StateUnfit
from agentops.settings import Settings


@dataclasses.dataclass
class Known:
    inner: Any = None


@dataclasses.dataclass
class Unknown:
    value: int = 1


class Model(BaseModel):
    value: int = 1


class State(TypedDict, total=False):
    said: Any
    known: Known
    more: Annotated[list[Any], operator.add]


NAME = f"{__name__}.Unknown"


@pytest.fixture
def runtime(either_settings: Settings) -> Iterator[Runtime]:
    with Runtime(either_settings, engine=ScriptedEngine()) as runtime:
        yield runtime


def one_node(node: Any, *later: Any) -> Any:
    builder: Any = StateGraph(State).add_node("first", lambda state: {"more": ["first"]}).add_node("answer", node)
    return builder.add_edge(START, "first").add_edge("first", "answer")


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (Unknown(), NAME),
        (Model(), f"{__name__}.Model"),
        ([{"deep": (1, {"er": Unknown()})}], NAME),
        (Known(Unknown()), NAME),
        (fractions.Fraction, "ABCMeta"),
        (threading.Lock(), "lock"),
        ({Known(1).inner: object()}, "object"),
    ],
)
def test_the_node_and_the_field_are_told_and_the_mended_run_goes_on(runtime: Runtime, value: Any, named: str) -> None:
    given, began = [value], []

    def answer(state: State) -> Any:
        began.append(1)
        return {"said": given[0]}

    graph = one_node(answer)
    with pytest.raises(StateUnfit, match=r"node answer, field said: ") as caught:
        runtime.run(graph, {"more": []}, run_id="r")
    assert named in str(caught.value)
    assert "record.types" in caught.value.hint
    given[0] = "mended"
    result = runtime.resume("r", graph=graph)
    assert (result.status, result.output["said"], result.output["more"]) == ("done", "mended", ["first"])
    assert len(began) == 2


def test_nothing_after_the_node_begins(runtime: Runtime) -> None:
    began = []
    graph = (
        one_node(lambda state: {"said": Unknown()}).add_node("after", lambda state: began.append(1)).add_edge("answer", "after")
    )
    with pytest.raises(StateUnfit):
        runtime.run(graph, {"more": []})
    assert began == []


def test_what_was_sent_names_its_node(runtime: Runtime) -> None:
    builder: Any = StateGraph(State).add_node("work", lambda state: {"more": [Unknown()] if state["said"] == 3 else []})
    builder.add_conditional_edges(START, lambda state: [Send("work", {"said": n}) for n in range(5)], ["work"])
    with pytest.raises(StateUnfit, match="node work, field more: "):
        runtime.run(builder, {"more": []})


def test_a_packet_a_question_and_an_input_are_told_as_such(runtime: Runtime) -> None:
    sends = one_node(lambda state: Command(goto=Send("answer", {"said": Unknown()})))
    with pytest.raises(StateUnfit, match="node answer, what it sends: "):
        runtime.run(sends, {"more": []})
    with pytest.raises(StateUnfit, match="node answer, what it asks: "):
        runtime.run(one_node(lambda state: {"said": interrupt(Unknown())}), {"more": []})
    with pytest.raises(StateUnfit, match="the input, field "):
        runtime.run(one_node(lambda state: {}), {"said": Unknown()})


async def test_what_the_schema_or_the_user_names_comes_back_as_it_was(either_settings: Settings) -> None:
    config: Any = {"configurable": {"thread_id": "t", "checkpoint_ns": ""}}
    value = [Known(Unknown(3)), {"a": Unknown()}, Interrupt(value=Known(), id="i")]
    allowed = replace(either_settings, record=replace(either_settings.record, types=(NAME,)))
    for given, kept in ((either_settings, False), (allowed, True)):
        async with lease(given, "t") as held, open_checkpointer(held, frozenset({Known})) as saver:
            if kept:
                assert saver.serde.loads_typed(saver.serde.dumps_typed(value)) == value
            else:
                with pytest.raises(TypeError, match="Unknown"):
                    saver.serde.dumps_typed(value)
                with pytest.raises(StateUnfit, match="metadata"):
                    await saver.aput(config, {"id": "1", "channel_values": {}}, {"step": {1}}, {})  # type: ignore[typeddict-item]


def test_a_class_that_cannot_be_found_again_is_refused(runtime: Runtime) -> None:
    @dataclasses.dataclass
    class Hidden:
        value: int = 1

    own: Any = TypedDict("own", {"said": Hidden})
    builder: Any = StateGraph(own).add_node("answer", lambda state: {"said": Hidden()}).add_edge(START, "answer")
    with pytest.raises(StateUnfit, match=r"the input, field .*Hidden"):
        runtime.run(builder, {"said": Hidden(2)})


@pytest.mark.parametrize("name", ["nowhere.Thing", "fractions.Nothing", "os.system", "Thing"])
async def test_only_classes_are_named(settings: Settings, name: str) -> None:
    broken = replace(settings, record=replace(settings.record, types=(name,)))
    async with lease(broken, "t") as held:
        with pytest.raises(SettingsError, match=r"record\.types"):
            async with open_checkpointer(held, frozenset()):
                pass
