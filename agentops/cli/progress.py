"""Progress bars on standard error, for work that is told in named stages (preparing a model)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

Stages = Callable[[str, int, int], None]
"""Called with the stage's name, what is done of it and its total; a total of 0 stands for unknown."""


@contextmanager
def stages() -> Iterator[Stages]:
    """A bar for the stage that is under way; one line a stage where standard error is no terminal.

    Between stages nothing is drawn, so that a stream of tokens may follow.
    """
    bars = _Bars() if sys.stderr.isatty() else None
    seen: set[str] = set()

    def tell(stage: str, done: int, total: int) -> None:
        if bars is not None:
            bars.show(stage, done, total)
        elif stage not in seen:
            seen.add(stage)
            print(f"· {stage}", file=sys.stderr, flush=True)

    try:
        yield tell
    finally:
        if bars is not None:
            bars.end()


class _Bars:
    def __init__(self) -> None:
        self._stage = ""
        self._drawn: tuple[Progress, TaskID] | None = None

    def show(self, stage: str, done: int, total: int) -> None:
        if stage != self._stage:
            self.end()
            self._stage, self._drawn = stage, self._begin(stage, total)
        if self._drawn is not None:
            progress, task = self._drawn
            progress.update(task, completed=done, total=total or None)
            if total and done >= total:
                self.end()

    def end(self) -> None:
        if self._drawn is not None:
            self._drawn[0].stop()
            self._drawn = None

    @staticmethod
    def _begin(stage: str, total: int) -> tuple[Progress, TaskID]:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description:28}", markup=False), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
        progress = Progress(*columns, console=Console(stderr=True))
        progress.start()
        return progress, progress.add_task(stage, total=total or None)
