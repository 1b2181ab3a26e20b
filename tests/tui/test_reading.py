"""What the screens show is what is on record: lists that come late, change or lose runs, and errors of any kind."""

from __future__ import annotations

import json
import os
import sqlite3
import time
from typing import Any

import pytest
from textual.widgets import Input, Static
from tui_app import drawn, opened, press, said, settle
from tui_record import NOW, SECOND, Seeds, answered, many, small

from agentops import Runtime, ScriptedEngine, Settings
from agentops.errors import RecordError, UsageError
from agentops.store.opening import database_path
from agentops.store.pages import Pages, RunFilter, SpanLine, open_pages
from tui.app import TerminalApp
from tui.query import LONGEST, parse
from tui.screens.engine import engine_parts
from tui.screens.run import RunScreen
from tui.state import FILE, load_state
from tui.text import as_text
from tui.verbs import memory_bytes
from tui.widgets.detail import Detail, content_parts
from tui.widgets.table import Table
from tui.widgets.trace import Outline, Trace

BAD_FILTERS = ("since:999999w", "since:0001-01-02", "since:9999-12-31", "a\ud800", "a\x00b", "\x1b]0;t\x07x", "x " * 2_000)


def _two_nodes() -> Any:
    from typing import TypedDict

    from langgraph.graph import START, StateGraph

    class State(TypedDict, total=False):
        x: int

    builder: Any = StateGraph(State)
    builder.add_sequence([("a", lambda state: {"x": 2}), ("b", lambda state: {"x": 3})])
    return builder.add_edge(START, "a").compile()


_TWO_NODES = _two_nodes()


def shown(app: TerminalApp) -> list[str]:
    table = app.screen.query_one(Table)
    return [table.rows[key].id for key in table.keys]


async def wait_for(pilot: Any, seen: Any) -> None:
    begun = time.monotonic()
    while not seen():
        assert time.monotonic() - begun < 10, drawn(pilot.app)
        await pilot.pause(0.05)


def forget(settings: Settings, *runs: str) -> None:
    """As one that keeps the record small would."""
    with sqlite3.connect(database_path(settings)) as writer:
        for run in runs:
            writer.execute("DELETE FROM span WHERE run_id = ?", [run])
            writer.execute("DELETE FROM run WHERE id = ?", [run])
    writer.close()


async def test_a_change_between_asking_and_the_answer_shows_no_other_list(settings: Settings) -> None:
    small(settings)
    async with opened(settings) as (app, pilot):
        app.state.filter = "no-such-run"
        app.screen.read()
        app.screen.read(calm=True)
        await settle(pilot)
        assert shown(app) == []
        app.state.filter = ""
        app.state.sort = "tokens"
        app.screen.read()
        app.state.sort = "started"
        app.screen.read(calm=True)
        await settle(pilot)
        assert shown(app) == ["run_01A", "run_02B", "run_03C", "run_04D", "run_05E", "run_06F"]


@pytest.mark.parametrize("text", ["boom", "status:failed", "since:1m"])
async def test_a_filter_is_held_against_runs_that_change(settings: Settings, text: str) -> None:
    seeds = Seeds()
    seeds.run("run_1", status="running", started_ns=NOW - SECOND)
    seeds.write(settings)
    now = NOW
    async with opened(settings, now_ns=lambda: now) as (app, pilot):
        app.state.filter = text
        app.screen.read()
        await settle(pilot)
        assert shown(app) == (["run_1"] if text == "since:1m" else [])
        now += 3600 * SECOND
        seeds.run("run_1", status="failed", started_ns=NOW - SECOND, ended_ns=NOW, error="ValueError: boom")
        seeds.write(settings)
        await wait_for(pilot, lambda: shown(app) == ([] if text == "since:1m" else ["run_1"]))


async def test_runs_that_vanish_leave_the_list_and_say_so_when_they_are_open(settings: Settings) -> None:
    small(settings)
    async with opened(settings) as (app, pilot):
        forget(settings, "run_02B", "run_06F")
        await wait_for(pilot, lambda: shown(app) == ["run_01A", "run_03C", "run_04D", "run_05E"])
        # The number of the last one that is gone is given to the next one that comes.
        seeds = Seeds()
        seeds.run("run_07G", started_ns=NOW + SECOND)
        forget(settings, "run_05E")
        seeds.write(settings)
        await wait_for(pilot, lambda: shown(app) == ["run_07G", "run_01A", "run_03C", "run_04D"])
        await press(pilot, "home", "down", "enter")
        assert app.screen.query_one(Trace).line_count == 5
        forget(settings, "run_01A")
        await wait_for(pilot, lambda: "run_01A is not on record any more" in drawn(app))


async def test_a_run_that_was_recorded_late_stands_where_it_started(settings: Settings) -> None:
    small(settings)
    async with opened(settings) as (app, pilot):
        seeds = Seeds()
        seeds.run("run_00Z", started_ns=NOW - 200 * SECOND)
        seeds.write(settings)
        await wait_for(pilot, lambda: "run_00Z" in shown(app))
        assert shown(app)[:3] == ["run_01A", "run_02B", "run_00Z"]


async def test_what_comes_is_read_without_the_rest(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    list(many(settings, 400, 1))
    async with opened(settings) as (app, pilot):
        await wait_for(pilot, lambda: app.screen.query_one(Table).line_count == 400)
        await settle(pilot)

        def never(*_: Any, **__: Any) -> Any:
            raise AssertionError("all keys were read")

        monkeypatch.setattr(Pages, "run_keys", never)
        seeds = Seeds()
        seeds.run("run_new", started_ns=NOW + SECOND)
        seeds.write(settings)
        await wait_for(pilot, lambda: app.screen.query_one(Table).line_count == 401)
        table = app.screen.query_one(Table)
        assert table.rows[table.keys[0]].id == "run_new"
        assert app.trouble is None


@pytest.mark.parametrize("text", BAD_FILTERS, ids=range(len(BAD_FILTERS)))
async def test_no_filter_stops_the_screens(settings: Settings, text: str) -> None:
    small(settings)
    (settings.paths.home / FILE).write_text(json.dumps({"filter": text}))
    async with opened(settings) as (app, pilot):
        assert app.trouble is None
        assert not any("\ud800" <= mark <= "\udfff" or mark < " " for mark in app.state.filter)
        await press(pilot, "slash")
        app.screen.query_one(Input).value = text
        await press(pilot, "enter", "escape")
        app.state.filter = ""
        app.screen.read()
        await settle(pilot)
        assert len(shown(app)) == 6
        assert app.trouble is None


def test_a_saved_filter_that_makes_no_sense_is_none(settings: Settings) -> None:
    settings.paths.home.mkdir(parents=True)
    (settings.paths.home / FILE).write_text(json.dumps({"filter": "colour:red"}))
    assert load_state(settings).filter == ""
    with pytest.raises(UsageError, match="characters"):
        parse("x" * (LONGEST + 1), NOW)
    assert parse("since:999999w", NOW).since_ns == 0
    assert parse("since:9999-12-31", NOW).since_ns == 2**63 - 1


@pytest.mark.parametrize("error", [ZeroDivisionError("a defect"), UsageError("a defect", hint="none")], ids=["any", "ours"])
async def test_an_error_of_any_kind_is_shown_and_the_reader_goes_on(settings: Settings, error: Exception) -> None:
    small(settings)
    asked = 0

    def work(pages: Pages) -> None:
        nonlocal asked
        asked += 1
        raise error

    async with opened(settings) as (app, pilot):
        app.screen.ask("broken", work, lambda _: None)
        await wait_for(pilot, lambda: "a defect" in said(app, "Bar"))
        await wait_for(pilot, lambda: asked == (3 if isinstance(error, UsageError) else 1))
        await pilot.pause(0.7)
        assert asked <= 3, "it is asked for ever"
        assert "a defect" in said(app, "Bar")
        await press(pilot, "2")
        assert app.screen.query_one(Table).line_count == 2
        await wait_for(pilot, lambda: app.trouble is None)
        await press(pilot, "1", "enter")
        assert app.screen.query_one(Trace).line_count == 5


async def test_a_journal_that_cannot_be_stored_does_not_stop_reading(settings: Settings) -> None:
    small(settings)
    (settings.paths.home / "journal").mkdir(exist_ok=True)
    (settings.paths.home / "journal" / "j.seg").touch()
    broken = True

    def catch_up() -> None:
        if broken:
            raise OSError("the disk is gone")

    async with opened(settings, catch_up=catch_up) as (app, pilot):
        await wait_for(pilot, lambda: "the disk is gone" in said(app, "Bar"))
        await press(pilot, "enter")
        assert app.screen.query_one(Trace).line_count == 5
        broken = False
        await wait_for(pilot, lambda: app.trouble is None)


async def test_contents_that_make_no_sense_are_said_not_to(settings: Settings) -> None:
    seeds = Seeds()
    deep: Any = "x"
    for _ in range(600):
        deep = [deep]
    odd = [{"text": "t", "source": "s", "score": 10**400}]
    asked = {"id": "int_1", "kind": "approval", "question": "Send?", "node": "n", "content": odd, "schema": None}
    seeds.run("run_1", status="waiting", ended_ns=NOW, input=deep, pending=[asked])
    seeds.span("sp_1", "run_1", kind="workflow", output=odd, input=deep)
    seeds.write(settings)
    async with opened(settings, size=(160, 40)) as (app, pilot):
        await press(pilot, "enter")
        await pilot.pause(0.2)
        await settle(pilot)
        shown = "\n".join(part.text for part in app.screen.query_one(Detail).parts)
        assert "it cannot be shown: OverflowError" in shown
        await press(pilot, "escape", "2")
        shown = "\n".join(part.text for part in app.screen.query_one(Detail).parts)
        assert "it cannot be shown: OverflowError" in shown
        assert app.trouble is None
    for _ in range(100_000):
        deep = [deep]
    assert "too deeply" in as_text(deep)
    assert "too deeply" in content_parts("input", deep)[0].text


def test_a_graph_is_found_by_its_own_name_alone(settings: Settings) -> None:
    seeds = Seeds()
    graphs = (
        "rag",
        "/home/me/ragtime/letter.py:graph",
        "/srv/langgraph.json:RAG",
        "/home/rag/x.py:other",
        "here.py:graph",
        "ragged",
    )
    for place, graph in enumerate(graphs):
        seeds.run(f"run_{place}", graph=graph)
    seeds.write(settings)

    def found(name: str) -> set[str]:
        with open_pages(settings) as pages:
            return {line.graph for line in pages.run_lines(pages.run_keys(RunFilter(graphs=(name,)), "started")).values()}

    assert found("rag") == found("Rag") == {"rag", "/srv/langgraph.json:RAG"}
    assert found("letter.py") == found("letter.py:graph") == {"/home/me/ragtime/letter.py:graph"}
    assert found("graph") == {"/home/me/ragtime/letter.py:graph", "here.py:graph"}
    assert found("here.py") == {"here.py:graph"}
    assert found("ragtime") == found("%") == set()


def line(key: int, span: str, parent: str | None) -> SpanLine:
    return SpanLine(key, span, parent, "sp_1", "node", span, "ok", NOW + key, SECOND, 0, 0, 0)


def test_rings_of_parents_lose_nothing() -> None:
    lines = [line(1, "sp_1", None), line(2, "a", "c"), line(3, "b", "a"), line(4, "c", "b"), line(5, "d", "b"), line(6, "e", "e")]
    outline, _ = Outline().with_spans(lines)

    def seen() -> list[str]:
        return [span for span, _ in outline.visible]

    assert sorted(seen()) == ["a", "b", "c", "d", "e", "sp_1"]
    outline.fold(["a"], True)
    assert seen() == ["sp_1", "e", "a"]
    outline.fold(["a"], False)
    outline.fold(["b"], True)
    outline, _ = outline.with_spans([line(7, "f", "sp_1")])
    assert seen() == ["sp_1", "f", "e", "a", "b"]


async def test_the_cursor_goes_into_a_ring_and_to_the_newest_span(settings: Settings) -> None:
    seeds = Seeds()
    answered(seeds, "run_1", NOW)
    for span, parent in (("sp_a", "sp_b"), ("sp_b", "sp_a")):
        seeds.span(span, "run_1", parent_id=parent, seq=9, start_ns=NOW, status="error")
    # Started last, and shown above others: it is under the first node.
    seeds.span("sp_late", "run_1", parent_id="sp_11", root_id="sp_1", seq=10, start_ns=NOW + 3 * SECOND, name="late")
    seeds.write(settings)
    async with opened(settings, open_at="run/run_1") as (app, pilot):
        trace = app.screen.query_one(Trace)
        assert trace.line_count == 8
        await press(pilot, "z", "n")
        assert trace.span is not None
        assert trace.span.id == "sp_a"
        await press(pilot, "n")
        assert trace.span.id == "sp_b"
        await press(pilot, "f")
        assert trace.span.id == "sp_11", "the branch that it is folded away in"
        await press(pilot, "z", "z", "z", "f", "f")
        assert trace.span.id == "sp_late"
        assert trace.cursor < trace.line_count - 1


def test_the_engine_says_how_many_more_run_and_asks_no_strange_process(settings: Settings) -> None:
    seeds = Seeds()
    for place in range(3):
        seeds.run(f"run_{place}", status="running", pid=os.getpid(), segment="j_other.seg")
    seeds.write(settings)
    with open_pages(settings) as pages:
        lines = list(pages.run_lines(pages.run_keys(RunFilter(), "started")).values())
    assert [memory_bytes(settings, one) for one in lines] == [None, None, None]
    held = settings.paths.home / "journal" / "j_other.seg"
    held.parent.mkdir(exist_ok=True)
    with held.open("w"):
        assert (memory_bytes(settings, lines[0]) or 0) > 1_000_000
    parts = engine_parts([], [(one, None) for one in lines], NOW, more=7)
    assert parts[-1].text == "and 7 more"


def test_nothing_is_read_where_there_is_no_record(settings: Settings) -> None:
    with pytest.raises(RecordError, match="there is no record"):
        open_pages(settings)


async def test_an_answer_for_a_screen_that_is_being_taken_down_is_dropped(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    small(settings)
    async with opened(settings) as (app, pilot):
        await settle(pilot)
        late: list[Any] = []
        monkeypatch.setattr(app.reader, "ask", lambda name, work, deliver, **_: late.append(deliver))
        reached: list[str] = []
        app.screen.ask("late", lambda pages: "", reached.append)
        late[0]("while it stands")
        for node in app.screen.walk_children(with_self=True):
            node._pruning = True
        late[0]("while it goes")
        for node in app.screen.walk_children(with_self=True):
            node._pruning = False
    assert reached == ["while it stands"]


async def test_a_run_of_which_something_is_missing_says_so_in_red(settings: Settings) -> None:
    with Runtime(settings, engine=ScriptedEngine()) as runtime:
        whole, holed = (runtime.run(_TWO_NODES, {"x": 1}).run_id for _ in range(2))
    with sqlite3.connect(database_path(settings)) as writer:
        writer.execute("DELETE FROM span WHERE run_id = ? AND kind = 'node' AND name = 'b'", [holed])
    writer.close()
    for run, told in ((whole, False), (holed, True)):
        async with opened(settings) as (app, pilot):
            app.push_screen(RunScreen(run))
            await settle(pilot)
            head = app.screen.query_one("#head", Static)
            await wait_for(pilot, lambda head=head: "done" in str(head.content))
            if told:
                await wait_for(pilot, lambda head=head: "NOT BALANCED: 3 spans emitted, 2 stored" in str(head.content))
            else:
                await pilot.pause(0.5)
                assert "BALANCED" not in str(head.content)
