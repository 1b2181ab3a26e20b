"""The journal: one append-only file a process. An append that returned is acknowledged and survives kill -9.

A record is a header (length and CRC-32 of the payload, both unsigned 32 bit little-endian) and a msgpack payload. Its
owner holds an exclusive `flock` on the file while it lives, so anyone can tell a dead owner's segment by trying the lock.
What the store has taken is given back to the file system from the segment's beginning; positions stay as they were.
A segment is named after its home, `<home id>-<id>.v<format>.seg`: several homes may be drained into one store.
The journal knows nothing of what the events mean and nothing of the store; it does not survive the machine's power loss.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import struct
import sys
import threading
import weakref
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ormsgpack

from agentops.clock import UlidSource
from agentops.errors import JournalFull

SUFFIX = ".seg"
FORMAT = 2
"""Raised when a version that came before would not understand the records. Names of the first format do not say it; its contents
were encoded before they were appended."""
MAX_RECORD_BYTES = 2**30
_HEADER = struct.Struct("<II")
_RESERVE_BYTES = 65_536
_GIVEN_BACK_BYTES = 16_000_000
"""So much that was drained is given back at a time."""
_PATIENCE_S = 0.7
_PUNCH_HOLE_KEEP_SIZE = 3
_READING_BYTES = 2**20
_FORMAT = re.compile(r"\.v(\d+)\.seg$")
_HOME = re.compile(rb"home_[0-9A-Z]{26}\n")

Event = dict[str, Any]


class Journal:
    """This process's segment in `folder`. Safe to use from many threads; a forked child gets a segment of its own.

    `limit_bytes` is how much it may hold that was not `drained` yet: an append beyond that waits a moment for the drainer.

    Raises:
        JournalFull: the folder cannot be written.
    """

    def __init__(self, folder: Path, *, limit_bytes: int | None = None) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes
        self._lock = threading.Lock()
        self._room = threading.Condition(self._lock)
        self._open()
        me = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: _after_fork(me()))

    def _open(self) -> None:
        try:
            self.folder.parent.mkdir(0o700, parents=True, exist_ok=True)
            self.folder.mkdir(0o700, exist_ok=True)
            home = home_id(self.folder)
            while True:
                self.path = self.folder / f"{home}-{UlidSource().new('j')}.v{FORMAT}{SUFFIX}"
                self._fd = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND, 0o600)
                fcntl.flock(self._fd, fcntl.LOCK_EX)
                # Whoever drains may have taken the new file for a dead owner's before the lock was held.
                if self.path.exists():
                    break
                os.close(self._fd)
            self._reserve = self.path.with_suffix(".reserve")
            self._keep_back()
        except OSError as error:
            raise _full(error, self.folder) from error
        self.size = self._drained = self._given_back = 0
        self._closed = self._orphan = self._stuck = False

    def _keep_back(self) -> None:
        try:
            self._reserve.write_bytes(bytes(_RESERVE_BYTES))
        except OSError:
            self._reserve.unlink(missing_ok=True)
            raise
        self._spent = False

    def _forked(self) -> None:
        self._lock = threading.Lock()
        self._room = threading.Condition(self._lock)
        if not self._closed:
            os.close(self._fd)
            self._orphan = True

    @property
    def segment(self) -> str:
        """The name of this process's own file: whether it lives tells whether what names it still runs.

        Raises:
            JournalFull: a forked child's own cannot be made.
        """
        if self._orphan:
            with self._lock:
                if self._orphan and not self._closed:
                    self._open()
        return self.path.name

    def append(self, *events: Event, last_word: bool = False) -> None:
        """Writes the events, all of them or none. `last_word` may use the space kept back for the end of a run.

        Raises:
            JournalFull: the disk takes no more, too much waits for the store, or the journal is closed. What was appended before
                stays readable.
        """
        frames = b"".join(frame(event) for event in events)
        with self._lock:
            if self._closed:
                raise JournalFull("the journal is closed", hint="start runs before the runtime is closed")
            if self._orphan:
                self._open()
            if self.limit_bytes is not None and not last_word:
                self._make_room(len(frames), self.limit_bytes)
            try:
                if self._spent and not last_word:
                    # What was kept back is for the ends of other runs; no run goes on until there is as much again.
                    self._keep_back()
                self._write(frames)
            except OSError as error:
                if not last_word or error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise _full(error, self.folder) from error
                try:
                    self._reserve.unlink(missing_ok=True)
                    self._spent = True
                    self._write(frames)
                except OSError as again:
                    raise _full(again, self.folder) from again

    def _make_room(self, wanted: int, limit: int) -> None:
        def fits() -> bool:
            # One event alone may be larger than the limit; it is taken when nothing else waits.
            return self._closed or self.size == self._drained or self.size - self._drained + wanted <= limit

        if fits():
            return
        # Once is enough to learn that the store takes nothing: a thousand runs would wait one after the other.
        self._stuck = self._stuck or not self._room.wait_for(fits, _PATIENCE_S)
        if self._closed or not fits():
            waiting = self.size - self._drained
            raise JournalFull(
                f"the store has not taken {waiting:,} bytes of the journal, the limit is {limit:,} ({self.folder})",
                hint="see what keeps the store: agentops doctor; or raise record.journal_bytes; then resume the run",
            )

    def drained(self, segment: str, position: int) -> None:
        """To be called when the store has everything of a segment up to a position: that is not needed here any more."""
        with self._lock:
            if self._closed or self._orphan or segment != self.path.name or not self._drained < position <= self.size:
                return
            self._drained, self._stuck = position, False
            self._room.notify_all()
            if position - self._given_back >= _GIVEN_BACK_BYTES:
                self._given_back = position
                # Appends wait for it, milliseconds: a descriptor of its own could pass to a forked child, and the lock with it.
                _give_back(self._fd, position)

    def _write(self, frames: bytes) -> None:
        rest = memoryview(frames)
        try:
            while rest:
                rest = rest[os.write(self._fd, rest) :]
            self.size += len(frames)
        except BaseException:
            # Half a record would hide every later one from readers. A signal's handler may raise anywhere in between.
            os.ftruncate(self._fd, self.size)
            raise

    def close(self) -> None:
        """Gives the segment up: whoever drains next may delete it; an empty one goes now. Closing twice is harmless."""
        with self._lock:
            if not self._closed and not self._orphan:
                self._reserve.unlink(missing_ok=True)
                if self.size == 0:
                    self.path.unlink(missing_ok=True)
                os.close(self._fd)
            self._closed = True


def home_id(folder: Path) -> str:
    """What segments in this folder are named after. It is made once; of several processes that need it at once, one makes it.

    Raises:
        OSError: the folder cannot be written, or is not there.
    """
    fd = os.open(folder / "home", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        if not _HOME.fullmatch(found := os.read(fd, 100)):
            fcntl.flock(fd, fcntl.LOCK_EX)
            # Another process may have been first.
            if not _HOME.fullmatch(found := os.pread(fd, 100, 0)):
                found = f"{UlidSource().new('home')}\n".encode()
                os.ftruncate(fd, 0)
                os.pwrite(fd, found, 0)
    finally:
        os.close(fd)
    return found.decode().strip()


def _after_fork(journal: Journal | None) -> None:
    if journal is not None:
        journal._forked()


def _give_back(fd: int, size: int) -> None:
    """Frees the disk under a file's first bytes, which are zeros then. Where the system cannot, the file keeps them."""
    if (fallocate := getattr(ctypes.CDLL(None), "fallocate", None)) is not None:
        fallocate(fd, _PUNCH_HOLE_KEEP_SIZE, ctypes.c_int64(0), ctypes.c_int64(size))


def overwrite(segment: Path, size: int) -> None:
    """Makes the first bytes of a segment zeros, whoever owns it: what the store has of it is to be found there no more. No drain
    may read it meanwhile.

    Raises:
        OSError: it cannot be written.
    """
    try:
        fd = os.open(segment, os.O_WRONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        _give_back(fd, size)
        # A system that cannot free it keeps it as it was.
        zeros, place = bytes(1 << 20), 0
        while place < size and (data := _data_from(segment, place)) < size:
            place = data + os.pwrite(fd, zeros[: size - data], data)
        os.fsync(fd)
    finally:
        os.close(fd)


def _data_from(segment: Path, place: int) -> int:
    """Where the next byte is that is not in a hole."""
    with segment.open("rb") as file:
        try:
            return os.lseek(file.fileno(), place, os.SEEK_DATA)
        except OSError as error:
            return sys.maxsize if error.errno == errno.ENXIO else place


def frame(event: Event) -> bytes:
    """One record as it stands in a segment."""
    try:
        payload = ormsgpack.packb(event)
    except (TypeError, ValueError):
        payload = ormsgpack.packb(_packable(event))
    return _HEADER.pack(len(payload), zlib.crc32(payload)) + payload


def _packable(value: Any) -> Any:
    """The same with what msgpack refuses (lone surrogates, huge integers, foreign types) written as text."""
    match value:
        case dict():
            return {str(_packable(key)): _packable(item) for key, item in value.items()}
        case list() | tuple():
            return [_packable(item) for item in value]
        case str():
            return value.encode("utf-8", "backslashreplace").decode()
        case None | bool() | float() | bytes():
            return value
        case int() if -(2**63) <= value < 2**63:
            return value
    return str(value)[:1000].encode("utf-8", "backslashreplace").decode()


def read(segment: Path, position: int = 0) -> Iterator[tuple[Event | None, int]]:
    """The records from `position` on, each with the position after it. Stops before a torn or unreadable tail.

    Damaged records between two good ones are given as `None`, so that their loss can be told. Zeros, which no record begins
    with, are passed over: they were given back.
    """
    with segment.open("rb", buffering=_READING_BYTES) as file:
        size = os.fstat(file.fileno()).st_size
        position = _behind_hole(file, position, size)
        while True:
            file.seek(position)
            found, end = _record(file, position, size)
            if end is None or (found is None and not _goes_on(file, end, size)):
                return
            yield found, end
            position = end


def _behind_hole(file: Any, position: int, size: int) -> int:
    """Where the first record is behind the zeros at a position."""
    file.seek(position)
    if file.read(_HEADER.size) != bytes(_HEADER.size):
        return position
    try:
        place = os.lseek(file.fileno(), position, os.SEEK_DATA)
    except OSError:
        return position
    file.seek(place)
    while block := file.read(1 << 16):
        if rest := block.lstrip(b"\0"):
            first = place + len(block) - len(rest)
            # The length in a record's header may begin with zeros of its own.
            starts = (first - back for back in range(_HEADER.size) if first - back >= position)
            return next((start for start in starts if _good_at(file, start, size)), position)
        place += len(block)
    return position


def _record(file: Any, position: int, size: int) -> tuple[Event | None, int | None]:
    """(event, end), (None, end) when damaged, (None, None) when there is no whole record here."""
    header = file.read(_HEADER.size)
    if len(header) < _HEADER.size:
        return None, None
    length, checksum = _HEADER.unpack(header)
    end = position + _HEADER.size + length
    if not 0 < length <= MAX_RECORD_BYTES or end > size:
        return None, None
    payload = file.read(length)
    if zlib.crc32(payload) != checksum:
        return None, end
    try:
        event = ormsgpack.unpackb(payload)
    except ValueError:
        return None, end
    return (event, end) if isinstance(event, dict) else (None, end)


def _goes_on(file: Any, position: int | None, size: int) -> bool:
    """Whether the lengths from a position on lead to a good record."""
    found = None
    while position is not None and found is None:
        file.seek(position)
        found, position = _record(file, position, size)
    return found is not None


def _good_at(file: Any, position: int, size: int) -> bool:
    file.seek(position)
    return _record(file, position, size)[0] is not None


def format_of(segment: str) -> int:
    """The format of a segment's records, by its name."""
    found = _FORMAT.search(segment)
    return int(found[1]) if found else 1


def claim(segment: Path) -> int | None:
    """An open descriptor that holds the lock of a dead owner's segment, or `None` while its owner lives."""
    try:
        fd = os.open(segment, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        return None
    return fd


def _full(error: OSError, folder: Path) -> JournalFull:
    return JournalFull(
        f"the journal cannot be written: {error.strerror or error} ({folder})",
        hint="free some disk space (or point paths.home at another disk), then resume the run; one that is not on record had not "
        "begun, run it again",
    )
