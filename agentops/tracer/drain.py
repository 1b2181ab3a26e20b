"""Moves events from the journal's segments into the store, and tells which runs died with their process.

Any process may drain all segments; they take turns behind the store's lock. Segments are read side by side in the order
of the events' times. A store that is locked, broken or absent keeps the events where they are, in the journal, and never
holds up a run.
"""

from __future__ import annotations

import heapq
import logging
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from agentops.errors import RecordError, StoreBroken, StoreLocked, StoreTooNew, StoreUnavailable
from agentops.settings import Settings
from agentops.tracer.journal import FORMAT, SUFFIX, Event, Journal, claim, format_of, home_id, read
from agentops.tracer.payload import encode_packed

if TYPE_CHECKING:
    from agentops.store import StoreWriter

log = logging.getLogger("agentops.tracer")

_BATCH_EVENTS = 1_000
_BATCH_BYTES = 8_000_000
_CLOSING_WAIT_S = 1.0
_STALLED_S = 5.0
_READING_WAIT_S = 0.3
_FAILURES_TO_TELL = 5
_told_newer: set[str] = set()


@dataclass(frozen=True, slots=True)
class Drained:
    """What a drain did: events stored, damaged records passed over, runs found dead."""

    events: int
    lost: int
    crashed: int


@dataclass(slots=True)
class _Batch:
    events: list[Event] = field(default_factory=list)
    positions: dict[str, int] = field(default_factory=dict)
    lost: dict[str, int] = field(default_factory=dict)
    size: int = 0
    _hashes: dict[tuple[bytes, int], str] = field(default_factory=dict)

    def take(self, event: Event) -> None:
        """Adds an event, and before it the contents that a span's event carries, as events of their own."""
        if event.get("t") == "span":
            for name in ("input", "output"):
                if (packed := event.pop(name, None)) is not None:
                    event[f"{name}_hash"] = self._content(packed, int(event["limit"]))
        self.events.append(event)
        self.size += len(event.get("data", b""))

    def _content(self, packed: bytes, limit: int) -> str:
        if (packed, limit) not in self._hashes:
            made = encode_packed(packed, limit)
            self._hashes[packed, limit] = made.hash
            self.take({"t": "payload", "hash": made.hash, "data": made.data, "truncated": made.truncated})
        return self._hashes[packed, limit]


def drain(folder: Path, writer: StoreWriter) -> Drained:
    """Reads all segments from where they were left, stores what is new, and removes those of dead owners.

    A dead owner's segment with bytes that cannot be read, or with damaged records, is kept as `*.damaged`. Segments that a newer
    version wrote stay as they are, and their owners count as living.

    Raises:
        StoreLocked, StoreBroken, RecordError (within the block of `open_writer`)
    """
    found = {path.name: path for path in sorted(folder.glob("*" + SUFFIX))}
    segments = {name: path for name, path in found.items() if format_of(name) <= FORMAT}
    if newer := found.keys() - segments.keys() - _told_newer:
        _told_newer.update(newer)
        log.warning(
            "%d journal segments in %s were written by a newer version and are left for it, with what they hold: "
            "upgrade agentops-runtime",
            *(len(newer), folder),
        )
    # Claimed before it is read: a dead owner adds nothing more.
    dead = {name: fd for name, path in segments.items() if (fd := claim(path)) is not None}
    try:
        positions = writer.positions()
        stored, lost = 0, dict.fromkeys(segments, 0)
        for batch in _batches(segments, positions):
            writer.apply(batch.events, batch.positions, batch.lost)
            positions.update(batch.positions)
            stored += len(batch.events)
            for name, count in batch.lost.items():
                lost[name] += count
        home = home_id(folder)
        crashed = writer.bury([name for name in found if name not in dead], home=home)
        writer.forget(list(found), home=home)
        for name, fd in dead.items():
            _remove(segments[name], os.fstat(fd).st_size - positions.get(name, 0), lost[name])
    finally:
        for fd in dead.values():
            os.close(fd)
    return Drained(stored, sum(lost.values()), crashed)


def _batches(segments: dict[str, Path], positions: dict[str, int]) -> Iterator[_Batch]:
    streams = [_following(name, path, positions.get(name, 0)) for name, path in segments.items()]
    batch = _Batch()
    for _, name, event, position in heapq.merge(*streams, key=lambda item: item[0]):
        batch.positions[name] = position
        if event is None:
            batch.lost[name] = batch.lost.get(name, 0) + 1
        else:
            batch.take(event)
        if len(batch.events) >= _BATCH_EVENTS or batch.size >= _BATCH_BYTES:
            yield batch
            batch = _Batch()
    if batch.positions:
        yield batch


def _following(name: str, path: Path, position: int) -> Iterator[tuple[int, str, Event | None, int]]:
    last_ns = 0
    for event, end in read(path, position):
        # Never backwards within a segment, whatever the wall clock did.
        last_ns = max(last_ns, _time_of(event))
        yield last_ns, name, event, end


def _time_of(event: Event | None) -> int:
    ns = (event or {}).get("ns")
    return ns if isinstance(ns, int) else 0


def _remove(segment: Path, unread: int, lost: int) -> None:
    segment.with_suffix(".reserve").unlink(missing_ok=True)
    if unread or lost:
        kept = segment.rename(segment.with_suffix(".damaged"))
        log.warning("the journal segment %s has %d unreadable bytes and %d damaged records; it is kept", kept, unread, lost)
    else:
        segment.unlink()


class Drainer:
    """Drains in a background thread of the running process, every `record.drain_ms` in which something was written."""

    def __init__(self, settings: Settings, journal: Journal) -> None:
        self._settings = settings
        self._journal = journal
        self._drained_size = 0
        self._stop = threading.Event()
        self._turn = threading.Lock()
        self._behind = 0
        self._told: set[str] = set()
        self.failures = 0
        self._thread = threading.Thread(target=self._loop, name="agentops-drainer", daemon=True)
        self._thread.start()

    def _loop(self) -> None:
        pause_s = self._settings.record.drain_ms / 1000
        while not self._stop.wait(pause_s):
            if self._journal.size != self._drained_size:
                self.attempt(timeout_s=pause_s)

    def attempt(self, *, timeout_s: float) -> bool:
        """Drains once; False when the store did not take it. The backlog stays in the journal."""
        from agentops.store import open_writer

        if not self._turn.acquire(timeout=timeout_s):
            return False
        try:
            size = self._journal.size
            try:
                with open_writer(self._settings, timeout_s=timeout_s) as writer:
                    drain(self._journal.folder, writer)
                    segment = self._journal.segment
                    self._journal.drained(segment, writer.positions().get(segment, 0))
            except Exception as error:
                self.failures += 1
                self._behind += 1
                # A short wait for another writer is no news.
                if self._behind >= _FAILURES_TO_TELL and (kind := type(error).__name__) not in self._told:
                    self._told.add(kind)
                    log.warning("the record is behind; events wait in the journal: %s", str(error).split("\n", 1)[0])
                return False
            self._drained_size = size
            self._behind = 0
            return True
        finally:
            self._turn.release()

    def close(self) -> None:
        """Ends the thread; a drain under way is finished first, unless its server stalls."""
        self._stop.set()
        if self._thread is not threading.current_thread():
            self._thread.join(_STALLED_S)

    def finish(self) -> None:
        """The last drain, after the journal was closed. Does not wait long: the next process takes over what is left."""
        if self._journal.size:
            self.attempt(timeout_s=_CLOSING_WAIT_S)


def catch_up(settings: Settings, *, wait: bool = False) -> None:
    """Before the record is read: stores what journals still hold, and finds runs whose process died.

    Gives up soon when another process writes, as that one drains too; with `wait`, for readers that must not miss the end of a
    run, after `record.lock_timeout_s`, and says so.

    Raises:
        StoreTooNew, StoreBroken; with `wait`, StoreLocked and StoreUnavailable.
    """
    from agentops.store import open_writer

    folder = settings.paths.home / "journal"
    if not folder.is_dir():
        return
    try:
        longest_s = settings.record.lock_timeout_s
        with open_writer(settings, timeout_s=longest_s if wait else min(_READING_WAIT_S, longest_s)) as writer:
            drain(folder, writer)
    except (StoreTooNew, StoreBroken):
        raise
    except (RecordError, OSError) as error:
        if wait and isinstance(error, StoreLocked | StoreUnavailable):
            raise
        log.info("the record may be behind: %s", error)
