"""What people write, paste and answer: nothing hidden gets in or is lost, and an answer goes where it was meant to."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import pytest
from test_actions import Started
from textual import events
from textual.widgets import Input, TextArea
from tui_app import opened, press, said, settle
from tui_pty import terminal
from tui_record import FORBIDDEN, HOSTILE_TEXT, NOW, SECOND, Seeds, small

from agentops import Settings
from agentops.text import clean
from tui.screens.dialogs import Confirm, Write, restored
from tui.screens.runs import RunsScreen
from tui.verbs import Job
from tui.widgets.table import Table


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Started]:
    monkeypatch.setattr("tui.app.Job", Started)
    monkeypatch.setattr(Started, "all", [])
    return Started.all


async def test_what_is_pasted_is_cleaned(settings: Settings) -> None:
    small(settings)
    async with opened(settings) as (app, pilot):
        await press(pilot, "slash")
        app.post_message(events.Paste("\x1b]0;t\x07a\u202eb\x9b2J\u200ec"))
        await settle(pilot)
        assert app.screen.query_one(Input).value == "abc"
        await press(pilot, "escape", "2", "e")
        app.post_message(events.Paste("\x1b[2J\ta\u202eb\nc\x85"))
        await settle(pilot)
        assert app.screen.query_one(TextArea).text.startswith("\tab\nc")
        await press(pilot, "escape")


def test_nothing_that_is_pasted_or_was_saved_reaches_a_real_terminal(settings: Settings, environment: dict[str, str]) -> None:
    small(settings)
    (settings.paths.home / "tui.json").write_text(json.dumps({"filter": "'\x9b2Jsaved\u202e'"}))
    environment = environment | {"AGENTOPS_PATHS_HOME": str(settings.paths.home)}
    # Without the pile of marks: a filter has an end.
    pasted = b"\x1b[200~" + HOSTILE_TEXT.replace("\u0301", "").encode("utf-8", "replace") + b"\x1b[201~"
    with terminal([sys.executable, "-m", "agentops", "tui", "runs"], environment) as screen:
        screen.read_until(b"saved")
        for keys in (b"/", pasted, b"\x1b", b"2", b"e", pasted):
            # What is to be pasted into is there only some time after its key, on a machine at work also with pauses in between.
            if keys == pasted:
                screen.send(keys, 0)
                screen.read_until(b"paragraphnext")
            else:
                screen.press(keys, 1.5)
        written = bytes(screen.output)
        screen.send(b"\x1b", 1.5)
        screen.send(b"q", 5.0)
        assert screen.process.wait(10) == 0
    # What ends what is pasted is a key, so it cannot be within; Textual sets the shape of the pointer by itself.
    assert not [mark for mark in FORBIDDEN if mark in written and mark != b"\x07"]


LETTER = "first\r\n\tsecond \u200emark\nthird \u202eline\x1b[31m\n\ud800 last"


def test_lines_that_are_not_changed_keep_what_cannot_be_shown() -> None:
    shown = "\n".join(map(clean, LETTER.split("\n")))
    assert "\u200e" not in shown
    assert restored(LETTER, shown, shown) == LETTER
    assert restored(LETTER, shown, shown.replace("first", "First")) == LETTER.replace("first\r", "First")
    assert restored(LETTER, shown, "new\n" + shown + "\nend") == "new\n" + LETTER + "\nend"
    assert restored(LETTER, shown, "") == ""
    assert restored("a\tb", "a\tb", "a\tc") == "a\tc"


async def test_an_edit_sends_what_was_not_changed_as_it_was(settings: Settings, started: list[Started]) -> None:
    seeds = Seeds()
    asked = {"id": "int_1", "kind": "approval", "question": "Send?", "node": "n", "content": LETTER, "schema": None}
    seeds.run("run_1", status="waiting", ended_ns=NOW, pending=[asked])
    seeds.write(settings)
    async with opened(settings, open_at="inbox") as (app, pilot):
        await press(pilot, "e")
        assert isinstance(app.screen, Write)
        assert "characters that cannot be shown" in said(app, "#hidden")
        assert "\t" in app.screen.query_one(TextArea).text
        await press(pilot, "x", "ctrl+s")
        assert json.loads(started[-1].given)["int_1"]["content"] == "x" + LETTER.replace("\r", "", 1)


async def test_a_run_that_ended_while_it_was_asked_about_is_not_interrupted(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped: list[str] = []
    monkeypatch.setattr("tui.app.cancel", lambda settings, run: stopped.append(run))
    seeds = Seeds()
    about: dict[str, Any] = {"pid": os.getpid(), "segment": "j.seg", "started_ns": NOW - SECOND}
    seeds.run("run_1", status="running", **about)
    seeds.write(settings)
    late: list[str] = []

    def catch_up() -> None:
        for status in late:
            seeds.run("run_1", status=status, ended_ns=NOW, **about)
            seeds.write(settings)
        late.clear()

    async with opened(settings, catch_up=catch_up) as (app, pilot):
        await press(pilot, "c")
        assert isinstance(app.screen, Confirm)
        late.append("done")
        await press(pilot, "y")
        for _ in range(100):
            if "nothing to stop" in said(app):
                break
            await pilot.pause(0.05)
        assert "run_1 is done by now; there is nothing to stop" in said(app)
        assert isinstance(app.screen, RunsScreen)
    assert not stopped


def test_of_a_verb_that_says_much_the_end_is_kept(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tui.verbs._KEPT_BYTES", 1_000)
    job = Job(settings, ["--help"])
    job._process.wait(60)
    assert os.fstat(job._output.fileno()).st_size > 1_500
    job.poll()
    assert len(job.text.encode()) <= 1_000
    assert "tui" in job.text
    assert "Usage" not in job.text
    assert job.code == 0


def waiting(seeds: Seeds, run: str, question: str, *, age: int) -> None:
    asked = {"id": f"int_{run}", "kind": "approval", "question": question, "node": "n", "content": "text", "schema": None}
    seeds.run(run, status="waiting", started_ns=NOW - age * SECOND, ended_ns=NOW, pending=[asked])


async def test_a_question_that_is_gone_leaves_nothing_chosen(settings: Settings, started: list[Started]) -> None:
    seeds = Seeds()
    for place, name in enumerate("ABC"):
        waiting(seeds, f"run_{name}", f"Send {name}?", age=30 - place)
    seeds.write(settings)
    async with opened(settings, open_at="inbox") as (app, pilot):
        table = app.screen.query_one(Table)
        await press(pilot, "down")
        assert table.row.run.id == "run_B"
        # The one above goes: the cursor stays on its question.
        seeds.run("run_A", status="done", started_ns=NOW - 30 * SECOND, ended_ns=NOW)
        seeds.write(settings)
        await pilot.pause(0.5)
        await settle(pilot)
        assert table.row.run.id == "run_B"
        seeds.run("run_B", status="done", started_ns=NOW - 29 * SECOND, ended_ns=NOW)
        seeds.write(settings)
        for _ in range(100):
            if "not asked any more" in said(app):
                break
            await pilot.pause(0.05)
        await settle(pilot)
        assert table.row is None
        await press(pilot, "a", "x", "e")
        assert not started
        assert app.screen.where == "inbox"
        assert "no question is chosen" in said(app)
        waiting(seeds, "run_D", "Send D?", age=1)
        seeds.write(settings)
        await pilot.pause(0.5)
        await press(pilot, "a")
        assert not started
        await press(pilot, "down", "a")
        assert started[-1].words[1] == "run_C"


async def test_the_inbox_says_what_it_does_not_show(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tui.screens.inbox.MOST", 2)
    seeds = Seeds()
    for place, name in enumerate("ABC"):
        waiting(seeds, f"run_{name}", f"Send {name}?", age=30 - place)
    seeds.write(settings)
    async with opened(settings, open_at="inbox") as (app, _):
        assert "1 older run waits too and is not shown" in said(app, "#summary")
        assert app.screen.query_one(Table).line_count == 2
