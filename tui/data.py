"""The thread that reads the record, so that no screen ever waits for a disk or a lock.

A screen asks for something to be read and is given the answer in its own thread; when somebody has written to the record, it
is told, and asks again. What goes wrong while reading is told once, as `Trouble`, and is over when reading works again.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from textual.message import Message

from agentops.errors import AgentOpsError
from agentops.settings import Settings
from agentops.store.pages import Pages, open_pages

T = TypeVar("T")
Post = Callable[[Message], object]
_POLL_S = 0.2
_CATCH_UP_S = 1.5
_RETRY_S = 0.5
_SHARE = 4
"""What is read again because of a change rests four times as long as it took: a fifth of one core at most."""


class Changed(Message):
    """Somebody has written to the record, or it can be read again."""


class Trouble(Message):
    """The record cannot be read; None when it can be again."""

    def __init__(self, error: AgentOpsError | None) -> None:
        super().__init__()
        self.error = error


class Answer(Message):
    """What was asked for. To be delivered in the thread of the screens."""

    def __init__(self, deliver: Callable[[], None]) -> None:
        super().__init__()
        self.deliver = deliver


@dataclass(slots=True)
class _Question:
    work: Callable[[Pages], Any]
    deliver: Callable[[Any], None]
    not_before: float


class Reader:
    """Reads for the screens of one application; `post` takes its messages and may be called from any thread. `catch_up` brings
    the record up to date where nobody else does."""

    def __init__(self, settings: Settings, post: Post, catch_up: Callable[[], None] | None = None) -> None:
        self._settings = settings
        self._post = post
        self._catch_up = catch_up
        self._asked: dict[str, _Question] = {}
        self._rest: dict[str, float] = {}
        self._wake = threading.Condition()
        self._stop = False
        self._pages: Pages | None = None
        self._token: int | None = None
        self._trouble: str | None = None
        self._working = 0
        self._caught_up = 0.0
        self._thread = threading.Thread(target=self._loop, name="agentops-reader", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        with self._wake:
            self._stop = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    @property
    def idle(self) -> bool:
        """Whether the record was looked at, and everything asked for was read and delivered or cannot be read now."""
        with self._wake:
            looked = self._token is not None or self._trouble is not None
            return looked and not self._working and (not self._asked or self._trouble is not None)

    def ask(self, name: str, work: Callable[[Pages], T], deliver: Callable[[T], None], *, calm: bool = False) -> None:
        """Has `work` done in the reader's thread and its result given to `deliver`. A question of the same name that still waits
        is replaced. A `calm` one may wait until the last of its name has rested."""
        with self._wake:
            now = time.monotonic()
            self._asked[name] = _Question(work, deliver, max(now, self._rest.get(name, 0)) if calm else now)
            self._wake.notify()

    def _loop(self) -> None:
        polled = 0.0
        while True:
            with self._wake:
                due = min((question.not_before for question in self._asked.values()), default=float("inf"))
                wait_s = min(due, polled + _POLL_S) - time.monotonic()
                if wait_s > 0 and not self._stop:
                    self._wake.wait(wait_s)
                if self._stop:
                    break
            if time.monotonic() >= polled + (_POLL_S if self._trouble is None else _RETRY_S):
                self._poll()
                polled = time.monotonic()
            if self._pages is None:
                # What cannot be read now is asked for again when it can.
                time.sleep(0 if self._trouble is None else 0.02)
                continue
            self._answer()
        self._close()

    def _answer(self) -> None:
        now = time.monotonic()
        with self._wake:
            name = next((name for name, question in self._asked.items() if question.not_before <= now), None)
            if name is None:
                return
            question = self._asked.pop(name)
            self._working += 1
        assert self._pages is not None
        try:
            answer = question.work(self._pages)
        except AgentOpsError as error:
            with self._wake:
                self._working -= 1
                self._asked.setdefault(name, question)
            self._fail(error)
            return
        spent = time.monotonic() - now
        self._rest[name] = now + spent * (1 + _SHARE)

        def deliver() -> None:
            try:
                question.deliver(answer)
            finally:
                with self._wake:
                    self._working -= 1

        self._post(Answer(deliver))

    def _poll(self) -> None:
        try:
            self._keep_up()
            if self._pages is None:
                self._pages = open_pages(self._settings)
                self._token = None
            token = self._pages.change()
        except AgentOpsError as error:
            self._fail(error)
            return
        if self._trouble is not None:
            self._trouble = None
            self._post(Trouble(None))
            self._token = None
        if token != self._token:
            self._token = token
            self._post(Changed())

    def _keep_up(self) -> None:
        if self._catch_up is None or time.monotonic() - self._caught_up < _CATCH_UP_S:
            return
        self._caught_up = time.monotonic()
        journal = self._settings.paths.home / "journal"
        # A record that was taken away is not made anew behind its owner's back.
        if (self._settings.paths.home / "record.db").exists() and journal.is_dir() and any(journal.iterdir()):
            self._catch_up()

    def _fail(self, error: AgentOpsError) -> None:
        self._close()
        if self._trouble != str(error):
            self._trouble = str(error)
            self._post(Trouble(error))

    def _close(self) -> None:
        if self._pages is not None:
            with contextlib.suppress(Exception):
                self._pages.close()
            self._pages = None
