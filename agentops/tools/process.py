"""A child process that is spoken to in lines, and that is gone when the block around it is left.

It may print what it likes: a line that is too long is dropped, and of what it says on its error stream the end is kept. What
the lines mean is not known here.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

LINE_BYTES = 16_000_000
"""A longer line is dropped."""
_LAST_WORDS_BYTES = 2_000
_GRACE_S = 2.0
"""It has so long to end by itself when its input does, and again when it is told to; then it is killed."""


class LineProcess:
    """A running child. Make it with `open_process`."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._last_words = b""
        self._reading = asyncio.create_task(self._read_errors())

    @property
    def last_words(self) -> str:
        """The end of what it has said on its error stream."""
        return self._last_words.decode(errors="replace")

    async def send(self, line: str) -> None:
        """
        Raises:
            OSError: it has closed its input.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(line.encode(errors="replace") + b"\n")
        await self._process.stdin.drain()

    async def lines(self) -> AsyncIterator[str | None]:
        """What it prints until its end; None for a line that was dropped."""
        reader = self._process.stdout
        assert reader is not None
        dropped = False
        while True:
            try:
                line = await reader.readuntil(b"\n")
            except asyncio.LimitOverrunError as error:
                await reader.readexactly(error.consumed)
                dropped = True
                continue
            except asyncio.IncompleteReadError:
                return
            yield None if dropped else line.decode(errors="replace")
            dropped = False

    async def _read_errors(self) -> None:
        assert self._process.stderr is not None
        while said := await self._process.stderr.read(65_536):
            self._last_words = (self._last_words + said)[-_LAST_WORDS_BYTES:]

    async def end(self, *, at_once: bool) -> None:
        """Ends it and all that it started, with time to end by itself unless `at_once`."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        if not await self._over(0 if at_once else _GRACE_S):
            self._signal(signal.SIGTERM)
            await self._over(0.2 if at_once else _GRACE_S)
        # Also where it has ended: what it started may still be there.
        self._signal(signal.SIGKILL)
        with suppress(TimeoutError):
            await asyncio.wait_for(self._process.wait(), _GRACE_S)
        self._reading.cancel()

    async def _over(self, within_s: float) -> bool:
        # Process.wait() is no use here: it waits for whoever else holds the pipes, too.
        deadline = time.monotonic() + within_s
        while self._process.returncode is None and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        return self._process.returncode is not None

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)


@asynccontextmanager
async def open_process(
    command: str, arguments: Sequence[str], *, environment: Mapping[str, str], folder: Path
) -> AsyncIterator[LineProcess]:
    """
    Raises:
        OSError: it cannot be started.
    """
    process = await asyncio.create_subprocess_exec(
        command,
        *arguments,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        limit=LINE_BYTES,
        env=environment,
        cwd=folder,
        start_new_session=True,
    )
    child = LineProcess(process)
    at_once = True
    try:
        yield child
        at_once = False
    finally:
        await child.end(at_once=at_once)
