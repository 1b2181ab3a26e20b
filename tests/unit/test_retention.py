"""Retention: what a rule lets go, what stays whatever it says, and that nothing else is touched, also when it is killed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_removing import apply, content, named, run, span
from typer.testing import CliRunner

from agentops import retention
from agentops.checkpoints import checkpoint_folder, lease
from agentops.cli import app
from agentops.errors import RunNotFound
from agentops.settings import Settings
from agentops.store import open_store
from agentops.sync import run_sync

NOW = 10**18
DAY = 86_400 * 10**9


def old(name: str, days: float, thread: str, **more: Any) -> dict[str, Any]:
    began = NOW - int(days * DAY)
    return run(name, thread, **{"started_ns": began, "ended_ns": began + 1, **more})


@pytest.fixture
def recorded(settings: Settings) -> Settings:
    apply(
        settings,
        content("old"),
        content("shared"),
        old("run_5", 5, "th_a", input_hash=named("old")),
        old("run_4", 4, "th_b", input_hash=named("shared"), status="failed"),
        old("run_3", 3, "th_w", status="waiting"),
        old("run_2", 2, "th_e"),
        old("run_1", 1, "th_b", input_hash=named("shared")),
        old("run_0", 0.001, "th_c"),
        span("sp_5", "run_5"),
        {"t": "case", "experiment_id": "exp_1", "case_id": "c", "place": 0, "run_id": "run_2", "status": "done"},
    )
    folder = checkpoint_folder(settings)
    folder.mkdir()
    for thread in "abewc":
        for ending in ("db", "db-wal", "db-shm", "lock"):
            (folder / f"th_{thread}.{ending}").touch()
    return settings


def left(settings: Settings) -> list[str]:
    with open_store(settings) as store:
        return sorted(one.id for one in store.runs(limit=1000))


def threads(settings: Settings) -> list[str]:
    return sorted(path.stem for path in checkpoint_folder(settings).glob("*.db"))


def prune(settings: Settings, **rule: Any) -> retention.Pruned:
    return run_sync(retention.prune(settings, retention.plan(settings, retention.Rule(**rule), now_ns=NOW)))


def test_a_rule_lets_go_what_is_beyond_any_of_its_limits(recorded: Settings) -> None:
    def goes(**rule: Any) -> list[str]:
        return [one.id for one in retention.plan(recorded, retention.Rule(**rule), now_ns=NOW).runs]

    assert goes() == []
    assert goes(since_ns=NOW - 4 * DAY) == ["run_5"]
    assert goes(runs=2) == ["run_5", "run_4"]
    assert goes(runs=5, since_ns=NOW - 3 * DAY) == ["run_5", "run_4"]
    assert goes(runs=2, experiments=True) == ["run_5", "run_4", "run_2"]
    assert goes(runs=0, graph="another") == []
    chosen = retention.plan(recorded, retention.Rule(runs=0), now_ns=NOW)
    assert [one.id for one in chosen.runs] == ["run_5", "run_4", "run_1"]
    assert (chosen.unfinished, chosen.in_experiments, chosen.recent, chosen.stay) == (1, 1, 1, 3)


def test_a_pinned_run_stays_until_it_is_pinned_no_more(recorded: Settings) -> None:
    environment = {"AGENTOPS_PATHS_HOME": str(recorded.paths.home)}

    def told(*arguments: str) -> Any:
        done = CliRunner().invoke(app, [*arguments, "--json"], env=environment)
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    for _ in range(2):
        assert told("pin", "run_5") == {"run": "run_5", "pinned": True}
    assert told("show", "run_5")["pinned"]
    chosen = retention.plan(recorded, retention.Rule(runs=0), now_ns=NOW)
    assert (chosen.pinned, [one.id for one in chosen.runs]) == (1, ["run_4", "run_1"])
    prune(recorded, runs=0)
    assert "run_5" in left(recorded)
    assert told("unpin", "run_5") == {"run": "run_5", "pinned": False}
    assert not told("show", "run_5")["pinned"]
    prune(recorded, runs=0)
    assert "run_5" not in left(recorded)
    assert isinstance(CliRunner().invoke(app, ["pin", "run_9"], env=environment).exception, RunNotFound)


def test_runs_go_with_the_checkpoints_of_threads_that_have_no_other(recorded: Settings) -> None:
    done = prune(recorded, since_ns=NOW - 2 * DAY)
    assert (done.removed.runs, done.removed.spans, done.removed.contents, done.threads) == (2, 1, 1, 1)
    assert left(recorded) == ["run_0", "run_1", "run_2", "run_3"]
    assert threads(recorded) == ["th_b", "th_c", "th_e", "th_w"]
    assert not list(checkpoint_folder(recorded).glob("th_a.db*"))
    with open_store(recorded) as store:
        assert store.payload(named("shared")) == "shared"


def test_a_thread_in_use_is_left_for_the_next_time(recorded: Settings) -> None:
    async def busy() -> retention.Pruned:
        chosen = retention.plan(recorded, retention.Rule(since_ns=NOW - 2 * DAY), now_ns=NOW)
        async with lease(recorded, "th_a"):
            return await retention.prune(recorded, chosen)

    assert run_sync(busy()).busy == ["th_a"]
    assert left(recorded) == ["run_0", "run_1", "run_2", "run_3", "run_5"]
    assert "th_a" in threads(recorded)
    assert prune(recorded, since_ns=NOW - 2 * DAY).removed.runs == 1
    assert "th_a" not in threads(recorded)


def test_a_run_that_came_after_the_plan_keeps_its_thread(recorded: Settings) -> None:
    chosen = retention.plan(recorded, retention.Rule(since_ns=NOW - 2 * DAY), now_ns=NOW)
    apply(recorded, old("run_new", 0, "th_a", input_hash=named("old")))
    done = run_sync(retention.prune(recorded, chosen))
    assert (done.removed.runs, done.removed.contents, done.threads) == (2, 0, 0)
    assert "run_new" in left(recorded)
    assert "th_a" in threads(recorded)


def test_what_is_ended_in_the_middle_is_finished_by_the_next(recorded: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files of a thread go first: its runs tell the next call what is left."""
    with monkeypatch.context() as patched:
        patched.setattr("agentops.store.writing.remove", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prune(recorded, since_ns=NOW - 2 * DAY)
    assert "th_a" not in threads(recorded)
    assert len(left(recorded)) == 6
    assert prune(recorded, since_ns=NOW - 2 * DAY).removed.runs == 2


def test_the_verb_asks_and_says_what_it_does(recorded: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTOPS_PATHS_HOME", str(recorded.paths.home))
    monkeypatch.setattr("agentops.clock.SystemClock.now_ns", lambda _: NOW)

    def call(*words: str) -> Any:
        return CliRunner().invoke(app, ["prune", *words])

    assert "no rule" in str(call().exception)
    looked = call("--keep-days", "2.5", "--dry-run")
    assert looked.exit_code == 0
    assert "run_5" in looked.stdout
    assert "2 runs go, 4 stay (spared: 1 not at their end)" in looked.stdout
    assert "nobody can be asked" in str(call("--keep-days", "2.5").exception)
    assert len(left(recorded)) == 6
    monkeypatch.setenv("AGENTOPS_RECORD_KEEP_DAYS", "2.5")
    told = json.loads(call("--yes", "--json").stdout)
    assert told["runs"] == ["run_5", "run_4"]
    assert (told["removed"]["runs"], told["removed"]["threads"], told["busy"]) == (2, 1, [])
    assert len(left(recorded)) == 4
    assert json.loads(call("--yes", "--json").stdout)["runs"] == []


def test_in_postgres_runs_and_checkpoints_go_too(postgres_settings: Settings, tmp_path: Path) -> None:
    apply(postgres_settings, content("old"), old("run_5", 5, "th_a", input_hash=named("old")), old("run_1", 1, "th_a"))
    assert prune(postgres_settings, since_ns=NOW - 2 * DAY).threads == 0
    done = prune(postgres_settings, runs=0)
    assert (done.removed.runs, done.threads) == (1, 1)
    assert left(postgres_settings) == []
