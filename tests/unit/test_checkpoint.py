"""Checkpoints: what stands in a thread's file executes nothing and is nobody else's to read."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, TypedDict

import ormsgpack
import pytest
from langgraph.checkpoint.serde import _msgpack
from langgraph.checkpoint.serde.jsonplus import (
    EXT_CONSTRUCTOR_KW_ARGS,
    EXT_CONSTRUCTOR_POS_ARGS,
    EXT_CONSTRUCTOR_SINGLE_ARG,
    EXT_METHOD_SINGLE_ARG,
    EXT_PYDANTIC_V1,
    EXT_PYDANTIC_V2,
    JsonPlusSerializer,
)
from langgraph.graph import START, StateGraph

from agentops.checkpoints import checkpoint_folder, lease, open_checkpointer, serde
from agentops.errors import RecordError, StoreBroken
from agentops.settings import Settings

THREAD: Any = {"configurable": {"thread_id": "th_1"}}
SYSTEM = ("os", "system")


class State(TypedDict, total=False):
    said: list[str]


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """A file that is there once a payload was executed."""
    return tmp_path / "executed"


@pytest.fixture(autouse=True)
def fresh_process() -> Iterator[None]:
    serde.try_strictness.cache_clear()
    yield
    serde.try_strictness.cache_clear()


async def converse(settings: Settings, said: str = "hello") -> None:
    builder = StateGraph(State)
    builder.add_node("answer", lambda state: {"said": [*state["said"], "hi"]})
    builder.add_edge(START, "answer")
    async with lease(settings, "th_1") as held, open_checkpointer(held, frozenset()) as saver:
        await builder.compile(checkpointer=saver).ainvoke({"said": [said]}, THREAD, durability="sync")


async def loaded(settings: Settings) -> Any:
    async with lease(settings, "th_1") as held, open_checkpointer(held, frozenset()) as saver:
        return await saver.aget_tuple(THREAD)


async def test_a_write_under_way_is_finished_before_the_file_is_closed(settings: Settings) -> None:
    await converse(settings)
    async with lease(settings, "th_1") as held:
        async with open_checkpointer(held, frozenset()) as saver:
            newest = await saver.aget_tuple(THREAD)
            assert newest is not None
            late = asyncio.create_task(saver.aput_writes(newest.config, [("said", ["late"])], "task"))
        await late
    found = await loaded(settings)
    assert [one[1:] for one in found.pending_writes] == [("said", ["late"])]
    await converse(settings)


def plant(settings: Settings, kind: str, blob: bytes, table: str) -> None:
    """Puts a payload in place of every value of that table in the thread's file."""
    column = "checkpoint" if table == "checkpoints" else "value"
    with closing(sqlite3.connect(checkpoint_folder(settings) / "th_1.db")) as db, db:
        assert db.execute(f"UPDATE {table} SET type = ?, {column} = ?", (kind, blob)).rowcount > 0
        if table == "writes":
            # So that the newest checkpoint has them pending.
            newest = "(SELECT max(checkpoint_id) FROM checkpoints)"
            db.execute(f"UPDATE OR REPLACE writes SET checkpoint_id = {newest}")


def ext(code: int, *call: Any) -> bytes:
    return ormsgpack.packb(ormsgpack.Ext(code, ormsgpack.packb(call)))


def hostile(form: str, mark: Path) -> bytes:
    command = f"touch '{mark}'"
    match form:
        case "one argument":
            return ext(EXT_CONSTRUCTOR_SINGLE_ARG, *SYSTEM, command)
        case "arguments":
            return ext(EXT_CONSTRUCTOR_POS_ARGS, *SYSTEM, [command])
        case "keywords":
            return ext(EXT_CONSTRUCTOR_KW_ARGS, *SYSTEM, {"command": command})
        case "method":
            return ext(EXT_METHOD_SINGLE_ARG, "pathlib", "Path", str(mark), "touch")
        case "pydantic 1":
            return ext(EXT_PYDANTIC_V1, *SYSTEM, {"command": command})
        case "pydantic 2":
            return ext(EXT_PYDANTIC_V2, *SYSTEM, {"command": command}, "model_validate_json")
    # Inside what may be built: the hook looks at the arguments of a safe type too.
    return ext(EXT_CONSTRUCTOR_SINGLE_ARG, "builtins", "set", [ormsgpack.Ext(0, ormsgpack.packb([*SYSTEM, command]))])


CALLING_FORMS = ["one argument", "arguments", "keywords", "method", "pydantic 1", "pydantic 2", "nested"]


@pytest.mark.parametrize("table", ["checkpoints", "writes"])
@pytest.mark.parametrize("form", CALLING_FORMS)
async def test_a_hostile_checkpoint_executes_nothing(settings: Settings, mark: Path, form: str, table: str) -> None:
    await converse(settings)
    plant(settings, "msgpack", hostile(form, mark), table)
    found = await loaded(settings)
    assert found is not None, "it was read"
    if table == "writes":
        assert found.pending_writes
    assert not mark.exists()


@pytest.mark.parametrize("form", CALLING_FORMS)
def test_the_payloads_would_execute_where_nothing_is_refused(mark: Path, form: str) -> None:
    open_to_all = JsonPlusSerializer(allowed_msgpack_modules=True)
    trusted = _msgpack.SAFE_MSGPACK_METHODS | {("pathlib", "Path", "touch")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_msgpack, "SAFE_MSGPACK_METHODS", trusted)
        open_to_all.loads_typed(("msgpack", hostile(form, mark)))
    assert mark.exists()


@pytest.mark.parametrize("table", ["checkpoints", "writes"])
async def test_a_pickle_in_a_checkpoint_is_refused_unread(settings: Settings, mark: Path, table: str) -> None:
    await converse(settings)
    plant(settings, "pickle", f"cos\nsystem\n(S'touch {mark}'\ntR.".encode(), table)
    with pytest.raises(StoreBroken, match="'pickle'") as caught:
        await loaded(settings)
    assert caught.value.hint
    assert not mark.exists()


async def test_langgraphs_older_json_form_builds_no_objects(settings: Settings) -> None:
    await converse(settings)
    made = b'{"lc": 1, "type": "constructor", "id": ["langchain_core", "messages", "AIMessage"], "kwargs": {"content": "x"}}'
    plant(settings, "json", made, "checkpoints")
    with pytest.raises(StoreBroken, match="'json'"):
        await loaded(settings)


async def test_a_library_that_calls_what_a_checkpoint_names_is_not_used(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(_msgpack, "SAFE_MSGPACK_TYPES", _msgpack.SAFE_MSGPACK_TYPES | {("os", "getcwd")})
        for _ in range(2):
            with pytest.raises(RecordError, match=r"os\.getcwd") as caught:
                await converse(settings)
            assert "agentops-runtime" in caught.value.hint
    assert not list(checkpoint_folder(settings).glob("*.db"))
    await converse(settings)
    assert await loaded(settings)


async def test_the_self_test_covers_every_form_and_says_nothing(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    assert [code for code, _ in serde._HARMLESS_CALLS] == list(range(EXT_PYDANTIC_V2 + 1))
    permissive = JsonPlusSerializer(allowed_msgpack_modules=True)
    trusted = _msgpack.SAFE_MSGPACK_METHODS | {("builtins", "str", "upper")}
    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.CRITICAL):
        patch.setattr(_msgpack, "SAFE_MSGPACK_METHODS", trusted)
        for code, call in serde._HARMLESS_CALLS:
            assert permissive.loads_typed(("msgpack", ext(code, *call))) != call[2], "a call must show"
    caplog.clear()
    with caplog.at_level(logging.DEBUG):
        await converse(settings)
    assert not [record for record in caplog.records if record.name.startswith("langgraph")]


async def test_conversations_are_their_owners_alone(settings: Settings) -> None:
    old_umask = os.umask(0o022)
    try:
        async with lease(settings, "th_1") as held, open_checkpointer(held, frozenset()):
            files = sorted(checkpoint_folder(settings).iterdir())
            assert [file.name for file in files] == ["th_1.db", "th_1.db-shm", "th_1.db-wal", "th_1.lock"]
            assert {file.name: oct(file.stat().st_mode & 0o777) for file in files} == dict.fromkeys(
                (file.name for file in files), "0o600"
            )
    finally:
        os.umask(old_umask)
    assert checkpoint_folder(settings).stat().st_mode & 0o777 == 0o700
    assert settings.paths.home.stat().st_mode & 0o777 == 0o700
    await converse(settings)
    assert await loaded(settings), "a file that is there is used as it is"


async def test_a_file_that_cannot_be_made_is_told(settings: Settings) -> None:
    async with lease(settings, "th_1") as held:
        shutil.rmtree(checkpoint_folder(settings))
        with pytest.raises(RecordError, match="cannot be made") as caught:
            async with open_checkpointer(held, frozenset()):
                pass
    assert caught.value.hint
