"""Calls under stress, on a runner that sees every foreign token: cancelled in each state, too many, failing, late."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from scripted_runner import ScriptedRunner, answer, scripted_engine
from tiny_model import write_tiny_model

from agentops.engine import generate
from agentops.engine.calls import Call, Event
from agentops.engine.local import BLOCK, LocalEngine, open_engine
from agentops.engine.runners import Batch
from agentops.errors import DeadlinePassed, EngineError, EngineOverloaded
from agentops.records import Generation, Request, ScoreRequest, Scores, Timing, Usage
from agentops.settings import load_settings

Open = Callable[..., tuple[LocalEngine, ScriptedRunner]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny", bits=4)


@pytest_asyncio.fixture
async def opened(folder: Path) -> AsyncIterator[Open]:
    engines: list[LocalEngine] = []

    def make(**settings: Any) -> tuple[LocalEngine, ScriptedRunner]:
        engine, runner = scripted_engine(folder, **settings)
        engines.append(engine)
        return engine, runner

    yield make
    for engine in engines:
        await engine.close()


class Steps:
    """Lets the engine's steps through one by one; while one is held up, nothing of the engine changes."""

    def __init__(self, runner: ScriptedRunner) -> None:
        self._reached, self._go = threading.Semaphore(0), threading.Semaphore(0)
        self._free = False
        runner.before = self._hold

    def _hold(self, _: Batch) -> None:
        self._reached.release()
        if not self._free:
            assert self._go.acquire(timeout=10)

    async def reach(self) -> None:
        """Waits until a step is about to be computed."""
        assert await asyncio.to_thread(self._reached.acquire, timeout=30)

    def go(self) -> None:
        self._go.release()

    def free(self) -> None:
        self._free = True
        self._go.release()


async def settled(engine: LocalEngine) -> None:
    for _ in range(1_000):
        now = engine.counters
        if now.waiting == now.running == 0 and now.used_blocks == now.pinned_blocks:
            break
        await asyncio.sleep(0.01)
    now = engine.counters
    assert now.waiting == now.running == 0
    assert now.used_blocks == now.pinned_blocks
    assert now.free_blocks + now.cached_blocks + now.used_blocks == engine.pool.total
    assert now.taken == now.answered + now.cancelled + now.failed + now.expired


def asks(number: int, words: int = 8, max_tokens: int = 6, **options: Any) -> Request:
    return Request(text=f"{number:05} " + "the quick " * words, max_tokens=max_tokens, **options)


def check(engine: LocalEngine, request: Request, done: Generation) -> None:
    """The answer is the one that follows from its own prompt, all of it and nothing else."""
    prompt = engine._tokenizer.encode(request.text or "")
    expected = answer(prompt, request.max_tokens, engine.info.vocabulary)
    assert done.tokens == expected[: len(done.tokens)]
    assert all(other.tokens == expected[: len(other.tokens)] for other in done.others)
    assert done.finish_reason == "stop" or len(done.tokens) == request.max_tokens
    assert done.usage.cached_tokens + done.usage.computed_tokens == done.usage.input_tokens == len(prompt)


# --- cancels ---


@pytest.mark.parametrize("state", ["waiting", "prefill", "decode"])
async def test_a_thousand_cancels_in_each_state_harm_nobody(opened: Open, state: str) -> None:
    engine, runner = opened(max_batch=1 if state == "waiting" else 64, kv_tokens=16_384, prefill_tokens=8_192)
    rounds, each = 20, 50
    for number in range(0, rounds * 1000, 1000):
        steps = Steps(runner)
        plug = asyncio.create_task(generate(engine, asks(number, max_tokens=1)))
        await steps.reach()
        others = [asks(number + at, max_tokens=8) for at in range(1, 4)]
        kept = [asyncio.create_task(generate(engine, other)) for other in others]
        leaving = [asyncio.create_task(generate(engine, asks(number + 100 + at, max_tokens=40))) for at in range(each)]
        while len(engine._inbox) < len(kept) + len(leaving):
            await asyncio.sleep(0)
        for _ in range(2 if state == "decode" else 1):
            steps.go()
            await steps.reach()
        found = [_state(call) for call in engine._active if call.sequence.room == 40]
        assert found == [state] * each
        for task in leaving:
            task.cancel()
        gone = await asyncio.gather(*leaving, return_exceptions=True)
        assert all(isinstance(one, asyncio.CancelledError) for one in gone)
        steps.free()
        for request, done in zip(others, await asyncio.gather(*kept), strict=True):
            check(engine, request, done)
        await plug
        await settled(engine)
    assert engine.counters.cancelled == rounds * each == 1_000
    assert engine.counters.answered == rounds * 4
    assert (engine.counters.lost.computed_tokens > 0) == (state != "waiting")


def _state(call: Call) -> str:
    return "waiting" if call.admitted is None else "decode" if call.made else "prefill"


async def test_a_thousand_that_leave_when_all_is_done_harm_nobody(opened: Open) -> None:
    engine, _ = opened(queue=2_000)
    streams = [engine.stream(asks(number, words=2, max_tokens=2)) for number in range(1_000)]
    firsts = [asyncio.ensure_future(anext(stream)) for stream in streams]
    await asyncio.gather(*firsts)
    await settled(engine)
    assert engine.counters.answered == 1_000
    for stream in streams:
        await stream.aclose()  # type: ignore[attr-defined]
    await settled(engine)
    assert (engine.counters.cancelled, engine.counters.lost) == (0, Usage())


async def test_ten_times_more_requests_than_the_pool_holds_are_all_answered(opened: Open) -> None:
    engine, _ = opened(queue=2_000, kv_tokens=1024, max_batch=64)
    requests = [asks(number, max_tokens=20, thread=str(number % 7)) for number in range(250)]
    needs = engine.pool.blocks_for(len(engine._tokenizer.encode(requests[0].text or "")) + 20)
    assert len(requests) * needs >= 10 * engine.pool.total
    for request, done in zip(requests, await asyncio.gather(*(generate(engine, one) for one in requests)), strict=True):
        check(engine, request, done)
    await settled(engine)
    assert engine.counters.peak_blocks <= engine.pool.total
    assert engine.counters.answered == 250


async def test_what_was_forgotten_for_want_of_room_is_computed_again_and_the_same(opened: Open) -> None:
    engine, _ = opened(kv_tokens=1024)
    request = asks(1, words=60, max_tokens=4)
    first = await generate(engine, request)
    warm = await generate(engine, request)
    await asyncio.gather(*(generate(engine, asks(number, words=60)) for number in range(2, 12)))
    again = await generate(engine, request)
    assert warm.usage.cached_tokens > 0
    assert again.usage.cached_tokens < warm.usage.cached_tokens
    assert first.tokens == warm.tokens == again.tokens
    check(engine, request, again)


async def test_steps_that_raise_in_the_middle_fail_those_in_them_and_nobody_else(opened: Open) -> None:
    engine, runner = opened(queue=500, kv_tokens=2048)
    luck = random.Random(3)

    def fail(batch: Batch) -> None:
        if luck.random() < 0.1:
            # What a step had begun to write is nobody's: those blocks are given to others next.
            runner._slots[[table[-1] * BLOCK for table in batch.tables]] = -7
            raise RuntimeError("the card fell out of its slot")

    runner.before = fail
    requests = [asks(number, words=number % 30, max_tokens=12, n=1 + number % 3) for number in range(300)]
    dones = await asyncio.gather(*(generate(engine, one) for one in requests), return_exceptions=True)
    failed = [done for done in dones if isinstance(done, BaseException)]
    assert 0 < len(failed) < 300
    assert all(isinstance(error, EngineError) and "card fell out" in str(error) for error in failed)
    for request, done in zip(requests, dones, strict=True):
        if isinstance(done, Generation):
            check(engine, request, done)
    await settled(engine)
    assert engine.counters.failed == len(failed)
    runner.before = lambda batch: None
    check(engine, requests[0], await generate(engine, requests[0]))


# --- the sums ---


def listen(engine: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> list[Generation | Scores]:
    """All answers that the engine sends, also those that nobody waits for any more."""
    sent: list[Generation | Scores] = []
    mailbox = engine._mailbox

    def heard() -> tuple[asyncio.Queue[Event], Callable[[Event], None]]:
        events, send = mailbox()

        def both(event: Event) -> None:
            if isinstance(event, Generation | Scores):
                sent.append(event)
            send(event)

        return events, both

    monkeypatch.setattr(engine, "_mailbox", heard)
    return sent


async def traffic(engine: LocalEngine, calls: int, max_tokens: int) -> int:
    """Streams that are read and left, forks, scores, primed prefixes, deadlines, retries of what was refused; how many."""
    luck, made = random.Random(11), 0
    beginnings = [f"{name} " + "the quick brown fox jumps over the lazy dog " * 3 for name in "abc"]

    async def one(number: int) -> None:
        nonlocal made
        text = luck.choice(beginnings) + f"{number} yes " * luck.randrange(4)
        who = {"tenant": luck.choice(["", "other"]), "thread": str(number % 5), "priority": number % 3}
        kind = luck.choice(["read", "left", "forked", "scored", "primed", "late"])
        patience = luck.randrange(4)
        for _ in range(1_000):
            made += 1
            try:
                if kind == "scored":
                    await engine.score(ScoreRequest((" yes", " no maybe", " one two"), text=text, **who))
                elif kind == "primed":
                    await engine.prime(Request(text=text, **who))
                else:
                    n, late = (3, 0.0) if kind == "forked" else (1, 0.002 if kind == "late" else 0.0)
                    request = Request(text=text, max_tokens=max_tokens, n=n, deadline_s=late, temperature=1.0, **who)
                    stream = engine.stream(request)
                    try:
                        read = 0
                        async for _event in stream:
                            read += 1
                            if kind == "left" and read > patience:
                                break
                    finally:
                        await stream.aclose()  # type: ignore[attr-defined]
            except EngineOverloaded:
                await asyncio.sleep(0.01)
                continue
            except DeadlinePassed:
                assert kind == "late"
            return

    for start in range(0, calls, 100):
        await asyncio.gather(*(one(number) for number in range(start, min(calls, start + 100))))
    return made


def the_sums_agree(engine: LocalEngine, sent: list[Generation | Scores], made: int) -> None:
    now = engine.counters
    assert sum((answer.usage for answer in sent), now.lost) == now.usage
    assert now.usage.cached_tokens + now.usage.computed_tokens == now.usage.input_tokens
    assert all(one.usage.cached_tokens + one.usage.computed_tokens == one.usage.input_tokens for one in sent)
    total = sum((answer.timing for answer in sent), Timing())
    for name in Timing.__slots__:
        # The engine reads its clock once more than the call when it closes the books.
        assert getattr(now.timing, name) == pytest.approx(getattr(total, name), rel=0.05, abs=5.0)
    assert now.answered == len(sent)
    assert now.taken + now.refused == made
    assert 0 < now.peak_blocks <= engine.pool.total
    assert now.peak_memory_bytes > 1_000_000
    for answer_ in sent:
        held = answer_.footprint
        assert 0 < held.blocks <= now.peak_blocks
        assert held.used_blocks + held.cached_blocks + held.free_blocks == engine.pool.total


@pytest.mark.parametrize("calls", [600, pytest.param(10_000, marks=pytest.mark.long)])
async def test_what_calls_say_they_cost_is_what_the_engine_counted(
    opened: Open, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    engine, _ = opened(queue=40, kv_tokens=2048)
    sent = listen(engine, monkeypatch)
    made = await traffic(engine, calls, max_tokens=6)
    await settled(engine)
    the_sums_agree(engine, sent, made)
    now = engine.counters
    assert min(now.answered, now.cancelled, now.expired, now.refused) > 0
    assert now.lost.input_tokens > 0
    assert now.usage.cached_tokens > 0


async def test_failed_calls_are_in_the_sums_too(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, runner = opened()
    sent, luck = listen(engine, monkeypatch), random.Random(5)

    def fail(_: Batch) -> None:
        if luck.random() < 0.2:
            raise RuntimeError("no")

    runner.before = fail
    requests = [asks(number % 9, words=number % 20, n=1 + number % 4) for number in range(100)]
    await asyncio.gather(*(generate(engine, one) for one in requests), return_exceptions=True)
    monkeypatch.setattr("agentops.engine.sampler.Sampler.choose", lambda *_: 1 / 0)
    await asyncio.gather(*(generate(engine, one) for one in requests), return_exceptions=True)
    await settled(engine)
    assert engine.counters.failed > 100
    assert engine.counters.lost.output_tokens > 0
    the_sums_agree(engine, sent, 200)


async def test_the_sums_agree_on_a_real_runner(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = {"engine.kv_tokens": 1024, "engine.threads": 1, "engine.kernel": "int4", "engine.queue": 40}
    engine = open_engine(folder, load_settings(flags, environment={}), "tiny")
    try:
        sent = listen(engine, monkeypatch)
        made = await traffic(engine, 200, max_tokens=6)
        await settled(engine)
        the_sums_agree(engine, sent, made)
    finally:
        await engine.close()


# --- deadlines and priorities ---


async def test_a_request_whose_time_is_over_ends_and_frees_its_blocks_in_every_state(opened: Open) -> None:
    engine, runner = opened(max_batch=1)
    steps = Steps(runner)
    busy = asyncio.create_task(generate(engine, asks(1, max_tokens=60)))
    await steps.reach()
    waiting = asyncio.create_task(generate(engine, asks(2, max_tokens=60, deadline_s=0.01)))
    while engine.counters.taken < 2:
        await asyncio.sleep(0)
    await asyncio.sleep(0.02)
    steps.go()
    await steps.reach()
    with pytest.raises(DeadlinePassed, match="it waited in the queue") as caught:
        await waiting
    assert "deadline_s" in caught.value.hint
    busy.cancel()
    late = asyncio.create_task(generate(engine, asks(3, max_tokens=60, deadline_s=0.2, thread="late")))
    while engine.counters.answered + engine.counters.expired < 2:
        steps.go()
        await asyncio.sleep(0.005)
    with pytest.raises(DeadlinePassed, match=r"[1-9]\d* tokens were made"):
        await late
    steps.free()
    await settled(engine)
    assert (engine.counters.expired, engine.counters.cancelled) == (2, 1)
    with pytest.raises(DeadlinePassed):
        await engine.score(ScoreRequest((" yes",), text="is it", deadline_s=1e-9))
    done = await generate(engine, asks(4, deadline_s=60))
    check(engine, asks(4), done)


async def test_who_has_priority_goes_first(opened: Open) -> None:
    engine, runner = opened(max_batch=1)
    steps, order = Steps(runner), []

    async def ask(number: int, priority: int) -> None:
        await generate(engine, asks(number, max_tokens=2, priority=priority))
        order.append(number)

    tasks = [asyncio.create_task(ask(0, 0))]
    await steps.reach()
    tasks += [asyncio.create_task(ask(number, priority)) for number, priority in ((1, 0), (2, -1), (3, 5), (4, 0), (5, 5))]
    while engine.counters.taken < 6:
        await asyncio.sleep(0)
    steps.free()
    await asyncio.gather(*tasks)
    assert order == [0, 3, 5, 1, 4, 2]


# --- prefixes that are computed beforehand, and pinned ---


async def test_a_primed_prefix_is_found_and_its_cost_told(opened: Open) -> None:
    engine, _ = opened()
    request = asks(1, words=40)
    cost = await engine.prime(request)
    assert (cost.cached_tokens, cost.output_tokens) == (0, 0)
    assert cost.computed_tokens == cost.input_tokens > 64
    done = await generate(engine, Request(text=f"{request.text} and then", max_tokens=3))
    assert done.usage.cached_tokens >= cost.input_tokens // BLOCK * BLOCK - BLOCK
    again = await engine.prime(request)
    assert 0 < again.computed_tokens <= BLOCK
    assert (await engine.prime(Request(request.messages, request.text, tenant="other"))).cached_tokens == 0
    assert engine.counters.usage.output_tokens == 3


async def test_a_pinned_prefix_stays_where_a_primed_one_goes(opened: Open) -> None:
    engine, _ = opened(kv_tokens=1024)
    pinned, primed = asks(1, words=60), asks(2, words=60)
    kept = await engine.pin(pinned)
    await engine.prime(primed)
    assert kept == engine.counters.pinned_blocks * BLOCK > 100
    for number in range(10, 30):
        done = await generate(engine, asks(number, words=100))
        assert done.footprint.pinned_blocks == kept // BLOCK
    assert (await generate(engine, primed)).usage.cached_tokens == 0
    again = await generate(engine, pinned)
    assert again.usage.cached_tokens >= kept - BLOCK
    check(engine, pinned, again)
    assert await engine.pin(pinned) == kept
    assert await engine.unpin(pinned) == kept
    assert await engine.unpin(pinned) == 0
    await settled(engine)
    assert engine.counters.pinned_blocks == 0
    for number in range(10, 30):
        await generate(engine, asks(number, words=100))
    assert (await generate(engine, pinned)).usage.cached_tokens == 0


async def test_no_more_than_half_of_the_pool_can_be_pinned_and_another_tenant_does_not_find_it(opened: Open) -> None:
    engine, _ = opened(kv_tokens=1024)
    kept = await engine.pin(asks(1, words=200))
    with pytest.raises(EngineError, match="no more than 512 can be") as caught:
        await engine.pin(asks(2, words=200))
    assert "unpin" in caught.value.hint
    await settled(engine)
    assert engine.counters.pinned_blocks == kept // BLOCK
    assert (await generate(engine, asks(1, words=200, tenant="other"))).usage.cached_tokens == 0
    assert (await generate(engine, asks(1, words=200))).usage.cached_tokens > 0
    assert await engine.unpin(asks(1, words=200, tenant="other")) == 0


async def test_who_finds_no_room_for_what_is_pinned_is_told_and_holds_up_nobody(opened: Open) -> None:
    engine, _ = opened(kv_tokens=512)
    await engine.pin(asks(1, words=50))
    with pytest.raises(EngineError, match="are pinned") as caught:
        await asyncio.wait_for(generate(engine, asks(2, words=50, max_tokens=380)), 20)
    assert "engine.kv_tokens" in caught.value.hint
    # The one that begins with what is pinned has it already.
    assert (await generate(engine, asks(1, words=50, max_tokens=380))).usage.cached_tokens > 0
    await engine.unpin(asks(1, words=50))
    assert (await generate(engine, asks(2, words=50, max_tokens=380))).text
    await settled(engine)


async def test_an_engine_that_is_closed_holds_no_pins(opened: Open) -> None:
    engine, _ = opened()
    await engine.pin(asks(1))
    await engine.close()
    with pytest.raises(EngineError):
        await engine.unpin(asks(1))
    with pytest.raises(EngineError):
        await engine.prime(asks(1))
