"""kill -9 of processes that record in several threads, and of those that drain after them: what was told is there, once."""

from __future__ import annotations

import json
import os
import random
import select
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from scribe import content

from agentops.settings import Settings, load_settings
from agentops.store import open_store
from agentops.tracer import catch_up

HERE = Path(__file__).parent


class Scribes:
    """Lets children of a warmed process record and drain, and kills them."""

    def __init__(self, environment: dict[str, str]) -> None:
        paths = os.pathsep.join((str(HERE), str(HERE.parents[1])))
        command, pipe = [sys.executable, str(HERE / "scribe.py")], subprocess.PIPE
        self._parent = subprocess.Popen(command, env=environment | {"PYTHONPATH": paths}, stdin=pipe, stdout=pipe, bufsize=0)
        self._buffer = b""
        assert self._line(60) == "warm"

    def live(self, job: dict[str, Any], for_s: float) -> list[str]:
        """Lets a child do a job, kills it `for_s` after it was ready unless it is done by then, and returns what it said."""
        assert self._parent.stdin is not None
        self._parent.stdin.write(f"{json.dumps(job)}\n".encode())
        child = int(str(self._line(60)).split()[1])
        assert self._line(60) == "ready"
        deadline, said, killed = time.monotonic() + for_s, list[str](), False
        while True:
            line = self._line(60 if killed else deadline - time.monotonic())
            if line is None or (not killed and time.monotonic() > deadline):
                os.kill(child, signal.SIGKILL)
                killed = True
            if line is not None:
                if line.startswith("over "):
                    assert killed or line == "over 0"
                    return said
                said.append(line)

    def _line(self, wait_s: float) -> str | None:
        assert self._parent.stdout is not None
        while b"\n" not in self._buffer:
            if not select.select([self._parent.stdout], [], [], max(0.0, wait_s))[0]:
                return None
            found = os.read(self._parent.stdout.fileno(), 65_536)
            assert found, "the parent of all children is gone"
            self._buffer += found
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line.decode()

    def close(self) -> None:
        self._parent.kill()
        self._parent.wait()
        for pipe in (self._parent.stdin, self._parent.stdout):
            assert pipe is not None
            pipe.close()


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return load_settings({"paths.home": tmp_path_factory.mktemp("scribe") / "home"})


@pytest.fixture(scope="module")
def scribes(settings: Settings) -> Iterator[Scribes]:
    opened = Scribes(os.environ | {"AGENTOPS_PATHS_HOME": str(settings.paths.home)})
    yield opened
    opened.close()


@dataclass
class Round:
    """How many beginnings and ends of spans were acknowledged, how many of these are lost, and how many drains were killed."""

    told: int
    lost: int
    killed: int


def killed_round(scribes: Scribes, settings: Settings, name: str, chance: random.Random, **job: Any) -> Round:
    """Kills who writes, and what drains after it up to three times."""
    job = {"run": name, "threads": chance.choice((1, 2, 4, 8)), "drain_ms": chance.choice((5, 60_000)), **job}
    said = scribes.live(job, chance.uniform(0.01, 0.2))
    killed = sum(scribes.live({"drain": True}, chance.uniform(0, 0.06)) == [] for _ in range(chance.randrange(4)))
    catch_up(settings, wait=True)
    began = {line.removeprefix("began ") for line in said if line.startswith("began ")}
    ended = {line.removeprefix("ended ") for line in said if line.startswith("ended ")}
    with sqlite3.connect(settings.paths.home / "record.db") as database:
        rows = database.execute("SELECT name, status FROM span WHERE run_id = ? AND kind = 'tool'", (name,)).fetchall()
        hashes = "SELECT input_hash AS hash FROM span UNION SELECT output_hash FROM span"
        without = (
            f"SELECT count(*) FROM ({hashes}) AS used LEFT JOIN payload USING (hash) WHERE used.hash AND payload.hash IS NULL"
        )
        (missing,) = database.execute(without).fetchone()
    database.close()
    assert missing == 0, "a span's content is not there"
    assert max(Counter(row[0] for row in rows).values(), default=0) <= 1, "a span is there twice"
    found = dict(rows)
    assert set(found.values()) <= {"ok", "crashed"}, "nothing is open that no process works on"
    with open_store(settings) as store:
        spans = [one for one in store.spans(name) if one.kind == "tool"]
        for one in chance.sample(spans, min(5, len(spans))):
            assert store.payload(str(one.input_hash)) == content(one.name)
            if one.status == "ok":
                assert store.payload(str(one.output_hash)) == content(f"{one.name}, output")
        if not job.get("queue"):
            assert store.run(name).status == "crashed"
            assert store.balance(name).balanced
    assert not list((settings.paths.home / "journal").glob("*.seg")), "a dead owner's segment goes once it is drained"
    lost = len(began - set(found)) + sum(found.get(span) == "crashed" for span in ended)
    return Round(len(began) + len(ended), lost, killed)


def rounds(scribes: Scribes, settings: Settings, wanted: int, seed: int) -> None:
    found = [
        killed_round(scribes, settings, f"run_{seed}_{number}", random.Random(seed * 1_000 + number)) for number in range(wanted)
    ]
    assert sum(one.lost for one in found) == 0
    assert sum(one.told for one in found) > 20 * wanted
    assert sum(one.killed for one in found) >= wanted // 5, "hardly any recovery was caught at work"


def test_killed_processes_lose_no_span_and_store_none_twice(scribes: Scribes, settings: Settings) -> None:
    rounds(scribes, settings, 10, seed=1)


@pytest.mark.long
def test_ninety_more_killed_processes_lose_no_span_and_store_none_twice(scribes: Scribes, settings: Settings) -> None:
    rounds(scribes, settings, 90, seed=2)


def test_a_queue_in_the_journals_place_loses_spans(scribes: Scribes, settings: Settings) -> None:
    """The control: the tests above would notice."""
    chance = random.Random(3)
    found = [killed_round(scribes, settings, f"run_queue_{number}", chance, queue=True) for number in range(3)]
    assert sum(one.lost for one in found) > 0
