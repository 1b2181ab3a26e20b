"""Erasing: of a user or a thread nothing is found in any byte of the home afterwards, and of others nothing is missing."""

from __future__ import annotations

import asyncio
import json
import operator
import os
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, TypedDict

import psycopg
import pytest
import zstandard
from langgraph.graph import START, StateGraph
from langgraph.types import interrupt
from psycopg import sql

from agentops import Runtime, ScriptedEngine, Settings, erasing
from agentops.checkpoints import lease
from agentops.cli import main
from agentops.erasing import erase
from agentops.errors import RecordError, ThreadBusy
from agentops.records import Labels
from agentops.store import StoreWriter, open_store
from agentops.tracer import catch_up
from agentops.tracer.journal import Journal, frame, overwrite, read

_ZSTD = b"\x28\xb5\x2f\xfd"
CANARY = "canary-of-ada-9f3a7c"


class State(TypedDict, total=False):
    q: str
    said: Annotated[list[str], operator.add]


def says(state: State) -> State:
    return {"said": [f"you said {state['q']}", "hello"]}


def waits(state: State) -> State:
    interrupt(f"is it {state['q']} ?")
    return {}


def made() -> Any:
    graph = StateGraph(State).add_node("says", says).add_node("waits", waits)
    return graph.add_edge(START, "says").add_edge("says", "waits").compile()


def everything(home: Path) -> Iterator[tuple[str, bytes]]:
    for file in home.rglob("*"):
        if file.is_file():
            yield file.name, file.read_bytes()
    with sqlite3.connect(f"file:{home / 'record.db'}?mode=ro", uri=True) as connection:
        rows = connection.execute("SELECT data FROM payload").fetchall()
    connection.close()
    for (blob,) in rows:
        yield "payload", zstandard.ZstdDecompressor().decompress(blob, max_output_size=100_000_000)


def places(home: Path, canary: str) -> set[str]:
    return {name for name, data in everything(home) if canary.encode() in data}


@pytest.mark.parametrize("by", ["user", "thread"])
def test_no_byte_of_it_is_left_and_others_are_whole(settings: Settings, by: str) -> None:
    home, graph = settings.paths.home, made()
    with Runtime(settings, engine=ScriptedEngine()) as runtime:
        ada = runtime.run(graph, {"q": CANARY}, thread="hers", labels=Labels("ada", (), {"note": CANARY}))
        fork = runtime.fork(ada.run_id, step=0, graph=graph)
        bob = runtime.run(graph, {"q": "what bob asks"}, thread="his", labels=Labels("bob"))
        assert fork.thread_id != "hers"
        catch_up(settings, wait=True)
        (home / "journal" / "old.damaged").write_bytes(b"half a record of " + CANARY.encode())
        (home / "prefixes").mkdir()
        (home / "prefixes" / "a.safetensors").write_bytes(CANARY.encode())
        segment = runtime._tracer.journal.path.name
        # Without erasing, it is everywhere: also in the segment of a process that lives.
        assert places(home, CANARY) >= {segment, "hers.db", "old.damaged", "payload", "a.safetensors"}
        planned = erase(settings, **{by: "ada" if by == "user" else "hers"}, dry_run=True)
        assert planned.threads == tuple(sorted(("hers", fork.thread_id)))
        assert places(home, CANARY)
        found = erase(settings, **{by: "ada" if by == "user" else "hers"})
        assert (found.threads, found.runs, found.left) == (planned.threads, 2, ())
        assert places(home, CANARY) == set()
        # The process goes on with the same segment.
        more = runtime.run(graph, {"q": "more"}, thread="his2", labels=Labels("bob"))
        resumed = runtime.resume(bob.run_id, answer="yes", graph=graph)
        assert resumed.status == "done"
    catch_up(settings, wait=True)
    with open_store(settings) as store:
        assert {run.id for run in store.runs()} == {bob.run_id, more.run_id}
        for run in store.runs():
            assert store.balance(run.id).balanced
            for span in store.spans(run.id):
                for key in (span.input_hash, span.output_hash):
                    assert key is None or store.payload(key) is not None
    assert places(home, "what bob asks")


def test_what_others_have_too_stays_and_is_counted(settings: Settings) -> None:
    graph = made()
    with Runtime(settings, engine=ScriptedEngine()) as runtime:
        for user in ("ada", "bob"):
            runtime.run(graph, {"q": "the same"}, labels=Labels(user))
    assert erase(settings, user="ada").shared > 0
    with open_store(settings) as store:
        assert store.payload(str(store.run("last").input_hash)) == {"q": "the same"}


def test_a_redacted_user_is_found_by_the_name(settings: Settings) -> None:
    mine = replace(settings, record=replace(settings.record, redact=("email",)))
    with Runtime(mine, engine=ScriptedEngine()) as runtime:
        for user in ("ada@example.com", "bob@example.com"):
            runtime.run(made(), {"q": user}, labels=Labels(user))
    # Also where names are not redacted any more.
    assert erase(settings, user="ada@example.com", dry_run=True).runs == 1
    assert erase(mine, user="ada@example.com").runs == 1
    assert places(mine.paths.home, "ada@example.com") == set()
    with open_store(mine) as store:
        assert len(store.runs()) == 1


def test_a_thread_at_work_is_not_erased_and_nothing_is_then(settings: Settings) -> None:
    with Runtime(settings, engine=ScriptedEngine()) as runtime:
        runtime.run(made(), {"q": CANARY}, thread="one", labels=Labels("ada"))
        runtime.run(made(), {"q": CANARY}, thread="two", labels=Labels("ada"))

        async def while_held() -> None:
            async with lease(settings, "two"):
                await asyncio.to_thread(erase, settings, user="ada")

        with pytest.raises(ThreadBusy):
            asyncio.run(while_held())
        trace = runtime._tracer.start_run(run_id="run_x", thread_id="one", graph="python:g")
        with pytest.raises(ThreadBusy, match="thread one is at work"):
            erase(settings, thread="one")
        trace.end("done")
    catch_up(settings, wait=True)
    with open_store(settings) as store:
        assert len(store.runs()) == 3


def free_pages(settings: Settings) -> int:
    with closing(sqlite3.connect(settings.paths.home / "record.db")) as connection:
        return int(connection.execute("PRAGMA freelist_count").fetchone()[0])


@pytest.mark.parametrize("by", ["user", "thread"])
@pytest.mark.parametrize("at", ["remove", "shrink"])
def test_the_same_call_finishes_what_a_broken_one_left(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], by: str, at: str
) -> None:
    with Runtime(settings, engine=ScriptedEngine()) as runtime:
        runtime.run(made(), {"q": CANARY + os.urandom(60_000).hex()}, thread="hers", labels=Labels("ada"))
        whose = {by: "ada" if by == "user" else "hers"}

        def broken(*of: Any, **how: Any) -> None:
            raise OSError("the disk is full")

        monkeypatch.setattr(StoreWriter, at, broken)
        with pytest.raises(OSError, match="full"):
            erase(settings, **whose)
        monkeypatch.undo()
        if at == "remove":
            assert places(settings.paths.home, CANARY)
            assert erase(settings, **whose).runs == 1
        else:
            # The runs are gone; the room that they took can still be read.
            assert free_pages(settings) > 0
            monkeypatch.setenv("AGENTOPS_PATHS_HOME", str(settings.paths.home))
            monkeypatch.setattr(sys, "argv", ["agentops", "erase", f"--{by}", whose[by], "--yes"])
            with pytest.raises(SystemExit) as ended:
                main()
            said = capfd.readouterr().err
            assert (ended.value.code, "broken off had left is gone" in said, "no run" in said) == (1, True, True)
            assert free_pages(settings) == 0
            assert not (settings.paths.home / "erasing").exists()
        assert places(settings.paths.home, CANARY) == set()


def test_what_was_begun_or_forked_before_the_threads_were_held_goes_too(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = made()
    with Runtime(settings, engine=ScriptedEngine()) as runtime:
        ada = runtime.run(graph, {"q": CANARY}, thread="hers", labels=Labels("ada"))
        late: list[str] = []

        async def meanwhile(*of: Any) -> Any:
            if not late:
                late.append("")
                late.append((await runtime.arun(graph, {"q": CANARY}, thread="hers")).run_id)
                late.append((await runtime.afork(ada.run_id, step=0, graph=graph)).run_id)
            return await real(*of)

        real = erasing._held
        monkeypatch.setattr(erasing, "_held", meanwhile)
        assert erase(settings, thread="hers").runs == 3
        assert places(settings.paths.home, CANARY) == set()
    with open_store(settings) as store:
        assert not store.runs()


def test_a_thread_that_is_not_there_is_said(settings: Settings) -> None:
    with pytest.raises(RecordError, match="no run on thread 'none'"):
        erase(settings, thread="none")


def test_a_name_that_nobody_has_costs_nobody_anything(settings: Settings) -> None:
    home = settings.paths.home
    with Runtime(settings, engine=ScriptedEngine()) as runtime:
        runtime.run(made(), {"q": CANARY}, thread="hers", labels=Labels("ada"))
    kept = [home / "journal" / "old.damaged", home / "prefixes" / "a.safetensors", home / "threads" / "of_nobody.db"]
    (home / "prefixes").mkdir(exist_ok=True)
    for file in kept:
        file.write_bytes(b"somebody's")
    for whose in ({"user": "adda"}, {"thread": "of_nobody"}):
        with pytest.raises(RecordError, match="no run"):
            erase(settings, **whose)
    assert all(file.exists() for file in kept)


def test_a_segment_is_read_behind_what_was_overwritten(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    journal.append({"t": "a", "text": CANARY * 1_000})
    place = journal.size
    journal.append({"t": "b"})
    overwrite(journal.path, place)
    assert CANARY.encode() not in journal.path.read_bytes()
    assert [event for event, _ in read(journal.path, place)] == [{"t": "b"}]
    assert [event for event, _ in read(journal.path)] == [{"t": "b"}]
    journal.append({"t": "c"})
    assert [event for event, _ in read(journal.path)][1:] == [{"t": "c"}]
    assert journal.path.stat().st_size == journal.size == place + len(frame({"t": "b"})) * 2
    journal.close()


def test_the_verb_asks_first_and_says_what_it_did(
    environment: dict[str, str], settings: Settings, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Runtime(settings, engine=ScriptedEngine()) as runtime:
        runtime.run(made(), {"q": CANARY}, thread="hers", labels=Labels("ada"))

    def verb(*words: str) -> tuple[int, str, str]:
        monkeypatch.setenv("AGENTOPS_PATHS_HOME", str(settings.paths.home))
        monkeypatch.setattr(sys, "argv", ["agentops", "erase", *words])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), *capfd.readouterr()

    assert verb()[0] == 2
    assert verb("--user", "ada", "--thread", "hers")[0] == 2
    code, _, said = verb("--user", "ada")
    assert (code, "--yes" in said) == (2, True)
    code, told, _ = verb("--user", "ada", "--dry-run")
    assert code == 0
    assert told.startswith("would erase 1 threads with 1 runs of user 'ada'")
    assert "  hers" in told
    code, told, _ = verb("--thread", "hers", "--yes", "--json")
    assert (code, json.loads(told)["runs"]) == (0, 1)
    assert places(settings.paths.home, CANARY) == set()
    assert verb("--thread", "hers", "--yes")[0] == 1


def test_of_a_record_in_postgres_no_row_has_it(postgres_settings: Settings) -> None:
    graph = made()
    with Runtime(postgres_settings, engine=ScriptedEngine()) as runtime:
        ada = runtime.run(graph, {"q": CANARY}, labels=Labels("ada", (), {"note": CANARY}))
        runtime.fork(ada.run_id, step=0, graph=graph)
        bob = runtime.run(graph, {"q": "what bob asks"}, labels=Labels("bob"))
        catch_up(postgres_settings, wait=True)
        assert CANARY in rows(postgres_settings)
        assert erase(postgres_settings, user="ada").runs == 2
        assert CANARY not in rows(postgres_settings)
        assert not any(CANARY.encode() in file.read_bytes() for file in postgres_settings.paths.home.rglob("*") if file.is_file())
    with open_store(postgres_settings) as store:
        assert [run.id for run in store.runs()] == [bob.run_id]


def rows(settings: Settings) -> str:
    """All rows of a record in Postgres, as text, with their contents unpacked."""
    unpacked = zstandard.ZstdDecompressor()
    found: list[bytes] = []
    with psycopg.connect(settings.record.url) as connection:
        names = connection.execute("SELECT tablename FROM pg_tables WHERE schemaname = current_schema()").fetchall()
        for (name,) in names:
            for row in connection.execute(sql.SQL("SELECT * FROM {}").format(sql.Identifier(name))).fetchall():
                raw = [bytes(one) if isinstance(one, bytes | memoryview) else str(one).encode() for one in row]
                found += [unpacked.decompress(one, 10**8) if one[:4] == _ZSTD else one for one in raw]
    return b"\n".join(found).decode(errors="replace")
