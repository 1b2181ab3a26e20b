"""The thread that reads the record, so that no screen ever waits for a disk or a lock.

A screen asks for something to be read and is given the answer in its own thread; when somebody has written to the record, it
is told, and asks again. What goes wrong while reading is told once, as `Trouble`, and is over when reading works again; whatever
it is, the thread goes on.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from textual.message import Message

from agentops.errors import AgentOpsError, RecordError, StoreLocked
from agentops.settings import Settings
from agentops.store.opening import open_database
from agentops.store.pages import Pages, open_pages

T = TypeVar("T")
Post = Callable[[Message], object]
_POLL_S = 0.2
_CATCH_UP_S = 1.5
_RETRY_S = 0.5
_SHARE = 4
"""What is read again because of a change rests four times as long as it took: a fifth of one core at most."""
_TRIES = 3
"""A question that fails so often, although the record can be opened and nobody holds it, fails for a reason of its own."""
_JOURNALS = "journals"


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
        self._trouble: AgentOpsError | None = None
        self._faults: dict[str, AgentOpsError] = {}
        self._tries: dict[str, int] = {}
        self._told = ""
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
        except Exception as error:
            self._failed(name, question, error, time.monotonic() - now)
            return
        self._rest[name] = now + (time.monotonic() - now) * (1 + _SHARE)
        self._right(name)

        def deliver() -> None:
            try:
                question.deliver(answer)
            finally:
                with self._wake:
                    self._working -= 1

        self._say(Answer(deliver))

    def _failed(self, name: str, question: _Question, error: Exception, spent: float) -> None:
        """What the record is to blame for is asked again when it can be read; what is the question's own fault is not."""
        self._tries[name] = tries = self._tries.get(name, 0) + (not isinstance(error, StoreLocked))
        again = isinstance(error, AgentOpsError) and tries < _TRIES
        with self._wake:
            self._working -= 1
            if again:
                self._asked.setdefault(name, question)
        if again:
            self._fail(_known(error))
        else:
            self._rest[name] = time.monotonic() + max(_RETRY_S, spent * _SHARE)
            self._faults[name] = _known(error)
            self._tell()

    def _poll(self) -> None:
        try:
            self._keep_up()
            if self._pages is None:
                self._pages = open_pages(self._settings)
                self._token = None
            token = self._pages.change()
        except Exception as error:
            self._fail(_known(error))
            return
        if self._trouble is not None:
            self._trouble = None
            self._tell()
            self._token = None
        if token != self._token:
            self._token = token
            self._say(Changed())

    def _keep_up(self) -> None:
        if self._catch_up is None or time.monotonic() - self._caught_up < _CATCH_UP_S:
            return
        self._caught_up = time.monotonic()
        journal = self._settings.paths.home / "journal"
        try:
            # A record that was taken away is not made anew behind its owner's back.
            if open_database(self._settings).exists() and journal.is_dir() and any(journal.glob("*.seg")):
                self._catch_up()
        except AgentOpsError:
            raise
        except Exception as error:
            # What is on record can be read all the same.
            self._faults[_JOURNALS] = _known(error)
            self._tell()
        else:
            if self._faults.pop(_JOURNALS, None):
                self._tell()

    def _fail(self, error: AgentOpsError) -> None:
        self._close()
        self._trouble = error
        self._tell()

    def _right(self, name: str) -> None:
        """An answer ends its own fault, and those of screens that are no longer asked for."""
        self._tries.pop(name, None)
        screen = name.partition(".")[0]
        left = {
            other: error
            for other, error in self._faults.items()
            if other == _JOURNALS or (other != name and other.partition(".")[0] == screen)
        }
        if len(left) < len(self._faults):
            self._faults = left
            self._tell()

    def _tell(self) -> None:
        error = self._trouble or next(iter(self._faults.values()), None)
        if (said := str(error or "")) != self._told:
            self._told = said
            self._say(Trouble(error))

    def _say(self, message: Message) -> None:
        # The application may be over by now.
        with contextlib.suppress(RuntimeError):
            self._post(message)

    def _close(self) -> None:
        if self._pages is not None:
            with contextlib.suppress(Exception):
                self._pages.close()
            self._pages = None


def _known(error: Exception) -> AgentOpsError:
    """An error that can be shown."""
    if isinstance(error, AgentOpsError):
        return error
    said = f"this cannot be read: {type(error).__name__}: {error}"
    return RecordError(said[:300], hint="the rest goes on; what it is about is in: agentops show")
