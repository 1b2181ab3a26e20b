"""Cancelling a run from another process: a run at work has a pipe in the home folder, and stops when somebody writes to it.

The pipe needs no store, which may be locked, and no signal, which would stop all else that the process does. One without a
reader is what a dead process left behind. Nothing here knows what a run is doing.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from agentops.errors import RunNotFound
from agentops.settings import Settings


def _folder(settings: Settings) -> Path:
    return settings.paths.home / "running"


@contextmanager
def cancellable(settings: Settings, run_id: str, stop: Callable[[], object]) -> Iterator[None]:
    """Calls `stop` in the running event loop when the run is to be cancelled. Where the home folder can hold no pipe the run
    works all the same, and is not found by `cancel`. One process at a time may work on a run."""
    file, loop, pipe = _folder(settings) / run_id, asyncio.get_running_loop(), -1

    def heard() -> None:
        with contextlib.suppress(BlockingIOError):
            if os.read(pipe, 64):
                stop()

    try:
        file.parent.mkdir(0o700, parents=True, exist_ok=True)
        file.unlink(missing_ok=True)
        os.mkfifo(file, 0o600)
        # Open for writing too: a pipe that all writers have left is readable for ever.
        pipe = os.open(file, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        loop.add_reader(pipe, heard)
    except OSError:
        _close(pipe, file)
        pipe = -1
    try:
        yield
    finally:
        if pipe >= 0:
            loop.remove_reader(pipe)
            _close(pipe, file)


def _close(pipe: int, file: Path) -> None:
    with contextlib.suppress(OSError):
        file.unlink(missing_ok=True)
    if pipe >= 0:
        os.close(pipe)


def at_work(settings: Settings, run: str) -> str:
    """The id of a run that is at work on this machine, by its id, a unique beginning of it, or the word `last`.

    Raises:
        RunNotFound: none, or more than one.
    """
    try:
        there = sorted(file.name for file in _folder(settings).iterdir())
    except OSError:
        there = []
    found = [run] if run in there else [name for name in there if run and name.startswith((run, f"run_{run.upper()}"))]
    if run == "last":
        found = there[-1:]
    if len(found) > 1:
        raise RunNotFound(f"more than one run at work starts with '{run}': {', '.join(found[:3])}", hint="give more of the id")
    if not found:
        raise RunNotFound(f"no run called '{run}' is at work on this machine", hint="see: agentops runs --status running")
    return found[0]


def cancel(settings: Settings, run: str) -> str:
    """Asks a run at work, in whatever process of this machine, to stop; returns its id at once. `is_at_work` tells when it has.

    Raises:
        RunNotFound: none of that name is at work, or its process has died.
    """
    run_id = at_work(settings, run)
    file = _folder(settings) / run_id
    try:
        pipe = os.open(file, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ENXIO:
            file.unlink(missing_ok=True)
        raise RunNotFound(f"run {run_id} is no longer at work", hint=f"see how it ended: agentops show {run_id}") from error
    try:
        os.write(pipe, b"cancel\n")
    except OSError:
        pass  # full: it was asked a thousand times before
    finally:
        os.close(pipe)
    return run_id


def is_at_work(settings: Settings, run_id: str) -> bool:
    """Whether somebody could still cancel it."""
    return (_folder(settings) / run_id).exists()
