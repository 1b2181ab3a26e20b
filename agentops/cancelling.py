"""Cancelling a run from another process: a run at work, or in line for a place, has a pipe in the home folder, and stops when its
id is written there.

The pipe needs no store, which may be locked, and no signal, which would stop all else that the process does. The runs of an event
loop share one under many names, so that a thousand that wait hold one open file. One without a reader is what a dead process
left behind. Nothing here knows what a run is doing.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from agentops.errors import RunNotFound
from agentops.settings import Settings

_READ_BYTES = 65_536


def _folder(settings: Settings) -> Path:
    return settings.paths.home / "running"


class _Pipe:
    """The pipe of one event loop in one home, open while one of its runs has a name in the folder."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / f".{uuid.uuid4().hex}"
        self._loop = asyncio.get_running_loop()
        self.stops: dict[str, Callable[[], object]] = {}
        os.mkfifo(self._file, 0o600)
        try:
            # Open for writing too: a pipe that all writers have left is readable for ever.
            self._pipe = os.open(self._file, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            self._loop.add_reader(self._pipe, self._heard)
        except OSError:
            self._file.unlink()
            raise

    def _heard(self) -> None:
        with contextlib.suppress(BlockingIOError):
            # What one process writes at once is not torn, and what is cut off at the end is written again by who wants it.
            for run_id in os.read(self._pipe, _READ_BYTES).decode(errors="replace").split():
                if stop := self.stops.get(run_id):
                    stop()

    def link(self, file: Path, *, over: bool) -> bool:
        """Gives the pipe the name of a run: `over` another process's, or only where none is alive. Returns whether it did."""
        with contextlib.suppress(FileExistsError):
            os.link(self._file, file)
            return True
        if not over and _alive(file):
            return False
        file.unlink(missing_ok=True)
        os.link(self._file, file)
        return True

    def unlink(self, file: Path) -> None:
        with contextlib.suppress(OSError):
            if file.samefile(self._file):
                file.unlink()

    def close(self) -> None:
        self._loop.remove_reader(self._pipe)
        os.close(self._pipe)
        with contextlib.suppress(OSError):
            self._file.unlink()


_lock = threading.Lock()
_pipes: dict[tuple[Path, asyncio.AbstractEventLoop], _Pipe] = {}


@contextmanager
def cancellable(settings: Settings, run_id: str, stop: Callable[[], object], *, waits: bool = False) -> Iterator[None]:
    """Calls `stop` in the running event loop when the run is to be cancelled. Where the home folder can hold no pipe the run
    works all the same, and is not found by `cancel`. One process at a time may work on a run; others of its name that are told
    to `wait` leave it what it has."""
    folder = _folder(settings)
    file, key = folder / run_id, (folder, asyncio.get_running_loop())
    pipe: _Pipe | None = None
    with _lock, contextlib.suppress(OSError):
        if key not in _pipes:
            folder.mkdir(0o700, parents=True, exist_ok=True)
            _pipes[key] = _Pipe(folder)
        if _pipes[key].link(file, over=not waits):
            pipe = _pipes[key]
            pipe.stops[run_id] = stop
    try:
        yield
    finally:
        with _lock:
            if pipe is not None and pipe.stops.get(run_id) is stop:
                del pipe.stops[run_id]
                pipe.unlink(file)
            if (shared := _pipes.get(key)) is not None and not shared.stops:
                _pipes.pop(key).close()


def _alive(file: Path) -> bool:
    """Whether somebody reads what is written there."""
    try:
        os.close(os.open(file, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def at_work(settings: Settings, run: str) -> str:
    """The id of a run that is at work or in line on this machine, by its id, a unique beginning of it, or the word `last`.

    Raises:
        RunNotFound: none, or more than one.
    """
    try:
        there = sorted(file.name for file in _folder(settings).iterdir() if not file.name.startswith("."))
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
    """Asks a run at work or in line, in whatever process of this machine, to stop; returns its id at once. `is_at_work` tells
    when it has.

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
        os.write(pipe, f"{run_id}\n".encode())
    except OSError:
        pass  # full: it was asked a thousand times before
    finally:
        os.close(pipe)
    return run_id


def is_at_work(settings: Settings, run_id: str) -> bool:
    """Whether somebody could still cancel it."""
    return (_folder(settings) / run_id).exists()
