from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import AsyncIterator

import pytest

from agentops.sync import iterate_sync, run_sync


def test_a_coroutine_is_awaited_and_its_error_raised() -> None:
    async def double(number: int) -> int:
        await asyncio.sleep(0)
        return 2 * number

    async def fail() -> None:
        raise ValueError("no")

    assert run_sync(double(4)) == 8
    with pytest.raises(ValueError, match="no"):
        run_sync(fail())


def test_context_variables_travel_along() -> None:
    place: contextvars.ContextVar[str] = contextvars.ContextVar("place")
    place.set("here")

    async def read() -> str:
        return place.get()

    assert run_sync(read()) == "here"


async def test_inside_another_loop_it_works_from_a_thread_only_on_the_private_loop_it_refuses() -> None:
    async def one() -> int:
        return 1

    async def nested() -> int:
        return run_sync(one())

    assert await asyncio.to_thread(run_sync, one()) == 1
    with pytest.raises(RuntimeError, match="await its asynchronous form"):
        await asyncio.to_thread(run_sync, nested())


def test_an_iterator_is_closed_when_its_caller_leaves() -> None:
    closed = threading.Event()

    async def numbers() -> AsyncIterator[int]:
        try:
            for number in range(100):
                yield number
        finally:
            closed.set()

    assert list(zip(iterate_sync(numbers()), range(3), strict=False)) == [(0, 0), (1, 1), (2, 2)]
    assert closed.wait(5)
    assert list(iterate_sync(numbers())) == list(range(100))
