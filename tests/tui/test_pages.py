"""Pages of the record by key: order, filters, what came since, and files that are locked, replaced, gone or newer."""

from __future__ import annotations

import sqlite3
from dataclasses import replace

import pytest
from tui_record import NOW, SECOND, Seeds, many, small

from agentops import Settings
from agentops.errors import RecordError, StoreBroken, StoreLocked, StoreTooNew
from agentops.store.opening import database_path
from agentops.store.pages import SORTS, Pages, RunFilter, open_pages


@pytest.fixture
def pages(settings: Settings) -> Pages:
    small(settings)
    return open_pages(settings)


def ids(pages: Pages, wanted: RunFilter = RunFilter(), sort: str = "started", descending: bool = True) -> list[str]:  # noqa: B008
    keys = pages.run_keys(wanted, sort, descending=descending)  # type: ignore[arg-type]
    lines = pages.run_lines(keys)
    return [lines[key].id for key in keys]


def test_runs_come_in_every_order_both_ways(pages: Pages) -> None:
    assert ids(pages) == ["run_01A", "run_02B", "run_03C", "run_04D", "run_05E", "run_06F"]
    for sort in SORTS:
        down = ids(pages, sort=sort)
        assert sorted(down) == sorted(ids(pages))
        assert ids(pages, sort=sort, descending=False)[0] in (down[-1], "run_05E")


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        (RunFilter(statuses=("failed", "crashed")), ["run_02B", "run_05E"]),
        (RunFilter(graphs=("mine.py",)), ["run_02B"]),
        (RunFilter(graphs=("graph",)), ["run_02B"]),
        (RunFilter(graphs=("rag",)), ["run_01A"]),
        (RunFilter(threads=("th_2",)), ["run_06F"]),
        (RunFilter(since_ns=NOW - 200 * SECOND), ["run_01A", "run_02B"]),
        (RunFilter(words=("NO SUCH", "valueerror")), ["run_02B"]),
        (RunFilter(words=("100%",)), []),
        (RunFilter(words=("WHERE", "is the index")), ["run_02B"]),
        (RunFilter(words=("to the customer",), statuses=("waiting",)), ["run_03C"]),
        (RunFilter(words=("to the customer",), statuses=("done",)), []),
        (RunFilter(words=("run_0",), statuses=("done",), since_ns=NOW - 100 * SECOND), ["run_01A"]),
    ],
)
def test_a_filter_leaves_what_it_says(pages: Pages, wanted: RunFilter, found: list[str]) -> None:
    assert ids(pages, wanted) == found


def test_names_of_fields_are_not_what_was_asked(pages: Pages) -> None:
    assert "run_02B" not in ids(pages, RunFilter(words=("question",)))


def test_inputs_are_searched_newest_first_up_to_a_bound(pages: Pages, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = RunFilter(words=("customer",))
    assert ids(pages, asked) == ["run_03C"]
    assert pages.searched is None
    monkeypatch.setattr("agentops.store.pages.NEWEST_INPUTS", 2)
    assert ids(pages, asked) == []
    assert pages.searched == 2
    assert ids(pages, replace(asked, graphs=("review",))) == ["run_03C"], "a field brings others within reach"
    assert pages.searched is None
    monkeypatch.setattr("agentops.store.pages.INPUT_BYTES", 10)
    assert ids(pages, asked) == []
    assert pages.searched == 0


def test_a_damaged_input_has_no_words(pages: Pages, settings: Settings) -> None:
    with sqlite3.connect(settings.paths.home / "record.db") as database:
        database.execute("UPDATE payload SET data = x'00'")
    assert ids(pages, RunFilter(words=("customer",))) == []
    assert ids(pages, RunFilter(words=("run_03",))) == ["run_03C"]


def test_what_came_since_is_found_by_its_key(pages: Pages, settings: Settings) -> None:
    before, token = pages.last_run_key(), pages.change()
    assert pages.change() == token
    seeds = Seeds()
    seeds.run("run_07G", started_ns=NOW + SECOND)
    seeds.run("run_08H", started_ns=NOW + 2 * SECOND, status="failed")
    seeds.write(settings)
    assert pages.change() != token
    new = pages.new_run_keys(RunFilter(), before)
    assert [pages.run_lines(new)[key].id for key in new] == ["run_08H", "run_07G"]
    assert len(pages.new_run_keys(RunFilter(statuses=("failed",)), before)) == 1
    assert pages.statuses() == {"done": 3, "failed": 2, "waiting": 1, "cancelled": 1, "crashed": 1}


def test_spans_come_without_their_contents_in_order(pages: Pages, settings: Settings) -> None:
    found = pages.span_lines("run_01A")
    assert [(line.name, line.kind) for line in found] == [
        ("rag", "workflow"),
        ("retrieve", "node"),
        ("search", "retrieval"),
        ("generate", "node"),
        ("generate", "generation"),
    ]
    assert found[-1].output_tokens == 40
    last = max(line.key for line in found)
    assert pages.span_lines("run_01A", after=last) == []
    assert {line.id for line in pages.span_lines_of([last])} <= {line.id for line in found}
    assert [call.model for call in pages.calls()] == ["smollm2-135m-instruct"]
    assert pages.calls(since_ns=NOW) == []
    assert pages.case_counts()["exp_01"] == {"done": 1, "failed": 1, "queued": 1}
    line = pages.run_line("run_01A")
    assert line is not None
    assert line.input_tokens == 120
    assert pages.run_line("run_99") is None


def test_more_keys_than_one_statement_takes(settings: Settings) -> None:
    list(many(settings, 1_201, 1))
    with open_pages(settings) as pages:
        keys = pages.run_keys(RunFilter(), "started")
        assert len(pages.run_lines(keys)) == len(keys) == 1_201
        assert list(pages.run_keys(RunFilter(), "started", limit=7)) == list(keys[:7])


def test_a_record_that_is_not_there_locked_newer_or_broken(settings: Settings) -> None:
    with pytest.raises(RecordError, match="there is no record"):
        open_pages(settings)
    small(settings)
    path = database_path(settings)
    pages = open_pages(settings)
    pages.change()
    with sqlite3.connect(path) as writer:
        writer.execute("UPDATE alembic_version SET version_num = '9999'")
    writer.close()
    with pytest.raises(StoreTooNew, match="9999"):
        pages.change()
    pages.close()
    with pytest.raises(StoreTooNew, match="9999"):
        open_pages(settings)
    path.rename(path.with_suffix(".moved"))
    path.write_bytes(b"no database at all" * 100)
    with pytest.raises(StoreBroken):
        open_pages(settings)


def test_a_record_that_vanishes_or_is_replaced_is_noticed(settings: Settings) -> None:
    small(settings)
    path = database_path(settings)
    with open_pages(settings) as pages:
        pages.change()
        path.rename(path.with_suffix(".away"))
        with pytest.raises(RecordError, match="is gone"):
            pages.change()
        path.write_bytes(b"")
        with pytest.raises(RecordError, match="replaced"):
            pages.change()


def test_a_locked_record_is_said_to_be_locked(settings: Settings) -> None:
    small(settings)
    path = database_path(settings)
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("PRAGMA locking_mode=EXCLUSIVE")
    holder.execute("PRAGMA journal_mode=DELETE")
    holder.execute("BEGIN EXCLUSIVE")
    with pytest.raises(StoreLocked):
        open_pages(settings, wait_s=0.05)
    holder.execute("ROLLBACK")
    holder.close()
