"""Every action of the table, by its key: what it does, and that the table, the keys, the help, the palette and the page agree."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from textual.widgets import Input, TextArea
from tui_app import ROOT, opened, press, said, settle
from tui_record import NOW, SECOND, Seeds, small

from agentops import Settings
from agentops.store import open_store
from agentops.tracer import catch_up
from tui.actions import ACTIONS, SECTIONS, bindings, of
from tui.app import THEMES, TerminalApp
from tui.screens.dialogs import Confirm, Help, JobScreen, Write, help_parts
from tui.screens.evals import CasesScreen, EvalsScreen
from tui.screens.inbox import InboxScreen
from tui.screens.run import RunScreen
from tui.screens.runs import RunsScreen
from tui.state import FILE, load_state
from tui.widgets.detail import Detail
from tui.widgets.table import Table
from tui.widgets.trace import Trace

SCREENS = {"runs": RunsScreen, "run": RunScreen, "inbox": InboxScreen, "evals": EvalsScreen, "cases": CasesScreen}


class Started:
    """Stands for a verb's process: notes what was started."""

    all: list[Started] = []  # noqa: RUF012

    def __init__(self, settings: Settings, words: list[str], *, given: str = "") -> None:
        self.words, self.given, self.code, self.text = tuple(words), given, None, "it works \x1b]0;title\x07 on it"
        self.line = " ".join(words)
        Started.all.append(self)

    def poll(self) -> bool:
        self.code = 0 if self.code is None else self.code
        return True

    def leave(self) -> None:
        pass


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Started]:
    monkeypatch.setattr("tui.app.Job", Started)
    monkeypatch.setattr(Started, "all", [])
    return Started.all


@pytest.fixture
def record(settings: Settings) -> Settings:
    small(settings)
    return settings


def words(detail: Detail) -> str:
    lines = ("".join(text for text, _ in detail.pieces(index, 80)) for index in range(detail.line_count))
    return " ".join(" ".join(lines).split())


def table(app: TerminalApp) -> Table[Any]:
    return app.screen.query_one("#table", Table)


def row_ids(app: TerminalApp) -> list[str]:
    return [table(app).rows[key].id for key in table(app).keys]


def test_the_table_names_each_key_once_a_screen_and_every_action_exists() -> None:
    for where, screen in SCREENS.items():
        keys = [action.key for action in of(where)]
        assert len(keys) == len(set(keys)), where
        for action in ACTIONS:
            if where in action.where:
                assert callable(getattr(screen, f"action_{action.name}")), f"{where}: {action.name}"
        assert {binding.key for binding in bindings(where)} <= {str(binding.key) for binding in screen.BINDINGS}  # type: ignore[union-attr]
    for action in of(""):
        assert callable(getattr(TerminalApp, f"action_{action.name.partition('(')[0]}")), action.name


def test_the_help_and_the_page_repeat_the_table() -> None:
    shown = " ".join(part.name + part.text for part in help_parts())
    assert all(action.about in shown for action in ACTIONS)
    watching = " ".join(part.text for part in help_parts(acting=False))
    assert not any(action.about in watching for action in ACTIONS if action.acts)
    page = (ROOT / "docs" / "terminal.md").read_text(encoding="utf-8")
    rows = re.findall(r"(?m)^\| `(.+?)` \| (.+?) \| (.+?) \|$", page)
    expected = [(action.shown_key, ", ".join(action.where) or "everywhere", action.about) for action in ACTIONS]
    assert rows == expected


async def test_sections_by_key_by_mouse_and_from_the_command_line(record: Settings) -> None:
    async with opened(record) as (app, pilot):
        for key, name in zip("2341", (*SECTIONS[1:], "runs"), strict=True):
            await press(pilot, key)
            assert app.screen.where == name
        await pilot.click("Bar", offset=(24, 0))
        await settle(pilot)
        assert app.screen.where == "evals"
    for place in ("engine", "evals"):
        async with opened(record, open_at=place) as (app, _):
            assert app.screen.where == place


@pytest.mark.parametrize("prefix", ["run_01A", "01a", "last"])
async def test_a_run_is_opened_from_the_command_line(record: Settings, prefix: str) -> None:
    async with opened(record, open_at=f"run/{prefix}") as (app, pilot):
        assert isinstance(app.screen, RunScreen)
        assert app.screen.query_one(Trace).line_count == 5
        await press(pilot, "escape")
        assert app.screen.where == "runs"


async def test_a_run_that_is_not_there_is_said_not_to_be(record: Settings) -> None:
    async with opened(record, open_at="run/nothing") as (app, _):
        assert app.screen.where == "runs"
        assert "no run is called" in said(app)


async def test_open_sort_reverse_and_follow(record: Settings) -> None:
    async with opened(record) as (app, pilot):
        assert row_ids(app)[0] == "run_01A"
        await press(pilot, "S")
        assert row_ids(app)[0] == "run_06F"
        await press(pilot, "S", "s")
        assert app.state.sort == "time"
        assert row_ids(app)[0] == "run_04D"
        for _ in range(4):
            await press(pilot, "s")
        assert app.state.sort == "started"
        await press(pilot, "down", "enter")
        assert (app.screen.where, app.screen.run_id) == ("run", "run_02B")
        await press(pilot, "escape", "f")
        assert app.state.follow
        assert table(app).cursor == 0


async def test_filter(record: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(record) as (app, pilot):
        await press(pilot, "slash", *"status:failed")
        assert row_ids(app) == ["run_02B"]
        await press(pilot, "enter")
        assert table(app).has_focus
        await press(pilot, "slash")
        app.screen.query_one(Input).value = "where index"
        await press(pilot, "enter")
        assert row_ids(app) == ["run_02B"], "what was asked is searched too"
        assert "searched" not in said(app, "#summary")
        monkeypatch.setattr("agentops.store.pages.NEWEST_INPUTS", 1)
        await press(pilot, "slash")
        app.screen.query_one(Input).value = "customer"
        await press(pilot, "enter")
        assert "only the newest 1 inputs searched" in said(app, "#nothing").lower()
        await press(pilot, "slash")
        app.screen.query_one(Input).value = "colour:red"
        await press(pilot, "enter")
        assert "no field is called 'colour'" in said(app)
        app.screen.query_one(Input).value = "nothing-has-this"
        await press(pilot, "enter")
        assert "No run fits the filter" in said(app, "#nothing")
        await press(pilot, "slash", "escape")
        assert len(row_ids(app)) == 6


async def test_the_mouse_opens_sorts_and_scrolls(record: Settings) -> None:
    async with opened(record) as (app, pilot):
        await pilot.click("#table", offset=(50, 0))
        await settle(pilot)
        assert app.state.sort == "tokens"
        await pilot.click("#table", offset=(5, 3))
        await settle(pilot)
        assert table(app).cursor == 2
        assert app.screen.where == "runs"
        await pilot.click("#table", offset=(5, 3))
        await settle(pilot)
        assert app.screen.where == "run"


async def test_fold_problem_detail_and_follow_in_a_run(record: Settings) -> None:
    async with opened(record, open_at="run/01A") as (app, pilot):
        trace = app.screen.query_one(Trace)
        await press(pilot, "z")
        assert trace.line_count == 3
        await press(pilot, "down", "right")
        assert trace.line_count == 4
        await press(pilot, "left")
        assert trace.line_count == 3
        await press(pilot, "space")
        assert trace.line_count == 4
        await press(pilot, "z", "end", "left")
        assert trace.span is not None
        assert trace.span.id == "sp_01A3"
        await press(pilot, "d")
        assert not trace.display
        assert app.screen.query_one("#detail").has_focus
        await press(pilot, "d", "f")
        assert trace.cursor == trace.line_count - 1
        await press(pilot, "n")
        assert "no span of this run failed" in said(app)
    async with opened(record, open_at="run/02B") as (app, pilot):
        trace = app.screen.query_one(Trace)
        await press(pilot, "n")
        assert trace.cursor == 1
        await press(pilot, "n")
        assert trace.cursor == 0


async def test_the_detail_of_a_generation_has_all_there_is(record: Settings) -> None:
    async with opened(record, open_at="run/01A", size=(160, 60)) as (app, pilot):
        await press(pilot, "end")
        await pilot.pause(0.2)
        await settle(pilot)
        detail = app.screen.query_one(Detail)
        shown = words(detail)
        for part in (
            "88 computed + 32 cached = 120 input, 40 output",
            "rag/answer b2:0123",
            "system",
            "Answer from the documents.",
        ):
            assert part in shown
        for part in ("A timed unit.", "16.0 tokens/s", "first token 310.0 ms", "finish_reason"):
            assert part in shown
        await press(pilot, "up", "up")
        await pilot.pause(0.2)
        await settle(pilot)
        shown = words(detail)
        assert "[1] 0.9300 docs/record.md vector #1 (0.810) lexical #2 (4.500)" in shown


async def test_approve_edit_reject_and_answer_start_the_verb(record: Settings, started: list[Started]) -> None:
    async with opened(record, open_at="inbox") as (app, pilot):
        await press(pilot, "a")
        assert isinstance(app.screen, JobScreen)
        assert started[-1].words == ("resume", "run_03C", "--answers", "-")
        assert json.loads(started[-1].given) == {"int_aaaa1111": {"kind": "approve", "content": None, "reason": ""}}
        await press(pilot, "escape", "x", *"too", "space", *"long", "ctrl+s")
        assert json.loads(started[-1].given) == {"int_aaaa1111": {"kind": "reject", "content": None, "reason": "too long"}}
        await press(pilot, "escape", "e")
        assert isinstance(app.screen, Write)
        app.screen.query_one(TextArea).text = "Dear customer, it is lost."
        await press(pilot, "ctrl+s")
        answer = json.loads(started[-1].given)["int_aaaa1111"]
        assert (answer["kind"], answer["content"]) == ("edit", "Dear customer, it is lost.")
        await press(pilot, "escape", "e", "escape")
        assert len(started) == 3
        await press(pilot, "down", "a", "x")
        assert len(started) == 3
        assert "a question wants an answer" in said(app)
        await press(pilot, "e", *"Hill", "ctrl+s")
        assert json.loads(started[-1].given) == {"int_bbbb2222": "Hill"}
        await press(pilot, "escape", "enter")
        assert app.screen.where == "run"


async def test_json_is_edited_as_json(settings: Settings, started: list[Started]) -> None:
    seeds = Seeds()
    asked = {"id": "int_1", "kind": "approval", "question": "Send?", "node": "n", "content": {"to": "a"}, "schema": None}
    pause = {"id": "int_2", "kind": "pause", "question": "stop", "node": "n", "content": None, "schema": None}
    seeds.run("run_1", status="waiting", ended_ns=NOW, pending=[asked, pause])
    seeds.write(settings)
    async with opened(settings, open_at="inbox") as (app, pilot):
        await press(pilot, "e")
        app.screen.query_one(TextArea).text = "{no json"
        await press(pilot, "ctrl+s")
        assert not started
        assert "this is no JSON" in said(app)
        await press(pilot, "e")
        app.screen.query_one(TextArea).text = '{"to": "b"}'
        await press(pilot, "ctrl+s")
        assert json.loads(started[-1].given)["int_1"]["content"] == {"to": "b"}
        await press(pilot, "escape", "down", "a")
        assert json.loads(started[-1].given) == {"int_2": True}


async def test_experiments_are_marked_compared_and_followed_to_a_trace(record: Settings, started: list[Started]) -> None:
    async with opened(record, open_at="evals", interval=lambda name, values, threads: (min(values), max(values))) as (app, pilot):
        shown = "\n".join(part.text for part in app.screen.query_one(Detail).parts)
        assert "0.800  [0.600, 1.000]  n=2" in shown
        assert "unscored: no_reference 2" in shown
        await press(pilot, "m")
        assert "mark one experiment" in said(app)
        await press(pilot, "v", "down")
        assert "0.750" in "\n".join(part.text for part in app.screen.query_one(Detail).parts)
        await press(pilot, "m")
        assert started[-1].words == ("eval", "--compare", "exp_02", "exp_01")
        await press(pilot, "escape", "enter")
        assert [table(app).rows[key].row.case_id for key in table(app).keys] == ["b", "c", "a"]
        await press(pilot, "down", "enter")
        assert "no run on record" in said(app)
        await press(pilot, "down", "enter")
        assert app.screen.run_id == "run_01A"
        await press(pilot, "escape", "escape")
        assert app.screen.where == "evals"


async def test_experiments_are_listed_before_their_intervals_are_computed(record: Settings) -> None:
    computed = threading.Event()

    def slow(name: str, values: Sequence[float], threads: Sequence[str]) -> tuple[float, float]:
        assert computed.wait(30)
        return min(values), max(values)

    app = TerminalApp(record, open_at="evals", interval=slow, now_ns=lambda: NOW)
    async with app.run_test(size=(120, 40)) as pilot:
        for _ in range(200):
            await pilot.pause(0.05)
            if app.screen.query(Detail) and "reading the scores" in str(app.screen.query_one(Detail).parts):
                break
        assert len(table(app).keys) == 2
        computed.set()
        for _ in range(200):
            await pilot.pause(0.05)
            if "0.800  [0.600, 1.000]" in str(app.screen.query_one(Detail).parts):
                break
        assert "0.800  [0.600, 1.000]" in str(app.screen.query_one(Detail).parts)


async def test_replay_starts_the_verb_and_its_words_are_kept(record: Settings, started: list[Started]) -> None:
    async with opened(record) as (app, pilot):
        await press(pilot, "l")
        assert "nothing was started" in said(app)
        await press(pilot, "r")
        assert started[-1].words == ("replay", "run_01A")
        await pilot.pause(0.6)
        assert "it works  on it" in "\n".join(part.text for part in app.screen.query_one(Detail).parts).replace(
            "\x1b]0;title\x07", ""
        )
        await press(pilot, "escape", "enter", "r")
        assert len(started) == 2
        await press(pilot, "escape", "l")
        assert isinstance(app.screen, JobScreen)


async def test_help_theme_palette_and_quit(record: Settings) -> None:
    async with opened(record) as (app, pilot):
        await press(pilot, "question_mark")
        assert isinstance(app.screen, Help)
        await press(pilot, "escape", "t")
        assert app.theme == THEMES[1]
        await press(pilot, "ctrl+p", *"Engine", "enter")
        await pilot.pause(0.3)
        await press(pilot, "enter")
        assert app.screen.where == "engine"
        await press(pilot, "q")
        assert app.return_code == 0
    assert load_state(record).theme == THEMES[1]
    assert load_state(record).section == "engine"


def test_a_state_that_makes_no_sense_is_none(settings: Settings) -> None:
    settings.paths.home.mkdir(parents=True)
    for text in ("", "[", "[1]", '{"section": "x", "sort": 5, "theme": "gruvbox", "follow": "yes"}', "[" * 100_000):
        (settings.paths.home / FILE).write_text(text)
        state = load_state(settings)
        assert (state.section, state.sort, state.follow) == ("runs", "started", False)


async def test_read_only_has_no_acting_keys(record: Settings, started: list[Started]) -> None:
    async with opened(record, open_at="inbox", read_only=True) as (app, pilot):
        await press(pilot, "a", "e", "x", "l")
        await press(pilot, "1", "r", "c")
        await press(pilot, "3", "v", "down", "m")
        assert not started
        assert isinstance(app.screen, EvalsScreen)
        titles = [command.title for command in app.get_system_commands(app.screen)]
        assert not any("Compare" in title for title in titles)
        app.start_job(["replay", "run_01A"])
        assert not started
    assert not (record.paths.home / FILE).exists()


WORKING = """
import asyncio
from agentops import load_settings
from agentops.cancelling import cancellable
from agentops.clock import SystemClock, UlidSource
from agentops.tracer import open_tracer
clock = SystemClock()
settings = load_settings()
tracer = open_tracer(settings, clock=clock, ids=UlidSource(clock))
run = tracer.start_run(run_id="run_live", thread_id="th_9", graph="slow")
async def work():
    stopped = asyncio.Event()
    with cancellable(settings, "run_live", stopped.set):
        print("working", flush=True)
        await asyncio.wait_for(stopped.wait(), 60)
        print("stopped", flush=True)
asyncio.run(work())
"""


async def test_cancel_stops_the_run_and_no_other(record: Settings, environment: dict[str, str]) -> None:
    environment = environment | {"AGENTOPS_PATHS_HOME": str(record.paths.home)}
    process = subprocess.Popen([sys.executable, "-c", WORKING], stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "working\n"
        async with opened(record) as (app, pilot):
            for _ in range(100):
                if "run_live" in row_ids(app):
                    break
                await pilot.pause(0.05)
            await press(pilot, "down", "c")
            assert "there is nothing to stop" in said(app)
            await press(pilot, "home", "c")
            assert isinstance(app.screen, Confirm)
            await press(pilot, "n")
            assert process.poll() is None
            await press(pilot, "c", "y")
            begun = time.monotonic()
            while "was asked to stop" not in said(app) and time.monotonic() - begun < 10:
                await pilot.pause(0.05)
            assert "was asked to stop" in said(app)
            assert process.stdout.readline() == "stopped\n"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


async def test_a_run_that_waits_is_stopped_by_the_verb(settings: Settings, started: list[Started]) -> None:
    seeds = Seeds()
    seeds.run("run_1", status="waiting", started_ns=NOW - SECOND)
    seeds.write(settings)
    async with opened(settings) as (app, pilot):
        await press(pilot, "c")
        assert isinstance(app.screen, Confirm)
        await press(pilot, "y")
        assert [one.words for one in started] == [("cancel", "run_1")]


async def test_a_run_that_is_not_at_work_on_this_machine_cannot_be_stopped(settings: Settings) -> None:
    seeds = Seeds()
    seeds.run("run_1", status="running", pid=os.getpid(), segment="j_other.seg", started_ns=NOW - SECOND)
    seeds.write(settings)
    async with opened(settings) as (app, pilot):
        await press(pilot, "c", "y")
        assert "no run called 'run_1' is at work on this machine" in said(app)


LETTER = """
from typing import TypedDict
from langgraph.graph import StateGraph
from agentops.people import approve

class State(TypedDict, total=False):
    text: str

def send(state):
    decision = approve("send it?", "Dear you")
    return {"text": f"{decision.kind}: {decision.content}"}

graph = StateGraph(State).add_node(send).set_entry_point("send").set_finish_point("send")
"""


CLOCK = """
from typing import TypedDict
from langgraph.graph import StateGraph

class State(TypedDict, total=False):
    text: str

def tell(state):
    return {"text": "it is done well"}

graph = StateGraph(State).add_node(tell).set_entry_point("tell").set_finish_point("tell")
"""


async def test_a_run_that_was_approved_on_the_screen_goes_on_and_ends(
    settings: Settings, environment: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "letter.py").write_text(LETTER)
    environment = environment | {"AGENTOPS_PATHS_HOME": str(settings.paths.home)}
    command = [sys.executable, "-m", "agentops", "run", "letter.py", "{}", "--quiet"]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    async with opened(settings, open_at="inbox", catch_up=lambda: catch_up(settings)) as (app, pilot):
        assert table(app).line_count == 1
        await press(pilot, "a")
        begun = time.monotonic()
        while app.jobs[0].code is None and time.monotonic() - begun < 60:
            await pilot.pause(0.1)
        assert app.jobs[0].code == 0, app.jobs[0].text
        assert "approve: Dear you" in app.jobs[0].text
        await press(pilot, "escape")
        await pilot.pause(0.5)
        await settle(pilot)
        assert "No run waits for an answer" in said(app, "#nothing")
    with open_store(settings) as store:
        assert store.run("last").status == "done"


async def ended(app: TerminalApp, pilot: Any) -> str:
    """What the newest verb has said, once it has ended well, as the screen shows it."""
    begun = time.monotonic()
    while app.jobs[-1].code is None and time.monotonic() - begun < 60:
        await pilot.pause(0.1)
    assert app.jobs[-1].code == 0, app.jobs[-1].text
    assert isinstance(app.screen, JobScreen)
    await pilot.pause(0.3)
    return words(app.screen.query_one(Detail))


async def test_a_recorded_run_is_replayed_from_its_screen(
    settings: Settings, environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "clock.py").write_text(CLOCK)
    monkeypatch.chdir(tmp_path)
    environment = environment | {"AGENTOPS_PATHS_HOME": str(settings.paths.home)}
    command = [sys.executable, "-m", "agentops", "run", "clock.py", "{}", "--quiet"]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    async with opened(settings, open_at="run/last", size=(130, 40), catch_up=lambda: catch_up(settings)) as (app, pilot):
        await press(pilot, "r")
        shown = await ended(app, pilot)
        assert "agentops replay run_" in app.jobs[-1].line
        assert "the same state after each output: the same 0 calls of a model" in shown, shown
        assert "it is done" in shown


async def test_two_experiments_are_compared_by_the_verb(record: Settings) -> None:
    async with opened(record, open_at="evals", size=(130, 40)) as (app, pilot):
        await press(pilot, "v", "down", "m")
        shown = await ended(app, pilot)
        assert "faithfulness" in shown
        assert "it is done" in shown
