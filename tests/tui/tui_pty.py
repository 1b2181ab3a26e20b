"""A real pseudo-terminal with a program in it: what it writes, byte by byte, and keys for it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager


class Terminal:
    """`output` is all that was written so far."""

    def __init__(self, process: subprocess.Popen[bytes], handle: int) -> None:
        self.process = process
        self.handle = handle
        self.output = bytearray()

    def read(self, seconds: float) -> bytes:
        """What is written within `seconds`, or until it pauses for a quarter of a second after something came."""
        begun, start = time.monotonic(), len(self.output)
        while time.monotonic() - begun < seconds:
            ready, _, _ = select.select([self.handle], [], [], 0.25)
            if not ready:
                if len(self.output) > start:
                    break
                continue
            try:
                got = os.read(self.handle, 65_536)
            except OSError:
                break
            if not got:
                break
            self.output += got
        return bytes(self.output[start:])

    def read_until(self, wanted: bytes, seconds: float = 30.0) -> bytes:
        """What is written until `wanted` was, from the beginning of this call."""
        begun, start = time.monotonic(), len(self.output)
        while time.monotonic() - begun < seconds:
            self.read(0.3)
            if wanted in self.output[start:]:
                return bytes(self.output[start:])
        raise AssertionError(f"{wanted!r} was not written within {seconds} s: ...{bytes(self.output[-600:])!r}")

    def send(self, keys: bytes, seconds: float = 2.0) -> bytes:
        """Types, and reads what comes of it."""
        os.write(self.handle, keys)
        return self.read(seconds)

    def press(self, key: bytes, seconds: float) -> None:
        """Types, and reads for just so long."""
        os.write(self.handle, key)
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            if select.select([self.handle], [], [], left)[0]:
                self.output += os.read(self.handle, 65_536)

    def resize(self, width: int, height: int) -> None:
        fcntl.ioctl(self.handle, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGWINCH)


@contextmanager
def terminal(words: Sequence[str], environment: Mapping[str, str], width: int = 120, height: int = 40) -> Iterator[Terminal]:
    """A terminal of this size in which `words` runs."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
    clean = {name: value for name, value in environment.items() if name not in ("NO_COLOR", "COLUMNS", "LINES")}
    process = subprocess.Popen(
        list(words), stdin=theirs, stdout=theirs, stderr=theirs, env={"TERM": "xterm-256color"} | clean, start_new_session=True
    )
    os.close(theirs)
    try:
        yield Terminal(process, ours)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.wait()
        os.close(ours)
