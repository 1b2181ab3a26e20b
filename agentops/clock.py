"""Time and names, injected so that a test or a replay can fix them.

Nothing else in the package reads a clock or draws a random id.
"""

from __future__ import annotations

import os
import threading
import time
from typing import Protocol

_CROCKFORD = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
# Every span has an id: two digits at a time halve what it costs.
_PAIRS = [high + low for high in _CROCKFORD for low in _CROCKFORD]
_SHIFTS = range(120, -10, -10)


class Clock(Protocol):
    """Wall time for when something happened, monotonic time for how long it took; both integer nanoseconds."""

    def now_ns(self) -> int: ...
    def monotonic_ns(self) -> int: ...


class SystemClock:
    """The machine's own clocks."""

    def now_ns(self) -> int:
        return time.time_ns()

    def monotonic_ns(self) -> int:
        return time.monotonic_ns()


class Ids(Protocol):
    """Source of ids. `new("run")` gives `run_` and a ULID (https://github.com/ulid/spec)."""

    def new(self, prefix: str) -> str: ...


class UlidSource:
    """ULIDs: 48 bits of milliseconds and 80 of randomness; within one process they never go backwards."""

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock = clock or SystemClock()
        self._lock = threading.Lock()
        self._last = 0

    def new(self, prefix: str) -> str:
        fresh = (self._clock.now_ns() // 1_000_000) << 80 | int.from_bytes(os.urandom(10), "big")
        with self._lock:
            self._last = value = max(fresh, self._last + 1)
        return f"{prefix}_" + "".join([_PAIRS[value >> shift & 1023] for shift in _SHIFTS])


class CountingIds:
    """Predictable ids for tests: `run_1`, `run_2`, `sp_1`, ..."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, int] = {}

    def new(self, prefix: str) -> str:
        with self._lock:
            self._counts[prefix] = number = self._counts.get(prefix, 0) + 1
        return f"{prefix}_{number}"
