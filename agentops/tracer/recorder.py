"""The tracer of a process: its journal, the thread that drains it, and what it has already written.

It starts runs and puts their events into the journal, contents once each. What the events are is told by the runs.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from agentops.clock import Clock, Ids
from agentops.errors import JournalFull, SettingsError
from agentops.records import ExperimentStatus, PromptVersion, RunStatus, Score
from agentops.settings import Settings
from agentops.tracer.drain import Drainer
from agentops.tracer.effects import Effects
from agentops.tracer.journal import Event, Journal
from agentops.tracer.meter import Meter
from agentops.tracer.payload import counted, encode, pack, redacted, to_plain
from agentops.tracer.redaction import Redactor, load_redactor
from agentops.tracer.sampling import load_sampling
from agentops.tracer.trace import RunTrace

log = logging.getLogger("agentops.tracer")

_KNOWN_CONTENTS = 20_000
TRUSTED_S = 600.0
"""What this process wrote so long ago it writes again when it is named: it may have been removed from the record since."""


class Tracer:
    """Owns this process's journal and the thread that drains it. Make it with `open_tracer`."""

    def __init__(
        self,
        settings: Settings,
        journal: Journal,
        *,
        clock: Clock,
        ids: Ids,
        drainer: Drainer,
        redactor: Redactor | None = None,
    ) -> None:
        self.settings = settings
        self._redactor = redactor
        self.journal = journal
        self.clock = clock
        self.ids = ids
        self.drainer = drainer
        self.faults = 0
        self._lock = threading.Lock()
        self.sampling = load_sampling(settings)
        self._known: OrderedDict[str, float] = OrderedDict()

    def start_run(
        self,
        *,
        run_id: str,
        thread_id: str,
        graph: str,
        input: Any = None,
        settings: Mapping[str, Any] | None = None,
        resumed: bool = False,
        after_ns: int = 0,
        tags: tuple[str, ...] = (),
        meter: Meter | None = None,
        effects: Effects | None = None,
    ) -> RunTrace:
        """Writes that the run is running, then gives the trace to record it with.

        A resumed run keeps what was stored when it began (graph, input, time of start); it gets one more workflow span,
        whose input is what it was resumed with, and its times are after `after_ns`, whatever this machine's clock says. `meter`
        refuses model calls beyond a budget; `effects` are what its nodes get from outside, those that happen where none are
        given.

        Raises:
            JournalFull: the run must not start.
        """
        now_ns = max(self.clock.now_ns(), after_ns)
        row: Event = {
            "t": "run",
            "ns": now_ns,
            "id": run_id,
            "thread_id": thread_id,
            "graph": graph,
            "status": "running",
            "started_ns": now_ns,
            "pid": os.getpid(),
            "segment": self.journal.segment,
            "settings": dict(settings or {}),
            "tags": list(tags),
        }
        run = RunTrace(self, row, effects or Effects(), meter)
        run.start(f"{graph} (resumed)" if resumed else graph, input)
        return run

    def score(
        self,
        score: Score,
        *,
        run_id: str,
        span_id: str | None = None,
        experiment_id: str | None = None,
        case_id: str | None = None,
        author: str = "",
    ) -> str:
        """Records a score of a run or a span, and returns its id. Scores are added and never changed.

        Raises:
            JournalFull
        """
        row = {
            "t": "score",
            "id": (key := self.ids.new("sc")),
            "created_ns": self.clock.now_ns(),
            "run_id": run_id,
            "span_id": span_id,
            "experiment_id": experiment_id,
            "case_id": case_id,
            "author": author,
            **asdict(score),
            "details": to_plain(score.details),
        }
        self.write([row])
        return key

    def experiment(
        self,
        *,
        id: str,
        name: str,
        dataset: str,
        dataset_hash: str,
        graph: str,
        status: ExperimentStatus,
        cases: int,
        started_ns: int,
        settings: Mapping[str, Any],
        error: str | None = None,
    ) -> None:
        """Records that an experiment begins, goes on, or has ended; what it was begun with stays.

        Raises:
            JournalFull
        """
        ended_ns = None if status == "running" else self.clock.now_ns()
        owner = {"pid": os.getpid(), "segment": self.journal.segment}
        about = {"id": id, "name": name, "dataset": dataset, "dataset_hash": dataset_hash, "graph": graph, "cases": cases}
        times = {"started_ns": started_ns, "ended_ns": ended_ns}
        self.write([{"t": "experiment", **about, **times, **owner, "status": status, "error": error, "settings": dict(settings)}])

    def case(
        self,
        *,
        experiment_id: str,
        case_id: str,
        place: int,
        status: RunStatus,
        run_id: str | None = None,
        error: str | None = None,
    ) -> None:
        """Records how far a case of an experiment is.

        Raises:
            JournalFull
        """
        about = {"experiment_id": experiment_id, "case_id": case_id, "place": place, "run_id": run_id}
        self.write([{"t": "case", **about, "status": status, "error": error}])

    def content(self, value: Any) -> str:
        """Keeps a JSON value and returns its hash, for `Store.payload`.

        Raises:
            JournalFull
        """
        events: list[Event] = []
        key = self.payload(value, events)
        self.write(events)
        return key

    def close(self) -> None:
        """Drains what can be drained in a short time, and gives the journal up. Closing twice is harmless."""
        self.drainer.close()
        self.journal.close()
        self.drainer.finish()

    def flush(self) -> bool:
        """Drains now, waiting for the store at most `record.lock_timeout_s`; False when it did not take the events."""
        return self.drainer.attempt(timeout_s=self.settings.record.lock_timeout_s)

    def fault(self) -> None:
        with self._lock:
            self.faults += 1
            first = self.faults == 1
        if first:
            log.warning("an event could not be recorded as it should be; the run goes on", exc_info=True)

    def write(self, events: list[Event], *, last_word: bool = False) -> None:
        if self._redactor is not None:
            events = [redacted(event, self._redactor) for event in events]
        try:
            self.journal.append(*events, last_word=last_word)
        except JournalFull:
            # What these events were to bring into the store has to be brought again.
            with self._lock:
                for event in events:
                    key = f"{event['name']}\0{event['version']}" if event["t"] == "prompt" else str(event.get("hash", ""))
                    self._known.pop(key, None)
            raise

    def payload(self, value: Any, events: list[Event], of: Event | None = None, *, redact: bool = True) -> str:
        """The hash of a value's JSON; adds an event with the content unless this process wrote it a short time ago. What
        redaction has done to it is told in the attributes of the span that it is `of`."""
        found = encode(value, self.settings.record.payload_bytes, self._redactor if redact else None)
        if of is not None and (found.redacted or found.unredacted):
            of["attributes"] = counted(of.get("attributes") or {}, found.redacted, found.unredacted)
        if self._new(found.hash):
            ns = self.clock.now_ns()
            events.insert(0, {"t": "payload", "ns": ns, "hash": found.hash, "data": found.data, "truncated": found.truncated})
        return found.hash

    def carried(self, name: str, value: Any, row: Event, events: list[Event]) -> Event:
        """What a span's event carries of its input or output as it is now: JSON and hash are made when it is drained. What that
        is not possible for, and what has to be redacted first, is encoded now and named in the row."""
        limit = self.settings.record.payload_bytes
        if self._redactor is None and (packed := pack(value, limit)) is not None:
            return {name: packed, "limit": limit}
        row[f"{name}_hash"] = self.payload(value, events, row)
        return {}

    def prompt(self, prompt: PromptVersion, events: list[Event]) -> None:
        if self._new(f"{prompt.name}\0{prompt.version}"):
            events.insert(0, {"t": "prompt", "ns": self.clock.now_ns(), **asdict(prompt)})

    def _new(self, key: str) -> bool:
        now = time.monotonic()
        with self._lock:
            if now < self._known.get(key, 0.0):
                return False
            self._known[key] = now + TRUSTED_S
            self._known.move_to_end(key)
            if len(self._known) > _KNOWN_CONTENTS:
                self._known.popitem(last=False)
            return True


def open_tracer(settings: Settings, *, clock: Clock, ids: Ids) -> Tracer:
    """A tracer for this process, with its journal in `<paths.home>/journal`, drained in the background.

    Raises:
        JournalFull: the folder cannot be written.
        SettingsError: a rule of `record.redact` cannot be used.
    """
    journal = Journal(settings.paths.home / "journal", limit_bytes=settings.record.journal_bytes)
    try:
        redactor = load_redactor(settings)
    except SettingsError:
        journal.close()
        raise
    return Tracer(settings, journal, clock=clock, ids=ids, drainer=Drainer(settings, journal), redactor=redactor)
