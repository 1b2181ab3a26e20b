"""Records that are locked, gone, replaced or newer, terminals that are small, resized or dumb, and nothing on record at all."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tui_app import drawn, opened, press, said, settle
from tui_pty import terminal
from tui_record import NOW, SECOND, Seeds, answered, many, small

from agentops import Settings
from agentops.errors import UsageError
from agentops.store import open_store
from agentops.store.opening import database_path
from tui.app import TerminalApp
from tui.query import parse
from tui.widgets.table import Table
from tui.widgets.trace import Trace

COMMANDS = {
    "runs": "agentops run assistant",
    "inbox": "agentops run assistant",
    "evals": "agentops eval --dataset",
    "engine": "agentops run assistant",
}


async def wait_for(pilot: Any, seen: Any) -> None:
    begun = time.monotonic()
    while not seen():
        assert time.monotonic() - begun < 10, drawn(pilot.app)
        await pilot.pause(0.05)
    await settle(pilot)


@pytest.mark.parametrize("place", COMMANDS)
async def test_with_nothing_on_record_each_screen_says_what_to_do(settings: Settings, place: str) -> None:
    open_store(settings).close()
    async with opened(settings, open_at=place, size=(80, 24)) as (app, _):
        assert COMMANDS[place] in said(app, "#nothing")
        assert COMMANDS[place] in drawn(app)


async def test_with_nothing_on_record_keys_are_no_text_of_a_filter(settings: Settings) -> None:
    open_store(settings).close()
    async with opened(settings, open_at="runs", size=(80, 24)) as (app, pilot):
        await press(pilot, "question_mark", "escape", "2")
        assert app.state.filter == ""
        assert COMMANDS["inbox"] in said(app, "#nothing")
        assert "No run waits" in said(app, "#nothing")


async def test_what_is_written_meanwhile_appears_and_moves(settings: Settings) -> None:
    open_store(settings).close()
    async with opened(settings) as (app, pilot):
        seeds = Seeds()
        seeds.run("run_1", status="running", started_ns=NOW)
        seeds.span("sp_1", "run_1", kind="workflow", name="rag", status="open", duration_ns=None)
        seeds.write(settings)
        await wait_for(pilot, lambda: "running" in drawn(app))
        await press(pilot, "enter")
        trace = app.screen.query_one(Trace)
        assert trace.line_count == 1
        seeds.span("sp_2", "run_1", parent_id="sp_1", root_id="sp_1", seq=2, name="retrieve")
        seeds.write(settings)
        await wait_for(pilot, lambda: trace.line_count == 2)
        seeds.span("sp_1", "run_1", kind="workflow", name="rag", duration_ns=3 * SECOND)
        seeds.run("run_1", status="done", started_ns=NOW, ended_ns=NOW + 3 * SECOND)
        seeds.write(settings)
        await wait_for(pilot, lambda: "✓ done" in drawn(app))
        assert trace.outline.spans["sp_1"].status == "ok"
        await press(pilot, "escape")
        answered(seeds, "run_2", NOW + SECOND)
        seeds.write(settings)
        await wait_for(pilot, lambda: app.screen.query_one(Table).line_count == 2)
        assert app.screen.query_one(Table).row.id == "run_1", "the cursor stays on its run"


async def test_a_record_that_vanishes_and_comes_back_under_the_open_screen(settings: Settings) -> None:
    small(settings)
    path = database_path(settings)
    async with opened(settings) as (app, pilot):
        for name in ("record.db", "record.db-wal", "record.db-shm"):
            if (path.parent / name).exists():
                (path.parent / name).rename(path.parent / f"away-{name}")
        await wait_for(pilot, lambda: "is gone" in said(app, "Bar") or "no record" in said(app, "Bar"))
        await press(pilot, "down", "2")
        assert app.return_code is None
        assert not path.exists(), "nobody makes a record behind its owner's back"
        await press(pilot, "1")
        small(settings)
        await wait_for(pilot, lambda: app.trouble is None)
        await press(pilot, "home", "enter")
        assert app.screen.query_one(Trace).line_count == 5


async def test_a_record_that_is_upgraded_under_the_open_screen(settings: Settings) -> None:
    small(settings)
    async with opened(settings) as (app, pilot):
        with sqlite3.connect(database_path(settings)) as writer:
            writer.execute("UPDATE alembic_version SET version_num = '9999'")
        writer.close()
        await wait_for(pilot, lambda: "newer version" in said(app, "Bar"))
        assert "upgrade agentops-runtime" in said(app)
        assert "run_01A" in str(app.screen.query_one(Table).row)


HOLDING = """
import sqlite3, sys
holder = sqlite3.connect(sys.argv[1], isolation_level=None)
holder.execute("BEGIN EXCLUSIVE")
print("held", flush=True)
sys.stdin.read()
"""


async def test_a_record_that_is_locked_and_vanishes_under_the_open_screen(settings: Settings) -> None:
    small(settings)
    path = database_path(settings)
    # With a write-ahead log nobody can shut readers out; a record that was copied or restored may have none.
    changed = sqlite3.connect(path)
    changed.execute("PRAGMA journal_mode=DELETE")
    changed.close()
    async with opened(settings) as (app, pilot):
        words = [sys.executable, "-c", HOLDING, str(path)]
        with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
            try:
                assert holder.stdout is not None
                assert holder.stdout.readline() == "held\n"
                await wait_for(pilot, lambda: "another process holds" in said(app, "Bar"))
                assert "wait for it to end" in said(app)
                await press(pilot, "down", "enter", "2", "e", "1")
                assert "another process holds" in said(app, "Bar")
                assert app.return_code is None
                assert app.screen.query_one(Table).row.id == "run_02B"
            finally:
                holder.kill()
        # What was asked for meanwhile is there as soon as it can be read.
        await wait_for(pilot, lambda: app.trouble is None and app.screen.where == "run")
        assert app.screen.run_id == "run_02B"
        assert app.screen.query_one(Trace).line_count == 2
        path.rename(path.with_name("away.db"))
        await wait_for(pilot, lambda: "is gone" in said(app, "Bar") or "no record" in said(app, "Bar"))
        await press(pilot, "down", "z", "escape", "S")
        assert app.return_code is None
        path.with_name("away.db").rename(path)
        await wait_for(pilot, lambda: app.trouble is None)
        assert app.screen.query_one(Table).line_count == 6


async def test_a_record_that_stays_locked_is_waited_for(settings: Settings) -> None:
    small(settings)
    path = database_path(settings)
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("PRAGMA journal_mode=DELETE")
    holder.execute("BEGIN EXCLUSIVE")
    try:
        app = TerminalApp(settings, now_ns=lambda: NOW)
        async with app.run_test(size=(100, 30)) as pilot:
            begun = time.monotonic()
            while "another process holds" not in said(app, "Bar"):
                assert time.monotonic() - begun < 10
                await pilot.pause(0.05)
            holder.execute("ROLLBACK")
            holder.close()
            await wait_for(pilot, lambda: app.screen.query_one(Table).line_count == 6)
            assert app.trouble is None
    finally:
        holder.close()


async def test_sizes(settings: Settings) -> None:
    small(settings)
    async with opened(settings, size=(80, 24)) as (app, pilot):
        for width, height in ((200, 60), (59, 24), (80, 13), (60, 14), (20, 3), (140, 40), (80, 24)):
            await pilot.resize_terminal(width, height)
            await settle(pilot)
            text = drawn(app)
            assert len(text.splitlines()[0]) >= width - 1
            too_small = width < 60 or height < 14
            assert ("too small" in " ".join(text.split())) == too_small, (width, height)
            assert ("✓ done" in text) != too_small
        await press(pilot, "enter")
        for width, height in ((140, 40), (80, 24)):
            await pilot.resize_terminal(width, height)
            await settle(pilot)
            assert "retrieve" in drawn(app)


@pytest.mark.parametrize(
    ("text", "said_by"),
    [
        ("status:lost", "no run can be 'lost'"),
        ("since:soon", "is no time"),
        ('"open', "cannot be read"),
        ("graph:", "wants a value"),
        ("x:y", "no field"),
    ],
)
def test_a_filter_that_makes_no_sense_says_why(text: str, said_by: str) -> None:
    with pytest.raises(UsageError, match=said_by) as error:
        parse(text, NOW)
    assert error.value.hint


def test_a_filter_is_read() -> None:
    wanted = parse("status:failed,crashed graph:rag since:2h since:2026-05-28 'no such' x", NOW)
    assert (wanted.statuses, wanted.graphs, wanted.words) == (("failed", "crashed"), ("rag",), ("no such", "x"))
    assert wanted.since_ns == NOW - 7_200 * SECOND
    assert parse("", NOW) == parse("  ", NOW)


def test_a_screen_or_theme_that_is_not_there(settings: Settings) -> None:
    for about in ({"open_at": "walks"}, {"theme": "none-such"}, {"open_at": "run/"}):
        with pytest.raises(UsageError) as error:
            TerminalApp(settings, **about)  # type: ignore[arg-type]
        assert error.value.hint


def tui(environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "agentops", "tui", *words], capture_output=True, text=True, env=environment)


def test_a_start_that_only_looks_changes_nothing(settings: Settings, environment: dict[str, str]) -> None:
    environment = environment | {"AGENTOPS_PATHS_HOME": str(settings.paths.home)}
    command = [sys.executable, "-m", "agentops", "tui", "--read-only"]
    with terminal(command, environment) as screen:
        assert b"there is no record" in screen.read_until(b"hint:")
        assert screen.process.wait(10) == 1
    assert not database_path(settings).exists()
    subprocess.run([sys.executable, "-c", LEFT], env=environment, check=True)
    (segment,) = (settings.paths.home / "journal").glob("*.seg")
    open_store(settings).close()
    before = segment.read_bytes()
    with terminal(command, environment) as screen:
        screen.read_until(b"No runs yet")
        screen.read(3.0)
        screen.send(b"q", 5.0)
        assert screen.process.wait(10) == 0
    assert segment.read_bytes() == before
    with terminal(command[:-1], environment) as screen:
        screen.read_until(b"left")
        screen.send(b"q", 5.0)
        assert screen.process.wait(10) == 0
    assert not segment.exists()


LEFT = """
import os
from agentops import load_settings
from agentops.clock import SystemClock, UlidSource
from agentops.tracer import open_tracer
clock = SystemClock()
settings = load_settings({"record.drain_ms": 60000})
open_tracer(settings, clock=clock, ids=UlidSource(clock)).start_run(run_id="run_left", thread_id="th_9", graph="left")
os._exit(0)
"""


def test_without_a_terminal_other_verbs_are_named(environment: dict[str, str]) -> None:
    done = tui(environment)
    assert done.returncode == 2
    assert "need a terminal" in done.stderr
    assert "agentops runs" in done.stderr


def test_a_record_of_a_newer_version_is_said_in_one_line(settings: Settings, environment: dict[str, str]) -> None:
    small(settings)
    with sqlite3.connect(database_path(settings)) as writer:
        writer.execute("UPDATE alembic_version SET version_num = '9999'")
    writer.close()
    with terminal([sys.executable, "-m", "agentops", "tui"], environment) as screen:
        shown = screen.read_until(b"hint:")
        assert b"newer version" in shown
        assert b"\x1b[?1049h" not in shown
        assert screen.process.wait(10) == 1


def test_a_terminal_without_colours_and_one_that_is_resized(settings: Settings, environment: dict[str, str]) -> None:
    small(settings)
    with terminal(["env", "NO_COLOR=1", sys.executable, "-m", "agentops", "tui"], environment, 80, 24) as screen:
        shown = screen.read_until("✓ done".encode())
        colours = {code for code in shown.split(b"\x1b[") if code[:5] == b"38;2;"}
        for code in colours:
            red, green, blue = code.split(b"m")[0].split(b";")[2:5]
            assert abs(int(red) - int(green)) <= 2
            assert abs(int(green) - int(blue)) <= 2
        screen.resize(40, 10)
        assert b"too small" in screen.read_until(b"too small")
        screen.resize(100, 30)
        screen.read_until("✓ done".encode())
        screen.send(b"q", 5)
        assert screen.process.wait(10) == 0


def test_the_screens_load_no_engine() -> None:
    heavy = ("torch", "langgraph", "langchain_core", "ragas", "numpy", "scipy", "evals", "graphs")
    code = f"import sys, tui.app; print(sorted(set({heavy}) & {{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert done.stdout == "[]\n", done.stdout


async def test_the_end_of_a_line_is_not_below_the_scrollbar(settings: Settings) -> None:
    list(many(settings, 1, 60))
    async with opened(settings, open_at="run/last", size=(80, 24)) as (app, _):
        trace = app.screen.query_one(Trace)
        assert trace.show_vertical_scrollbar
        assert drawn(app).splitlines()[3][:79].endswith("1.00 s")
