"""What the tasks of a step write, and the checkpoint after it, go onto the disk in one transaction; each is told its own fate."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from typing import Any

import pytest
from langgraph.checkpoint.base import empty_checkpoint

from agentops import Settings
from agentops.checkpoints import ThreadSaver, lease, open_checkpointer

INPUT: Any = {"configurable": {"thread_id": "t", "checkpoint_ns": ""}}


@pytest.fixture
async def saver(settings: Settings) -> AsyncIterator[ThreadSaver]:
    async with lease(settings, "t") as held, open_checkpointer(held, frozenset()) as saver:
        yield saver


def connection(saver: Any) -> sqlite3.Connection:
    found = saver.statements.conn
    assert isinstance(found, sqlite3.Connection)
    return found


async def begun(saver: ThreadSaver) -> Any:
    return await saver.aput(INPUT, empty_checkpoint(), {"source": "input", "step": -1}, {})


async def tasks_kept(saver: ThreadSaver, config: Any) -> list[str]:
    found = await saver.aget_tuple(config)
    assert found is not None
    return sorted(task for task, _, _ in found.pending_writes or ())


async def test_a_step_of_sixteen_tasks_is_one_transaction(saver: ThreadSaver) -> None:
    config = await begun(saver)
    said: list[str] = []
    connection(saver).set_trace_callback(said.append)
    writes = [saver.aput_writes(config, [("found", number)], f"task_{number:02}") for number in range(16)]
    await asyncio.gather(*writes, saver.aput(config, empty_checkpoint(), {"source": "loop", "step": 0}, {}))
    assert said.count("COMMIT") == 1
    assert await tasks_kept(saver, config) == [f"task_{number:02}" for number in range(16)]


async def test_writes_do_not_wait_for_a_checkpoint_that_does_not_come(saver: ThreadSaver, settings: Settings) -> None:
    config = await begun(saver)
    await saver.aput_writes(config, [("found", 1)], "slow_siblings")
    file = connection(saver).execute("PRAGMA database_list").fetchone()[2]
    other = sqlite3.connect(file)
    assert other.execute("SELECT task_id FROM writes").fetchall() == [("slow_siblings",)]
    other.close()


async def test_of_a_group_that_fails_all_but_the_culprit_are_kept(saver: ThreadSaver) -> None:
    config = await begun(saver)
    refuse = (
        "CREATE TEMP TRIGGER refuse BEFORE INSERT ON main.writes WHEN NEW.task_id = 'b' BEGIN SELECT RAISE(ABORT, 'no b'); END"
    )
    connection(saver).execute(refuse)
    written = [saver.aput_writes(config, [("found", name)], name) for name in "abc"]
    told = await asyncio.gather(*written, return_exceptions=True)
    assert [str(one) for one in told] == ["None", "no b", "None"]
    assert await tasks_kept(saver, config) == ["a", "c"]


async def test_what_sqlite_does_not_even_get_to_see_is_told_and_hurts_nobody(saver: ThreadSaver) -> None:
    config = await begun(saver)
    names = ["a", "no text: \udcff", "c"]
    async with asyncio.timeout(20):
        told = await asyncio.gather(*(saver.aput_writes(config, [("x", 1)], name) for name in names), return_exceptions=True)
    assert [type(one) for one in told] == [type(None), UnicodeEncodeError, type(None)]
    assert await tasks_kept(saver, config) == ["a", "c"]


async def test_who_is_cancelled_while_it_waits_has_written_all_the_same_and_hurts_nobody(saver: ThreadSaver) -> None:
    config = await begun(saver)
    cancelled = asyncio.create_task(saver.aput_writes(config, [("found", 1)], "cancelled"))
    other = asyncio.create_task(saver.aput_writes(config, [("found", 2)], "other"))
    await asyncio.sleep(0)
    cancelled.cancel()
    await other
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    assert await tasks_kept(saver, config) == ["cancelled", "other"]


async def test_what_waits_when_the_thread_is_left_is_written(settings: Settings) -> None:
    async with lease(settings, "t") as held:
        async with open_checkpointer(held, frozenset()) as saver:
            config = await begun(saver)
            left = asyncio.create_task(saver.aput_writes(config, [("found", 1)], "left"))
        await left
        async with open_checkpointer(held, frozenset()) as saver:
            assert await tasks_kept(saver, config) == ["left"]


async def test_a_history_that_is_left_early_hinders_nobody(saver: ThreadSaver) -> None:
    config = await begun(saver)
    for step in range(5):
        config = await saver.aput(config, empty_checkpoint(), {"source": "loop", "step": step}, {})
    async for _ in saver.alist(INPUT):
        break
    assert len([one async for one in saver.alist(INPUT, limit=3)]) == 3
    await saver.aprune(["t"])
    assert len([one async for one in saver.alist(INPUT)]) == 1
