"""The record in Postgres: the same as in a file, for several homes at once, and through outages of the server."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from postgres_server import Postgres

from agentops.clock import SystemClock, UlidSource
from agentops.errors import RecordError, StoreBroken, StoreLocked, StoreUnavailable
from agentops.postgres import translation
from agentops.records import Usage
from agentops.settings import PathSettings, Settings
from agentops.store import open_store, open_writer
from agentops.store.opening import HEAD, json_text
from agentops.store.pages import RunFilter, open_pages
from agentops.tracer import Tracer, open_tracer
from agentops.tracer.drain import catch_up

NASTY = "a\0b\x1a0\x1a\\u0000\\\\u001a é\U0010ffff"


def run_event(name: str, ns: int = 1, **more: Any) -> dict[str, Any]:
    base = {"t": "run", "ns": ns, "id": name, "thread_id": "th_1", "graph": "rag", "status": "done", "started_ns": ns}
    return {**base, "segment": "home_1-a.seg", **more}


def span_event(name: str, run: str, seq: int = 1, **more: Any) -> dict[str, Any]:
    base = {"t": "span", "ns": seq, "id": name, "run_id": run, "root_id": "sp_root", "seq": seq, "kind": "node", "name": name}
    return {**base, "status": "ok", "start_ns": seq, "segment": "home_1-a.seg", **more}


def apply(settings: Settings, *events: dict[str, Any]) -> int:
    with open_writer(settings) as writer:
        writer.apply(events, {}, {})
        return writer.rejected


def query(settings: Settings, statement: str) -> list[Any]:
    import psycopg

    with psycopg.connect(settings.record.url, autocommit=True) as connection:
        done = connection.execute(statement)  # type: ignore[call-overload, unused-ignore]
        return done.fetchall() if done.description else []


def at(settings: Settings, url: str, **more: Any) -> Settings:
    return replace(settings, record=replace(settings.record, url=url, **more))


def home(settings: Settings, folder: Path) -> Settings:
    return replace(settings, paths=PathSettings(home=folder, cache=settings.paths.cache))


# What is kept


def test_what_a_home_knew_of_a_run_changes_nothing_once_another_went_on_with_it(either_settings: Settings) -> None:
    one, other = (f"home_{number:026}-a.v2.seg" for number in (1, 2))
    begun = run_event("run_a", 10, status="running", segment=one)
    apply(either_settings, begun, run_event("run_a", 20, status="waiting", ended_ns=20, segment=one))
    apply(either_settings, run_event("run_a", 40, status="done", ended_ns=40, segment=other))
    # The first one comes back with what it had not brought to the store.
    apply(either_settings, run_event("run_a", 30, status="running", segment=one))
    with open_store(either_settings) as store:
        assert [(run.status, run.ended_ns) for run in store.runs()] == [("done", 40)]
    # A home tells its own runs in order, whatever became of its clock.
    apply(either_settings, run_event("run_a", 5, status="failed", ended_ns=5, segment=other))
    with open_store(either_settings) as store:
        assert [(run.status, run.ended_ns) for run in store.runs()] == [("failed", 5)]


def test_a_content_that_is_not_there_is_missing_in_the_balance(either_settings: Settings) -> None:
    kept = {"t": "payload", "ns": 1, "hash": "b2:" + "0" * 32, "data": b'"here"', "truncated": False}
    told = span_event("sp_root", "run_a", 1, kind="workflow", input_hash=kept["hash"], attributes={"emitted": 2})
    apply(either_settings, kept, run_event("run_a"), told, span_event("sp_b", "run_a", 2, input_hash=kept["hash"]))
    with open_store(either_settings) as store:
        assert store.balance("run_a").balanced
    apply(either_settings, span_event("sp_b", "run_a", 2, output_hash="b2:" + "f" * 32))
    with open_store(either_settings) as store:
        balance = store.balance("run_a")
    assert (balance.missing, balance.balanced) == (1, False)


def test_what_postgres_refuses_is_kept_and_found_as_in_a_file(either_settings: Settings) -> None:
    odd = {"text": NASTY, NASTY: [NASTY, {"deep": NASTY}], "numbers": [10**30, 1e-7], "orphan": True}
    rejected = apply(
        either_settings,
        run_event("run_1", graph=NASTY, error=NASTY, settings=odd, tags=[NASTY, "Infinity", "NaN"]),
        {**span_event("sp_1", "run_1", attributes=odd, error=NASTY), "name": NASTY},
        span_event("sp_2", "run_2", 2, attributes={"not": math.nan, "numbers": [math.inf, -math.inf]}),
        {"t": "prompt", "ns": 1, "name": NASTY, "version": "b2:p", "template": NASTY},
    )
    assert rejected == 0
    with open_store(either_settings) as store:
        (run,) = store.runs(graph=NASTY)
        assert (run.graph, run.error, run.settings, run.tags) == (NASTY, NASTY, odd, (NASTY, "Infinity", "NaN"))
        (one,), (two,) = store.spans("run_1"), store.spans("run_2")
        assert (one.name, one.error, one.attributes) == (NASTY, NASTY, odd)
        assert math.isnan(two.attributes["not"])
        assert two.attributes["numbers"] == [math.inf, -math.inf]
        assert store.prompt("b2:p").template == NASTY
        assert store.balance("run_1").orphans == 1
        assert store.runs(graph="a") == []
        assert store.runs(graph="a\0") == []


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.sampled_from('\0\x1a\\"u01aNI{},é\U0001f600')),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(st.sampled_from('\0\x1a\\"u01')), inner, max_size=4),
    max_leaves=12,
)


@hypothesis_settings(max_examples=400, deadline=None)
@given(json_values)
def test_json_is_kept_without_loss_and_without_what_is_refused(value: Any) -> None:
    from agentops.store.postgres import _kept, _loaded

    def strict(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    kept = _kept(json_text(value))
    assert _loaded(kept) == json.loads(json_text(value))
    assert "\\x00" not in repr(json.loads(kept, parse_constant=strict))


def test_whole_numbers_have_64_bits(either_settings: Settings) -> None:
    big = 2**40
    tokens = {"input_tokens": big, "output_tokens": big}
    apply(either_settings, run_event("run_1", pid=big), span_event("sp_1", "run_1", big, kind="generation", step=big, **tokens))
    apply(either_settings, span_event("sp_2", "run_1", 2, kind="generation", **tokens))
    with open_store(either_settings) as store:
        run = store.run("run_1")
        assert (run.pid, run.usage) == (big, Usage(2 * big, 2 * big, 0, 0, 0))
        assert type(run.usage.input_tokens) is int
        assert [span.seq for span in store.spans("run_1")] == [2, big]


def test_a_row_that_the_database_cannot_take_does_not_hold_up_the_others(postgres_settings: Settings) -> None:
    import random

    dice = random.Random(1)
    too_long = "run_" + "".join(chr(dice.randrange(0x4E00, 0x9FFF)) for _ in range(4000))
    events = [run_event(f"run_{number}") for number in range(9)]
    with open_writer(postgres_settings) as writer:
        writer.apply([*events[:4], run_event(too_long), *events[4:]], {"home_1-a.seg": 7}, {})
        assert writer.rejected == 1
        assert writer.positions() == {"home_1-a.seg": 7}
    with open_store(postgres_settings) as store:
        assert len(store.runs()) == 9


def test_ids_are_ordered_and_found_byte_by_byte_whatever_language_the_database_speaks(
    postgres_server: Postgres, settings: Settings
) -> None:
    query(at(settings, postgres_server.url("postgres")), "DROP DATABASE IF EXISTS spoken")
    query(
        at(settings, postgres_server.url("postgres")),
        "CREATE DATABASE spoken TEMPLATE template0 ENCODING 'UTF8' LOCALE_PROVIDER icu ICU_LOCALE 'en' LOCALE 'C'",
    )
    names = ["run_a", "run_B", "run_b", "run_A", "run_é", "run_-", "run__", "run_Z"]
    found = []
    spoken = at(settings, postgres_server.url("spoken"))
    for one in (settings, spoken):
        apply(one, *(run_event(name, thread_id=name) for name in names))
        with open_store(one) as store, open_pages(one) as pages:
            lines = pages.run_lines(keys := pages.run_keys(RunFilter(), "started", descending=False))
            found.append(([row.id for row in store.runs()], [lines[key].id for key in keys]))
            assert store.run("run_é").id == "run_é"
            with pytest.raises(RecordError, match="more than one"):
                store.run("run_")
    assert found[0] == found[1]
    assert found[0][0] == sorted(names, reverse=True)
    # The database itself would have it otherwise, and no column is left to it.
    assert query(spoken, "SELECT 'run_a' < 'run_B'") == [(True,)]
    left = (
        "SELECT table_name, column_name FROM information_schema.columns WHERE table_schema = 'public' AND collation_name IS NULL"
    )
    texts = " AND data_type IN ('text', 'character varying') AND table_name <> 'alembic_version'"
    assert query(spoken, left + texts) == []
    words = RunFilter(words=("É",))
    with open_pages(settings) as here, open_pages(spoken) as there:
        assert len(here.run_keys(words, "started")) == len(there.run_keys(words, "started"))


def test_a_screens_pages_and_changes_are_the_same_in_both(either_settings: Settings) -> None:
    content = {"t": "payload", "ns": 1, "hash": "b2:1", "data": b'{"question":"Green tea?"}', "truncated": False}
    ended = {"input_tokens": 3, "output_tokens": 1}
    apply(
        either_settings,
        content,
        run_event("run_1", 1, ended_ns=9, input_hash="b2:1", thread_id="th_2"),
        run_event("run_2", 2, status="running"),
        run_event("run_3", 3, ended_ns=4, graph="./there/mine.py:graph", status="failed", error="No TEA left"),
        span_event("sp_1", "run_1", 1, kind="generation", **ended),
        span_event("sp_2", "run_1", 2),
    )
    with open_pages(either_settings) as pages:

        def ids(keys: Any) -> list[str]:
            lines = pages.run_lines(keys)
            return [lines[key].id for key in keys]

        def listed(sort: Any = "started", descending: bool = True, **wanted: Any) -> list[str]:
            return ids(pages.run_keys(RunFilter(**wanted), sort, descending=descending))

        assert listed() == ["run_3", "run_2", "run_1"]
        assert listed("time") == ["run_1", "run_3", "run_2"]
        assert listed("time", descending=False) == ["run_2", "run_3", "run_1"]
        assert listed("tokens") == ["run_1", "run_3", "run_2"]
        assert listed("graph", descending=False) == ["run_3", "run_1", "run_2"]
        assert listed(words=("tea",)) == ["run_3", "run_1"]
        assert listed(words=("tea", "green")) == ["run_1"]
        assert listed(graphs=("mine.py",)) == ["run_3"]
        assert listed(statuses=("failed", "running"), threads=("th_1",), since_ns=3) == ["run_3"]
        assert pages.statuses() == {"done": 1, "running": 1, "failed": 1}
        assert [call.input_tokens for call in pages.calls()] == [3]
        assert [line.id for line in pages.span_lines("run_1")] == ["sp_1", "sp_2"]
        before, last = pages.change(), pages.last_run_key()
        assert pages.change() == before
        apply(either_settings, run_event("run_4", 0), run_event("run_2", 2, ended_ns=5))
        assert pages.change() != before
        assert ids(pages.new_run_keys(RunFilter(), last)) == ["run_4"]
        assert listed("time") == ["run_1", "run_2", "run_3", "run_4"]


# Whose database it is


def test_a_database_of_something_else_is_left_alone(postgres_settings: Settings) -> None:
    for tables, told in (
        ("CREATE TABLE recipes (name text)", "something else .*recipes"),
        ("CREATE TABLE alembic_version (version_num varchar); INSERT INTO alembic_version VALUES ('0001')", "something else"),
    ):
        query(postgres_settings, tables)
        for opening in (lambda: open_store(postgres_settings), lambda: apply(postgres_settings, run_event("run_1"))):
            with pytest.raises(StoreBroken, match=told) as caught:
                opening()
            assert "record.url" in caught.value.hint
    query(
        postgres_settings, "DROP TABLE recipes; DROP TABLE alembic_version; CREATE SCHEMA mine; CREATE TABLE checkpoints (id int)"
    )
    own = at(postgres_settings, postgres_settings.record.url + "?options=-csearch_path%3Dmine")
    for one in (postgres_settings, own):
        apply(one, run_event("run_1"))
        with open_store(one) as store:
            assert [row.id for row in store.runs()] == ["run_1"]


def test_a_database_that_cannot_keep_every_text_is_refused(postgres_server: Postgres, settings: Settings) -> None:
    make = "CREATE DATABASE latin TEMPLATE template0 ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C'"
    query(at(settings, postgres_server.url("postgres")), "DROP DATABASE IF EXISTS latin")
    query(at(settings, postgres_server.url("postgres")), make)
    with pytest.raises(StoreBroken, match="LATIN1") as caught:
        open_store(at(settings, postgres_server.url("latin")))
    assert "UTF8" in caught.value.hint


def test_processes_that_start_at_once_make_one_schema(postgres_settings: Settings, tmp_path: Path) -> None:
    program = (
        "import sys; from agentops.settings import load_settings; from agentops.store import open_store\n"
        "settings = load_settings({'paths.home': sys.argv[1], 'record.url': sys.argv[2]}); print('ready', flush=True)\n"
        "sys.stdin.readline(); open_store(settings).close(); print('done')"
    )
    children = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path / str(number)), postgres_settings.record.url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    for child in children:
        assert child.stdout
        assert child.stdout.readline() == "ready\n"
    for child in children:
        assert child.stdin
        child.stdin.write("\n")
        child.stdin.flush()
    for child in children:
        said, told = child.communicate(timeout=60)
        assert said == "done\n", told
    assert query(postgres_settings, "SELECT version_num FROM alembic_version") == [(HEAD,)]


def test_a_server_that_cannot_be_used_is_told_without_its_password(
    postgres_settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    good = postgres_settings.record.url
    secret = good.split(":", 2)[2].split("@")[0]
    caplog.set_level(logging.DEBUG)
    for url in (
        good.replace(secret, f"x{secret}"),
        good.replace("/test_", "/no_test_"),
        good.replace("@127.0.0.1:", "@127.0.0.1:1"),
    ):
        wrong = at(postgres_settings, url, drain_ms=10)
        for opening in (lambda: open_store(wrong), lambda: apply(wrong, run_event("run_1")), lambda: open_pages(wrong)):  # noqa: B023
            with pytest.raises(RecordError) as caught:
                opening()
            assert isinstance(caught.value, StoreUnavailable) or ":1" in url
            assert caught.value.hint
            assert secret not in str(caught.value) + caught.value.hint
        tracer = open_tracer(wrong, clock=SystemClock(), ids=UlidSource())
        tracer.start_run(run_id="run_1", thread_id="th_1", graph="g").end("done")
        while tracer.drainer.failures < 6:
            time.sleep(0.02)
        tracer.close()
        assert list((wrong.paths.home / "journal").glob("*.seg")), "what was told waits in the journal"
    assert "the record is behind" in caplog.text
    assert secret not in caplog.text
    catch_up(postgres_settings, wait=True)
    with open_store(postgres_settings) as store:
        assert store.run("run_1").status == "done"


# Runs while the server comes and goes, and other homes


def steps(tracer: Tracer, run_id: str, wanted: Iterable[int], done: Counter[str] | None = None) -> None:
    """A run of one node after the other, each counted once it is acknowledged."""
    run = tracer.start_run(run_id=run_id, thread_id="th_1", graph="g")
    for number in wanted:
        span = run.open("node", f"node {number}", parent=run.root_id, input={"number": number}, node="n", step=number)
        run.close(span, output={"number": -number})
        if done is not None:
            done[f"node {number}"] += 1
        time.sleep(0.004)
    run.end("done")


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("SSL connection has been closed unexpectedly", "no Postgres answers"),
        ("SSL SYSCALL error: EOF detected", "no Postgres answers"),
        ("SSL error: certificate verify failed", "no safe connection"),
        ("server does not support SSL, but SSL was required", "no safe connection"),
    ],
)
def test_a_server_that_goes_away_under_tls_is_not_called_unsafe(said: str, told: str) -> None:
    import psycopg

    assert told in str(translation(psycopg.OperationalError(said), "postgresql://a@localhost/b"))


def test_a_server_that_is_stopped_and_killed_in_the_middle_of_runs_loses_and_doubles_nothing(
    postgres_server: Postgres, postgres_settings: Settings
) -> None:
    busy = replace(postgres_settings, record=replace(postgres_settings.record, drain_ms=10))
    open_store(busy).close()
    tracer = open_tracer(busy, clock=SystemClock(), ids=UlidSource())
    enough = threading.Event()
    done: list[Counter[str]] = [Counter() for _ in range(3)]

    def until_enough() -> Iterator[int]:
        return takewhile(lambda _: not enough.is_set(), count())

    runs = [threading.Thread(target=steps, args=(tracer, f"run_{place}", until_enough(), done[place])) for place in range(3)]
    for run in runs:
        run.start()
    try:
        for end in (postgres_server.stop, postgres_server.kill):
            time.sleep(0.15)
            end()
            try:
                # No run waits for it, and the store cannot have what is told now.
                written = tracer.journal.size
                while tracer.journal.size < written + 5_000:
                    time.sleep(0.01)
                assert not tracer.flush()
            finally:
                postgres_server.start()
    finally:
        enough.set()
        for run in runs:
            run.join()
    tracer.close()
    catch_up(busy, wait=True)
    with open_store(busy) as store:
        for number in range(3):
            assert store.run(f"run_{number}").status == "done"
            spans = store.spans(f"run_{number}")
            assert Counter(span.name for span in spans if span.kind == "node") == done[number]
            assert set(done[number].values()) == {1}
            assert all(span.status == "ok" for span in spans)
            assert store.balance(f"run_{number}").balanced
            assert store.payload(spans[-1].output_hash or "") == {"number": 1 - len(done[number])}
    assert list((busy.paths.home / "journal").glob("*.seg")) == []


def test_a_reader_goes_on_when_the_server_is_back(postgres_server: Postgres, postgres_settings: Settings) -> None:
    apply(postgres_settings, run_event("run_1"))
    with open_pages(postgres_settings) as pages:
        before = pages.change()
        for end in (postgres_server.stop, postgres_server.kill):
            end()
            try:
                for ask in (pages.change, pages.change, pages.runs, pages.statuses):
                    with pytest.raises(StoreUnavailable):
                        ask()
            finally:
                postgres_server.start()
            assert pages.change() == before
            assert pages.statuses() == {"done": 1}


def test_a_server_that_stalls_holds_up_no_run_and_no_end(postgres_server: Postgres, postgres_settings: Settings) -> None:
    busy = replace(postgres_settings, record=replace(postgres_settings.record, drain_ms=10, lock_timeout_s=1.0))
    open_store(busy).close()
    tracer = open_tracer(busy, clock=SystemClock(), ids=UlidSource())
    assert postgres_server.process
    postmaster = postgres_server.process.pid
    enough = threading.Event()
    done: Counter[str] = Counter()
    wanted = takewhile(lambda _: not enough.is_set(), count())
    run = threading.Thread(target=steps, args=(tracer, "run_1", wanted, done))
    run.start()
    while not any(tracer.journal.segment in row for row in query(busy, "SELECT segment FROM journal_position")):
        time.sleep(0.01)
    stalled = [postmaster, *map(int, Path(f"/proc/{postmaster}/task/{postmaster}/children").read_text().split())]
    for pid in stalled:
        os.kill(pid, signal.SIGSTOP)
    try:
        before = sum(done.values())
        while sum(done.values()) < before + 20:
            time.sleep(0.01)
        enough.set()
        run.join()
        tracer.close()
        assert list((busy.paths.home / "journal").glob("*.seg"))
        with pytest.raises((StoreUnavailable, StoreLocked)):
            catch_up(busy, wait=True)
    finally:
        for pid in reversed(stalled):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
    catch_up(busy, wait=True)
    with open_store(busy) as store:
        assert store.run("run_1").status == "done"
        assert Counter(span.name for span in store.spans("run_1") if span.kind == "node") == done


def test_of_two_homes_on_one_database_neither_finds_the_others_runs_dead(postgres_settings: Settings, tmp_path: Path) -> None:
    here, there = home(postgres_settings, tmp_path / "here"), home(postgres_settings, tmp_path / "there")
    program = (
        "import sys, time; from agentops.clock import *; from agentops.settings import load_settings\n"
        "from agentops.tracer import open_tracer\n"
        "settings = load_settings({'paths.home': sys.argv[1], 'record.url': sys.argv[2]})\n"
        "tracer = open_tracer(settings, clock=SystemClock(), ids=UlidSource())\n"
        "tracer.start_run(run_id='run_there', thread_id='th_1', graph='g'); assert tracer.flush()\n"
        "print('ready', flush=True); sys.stdin.readline(); time.sleep(60)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program, str(there.paths.home), postgres_settings.record.url],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout
    assert child.stdout.readline() == "ready\n"
    tracer = open_tracer(here, clock=SystemClock(), ids=UlidSource())
    tracer.start_run(run_id="run_here", thread_id="th_2", graph="g")
    tracer.close()

    def statuses() -> dict[str, str]:
        with open_store(here) as store:
            return {row.id: row.status for row in store.runs()}

    catch_up(here, wait=True)
    assert statuses() == {"run_here": "crashed", "run_there": "running"}
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    catch_up(here, wait=True)
    assert statuses()["run_there"] == "running", "only its own home can tell"
    catch_up(there, wait=True)
    assert statuses() == {"run_here": "crashed", "run_there": "crashed"}


def test_several_homes_that_drain_at_once_store_everything_once(postgres_settings: Settings, tmp_path: Path) -> None:
    """They tell of the same threads and contents, in other orders."""
    homes = [
        replace(home(postgres_settings, tmp_path / str(number)), record=replace(postgres_settings.record, drain_ms=10))
        for number in range(3)
    ]
    open_store(homes[0]).close()

    def work(number: int) -> None:
        tracer = open_tracer(homes[number], clock=SystemClock(), ids=UlidSource())
        for run in range(4):
            steps(tracer, f"run_{number}{run}", range(25))
        tracer.close()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    seen = []
    with open_pages(postgres_settings) as pages:
        last = 0
        while any(thread.is_alive() for thread in threads):
            # A row that came later than one with a higher number would be missed for good.
            keys = pages.new_run_keys(RunFilter(), last)
            seen += keys
            last = max(keys, default=last)
        seen += pages.new_run_keys(RunFilter(), last)
    for one in homes:
        catch_up(one, wait=True)
    with open_store(postgres_settings) as store:
        rows = store.runs()
        assert len(rows) == 12
        assert {row.status for row in rows} == {"done"}
        assert all(len(store.spans(row.id)) == 26 and store.balance(row.id).balanced for row in rows)
    assert len(seen) == len(set(seen)) == 12
