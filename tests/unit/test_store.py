"""The store: questions and their answers, pages, prefixes, schema versions, and files that are not what they should be."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from sqlmodel import SQLModel

from agentops.errors import RecordError, RunNotFound, StoreBroken, StoreLocked, StoreTooNew
from agentops.records import PromptVersion
from agentops.settings import PathSettings, RecordSettings, Settings
from agentops.store import Store, StoreWriter, open_store, open_writer
from agentops.store.opening import HEAD, REVISIONS, open_database


def run_event(name: str, ns: int, **more: Any) -> dict[str, Any]:
    base = {"t": "run", "ns": ns, "id": name, "thread_id": "th_1", "graph": "rag", "status": "running", "started_ns": ns}
    return {**base, "segment": "home_1-a.seg", **more}


def span_event(name: str, run: str, seq: int = 1, **more: Any) -> dict[str, Any]:
    base = {"t": "span", "ns": seq, "id": name, "run_id": run, "root_id": "sp_root", "seq": seq, "kind": "node", "name": name}
    return {**base, "status": "open", "start_ns": seq, "segment": "home_1-a.seg", **more}


def apply(settings: Settings, *events: dict[str, Any]) -> None:
    with open_writer(settings) as writer:
        writer.apply(events, {}, {})


@pytest.fixture
def store(either_settings: Settings) -> Iterator[Store]:
    apply(
        either_settings,
        run_event("run_01A", 100, status="done", ended_ns=150),
        run_event("run_01B", 200, status="failed", ended_ns=260, error="ValueError: no", graph="./mine.py:graph"),
        run_event("run_02C", 300, thread_id="th_2"),
        run_event("run_02D", 300, thread_id="th_2", status="waiting", tags=["x"], settings={"k": 3}),
    )
    with open_store(either_settings) as opened:
        yield opened


def names(rows: list[Any]) -> list[str]:
    return [row.id for row in rows]


def test_runs_come_newest_first_and_can_be_filtered(store: Store) -> None:
    assert names(store.runs()) == ["run_02D", "run_02C", "run_01B", "run_01A"]
    assert names(store.runs(status="done")) == ["run_01A"]
    assert names(store.runs(graph="./mine.py:graph")) == ["run_01B"]
    assert names(store.runs(thread="th_2")) == ["run_02D", "run_02C"]
    assert names(store.runs(since_ns=200, thread="th_1")) == ["run_01B"]
    assert store.runs(graph="' OR 1=1 --") == []
    assert (store.runs()[0].tags, store.runs()[0].settings) == (("x",), {"k": 3})


def test_pages_follow_each_other_without_gaps_or_doubles(store: Store) -> None:
    pages, before = [], None
    while page := store.runs(limit=1, before=before):
        pages += names(page)
        before = page[-1].id
    assert pages == names(store.runs())


def test_a_run_is_found_by_a_unique_beginning_or_as_the_last(store: Store) -> None:
    assert store.run("run_01A").duration_ns == 50
    assert store.run("run_01B").error == "ValueError: no"
    assert store.run("01a").id == "run_01A"
    assert store.run("last").id == "run_02D"
    for bad, message in (
        ("run_02", "more than one"),
        ("run_0%", "no run"),
        ("run_9", "no run"),
        ("", "no run"),
        ("run_0_A", "no run"),
    ):
        with pytest.raises(RunNotFound, match=message) as caught:
            store.run(bad)
        assert caught.value.hint


def test_an_empty_record_answers(either_settings: Settings) -> None:
    with open_store(either_settings) as store:
        assert store.runs() == []
        assert store.spans("run_1") == []
        assert store.balance("run_1").balanced
        with pytest.raises(RunNotFound, match="nothing"):
            store.run("last")
        for ask in (store.thread, store.prompt, store.payload):
            with pytest.raises(RecordError):
                ask("nothing")


def test_the_same_events_again_change_nothing(either_settings: Settings) -> None:
    events = [
        {"t": "payload", "ns": 1, "hash": "b2:1", "data": b'{"a":1}', "truncated": True},
        {"t": "prompt", "ns": 1, "name": "write", "version": "b2:p", "template": "T"},
        run_event("run_1", 1, input_hash="b2:1"),
        span_event("sp_root", "run_1", kind="workflow", input_hash="b2:1"),
        span_event("sp_2", "run_1", 2, kind="generation", input_tokens=5, computed_tokens=5, output_tokens=2, status="ok"),
        run_event("run_1", 9, status="done", started_ns=1, ended_ns=9, graph="changed", input_hash="changed"),
    ]

    def look() -> list[Any]:
        with open_store(either_settings) as store:
            return [store.runs(), store.spans("run_1"), store.balance("run_1"), store.thread("th_1"), store.payload("b2:1")]

    apply(either_settings, *events)
    first = look()
    apply(either_settings, *events)
    for event in events:
        apply(either_settings, event)
    assert look() == first
    (run,) = first[0]
    assert (run.status, run.graph, run.input_hash, run.usage.input_tokens, run.usage.output_tokens) == (
        "done",
        "rag",
        "b2:1",
        5,
        2,
    )
    assert (first[2].emitted, first[2].stored, first[2].truncated) == (2, 2, 1)
    with open_store(either_settings) as store:
        assert store.prompt("b2:p") == PromptVersion("write", "b2:p", "T")


def test_an_event_that_makes_no_sense_does_not_hold_up_the_others(
    either_settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    bad: list[dict[str, Any]] = [
        {},
        {"t": "unknown"},
        {"t": "span", "id": "sp_x"},
        {**span_event("sp_x", "run_1"), "name": 7},
        span_event("sp_x", "run_1", start_ns=2**64),
        {**span_event("sp_x", "run_1"), "seq": "many"},
        {"t": "payload", "hash": "b2:x", "data": "text"},
        run_event("run_x", 1, thread_id=None),
    ]
    with open_writer(either_settings) as writer:
        writer.apply(
            [*bad, run_event("run_1", 1), span_event("sp_1", "run_1", attributes={"raw": b"\xff"})],
            {"home_1-a.seg": 10},
            {"home_1-a.seg": 2},
        )
        assert writer.rejected == len(bad)
        assert writer.positions() == {"home_1-a.seg": 10}
    with open_store(either_settings) as store:
        assert names(store.runs()) == ["run_1"]
        assert names(store.spans("run_1")) == ["sp_1"]
    assert "makes no sense" in caplog.text


def test_runs_and_spans_without_a_living_segment_are_crashed(either_settings: Settings) -> None:
    with open_writer(either_settings) as writer:
        writer.apply(
            [
                run_event("run_1", 1),
                run_event("run_2", 2, segment="home_1-b.seg"),
                run_event("run_3", 3, status="waiting"),
                span_event("sp_1", "run_1"),
                span_event("sp_2", "run_1", 2, status="ok"),
                span_event("sp_3", "run_2", segment="home_1-b.seg"),
            ],
            {"home_1-a.seg": 1, "home_1-b.seg": 1},
            {},
        )
        assert writer.bury(["home_1-b.seg"], home="home_1") == 1
        writer.forget(["home_1-b.seg"], home="home_1")
        assert writer.positions() == {"home_1-b.seg": 1}
    with open_store(either_settings) as store:
        assert {row.id: row.status for row in store.runs()} == {"run_1": "crashed", "run_2": "running", "run_3": "waiting"}
        assert {one.id: one.status for one in [*store.spans("run_1"), *store.spans("run_2")]} == {
            "sp_1": "crashed",
            "sp_2": "ok",
            "sp_3": "open",
        }


def test_a_home_that_shares_a_record_finds_none_dead_but_its_own(either_settings: Settings) -> None:
    running = {name: f"home_{name}-j_1.seg" for name in ("a", "ab")}
    shared = bool(either_settings.record.url)
    dead = {"run_a"} if shared else {"run_a", "run_ab", "run_old"}
    with open_writer(either_settings) as writer:
        writer.apply(
            [
                *(run_event(f"run_{name}", 1, segment=segment) for name, segment in running.items()),
                *(span_event(f"sp_{name}", f"run_{name}", segment=segment) for name, segment in running.items()),
                run_event("run_old", 1, segment="j_1.seg"),
            ],
            dict.fromkeys([*running.values(), "j_1.seg"], 1),
            {},
        )
        assert writer.bury([], home="home_a") == len(dead)
        writer.forget([], home="home_a")
        assert set(writer.positions()) == ({running["ab"], "j_1.seg"} if shared else set())
    with open_store(either_settings) as store:
        assert {row.id for row in store.runs(status="crashed")} == dead
        assert [store.span(name).status for name in ("sp_a", "sp_ab")] == ["crashed", "open" if shared else "crashed"]


# Files and schemas


def test_the_migrations_make_the_tables_that_the_code_knows(either_settings: Settings) -> None:
    open_store(either_settings).close()
    engine = open_database(either_settings).reader()
    with engine.connect() as connection:
        # Its own numbering of rows is a column in Postgres.
        options = {"include_name": lambda name, kind, _: not (name == "rowid" or str(name).endswith("_rowid"))}
        difference = compare_metadata(MigrationContext.configure(connection, opts=options), SQLModel.metadata)
    engine.dispose()
    assert difference == []
    assert sorted(set(REVISIONS)) == REVISIONS
    assert REVISIONS[-1] == HEAD


def tamper(settings: Settings, statement: str) -> None:
    if settings.record.url:
        import psycopg

        with psycopg.connect(settings.record.url) as server:
            server.execute(statement)
        return
    with closing(sqlite3.connect(settings.paths.home / "record.db")) as connection:
        connection.execute(statement)
        connection.commit()


def whole(settings: Settings) -> object:
    if not settings.record.url:
        return (settings.paths.home / "record.db").read_bytes()
    import psycopg

    with psycopg.connect(settings.record.url) as server:
        return server.execute("SELECT run.*, xmin FROM run").fetchall(), server.execute(
            "SELECT * FROM alembic_version"
        ).fetchall()


def test_a_record_of_a_newer_program_is_left_alone(either_settings: Settings) -> None:
    apply(either_settings, run_event("run_1", 1))
    tamper(either_settings, "UPDATE alembic_version SET version_num = '9999'")
    before = whole(either_settings)
    for opening in (lambda: open_store(either_settings), lambda: apply(either_settings, run_event("run_2", 1))):
        with pytest.raises(StoreTooNew, match="9999") as caught:
            opening()
        assert "upgrade" in caught.value.hint
    assert whole(either_settings) == before


def test_a_file_that_is_no_database_and_one_of_something_else(settings: Settings) -> None:
    home = settings.paths.home
    home.mkdir(parents=True)
    (home / "record.db").write_text("no database at all, whatever its name says" * 50)
    with pytest.raises(StoreBroken, match="no database"):
        open_store(settings)
    (home / "record.db").unlink()
    tamper(settings, "CREATE TABLE recipes (name TEXT)")
    with pytest.raises(StoreBroken, match=r"something else .*recipes"):
        open_store(settings)


def test_a_database_whose_pages_are_damaged_is_told(settings: Settings) -> None:
    apply(settings, *(run_event(f"run_{number:04}", number) for number in range(500)))
    path = settings.paths.home / "record.db"
    raw = bytearray(path.read_bytes())
    raw[8192:] = b"\xa5" * (len(raw) - 8192)
    path.write_bytes(raw)
    with pytest.raises(StoreBroken), open_store(settings) as store:
        store.runs(limit=500)


def test_a_migration_that_is_killed_leaves_nothing_behind(settings: Settings) -> None:
    program = (
        "import os; import alembic.op as op; from agentops.settings import load_settings; from agentops.store import open_store\n"
        "create, made = op.create_table, []\n"
        "def dying(*args, **more):\n    made.append(args); os._exit(9) if len(made) == 3 else create(*args, **more)\n"
        "op.create_table = dying; open_store(load_settings({'paths.home': os.sys.argv[1]}))"
    )
    done = subprocess.run([sys.executable, "-c", program, str(settings.paths.home)], check=False)
    assert done.returncode == 9
    with open_store(settings) as store:
        assert store.runs() == []


def test_a_locked_store_is_told_after_the_time_out(settings: Settings) -> None:
    quick = replace(settings, record=RecordSettings(lock_timeout_s=0.1))
    apply(settings, run_event("run_1", 1))
    with closing(sqlite3.connect(settings.paths.home / "record.db", isolation_level=None)) as foreign:
        foreign.execute("PRAGMA locking_mode=EXCLUSIVE")
        foreign.execute("BEGIN EXCLUSIVE")
        for opening in (lambda: open_store(quick).runs(), lambda: apply(quick, run_event("run_2", 1))):
            with pytest.raises(StoreLocked) as caught:
                opening()
            assert "lock_timeout_s" in caught.value.hint
    with open_store(quick) as store:
        assert names(store.runs()) == ["run_1"]


def test_writers_take_turns_and_readers_do_not_wait(either_settings: Settings) -> None:
    quick = replace(either_settings, record=replace(either_settings.record, lock_timeout_s=0.1))
    apply(either_settings, run_event("run_1", 1))
    with open_writer(either_settings):
        with pytest.raises(StoreLocked):
            apply(quick, run_event("run_2", 2))
        with open_store(quick) as store:
            assert names(store.runs()) == ["run_1"]
    apply(quick, run_event("run_2", 2))


def test_a_reader_cannot_write(either_settings: Settings) -> None:
    open_store(either_settings).close()
    engine = open_database(either_settings).reader()
    with engine.connect() as connection, pytest.raises(Exception, match=r"read-?only"):
        connection.exec_driver_sql("DELETE FROM run")
    engine.dispose()


@pytest.mark.parametrize("folder", ["a folder with spaces", "100% sure?", "käse#1"])
def test_folders_with_awkward_names(tmp_path: Path, folder: str) -> None:
    settings = Settings(paths=PathSettings(home=tmp_path / folder, cache=tmp_path))
    apply(settings, run_event("run_1", 1))
    with open_store(settings) as store:
        assert names(store.runs()) == ["run_1"]
    assert (tmp_path / folder / "record.db").exists()


def test_the_record_is_for_its_owner_only(settings: Settings) -> None:
    apply(settings, run_event("run_1", 1))
    assert (settings.paths.home / "record.db").stat().st_mode & 0o077 == 0


def test_a_home_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RecordError) as caught:
        open_store(Settings(paths=PathSettings(home=tmp_path / "file" / "home", cache=tmp_path)))
    assert caught.value.hint


def test_the_store_is_what_any_order_of_batches_and_repeats_leads_to(either_settings: Settings) -> None:
    """Against a model in plain dictionaries: random runs and spans start, end, are repeated and buried."""

    class Record(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            tamper_all(either_settings)
            self.status: dict[str, str] = {}
            self.tokens: dict[str, dict[str, int]] = {}
            self.past: list[dict[str, Any]] = []
            self.ns = 0

        def tell(self, event: dict[str, Any]) -> None:
            with open_writer(either_settings) as writer:
                self.write(writer, event)
            self.past.append(event)

        def write(self, writer: StoreWriter, event: dict[str, Any]) -> None:
            writer.apply([event], {"home_1-a.seg": self.ns}, {})

        @rule(name=st.sampled_from("abc"), status=st.sampled_from(["running", "done", "failed", "waiting"]))
        def run(self, name: str, status: str) -> None:
            self.ns += 1
            self.tell(run_event(f"run_{name}", self.ns, status=status))
            self.status[f"run_{name}"] = status

        @rule(name=st.sampled_from("abc"), number=st.integers(1, 4), tokens=st.integers(0, 50))
        def generation(self, name: str, number: int, tokens: int) -> None:
            if f"run_{name}" in self.status:
                self.ns += 1
                one = span_event(
                    f"sp_{name}{number}", f"run_{name}", number, kind="generation", output_tokens=tokens, status="ok"
                )
                self.tell(one)
                self.tokens.setdefault(f"run_{name}", {})[one["id"]] = tokens

        @rule()
        def repeat_the_last(self) -> None:
            if self.past:
                with open_writer(either_settings) as writer:
                    self.write(writer, self.past[-1])
                last = self.past[-1]
                if last["t"] == "run":
                    self.status[last["id"]] = last["status"]

        @rule()
        def bury(self) -> None:
            with open_writer(either_settings) as writer:
                writer.bury([], home="home_1")
            self.status = {name: "crashed" if status == "running" else status for name, status in self.status.items()}

        @invariant()
        def agrees(self) -> None:
            with open_store(either_settings) as store:
                rows = store.runs()
                assert {row.id: row.status for row in rows} == self.status
                for row in rows:
                    assert row.usage.output_tokens == sum(self.tokens.get(row.id, {}).values())

    quick = hypothesis_settings(max_examples=8, stateful_step_count=12, deadline=None, suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(Record, settings=quick)


def tamper_all(settings: Settings) -> None:
    open_store(settings).close()
    for name in ("run", "span", "thread", "journal_position"):
        tamper(settings, f"DELETE FROM {name}")
