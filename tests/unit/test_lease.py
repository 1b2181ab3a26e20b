"""The lease on a thread: of two writers one is told, whatever became of the lock, and nothing forks; in files and in Postgres."""

from __future__ import annotations

import asyncio
import enum
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from postgres_server import Postgres

from agentops import Settings
from agentops.checkpoints import checkpoint_folder, lease, open_checkpointer
from agentops.errors import LeaseLost, RecordError, ThreadBusy

# Runs its graph on each thread that it is told, says "step" in every step, and goes on with it when it is told to.
WRITER = """
import os, sys
from typing import Annotated, TypedDict
import operator
from langgraph.graph import END, START, StateGraph
from agentops import Runtime, ScriptedEngine
from agentops.errors import AgentOpsError
from agentops.settings import load_settings

class State(TypedDict, total=False):
    trail: Annotated[list[str], operator.add]

def node(state):
    print("step", flush=True)
    sys.stdin.readline()
    return {"trail": [sys.argv[1]]}

builder = StateGraph(State).add_node("first", node).add_node("second", node)
graph = builder.add_edge(START, "first").add_edge("first", "second").add_edge("second", END).compile()
with Runtime(load_settings(), engine=ScriptedEngine()) as runtime:
    print("ready", flush=True)
    while thread := sys.stdin.readline().strip():
        try:
            print("result", runtime.run(graph, {"trail": []}, thread=thread).output["trail"], flush=True)
        except AgentOpsError as error:
            print("error", type(error).__name__, str(error), "|", error.hint, flush=True)
"""


class Writer:
    """A process of its own that runs a graph of two steps."""

    def __init__(self, settings: Settings, name: str, folder: Path) -> None:
        file = folder / "writer.py"
        file.write_text(WRITER)
        environment = os.environ | {
            "AGENTOPS_PATHS_HOME": str(settings.paths.home),
            "PYTHONPATH": str(Path(__file__).parents[2]),
        }
        if settings.record.url:
            environment["AGENTOPS_RECORD_URL"] = settings.record.url
        pipe = subprocess.PIPE
        self.process = subprocess.Popen([sys.executable, file, name], env=environment, stdin=pipe, stdout=pipe, text=True)

    def go_on(self, thread: str = "") -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{thread}\n")
        self.process.stdin.flush()

    def said(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@contextmanager
def writers(settings: Settings, folder: Path) -> Iterator[list[Writer]]:
    """Two of them, ready."""
    opened = [Writer(settings, name, folder) for name in "ab"]
    try:
        assert [one.said() for one in opened] == ["ready", "ready"]
        yield opened
    finally:
        for one in opened:
            one.close()


async def kept(settings: Settings, thread: str) -> tuple[list[str], bool]:
    """What the newest checkpoint of a thread holds, and whether every checkpoint has one successor at most."""
    async with lease(settings, thread) as held, open_checkpointer(held, frozenset()) as saver:
        found = [one async for one in saver.alist({"configurable": {"thread_id": thread}})]
    parents = [one.parent_config["configurable"]["checkpoint_id"] for one in found if one.parent_config]
    return found[0].checkpoint["channel_values"]["trail"], len(parents) == len(set(parents)) == len(found) - 1


async def test_of_two_processes_one_writes_a_thread_whatever_becomes_of_the_lock(
    either_settings: Settings, tmp_path: Path
) -> None:
    with writers(either_settings, tmp_path) as (one, other):
        one.go_on("busy")
        assert one.said() == "step"
        other.go_on("busy")
        assert other.said().startswith("error ThreadBusy thread busy is in use")
        for _ in range(2):
            one.go_on()
        assert [one.said(), one.said()] == ["step", "result ['a', 'a']"]
        assert await kept(either_settings, "busy") == (["a", "a"], True)

        # It stands still, its connection is ended or its lock's file removed, another runs the thread, and it goes on.
        one.go_on("t")
        assert one.said() == "step"
        # LangGraph saves the input beside the first step. Who stands still in the middle of that keeps SQLite's lock.
        await asyncio.sleep(0.5)
        one.process.send_signal(signal.SIGSTOP)
        await _take_lock_away(either_settings)
        other.go_on("t")
        assert other.said() == "step"
        for _ in range(2):
            other.go_on()
        assert [other.said(), other.said()] == ["step", "result ['b', 'b']"]
        one.process.send_signal(signal.SIGCONT)
        one.go_on()
        told = one.said()
        assert told.startswith("error LeaseLost the lease of thread t was lost")
        assert "agentops resume" in told
    assert await kept(either_settings, "t") == (["b", "b"], True)


async def _take_lock_away(settings: Settings) -> None:
    if not settings.record.url:
        (checkpoint_folder(settings) / "t.lock").unlink()
        return
    import psycopg

    async with await psycopg.AsyncConnection.connect(settings.record.url, autocommit=True) as connection:
        ended = await connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND granted"
            " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
        )
        assert await ended.fetchall()


async def test_whoever_takes_the_lease_fences_all_before_it(either_settings: Settings) -> None:
    """By its number alone: here the lock, and the connection, of the one before live on."""
    config: Any = {"configurable": {"thread_id": "t", "checkpoint_ns": ""}}
    checkpoint: Any = {"v": 4, "id": "1", "ts": "", "channel_values": {}, "channel_versions": {}, "versions_seen": {}}
    async with lease(either_settings, "t") as held:
        async with open_checkpointer(held, frozenset()) as saver:
            place = await saver.aput(config, checkpoint, {"run_id": "r"}, {})  # type: ignore[typeddict-unknown-key]
            await _count_up(either_settings)
            for late in (
                lambda: saver.aput(place, {**checkpoint, "id": "2"}, {}, {}),
                lambda: saver.aput_writes(place, [("a", 1)], "task"),
                lambda: saver.aput_writes(place, [("__error__", "e")], "task"),
                lambda: saver.adelete_thread("t"),
                lambda: saver.adelete_for_runs(["r"]),
                lambda: saver.aprune(["t"], strategy="delete"),
            ):
                with pytest.raises(LeaseLost, match="another process has taken it"):
                    await late()
            saver._refused.clear()
            found = [one async for one in saver.alist(config)]
            assert [(one.checkpoint["id"], one.pending_writes) for one in found] == [("1", [])]
        if not either_settings.record.url:
            with pytest.raises(LeaseLost):
                async with open_checkpointer(held, frozenset()):
                    pass


async def _count_up(settings: Settings) -> None:
    if settings.record.url:
        import psycopg

        async with await psycopg.AsyncConnection.connect(settings.record.url, autocommit=True) as connection:
            await connection.execute("UPDATE checkpoint_leases SET token = token + 1")
        return
    with closing(sqlite3.connect(checkpoint_folder(settings) / "t.db")) as connection, connection:
        connection.execute("UPDATE lease SET token = token + 1")


async def test_a_lease_waits_for_a_write_that_is_not_over(postgres_settings: Settings) -> None:
    """Otherwise who takes the lease would not see what is about to be written."""
    import psycopg

    async with lease(postgres_settings, "t"):
        pass
    async with await psycopg.AsyncConnection.connect(postgres_settings.record.url) as writer:
        await writer.execute("SELECT FROM checkpoint_leases WHERE thread_id = 't' FOR SHARE")
        with pytest.raises(ThreadBusy):
            async with lease(postgres_settings, "t"):
                pass
        waiting = asyncio.create_task(lease(postgres_settings, "t").__aenter__())
        await asyncio.sleep(0.2)
        assert not waiting.done()
        await writer.rollback()
        await waiting


async def test_a_library_that_is_not_here_is_named(postgres_settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("agentops.checkpoints.postgres", raising=False)
    monkeypatch.setitem(sys.modules, "agentops.checkpoints.postgres", None)
    with pytest.raises(RecordError, match="a library that is not here") as caught:
        async with lease(postgres_settings, "t"):
            pass
    assert "agentops-runtime[postgres]" in caught.value.hint


async def test_two_that_begin_at_once_make_the_tables_together(postgres_settings: Settings) -> None:
    async def take(number: int) -> int:
        async with lease(postgres_settings, f"t{number}") as held, open_checkpointer(held, frozenset()) as saver:
            return len([one async for one in saver.alist(None)])

    assert await asyncio.gather(*(take(number) for number in range(8))) == [0] * 8


class Mood(enum.StrEnum):
    GOOD = "good"


async def test_every_value_comes_back_as_what_it_was(either_settings: Settings) -> None:
    values = {
        "nul": "a\0b",
        "nested": {"x": ["\0"]},
        "mood": Mood.GOOD,
        "big": 1e22,
        "small": -0.0,
        "none": float("inf"),
        "text": "ä" * 5_000,
        "int": 2**62,
        "yes": True,
    }
    config: Any = {"configurable": {"thread_id": "t", "checkpoint_ns": ""}}
    versions = dict.fromkeys(values, "1")
    checkpoint: Any = {"v": 4, "id": "1", "ts": "", "channel_values": values, "channel_versions": versions, "versions_seen": {}}
    async with lease(either_settings, "t") as held, open_checkpointer(held, frozenset({Mood})) as saver:
        place = await saver.aput(config, checkpoint, {}, versions)
        await saver.aput_writes(place, list(values.items()), "task")
        found = await saver.aget_tuple(config)
        assert found is not None
        for back in (found.checkpoint["channel_values"], {name: value for _, name, value in found.pending_writes or ()}):
            assert {name: (type(value), repr(value)) for name, value in back.items()} == {
                name: (type(value), repr(value)) for name, value in values.items()
            }


async def test_a_server_that_goes_away_is_told_and_what_was_kept_is_there_when_it_is_back(
    postgres_settings: Settings, postgres_server: Postgres
) -> None:
    config: Any = {"configurable": {"thread_id": "t", "checkpoint_ns": ""}}
    checkpoint: Any = {"v": 4, "id": "1", "ts": "", "channel_values": {}, "channel_versions": {}, "versions_seen": {}}
    async with lease(postgres_settings, "t") as held, open_checkpointer(held, frozenset()) as saver:
        place = await saver.aput(config, checkpoint, {}, {})
        postgres_server.kill()
        try:
            for _ in range(2):
                with pytest.raises(LeaseLost, match="broke") as caught:
                    await saver.aput(place, {**checkpoint, "id": "2"}, {}, {})
                with pytest.raises(LeaseLost, match="broke"):
                    await saver.aget_tuple(config)
            with pytest.raises(RecordError, match="no Postgres answers"):
                async with lease(postgres_settings, "t"):
                    pass
        finally:
            postgres_server.start()
    assert "agentops" not in str(caught.value), "neither name nor password"
    async with lease(postgres_settings, "t") as held, open_checkpointer(held, frozenset()) as saver:
        assert [one.checkpoint["id"] async for one in saver.alist(config)] == ["1"]
