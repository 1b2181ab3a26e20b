"""So many runs at once; the others wait, and nobody is forgotten."""

from __future__ import annotations

import asyncio
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from agentops.places import Places, affordable


@contextmanager
def open_files(limit: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_fewer_open_files_are_fewer_places() -> None:
    with open_files(1_024):
        few = affordable()
    with open_files(4_096):
        many = affordable()
    assert 8 <= few < 150
    assert many > 2 * few


async def test_never_more_than_there_are_places_and_first_come_first_served() -> None:
    places, at_work, most, order = Places(3), 0, 0, []

    async def work(number: int) -> None:
        nonlocal at_work, most
        async with places.taken():
            at_work += 1
            most = max(most, at_work)
            order.append(number)
            await asyncio.sleep(0.002)
            at_work -= 1

    await asyncio.gather(*(work(number) for number in range(20)))
    assert most == 3
    assert order == list(range(20))


async def test_who_gives_up_waiting_leaves_no_place_taken() -> None:
    places = Places(1)
    for late in (False, True):
        async with places.taken():
            waiting = [asyncio.create_task(places._take()) for _ in range(5)]
            await asyncio.sleep(0)
            if not late:
                for task in waiting:
                    task.cancel()
        if late:
            # Given to the first of them, and not taken up yet.
            for task in waiting:
                task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        async with asyncio.timeout(2), places.taken():
            pass


def test_a_place_goes_from_one_event_loop_to_another_and_not_to_a_closed_one() -> None:
    places, done = Places(1), []

    async def held(seconds: float, name: str) -> None:
        async with places.taken():
            await asyncio.sleep(seconds)
            done.append(name)

    async def left() -> None:
        task = asyncio.ensure_future(places._take())
        await asyncio.sleep(0.05)
        places_of_closed.append(task)

    places_of_closed: list[asyncio.Future[None]] = []
    first = threading.Thread(target=lambda: asyncio.run(held(0.3, "first")))
    first.start()
    loop = asyncio.new_event_loop()
    while not places._waiting:
        loop.run_until_complete(asyncio.sleep(0.01))
        task = loop.create_task(places._take())
        loop.run_until_complete(asyncio.sleep(0.01))
    loop.close()
    second = threading.Thread(target=lambda: asyncio.run(held(0, "second")))
    second.start()
    for thread in (first, second):
        thread.join(5)
    assert done == ["first", "second"]
    del task
