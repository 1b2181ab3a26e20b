"""What a home's journal holds that the store has not taken yet. It only looks: nothing is drained, claimed or locked."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from agentops.tracer.journal import SUFFIX, read


@dataclass(frozen=True, slots=True)
class Backlog:
    """`segments` are there, `waiting_bytes` of them wait, the oldest event of these is from `oldest_ns`, `None` where none waits.
    `damaged` segments were put aside because not all of them could be read."""

    segments: int
    waiting_bytes: int
    oldest_ns: int | None
    damaged: int


def backlog(folder: Path, positions: Mapping[str, int]) -> Backlog:
    """Of the segments in a folder, from where the store has read each up to."""
    segments = waiting = 0
    oldest: list[int] = []
    for path in folder.glob("*" + SUFFIX):
        position = positions.get(path.name, 0)
        # Whoever drains meanwhile may remove it.
        with suppress(FileNotFoundError):
            size = path.stat().st_size
            first, _ = next(read(path, position), (None, 0)) if size > position else (None, 0)
            segments += 1
            waiting += max(0, size - position)
            if first is not None and isinstance(ns := first.get("ns"), int):
                oldest.append(ns)
    return Backlog(segments, waiting, min(oldest, default=None), sum(1 for _ in folder.glob("*.damaged")))
