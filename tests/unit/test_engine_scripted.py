"""The engine that users' tests play with."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from agentops.engine import generate
from agentops.engine.scripted import ScriptedEngine
from agentops.errors import ConstraintInvalid, EngineOverloaded
from agentops.records import Constraint, Delta, Generation, Message, Request, ScoreRequest


def asks(text: str, **options: object) -> Request:
    return Request(messages=(Message("system", "be brief"), Message("user", text)), **options)  # type: ignore[arg-type]


async def test_a_list_is_played_in_order_and_then_used_up() -> None:
    engine = ScriptedEngine(["one", EngineOverloaded("busy", retry_after_s=1), "three"])
    assert (await generate(engine, asks("a"))).text == "one"
    with pytest.raises(EngineOverloaded):
        await generate(engine, asks("b"))
    assert (await generate(engine, asks("c"))).text == "three"
    with pytest.raises(LookupError, match="used up"):
        await generate(engine, asks("d"))
    assert [request.messages[-1].content for request in engine.requests] == ["a", "b", "c", "d"]


async def test_a_mapping_answers_by_what_the_last_message_holds() -> None:
    engine = ScriptedEngine({"capital": "Paris", "river": "Seine"})
    assert (await generate(engine, asks("which river is it"))).text == "Seine"
    assert (await generate(engine, Request(text="the capital"))).text == "Paris"
    with pytest.raises(LookupError, match="no answer"):
        await generate(engine, asks("what is brief"))
    assert (await generate(ScriptedEngine({"x": "1", "": "else"}), asks("y"))).text == "else"


async def test_a_function_sees_the_request() -> None:
    engine = ScriptedEngine(lambda request: f"{request.messages[-1].content} {request.seed}")
    assert (await generate(engine, asks("hi", seed=4))).text == "hi 4"


async def test_an_answer_that_breaks_the_constraint_is_the_scripts_fault() -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}
    wrong = ["maybe", "{}", '{"n": "1"}', '{"n": true}', '{"n": 1, "m": 2}', "no json", "12a"]
    engine = ScriptedEngine(wrong)
    constraints = (
        [Constraint("choice", ["yes", "no"])] + [Constraint("json_schema", schema)] * 5 + [Constraint("regex", "[0-9]+")]
    )
    for constraint in constraints:
        with pytest.raises(ConstraintInvalid, match="does not satisfy"):
            await generate(engine, asks("q", constraint=constraint))
    right = ScriptedEngine(["yes", '{"n": 1}', "12"])
    for constraint in (constraints[0], constraints[1], constraints[-1]):
        await generate(right, asks("q", constraint=constraint))


@pytest.mark.parametrize("kind", ["text", 7, ["string", {}], {"a": 1}])
async def test_a_type_that_is_none_is_an_invalid_constraint(kind: object) -> None:
    with pytest.raises(ConstraintInvalid, match="is no type of JSON schema"):
        await generate(ScriptedEngine(["1"]), asks("q", constraint=Constraint("json_schema", {"type": kind})))


async def test_an_answer_that_is_not_waited_for_is_cancelled_at_once() -> None:
    engine = ScriptedEngine(["yes"])
    over: list[bool] = []

    class Watched:
        async def stream(self, request: Request) -> AsyncIterator[Delta | Generation]:
            try:
                async for event in engine.stream(request):
                    yield event
            finally:
                over.append(True)

    await generate(Watched(), asks("q"))  # type: ignore[arg-type]
    assert over == [True]


async def test_scores_come_from_the_script() -> None:
    engine = ScriptedEngine(scores=lambda request: [-9.0 if "no" in choice else -1.0 for choice in request.choices])
    scores = await engine.score(ScoreRequest(("no", "yes indeed"), text="is it"))
    assert [choice.total for choice in scores.choices] == [-9.0, -1.0]
    assert scores.best.text == "yes indeed"
    assert len(engine.score_requests) == 1
    with pytest.raises(LookupError, match="scored 1 of 2"):
        await ScriptedEngine(scores=lambda request: [0.0]).score(ScoreRequest(("a", "b"), text="c"))


async def test_delays_and_departures_are_seen() -> None:
    engine = ScriptedEngine({"": "a b c d e f"}, delay_s=0.02)
    begin = time.perf_counter()
    done = await generate(engine, asks("q"))
    assert time.perf_counter() - begin >= 6 * 0.02
    assert done.timing.decode_ms > done.timing.first_token_ms > 0
    task = asyncio.create_task(generate(engine, asks("q")))
    await asyncio.sleep(0.03)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert engine.cancelled == 1
