"""kill -9 at random points of the shipped graphs and of 64 tasks side by side: what was seen is there, and the run goes on."""

from __future__ import annotations

import asyncio
import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from mortal import WIDTH
from postgres_server import Postgres

from agentops import Settings
from agentops.checkpoints import lease, open_checkpointer
from agentops.settings import load_settings
from agentops.store import open_store
from agentops.tracer import catch_up

HERE = Path(__file__).parent
WIDE = f"{HERE / 'mortal.py'}:graph"
JOBS = [
    (WIDE, '{"done": []}'),
    ("rag", "At how many degrees is green tea brewed?"),
    ("research", "At how many degrees is green tea brewed, and how many millilitres does a cup hold?"),
    ("review", "At how many degrees is green tea brewed?"),
    ("assistant", "Write down that the plumber comes at 9."),
    ("triage", "What is 12 times 12?"),
]


@dataclass
class Life:
    """What the caller of a run saw before its process died, or before it ended."""

    seconds: float
    killed: bool
    steps: list[int] = field(default_factory=list)
    result: dict[str, Any] | None = None

    @property
    def seen(self) -> int:
        """The last superstep that the caller knows to be over: a later one has begun."""
        return max(self.steps, default=0) - 1


class Mortals:
    """Lets children of a warmed process run graphs, and kills them."""

    def __init__(self, environment: dict[str, str]) -> None:
        paths = os.pathsep.join((str(HERE), str(HERE.parent), str(HERE.parents[1])))
        command, pipe = [sys.executable, str(HERE / "mortal.py")], subprocess.PIPE
        self._parent = subprocess.Popen(
            command, env=environment | {"PYTHONPATH": paths}, stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0
        )
        self._buffer = b""
        assert self._line(60) == "warm"

    def live(
        self, name: str, graph: str, question: str, *, for_s: float = 60.0, to_step: int = 1_000, durability: str = "sync"
    ) -> Life:
        """Runs a graph, and kills it `for_s` after it was ready, or when a step begins, unless it has ended by then."""
        assert self._parent.stdin is not None
        job = {"name": name, "graph": graph, "question": question, "durability": durability}
        self._parent.stdin.write(f"{json.dumps(job)}\n".encode())
        child = int(str(self._line(60)).split()[1])
        assert self._line(60) == "ready"
        begun = time.monotonic()
        life = Life(for_s, killed=False)
        while True:
            left = begun + for_s - time.monotonic()
            if (line := self._line(left if left > 0 and not life.killed else 60)) is None:
                life.killed = _kill(child)
                continue
            word, _, rest = line.partition(" ")
            if word == "over":
                life.seconds = time.monotonic() - begun
                assert life.killed or rest == "0", self._errors()
                return life
            if word == "step":
                life.steps.append(int(rest))
                if int(rest) >= to_step and not life.killed:
                    life.killed = _kill(child)
            elif word == "result":
                life.result = json.loads(rest)

    def _line(self, wait_s: float) -> str | None:
        assert self._parent.stdout is not None
        deadline = time.monotonic() + wait_s
        while b"\n" not in self._buffer:
            left = max(0.0, deadline - time.monotonic())
            if not select.select([self._parent.stdout], [], [], left)[0]:
                return None
            said = os.read(self._parent.stdout.fileno(), 65_536)
            assert said, self._errors()
            self._buffer += said
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line.decode()

    def _errors(self) -> str:
        self.close()
        assert self._parent.stderr is not None
        return self._parent.stderr.read().decode()

    def close(self) -> None:
        self._parent.kill()
        self._parent.wait()


def _kill(child: int) -> bool:
    """Whether it was still there."""
    try:
        os.kill(child, signal.SIGKILL)
    except ProcessLookupError:  # it ended in the same moment
        return False
    return True


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return load_settings({"paths.home": tmp_path_factory.mktemp("mortal") / "home"})


@pytest.fixture(scope="module")
def settings_of_postgres(postgres_server: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    home = tmp_path_factory.mktemp("mortal-postgres") / "home"
    return load_settings({"paths.home": home, "record.url": postgres_server.database()})


@pytest.fixture(scope="module")
def mortals(settings: Settings) -> Iterator[Mortals]:
    yield from _mortals({"AGENTOPS_PATHS_HOME": str(settings.paths.home)})


@pytest.fixture(scope="module")
def mortals_of_postgres(settings_of_postgres: Settings) -> Iterator[Mortals]:
    told = {"AGENTOPS_PATHS_HOME": str(settings_of_postgres.paths.home), "AGENTOPS_RECORD_URL": settings_of_postgres.record.url}
    yield from _mortals(told)


def _mortals(environment: dict[str, str]) -> Iterator[Mortals]:
    opened = Mortals(os.environ | environment)
    yield opened
    opened.close()
    for pipe in (opened._parent.stdin, opened._parent.stdout, opened._parent.stderr):
        assert pipe is not None
        pipe.close()


def kept(settings: Settings, thread: str) -> tuple[set[int], int]:
    """Which supersteps of the graph itself are saved of a thread, and of how many tasks of the newest one the results are."""

    async def read() -> tuple[set[int], int]:
        async with lease(settings, thread) as held, open_checkpointer(held, frozenset()) as saver:
            found = [one async for one in saver.alist({"configurable": {"thread_id": thread, "checkpoint_ns": ""}})]
        results = {task for task, channel, _ in (found[0].pending_writes or () if found else ()) if not channel.startswith("__")}
        return {int(one.metadata["step"]) for one in found}, len(results)

    return asyncio.run(read())


def lines(settings: Settings, name: str) -> Counter[str]:
    file = settings.files / name
    return Counter(file.read_text().split("\n")[:-1] if file.exists() else ())


def killed_and_taken_up(mortals: Mortals, settings: Settings, number: int, seed: int, usual: dict[str, Life]) -> int:
    """Kills a run, and often what takes it up again as well, until one comes to its end; returns how many times it was killed."""
    graph, question = JOBS[number % len(JOBS)]
    chance = random.Random(seed + number)
    if graph not in usual:
        usual[graph] = mortals.live(f"usual-{seed}-{number}", graph, question)
    expected, name = usual[graph], f"mortal-{seed}-{number}"
    before = {file: lines(settings, file) for file in ("effects", "notes.md")}
    reviews = len(list((settings.files / "reviews").glob("*")))
    kills, unfinished = 0, WIDTH if graph == WIDE else 0
    for last in (False, chance.random() < 0.5, True):
        tried = lines(settings, "tries")
        life = mortals.live(name, graph, question, for_s=60.0 if last else chance.uniform(0, expected.seconds))
        kills += life.killed
        steps, finished = kept(settings, f"th_{name}")
        assert set(range(life.seen + 1)) <= steps, f"{graph}: a step that was seen is gone: {life} {sorted(steps)}"
        tries = sum((lines(settings, "tries") - tried).values())
        assert tries == unfinished if life.result else tries <= unfinished, "what was finished is not run again"
        if life.result is not None:
            break
        if graph == WIDE:
            unfinished = 0 if 1 in steps else WIDTH - finished
    assert life.result is not None
    assert expected.result is not None
    assert life.result["status"] == expected.result["status"] == "done"
    for key in ("answer", "sources", "plan", "verdict", "route", "outcome", "total"):
        assert life.result["output"].get(key) == expected.result["output"].get(key), f"{graph}: {key}"
    effects = lines(settings, "effects") - before["effects"]
    assert len(effects) == sum(effects.values()) == (WIDTH if graph == WIDE else 0), "each effect once"
    notes = lines(settings, "notes.md") - before["notes.md"]
    assert sum(notes.values()) == (graph == "assistant")
    assert len(list((settings.files / "reviews").glob("*"))) - reviews == (graph == "review")
    catch_up(settings, wait=True)
    with open_store(settings) as store:
        assert store.run(name).status == "done"
        assert store.balance(name).balanced
    return kills


def rounds(mortals: Mortals, settings: Settings, wanted: int, seed: int) -> None:
    usual: dict[str, Life] = {}
    number = kills = 0
    while kills < wanted:
        kills += killed_and_taken_up(mortals, settings, number, seed, usual)
        number += 1
        assert number < 10 * wanted, "it is hardly ever killed in time"


def test_a_killed_run_keeps_what_was_seen_and_ends_as_it_would_have(mortals: Mortals, settings: Settings) -> None:
    rounds(mortals, settings, 8, seed=8)


@pytest.mark.long
def test_a_hundred_killed_runs_keep_what_was_seen_and_end_as_they_would_have(mortals: Mortals, settings: Settings) -> None:
    rounds(mortals, settings, 100, seed=100)


def test_with_postgres_a_killed_run_keeps_what_was_seen_and_ends_as_it_would_have(
    mortals_of_postgres: Mortals, settings_of_postgres: Settings
) -> None:
    rounds(mortals_of_postgres, settings_of_postgres, 5, seed=5)


@pytest.mark.long
def test_with_postgres_fifty_killed_runs_keep_what_was_seen_and_end_as_they_would_have(
    mortals_of_postgres: Mortals, settings_of_postgres: Settings
) -> None:
    rounds(mortals_of_postgres, settings_of_postgres, 50, seed=50)


def test_without_synchronous_checkpoints_what_was_seen_is_gone(mortals: Mortals, settings: Settings) -> None:
    """The control: the test above would notice."""
    for durability in ("sync", "exit"):
        life = mortals.live(f"control-{durability}", WIDE, JOBS[0][1], to_step=1, durability=durability)
        assert life.killed
        assert life.seen == 0
        saved, _ = kept(settings, f"th_control-{durability}")
        assert (0 in saved) is (durability == "sync")
