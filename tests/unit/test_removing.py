"""Removing runs from the record: what belongs to them alone goes, what others need stays, and the room is given back."""

from __future__ import annotations

import json
from contextlib import closing
from typing import Any

import pytest
from sqlalchemy import select

from agentops.clock import SystemClock, UlidSource
from agentops.errors import RecordError
from agentops.records import PromptVersion, Score, content_hash
from agentops.settings import Settings
from agentops.store import Removed, Store, open_store, open_writer
from agentops.store.opening import database_path, open_database
from agentops.store.tables import table
from agentops.tracer import recorder
from agentops.tracer.recorder import open_tracer


def content(value: Any) -> dict[str, Any]:
    data = json.dumps(value).encode()
    return {"t": "payload", "ns": 1, "hash": content_hash(data), "data": data, "truncated": False}


def named(value: Any) -> str:
    return content_hash(json.dumps(value).encode())


def run(name: str, thread: str = "th_1", **more: Any) -> dict[str, Any]:
    base = {"t": "run", "ns": 1, "id": name, "thread_id": thread, "graph": "rag", "status": "done", "started_ns": 1}
    return {**base, "ended_ns": 2, **more}


def span(name: str, of: str, **more: Any) -> dict[str, Any]:
    base = {"t": "span", "ns": 1, "id": name, "run_id": of, "root_id": f"sp_{of}", "seq": 1, "kind": "node", "name": name}
    return {**base, "status": "ok", "start_ns": 1, "duration_ns": 1, **more}


def apply(settings: Settings, *events: dict[str, Any]) -> None:
    with open_writer(settings) as writer:
        writer.apply(events, {}, {})
        assert writer.rejected == 0


def remove(settings: Settings, *run_ids: str, **how: Any) -> Removed:
    with open_writer(settings) as writer:
        return writer.remove(run_ids, **how)


def rows(settings: Settings, name: str) -> int:
    with open_database(settings).writer(1.0) as engine, engine.begin() as connection:
        return len(list(connection.execute(select(table(name)))))


def has(store: Store, value: Any) -> bool:
    try:
        return bool(store.payload(named(value)) == value)
    except RecordError:
        return False


def test_a_run_goes_with_all_that_is_its_own_and_nothing_else(either_settings: Settings) -> None:
    settings = either_settings
    prompt = {"t": "prompt", "ns": 1, "name": "ask", "version": "v1", "template": "Ask."}
    said = {"prompt_name": "ask", "prompt_version": "v1", "kind": "generation"}
    apply(
        settings,
        *(content(value) for value in ("mine", "ours", "noted", "kept in JSON")),
        prompt,
        {**prompt, "version": "v2"},
        run("run_A", "th_a", input_hash=named("mine"), output_hash=named("ours")),
        run("run_B", "th_b", input_hash=named("ours")),
        span("sp_A", "run_A", attributes={"result": named("noted"), "more": [named("kept in JSON")]}, **said),
        span("sp_A2", "run_A", **{**said, "prompt_version": "v2"}),
        span("sp_B", "run_B", attributes={"deep": {"er": [named("kept in JSON")]}}, **said),
        {"t": "checkpoint", "root_id": "sp_run_A", "place": 0, "run_id": "run_A", "step": 0, "source": "loop", "hash": "b2:x"},
    )
    removed = remove(settings, "run_A", "run_that_is_not_there")
    assert (removed.runs, removed.spans, removed.threads, removed.contents, removed.prompts) == (1, 2, ("th_a",), 2, 1)
    assert removed.content_bytes > 0
    with open_store(settings) as store:
        assert [one.id for one in store.runs()] == ["run_B"]
        assert (store.spans("run_A"), store.checkpoints("run_A")) == ([], [])
        assert [has(store, value) for value in ("mine", "ours", "noted", "kept in JSON")] == [False, True, False, True]
        assert store.prompt("v1").template == "Ask."
        with pytest.raises(RecordError):
            store.prompt("v2")
        with pytest.raises(RecordError):
            store.thread("th_a")
    assert remove(settings, "run_B").contents == 2
    assert {name: rows(settings, name) for name in ("run", "span", "payload", "thread", "prompt_version")} == {
        "run": 0,
        "span": 0,
        "payload": 0,
        "thread": 0,
        "prompt_version": 0,
    }


def test_lists_of_contents_hold_what_they_name(either_settings: Settings) -> None:
    """What an embedding gave and a dataset are lists of hashes in a content of their own."""
    settings = either_settings
    shared, lonely, case = "vector 1", "vector 2", "case 1"
    two, one, dataset = [named(shared), named(lonely)], [named(shared)], [["c1", named(case)]]
    about = {"name": "e", "dataset": "d", "graph": "rag", "status": "done", "cases": 1, "started_ns": 1}
    apply(
        settings,
        *(content(value) for value in (shared, lonely, case, two, one, dataset)),
        run("run_A", input_hash=named(case)),
        run("run_B"),
        span("sp_A", "run_A", kind="embedding", output_hash=named(two)),
        span("sp_B", "run_B", kind="embedding", output_hash=named(one)),
        {"t": "experiment", "ns": 1, "id": "exp_1", "dataset_hash": named(dataset), **about},
    )
    assert remove(settings, "run_A").contents == 2
    with open_store(settings) as store:
        assert [has(store, value) for value in (two, lonely, shared, one, case, dataset)] == [
            False,
            False,
            True,
            True,
            True,
            True,
        ]
        assert store.thread("th_1").runs == 1


def test_an_experiment_keeps_its_cases_and_its_results_where_that_is_wanted(either_settings: Settings) -> None:
    settings = either_settings
    score = {"t": "score", "run_id": "run_A", "name": "right", "value": 1.0, "source": "code", "created_ns": 1}
    apply(
        settings,
        run("run_A"),
        {**score, "id": "sc_1", "experiment_id": "exp_1", "case_id": "c1"},
        {**score, "id": "sc_2"},
        {"t": "case", "experiment_id": "exp_1", "case_id": "c1", "place": 0, "run_id": "run_A", "status": "done"},
    )
    assert remove(settings, "run_A", keep_results=True).scores == 1
    with open_store(settings) as store:
        assert [one.id for one in store.scores()] == ["sc_1"]
        assert [(one.case_id, one.run_id, one.status) for one in store.cases("exp_1")] == [("c1", None, "done")]
    apply(settings, run("run_A"))
    assert remove(settings, "run_A").scores == 1
    assert rows(settings, "score") == 0


def test_a_removal_that_fails_has_removed_nothing(either_settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = either_settings
    apply(settings, content("mine"), run("run_A", input_hash=named("mine")), span("sp_A", "run_A"))
    monkeypatch.setattr("agentops.store.removing._remove_prompts", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        remove(settings, "run_A")
    assert [rows(settings, name) for name in ("run", "span", "payload", "thread")] == [1, 1, 1, 1]


def test_the_file_gets_smaller_and_the_screens_keys_stay(settings: Settings) -> None:
    from agentops.store.pages import RunFilter, open_pages

    values = ["".join(content_hash(f"{at}.{place}") for place in range(300)) for at in range(60)]
    for at, value in enumerate(values):
        apply(settings, content(value), run(f"run_{at:03}", f"th_{at}", started_ns=at, input_hash=named(value)))
    path = database_path(settings)
    before = path.stat().st_size
    with closing(open_pages(settings)) as pages:
        keys = pages.run_lines(pages.run_keys(RunFilter(), "started"))
    with open_writer(settings) as writer:
        writer.remove([f"run_{at:03}" for at in range(0, 60, 2)])
        writer.shrink()
    assert path.stat().st_size < before * 0.9
    with closing(open_pages(settings)) as pages:
        left = pages.run_lines(pages.run_keys(RunFilter(), "started"))
    assert left == {key: line for key, line in keys.items() if int(line.id[4:]) % 2}


def test_a_process_gives_again_what_may_have_been_removed(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process writes a content once in a while only; one that lives long must not go on naming what is gone."""
    clock = [1000.0]
    monkeypatch.setattr("agentops.tracer.recorder.time.monotonic", lambda: clock[0])
    tracer = open_tracer(settings, clock=SystemClock(), ids=UlidSource())
    try:

        def told() -> int:
            events: list[dict[str, Any]] = []
            tracer.payload("said often", events)
            tracer.prompt(PromptVersion("ask", "v1", "Ask."), events)
            return len(events)

        assert (told(), told()) == (2, 0)
        clock[0] += recorder.TRUSTED_S - 1
        assert told() == 0
        clock[0] += 2
        assert (told(), told()) == (2, 0)
    finally:
        tracer.close()


def test_scores_of_a_run_that_is_gone_do_not_count(settings: Settings) -> None:
    score = Score("right", 1.0, source="code")
    apply(settings, run("run_A"), run("run_B"))
    tracer = open_tracer(settings, clock=SystemClock(), ids=UlidSource())
    tracer.score(score, run_id="run_A")
    kept = tracer.score(score, run_id="run_B")
    tracer.close()
    assert remove(settings, "run_A").scores == 1
    with open_store(settings) as store:
        assert [one.id for one in store.scores()] == [kept]
