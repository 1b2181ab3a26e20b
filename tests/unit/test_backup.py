"""A backup has all that was on record when it began, and is put back whole or not at all."""

from __future__ import annotations

import io
import json
import shutil
import signal
import subprocess
import sys
import tarfile
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import zstandard
from typer.testing import CliRunner

from agentops import Runtime, ScriptedEngine, Settings
from agentops.backup import backup, restore
from agentops.cli import app
from agentops.errors import RecordError, ThreadBusy, UsageError
from agentops.replay import replay
from agentops.store import open_store
from agentops.tracer import catch_up

LINE = """
import time
from typing import TypedDict
from langgraph.graph import START, StateGraph

class State(TypedDict, total=False):
    n: int

def slow(state: State) -> State:
    time.sleep(0.02)
    return {"n": state["n"] + 1}

builder = StateGraph(State)
before = START
for number in range(4):
    builder.add_node(f"node_{number}", slow)
    builder.add_edge(before, f"node_{number}")
    before = f"node_{number}"
graph = builder.compile()
"""
BUSY = """
import itertools, sys
from agentops import Runtime, ScriptedEngine, load_settings

with Runtime(load_settings(), engine=ScriptedEngine()) as runtime:
    for number in itertools.count():
        done = runtime.run(sys.argv[1], {"n": number})
        print(done.run_id, done.output["n"], flush=True)
"""


@pytest.fixture
def line(tmp_path: Path) -> str:
    """A graph that adds 4, slowly."""
    file = tmp_path / "line.py"
    file.write_text(LINE)
    return str(file)


@contextmanager
def busy(line: str, environment: dict[str, str]) -> Iterator[Iterator[tuple[str, int]]]:
    """A process that runs one run after the other; gives each with its result. It is killed in the end."""
    command = [sys.executable, "-c", textwrap.dedent(BUSY), line]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert child.stdout is not None
    try:
        yield ((run, int(reached)) for run, reached in map(str.split, child.stdout))
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()


def elsewhere(settings: Settings, home: Path) -> Settings:
    return replace(settings, paths=replace(settings.paths, home=home))


def test_what_was_done_when_it_began_is_in_it_and_what_was_at_work_is_resumed(
    settings: Settings, environment: dict[str, str], tmp_path: Path, line: str
) -> None:
    done: dict[str, int] = {}
    taken: list[tuple[Path, dict[str, int]]] = []
    with busy(line, environment) as runs:
        for run, reached in runs:
            done[run] = reached
            if len(done) in (2, 4, 6):
                time.sleep(0.03)
                before = dict(done)
                taken.append((backup(settings, tmp_path / f"{len(done)}.tar.zst", now_ns=1).file, before))
            if len(done) == 7:
                break
    unfinished = 0
    for number, (file, before) in enumerate(taken):
        assert file.stat().st_mode & 0o077 == 0
        there = elsewhere(settings, tmp_path / f"restored {number}")
        assert restore(file, there.paths.home, now_ns=2).before is None
        catch_up(there, wait=True)
        with open_store(there) as store:
            found = {run.id: run for run in store.runs()}
            assert set(before) <= set(found)
            for run, reached in before.items():
                output = found[run].output_hash
                assert output is not None
                assert (found[run].status, store.payload(output)) == ("done", {"n": reached})
                assert store.balance(run).balanced
        (again,) = replay(there, run=next(iter(before)))
        assert again.same
        with Runtime(there, engine=ScriptedEngine()) as runtime:
            for run in set(found) - set(before):
                if found[run].status != "done":
                    unfinished += 1
                    assert found[run].status == "crashed"
                    assert runtime.resume(run).status == "done"
    assert unfinished > 0


@pytest.fixture
def kept(settings: Settings, line: str, tmp_path: Path) -> Path:
    """A backup of one run."""
    with Runtime(settings, engine=ScriptedEngine()) as runtime:
        runtime.run(line, {"n": 1})
    return backup(settings, tmp_path / "kept.tar.zst", now_ns=1).file


def test_a_file_that_was_cut_or_changed_anywhere_is_refused_or_whole_all_the_same(kept: Path, tmp_path: Path) -> None:
    data, home = kept.read_bytes(), tmp_path / "home of another"
    assert restore(kept, home, now_ns=2).threads == 1
    sound = {one.name: one.read_bytes() for one in home.rglob("*.db")}
    refused = 0
    step = max(1, len(data) // 60)
    spoiled = [data[:cut] for cut in range(0, len(data), step)]
    spoiled += [data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :] for at in range(0, len(data), step)]
    for one in spoiled:
        shutil.rmtree(home)
        home.mkdir()
        kept.write_bytes(one)
        with suppress(RecordError):
            restore(kept, home, now_ns=2)
        found = {one.name: one.read_bytes() for one in home.rglob("*.db")}
        # Where the padding at its end was hit, nothing is missing.
        assert found in ({}, sound)
        refused += not found
    assert refused > 0.9 * len(spoiled)
    assert [one.name for one in tmp_path.iterdir() if "restoring" in one.name] == []


def changed(kept: Path, name: str, data: bytes, *, instead_of: str = "", link: str = "") -> None:
    """The same backup with one more member at its beginning, or with another in the place of one."""
    packed, unpacked = io.BytesIO(), io.BytesIO(zstandard.ZstdDecompressor().decompressobj().decompress(kept.read_bytes()))
    with tarfile.open(fileobj=unpacked) as old, tarfile.open(fileobj=packed, mode="w") as new:
        for member in old.getmembers():
            opened = old.extractfile(member)
            assert opened is not None
            if member.name == instead_of or (not instead_of and member.name == "record.db"):
                about = tarfile.TarInfo(name)
                about.size = len(data)
                if link:
                    about.type, about.linkname, about.size = tarfile.SYMTYPE, link, 0
                new.addfile(about, io.BytesIO(data))
            if member.name != instead_of:
                new.addfile(member, opened)
    kept.write_bytes(zstandard.ZstdCompressor().compress(packed.getvalue()))


@pytest.mark.parametrize(
    ("name", "link", "told"),
    [
        ("../outside.db", "", "nothing that a backup has"),
        ("/etc/outside", "", "nothing that a backup has"),
        ("threads/../../outside.db", "", "nothing that a backup has"),
        ("threads/th_1.db", "/etc/passwd", "is no file"),
        ("journal/extra.seg", "", "checksums do not fit"),
    ],
)
def test_what_a_backup_does_not_have_is_refused(kept: Path, tmp_path: Path, name: str, link: str, told: str) -> None:
    changed(kept, name, b"x", link=link)
    with pytest.raises(RecordError, match=told):
        restore(kept, tmp_path / "new", now_ns=2)
    assert not (tmp_path / "new").exists()
    assert not (tmp_path / "outside.db").exists()


@pytest.mark.parametrize(
    "manifest", [{"format": 2, "schema": "0001", "taken_ns": 1}, {"format": 1, "schema": "9999", "taken_ns": 1}]
)
def test_a_newer_backup_is_left_alone(kept: Path, tmp_path: Path, manifest: dict[str, Any]) -> None:
    changed(kept, "manifest.json", json.dumps(manifest).encode(), instead_of="manifest.json")
    with pytest.raises(RecordError, match="newer version") as refused:
        restore(kept, tmp_path / "new", now_ns=2)
    assert "upgrade" in refused.value.hint


def test_what_is_no_backup_is_refused(tmp_path: Path, settings: Settings) -> None:
    other = tmp_path / "other.tar.zst"
    with pytest.raises(RecordError, match="there is no file"):
        restore(other, tmp_path / "new", now_ns=2)
    for data in (b"", b"hello", zstandard.ZstdCompressor().compress(b"hello" * 1000)):
        other.write_bytes(data)
        with pytest.raises(RecordError, match="cannot be restored"):
            restore(other, tmp_path / "new", now_ns=2)


def test_a_home_is_moved_aside_only_when_that_is_said_and_nobody_works_in_it(
    kept: Path, settings: Settings, line: str, environment: dict[str, str]
) -> None:
    home = settings.paths.home
    with pytest.raises(UsageError, match="not empty"):
        restore(kept, home, now_ns=2)
    with busy(line, environment) as runs:
        next(runs)
        with pytest.raises(ThreadBusy, match="a process works in"):
            restore(kept, home, replace=True, now_ns=2)
    done = restore(kept, home, replace=True, now_ns=3)
    assert done.before is not None
    for one in (elsewhere(settings, done.before), settings):
        catch_up(one, wait=True)
    with open_store(elsewhere(settings, done.before)) as before, open_store(settings) as after:
        assert len(before.runs()) > len(after.runs()) == 1


def test_an_empty_home_a_file_in_the_way_and_a_folder_that_is_not_there_are_told(settings: Settings, kept: Path) -> None:
    with pytest.raises(RecordError, match="nothing is on record"):
        backup(elsewhere(settings, kept.parent / "empty"), kept.parent / "x", now_ns=1)
    with pytest.raises(UsageError, match="is there already"):
        backup(settings, kept, now_ns=1)
    with pytest.raises(RecordError, match="could not be written"):
        backup(settings, kept.parent / "no such folder" / "x", now_ns=1)


def test_postgres_has_a_way_of_its_own(settings: Settings, tmp_path: Path) -> None:
    shared = replace(settings, record=replace(settings.record, url="postgresql://nobody@127.0.0.1:9/none"))
    with pytest.raises(UsageError, match="Postgres") as refused:
        backup(shared, tmp_path / "x", now_ns=1)
    assert "pg_dump" in refused.value.hint


def test_the_verbs_tell_what_they_did(settings: Settings, kept: Path, tmp_path: Path) -> None:
    environment = {"AGENTOPS_PATHS_HOME": str(settings.paths.home)}

    def told(*arguments: str) -> Any:
        done = CliRunner().invoke(app, [*arguments, "--json"], env=environment)
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    file = tmp_path / "by hand.tar.zst"
    made = told("backup", str(file))
    assert (made["threads"], made["bytes"]) == (1, file.stat().st_size)
    put = told("restore", str(file), "--into", str(tmp_path / "into"))
    assert (put["home"], put["threads"], put["before"]) == (str(tmp_path / "into"), 1, None)
