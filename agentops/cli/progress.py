"""Progress on standard error, for work that is told in stages (getting a model ready) or by count (cases of an evaluation)."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

Stages = Callable[[str, int, int], None]
"""Called with the stage, what is done of it and its total; a total of 0 stands for unknown."""

Count = Callable[[int, int], None]
"""Called with how many are done and how many there are."""

AFTER_S = 2.0
"""What is over sooner shows no count."""

_WORDS = {
    "start": "starting",
    "load": "loading",
    "wait": "waiting for another process",
    "download": "downloading",
    "convert": "converting",
    "calibrate": "writing calibration text",
    "layers": "quantizing layers",
    "perplexity": "measuring perplexity",
}


@contextmanager
def stages(title: str = "model", *, quiet: bool = False) -> Iterator[Stages]:
    """A bar for the stage that is under way; where standard error is no terminal, a line when it begins and when it ends.

    Between stages nothing is drawn, so that a stream of tokens may follow.
    """
    if quiet:
        yield lambda stage, done, total: None
        return
    shown: _Shown = _Bars(title) if sys.stderr.isatty() else _Lines(title)
    current = ""

    def tell(stage: str, done: int, total: int) -> None:
        nonlocal current
        if stage != current:
            if current:
                shown.end()
            if total and done >= total:
                current = ""
                return
            current = stage
            shown.begin(_WORDS.get(stage, stage))
        shown.update(done, total)
        if total and done >= total:
            shown.end()
            current = ""

    try:
        yield tell
    finally:
        if current:
            shown.end()


@contextmanager
def counted(noun: str, *, quiet: bool = False) -> Iterator[Count]:
    """A bar that appears `AFTER_S` seconds after it was first told and goes at the end; nothing where standard error is no
    terminal."""
    if quiet or not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}", markup=False), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task(noun, total=None)
    begin = threading.Timer(AFTER_S, bar.start)
    begin.daemon = True
    begun = False

    def tell(done: int, total: int) -> None:
        nonlocal begun
        bar.update(task, completed=done, total=total)
        if not begun:
            begun = True
            begin.start()

    try:
        yield tell
    finally:
        if begun:
            begin.cancel()
            begin.join()
            bar.stop()


class _Shown(Protocol):
    def begin(self, stage: str) -> None: ...
    def update(self, done: int, total: int) -> None: ...
    def end(self) -> None: ...


class _Lines:
    def __init__(self, title: str) -> None:
        self._title = title
        self._stage = ""
        self._started = 0.0

    def begin(self, stage: str) -> None:
        self._stage, self._started = stage, time.monotonic()
        print(f"{self._title}: {stage} ...", file=sys.stderr, flush=True)

    def update(self, done: int, total: int) -> None:
        pass

    def end(self) -> None:
        print(f"{self._title}: {self._stage}, {time.monotonic() - self._started:.0f} s", file=sys.stderr, flush=True)


class _Bars:
    def __init__(self, title: str) -> None:
        self._title = title
        self._drawn: tuple[Progress, TaskID] | None = None

    def begin(self, stage: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description:42}", markup=False), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
        progress = Progress(*columns, console=Console(stderr=True))
        progress.start()
        self._drawn = progress, progress.add_task(f"{self._title}: {stage}", total=None)

    def update(self, done: int, total: int) -> None:
        if self._drawn is not None:
            progress, task = self._drawn
            progress.update(task, completed=done, total=total or None)

    def end(self) -> None:
        if self._drawn is not None:
            self._drawn[0].stop()
            self._drawn = None
