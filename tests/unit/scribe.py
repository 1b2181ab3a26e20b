"""A process that records in children, to be killed: everything is imported once, and a child is there in milliseconds.

It reads a job a line (JSON) and writes lines: `child PID`, then what the child says, and `over STATUS` when it is gone. A child
that writes says `began NAME` and `ended NAME` after the span's beginning and end were acknowledged, in `threads` threads at once,
until it is killed. A child that drains says `ready` first and `drained` when the store has everything.
"""

from __future__ import annotations

import json
import os
import queue
import random
import sys
import threading
import time
import traceback
from dataclasses import replace
from typing import Any

from agentops import store  # noqa: F401 - what children need is loaded before they are made
from agentops.clock import SystemClock, UlidSource
from agentops.settings import Settings, load_settings
from agentops.tracer import carried, catch_up, open_tracer, span
from agentops.tracer.journal import Event, Journal

LARGEST = 6_000


def say(line: str) -> None:
    os.write(1, f"{line}\n".encode())


def content(name: str) -> dict[str, Any]:
    """What the span of that name is given; its size is chosen by the name."""
    return {"name": name, "text": "x" * random.Random(name).choice((10, 100, 1_000, LARGEST))}


def record(name: str, inside: int) -> None:
    with span("tool", name, content(name)) as handle:
        say(f"began {name}")
        for number in range(inside):
            record(f"{name}/{number}", 0)
        handle.output = content(f"{name}, output")
    say(f"ended {name}")


def endless(thread: int) -> None:
    number = 0
    while True:
        record(f"{thread}:{number}", number % 3)
        number += 1


class Queue:
    """What exporters in the background do in the place of a journal: the events are taken now and written some time later."""

    def __init__(self, journal: Journal, delay_s: float) -> None:
        self._append, self._delay_s = journal.append, delay_s
        self._waiting: queue.SimpleQueue[tuple[Event, ...]] = queue.SimpleQueue()
        threading.Thread(target=self._write, daemon=True).start()

    def append(self, *events: Event, last_word: bool = False) -> None:
        self._waiting.put(tuple(dict(event) for event in events))

    def _write(self) -> None:
        while True:
            time.sleep(self._delay_s)
            while not self._waiting.empty():
                self._append(*self._waiting.get())


def write(settings: Settings, job: dict[str, Any]) -> None:
    tracer = open_tracer(
        replace(settings, record=replace(settings.record, drain_ms=job["drain_ms"])), clock=SystemClock(), ids=UlidSource()
    )
    if job.get("queue"):
        tracer.journal.append = Queue(tracer.journal, 0.05).append  # type: ignore[method-assign]
    run = tracer.start_run(run_id=job["run"], thread_id="th_1", graph="scribe")
    with run.active():
        threads = [threading.Thread(target=carried(endless), args=(number,)) for number in range(job["threads"])]
    say("ready")
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def main() -> None:
    settings = load_settings()
    say("warm")
    for line in sys.stdin:
        if (child := os.fork()) == 0:
            code = 1
            try:
                say(f"child {os.getpid()}")
                job = json.loads(line)
                if "run" in job:
                    write(settings, job)
                else:
                    say("ready")
                    catch_up(settings, wait=True)
                    say("drained")
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        say(f"over {os.waitstatus_to_exitcode(status)}")


if __name__ == "__main__":
    main()
