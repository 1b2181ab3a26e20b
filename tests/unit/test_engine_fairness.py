"""Nobody waits for all that another wants: who is admitted, who is in a step, and how long a step may take."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import pytest

from agentops.engine.blocks import BlockPool
from agentops.engine.pace import Pace
from agentops.engine.scheduler import Scheduler
from agentops.engine.sequence import Chunk, Sequence

_TOKENS = itertools.count(1)


def asks(share: str, prompt: int = 4, room: int = 64) -> Sequence:
    tokens = [next(_TOKENS) for _ in range(prompt)]
    return Sequence("a", tokens, prompt - 1, None, room=room, decodes=True, share=share)


def scheduler(max_batch: int = 16, prefill_tokens: int = 1024) -> Scheduler:
    return Scheduler(BlockPool(4096, 16), max_batch=max_batch, prefill_tokens=prefill_tokens)


def cost(chunks: list[Chunk]) -> float:
    """Seconds on a machine whose step has a price of its own, as all have."""
    made = sum(1 for chunk in chunks if chunk.start >= chunk.sequence.inputs)
    read = sum(chunk.count for chunk in chunks) - made
    return 0.010 + 0.004 * made + 0.001 * read


def step(plan: Scheduler) -> tuple[list[Chunk], float]:
    chunks = plan.plan()
    seconds = cost(chunks)
    plan.took(chunks, seconds)
    plan.advance(chunks)
    for chunk in chunks:
        if chunk.sequence.computed == len(chunk.sequence.tokens):
            chunk.sequence.tokens.append(7)
            if len(chunk.sequence.tokens) == chunk.sequence.inputs + chunk.sequence.room:
                plan.finish([chunk.sequence])
    return chunks, seconds


def until_over(plan: Scheduler, sequence: Sequence) -> float:
    total = 0.0
    while not sequence.over:
        chunks, seconds = step(plan)
        assert chunks
        total += seconds
    return total


def test_a_pace_is_learned_and_follows_a_change() -> None:
    pace = Pace()
    assert not pace.known
    for made, read in itertools.product(range(5), (0, 16, 64)):
        pace.learn(made, read, 0.01 + 0.002 * made + 0.0005 * read)
    assert pace.known
    assert pace.seconds(3) == pytest.approx(0.016, rel=0.01)
    assert pace.seconds(3, 100) == pytest.approx(0.066, rel=0.01)
    assert pace.room(3, 0.066) in (99, 100)
    for _ in range(600):
        pace.learn(2, 0, 0.1)
        pace.learn(4, 0, 0.2)
    assert pace.seconds(4) == pytest.approx(0.2, rel=0.05)


def test_steps_that_were_all_alike_say_nothing_odd_of_others() -> None:
    pace = Pace()
    for _ in range(50):
        pace.learn(1, 0, 0.01)
    assert 0.009 < pace.seconds(1) < 0.011
    assert 0 <= pace.seconds(0) <= pace.seconds(16) < 0.2


def test_a_single_request_beside_sixty_four_of_another_takes_at_most_twice_its_time() -> None:
    alone = scheduler()
    for _ in range(10):
        alone.add(warm := asks("warm", room=3))
        until_over(alone, warm)
    alone.add(one := asks("b"))
    solo = until_over(alone, one)

    crowded = scheduler()
    for _ in range(64):
        crowded.add(asks("a"))
    for _ in range(30):
        step(crowded)
    crowded.add(late := asks("b"))
    assert until_over(crowded, late) <= 2 * solo

    unfair = scheduler()
    for sequence in [asks("a") for _ in range(64)]:
        unfair.add(sequence)
    for _ in range(30):
        step(unfair)
    unfair.add(same := asks("a"))
    assert until_over(unfair, same) > 4 * solo


def test_the_sequences_of_the_longer_line_take_turns() -> None:
    plan = scheduler(max_batch=8)
    many = [asks("a", room=400) for _ in range(8)]
    for sequence in many:
        plan.add(sequence)
    for _ in range(20):
        step(plan)
    plan.add(one := asks("b", room=400))
    step(plan)
    before = [len(sequence.tokens) for sequence in many]
    rows = []
    for _ in range(40):
        chunks, _ = step(plan)
        rows.append(len(chunks))
        assert one in [chunk.sequence for chunk in chunks]
    assert max(rows) < 9
    gained = [len(sequence.tokens) - had for sequence, had in zip(many, before, strict=True)]
    assert max(gained) - min(gained) <= 1
    assert min(gained) > 0


def test_lines_of_one_decode_all_together() -> None:
    plan = scheduler()
    for number in range(8):
        plan.add(asks(f"thread {number}"))
    for _ in range(20):
        chunks, _ = step(plan)
    assert len(chunks) == 8


def test_who_has_nothing_at_work_is_admitted_beyond_the_batch_and_before_who_waited_longer() -> None:
    plan = scheduler(max_batch=2)
    for _ in range(5):
        plan.add(asks("a"))
    step(plan)
    plan.add(late := asks("b"))
    chunks, _ = step(plan)
    assert late in [chunk.sequence for chunk in chunks]
    assert sum(sequence.share == "a" for sequence in plan.running) == 2
    for number in range(5):
        plan.add(asks(f"c{number}"))
    step(plan)
    assert len(plan.running) == 4


def test_a_long_prompt_is_read_in_pieces_that_those_who_decode_hardly_feel() -> None:
    plan = scheduler()
    plan.add(quick := asks("a", room=600))
    calm = [step(plan)[1] for _ in range(30)][-1]
    plan.add(long := asks("b", prompt=3_000))
    waits = []
    while long.computed < long.inputs:
        chunks, seconds = step(plan)
        assert quick in [chunk.sequence for chunk in chunks]
        waits.append(seconds)
    # The first piece is read before it is known what reading costs.
    assert max(waits[1:]) <= 3 * calm
    assert len(waits) > 20


def test_a_prompt_alone_is_read_as_fast_as_the_settings_allow() -> None:
    plan = scheduler(prefill_tokens=512)
    for _ in range(12):
        plan.add(one := asks("a", prompt=512, room=2))
        until_over(plan, one)
    plan.add(asks("a", prompt=2_000))
    chunks, _ = step(plan)
    assert sum(chunk.count for chunk in chunks) == 512


async def test_requests_of_a_run_are_of_its_thread(settings: Any) -> None:
    from typing import TypedDict

    from langgraph.graph import START, StateGraph
    from langgraph.runtime import Runtime as Node

    from agentops import Context, Runtime, ScriptedEngine
    from agentops.engine import generate
    from agentops.records import Request, ScoreRequest

    class State(TypedDict, total=False):
        said: str

    async def ask(state: State, runtime: Node[Context]) -> State:
        engine = runtime.context.engine
        await engine.score(ScoreRequest(("a",), text="x"))
        await generate(engine, Request(text="x", thread="of its own"))
        return {"said": (await generate(engine, Request(text="x"))).text}

    graph = StateGraph(State, context_schema=Context).add_node("ask", ask).add_edge(START, "ask").compile()
    engine = ScriptedEngine({"": "yes"})
    async with Runtime(settings, engine=engine) as runtime:
        await asyncio.gather(*(runtime.arun(graph, {"said": ""}, thread=name) for name in ("one", "two")))
    assert sorted(request.thread for request in engine.requests) == ["of its own", "of its own", "one", "two"]
    assert sorted(request.thread for request in engine.score_requests) == ["one", "two"]
