"""Places for runs at work: so many at once, the others wait in the order in which they came.

A run holds several files open, and a process may have a thousand in many places: without a limit, the thousandth run at
once fails, and others with it. It knows nothing of runs.
"""

from __future__ import annotations

import asyncio
import resource
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext, suppress
from pathlib import Path

_FILES_OF_A_RUN = 6
_FILES_OF_THE_REST = 128
_LEAST, _MOST = 8, 10_000


def affordable() -> int:
    """How many runs the files allow that this process may still open."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit == resource.RLIM_INFINITY:
        return _MOST
    held = 0
    with suppress(OSError):
        held = sum(1 for _ in Path("/proc/self/fd").iterdir())
    return min(_MOST, max(_LEAST, (limit - held - _FILES_OF_THE_REST) // _FILES_OF_A_RUN))


Stoppable = Callable[[Callable[[], object]], AbstractContextManager[None]]
"""While the block that it opens goes on, what it is given may be called, in the same event loop."""


def _unstoppable(stop: Callable[[], object]) -> AbstractContextManager[None]:
    return nullcontext()


class Places:
    """`count` places. May be taken from any thread and event loop."""

    def __init__(self, count: int) -> None:
        self._free = count
        self._lock = threading.Lock()
        self._waiting: deque[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def taken(self, waiting: Stoppable = _unstoppable) -> AsyncIterator[None]:
        """A place, once there is one, until the block ends. `waiting` is entered by who has to wait, with what ends that.

        Raises:
            asyncio.CancelledError: it was ended.
        """
        await self._take(waiting)
        try:
            yield
        finally:
            self._give()

    async def _take(self, waiting: Stoppable = _unstoppable) -> None:
        loop = asyncio.get_running_loop()
        with self._lock:
            if self._free:
                self._free -= 1
                return
            waiter = loop.create_future()
            self._waiting.append((loop, waiter))
        try:
            with waiting(waiter.cancel):
                await waiter
        except asyncio.CancelledError:
            with self._lock, suppress(ValueError):
                self._waiting.remove((loop, waiter))
                raise
            # It was given in the same moment.
            self._give()
            raise

    def _give(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._free += 1
                    return
                loop, waiter = self._waiting.popleft()
            # A loop that is closed has nobody left who waits.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(_grant, waiter)
                return


def _grant(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
