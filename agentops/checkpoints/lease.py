"""The sole right to run a thread.

Of two that would run one thread, one is told that it is busy. Who holds a lease has a number, and each who takes it has a
higher one; every write compares it with the newest in its own transaction. A writer that lost its lease and does not know
(its connection broke while it stood still, somebody removed its lock) is told so by its next write, and writes nothing.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from contextlib import AbstractAsyncContextManager

from langgraph.checkpoint.serde.base import SerializerProtocol

from agentops.checkpoints.saver import ThreadSaver
from agentops.errors import LeaseLost, ThreadBusy, UsageError
from agentops.settings import Settings

_THREAD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class Lease(ABC):
    """A thread that is held. A class of a place knows what holding it means there."""

    def __init__(self, settings: Settings, thread_id: str) -> None:
        self.settings = settings
        self.thread_id = thread_id

    @abstractmethod
    def saver(self, serde: SerializerProtocol) -> AbstractAsyncContextManager[ThreadSaver]:
        """The thread's checkpoints, to be read and, as long as the lease is held, written; one at a time.

        Raises:
            LeaseLost, StoreBroken, RecordError
        """

    def lost(self, why: str) -> LeaseLost:
        return LeaseLost(
            f"the lease of thread {self.thread_id} was lost: {why}; nothing more was written",
            hint="the run can be resumed from its last step, unless another run went on with the thread: agentops resume RUN",
        )


def busy(thread_id: str) -> ThreadBusy:
    return ThreadBusy(
        f"thread {thread_id} is in use by another run",
        hint="wait for it to end (agentops runs --status running); a new run may have another --thread",
    )


def check_thread_id(thread_id: str) -> str:
    """
    Raises:
        UsageError: it could not be a file's name.
    """
    if not _THREAD.fullmatch(thread_id):
        raise UsageError(
            f"{thread_id[:80]!r} cannot name a thread",
            hint="use up to 128 letters, digits, '.', '_' and '-', a letter or digit first",
        )
    return thread_id
