"""Checkpoints in files: LangGraph's SQLite saver, one file and one owner a thread.

The lease on a thread is an exclusive lock on a file beside its checkpoints; the system drops it when the process dies.
With one file a thread there is never a second process writing it, so SQLite's WAL-reset defect (versions 3.7.0 to
3.51.2) cannot be met. Conversations are for their owner's eyes: folder and files are made so that nobody else can read them.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, ClassVar

import aiosqlite
from langgraph.checkpoint.serde.base import SerializerProtocol
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver

from agentops.checkpoints.lease import Lease, busy
from agentops.checkpoints.saver import ThreadSaver
from agentops.errors import RecordError, StoreBroken
from agentops.settings import Settings

_TAKEN = "another process has taken it"
_LEASE = "CREATE TABLE IF NOT EXISTS lease (one INTEGER PRIMARY KEY CHECK (one = 1), token INTEGER NOT NULL);"
_TAKE = "INSERT INTO lease VALUES (1, 1) ON CONFLICT DO UPDATE SET token = token + 1;"
# Triggers of this connection alone: what LangGraph's saver writes is compared within its own statements, at no further call.
_FENCE = """
CREATE TEMP TRIGGER fence_{table}_{change} BEFORE {change} ON main.{table} WHEN (SELECT token FROM main.lease) IS NOT {token}
BEGIN SELECT RAISE(ABORT, '{taken}'); END;
"""


def checkpoint_folder(settings: Settings) -> Path:
    return settings.paths.home / "threads"


@asynccontextmanager
async def hold(settings: Settings, thread_id: str) -> AsyncIterator[Lease]:
    """
    Raises:
        ThreadBusy, RecordError
    """
    folder = checkpoint_folder(settings)
    try:
        folder.parent.mkdir(0o700, parents=True, exist_ok=True)
        folder.mkdir(0o700, exist_ok=True)
        handle = os.open(folder / f"{thread_id}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise RecordError(f"{folder} cannot be written: {error.strerror}", hint="see: agentops doctor") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise busy(thread_id) from None
        yield _FileLease(settings, thread_id)
    finally:
        os.close(handle)


class _FileLease(Lease):
    _token: int | None = None

    @asynccontextmanager
    async def saver(self, serde: SerializerProtocol) -> AsyncIterator[ThreadSaver]:
        file = checkpoint_folder(self.settings) / f"{self.thread_id}.db"
        _make_private(file)
        async with aiosqlite.connect(file) as connection:
            saver = _SqliteSaver(self, connection, serde=serde)
            try:
                await saver.setup()
                await self._fence(connection)
            except aiosqlite.OperationalError:
                raise  # the disk is full, or the file is locked: what it holds is not in question
            except aiosqlite.DatabaseError as error:
                raise StoreBroken(
                    f"the checkpoints of thread {self.thread_id} cannot be read: {error}",
                    hint=f"move {file} away; the thread then starts anew",
                ) from error
            try:
                yield saver
            finally:
                # LangGraph leaves a run that failed while writes of others are under way: those that have begun come to their
                # end. Closed in the middle of one, the connection would keep the file locked for as long as anything holds its
                # cursor.
                await asyncio.sleep(0)
                async with saver.lock:
                    await connection.rollback()
                    await connection.close()

    async def _fence(self, connection: aiosqlite.Connection) -> None:
        """
        Raises:
            LeaseLost
        """
        # Taken when the thread is first looked at: what others wrote before that is seen.
        await connection.executescript(f"PRAGMA synchronous=FULL; {_LEASE} {_TAKE if self._token is None else ''}")
        async with connection.execute("SELECT token FROM lease") as found:
            newest = [int(token) for (token,) in await found.fetchall()]
        if newest != [self._token or newest[0]]:
            raise self.lost(_TAKEN)
        self._token = newest[0]
        fences = (
            _FENCE.format(table=table, change=change, token=self._token, taken=_TAKEN)
            for table in _SqliteSaver.TABLES
            for change in ("INSERT", "UPDATE", "DELETE")
        )
        await connection.executescript("".join(fences))


class _SqliteSaver(ThreadSaver, AsyncSqliteSaver):
    TABLES: ClassVar = {
        "checkpoints": "checkpoint_ns, checkpoint_id, parent_checkpoint_id, type, checkpoint, metadata",
        "writes": "checkpoint_ns, checkpoint_id, task_id, task_path, idx, channel, type, value",
    }

    def __init__(self, held: Lease, connection: aiosqlite.Connection, *, serde: SerializerProtocol) -> None:
        super().__init__(connection, serde=serde)
        self._held = held

    @asynccontextmanager
    async def _writing(self) -> AsyncIterator[None]:
        try:
            yield
        except aiosqlite.IntegrityError as error:
            async with self.lock:
                await self.conn.rollback()
            if _TAKEN not in str(error):
                raise
            raise self._held.lost(_TAKEN) from error

    @asynccontextmanager
    async def _changing(self) -> AsyncIterator[Any]:
        await self.setup()
        async with self._writing(), self.lock, self.conn.cursor() as cursor:
            try:
                yield cursor
                await self.conn.commit()
            except BaseException:
                await self.conn.rollback()
                raise

    async def _threads(self, cursor: Any, run_ids: Sequence[str]) -> list[str]:
        await cursor.execute("SELECT DISTINCT thread_id FROM checkpoints")
        return [str(row[0]) for row in await cursor.fetchall()]


def _make_private(file: Path) -> None:
    """An empty file that only its owner may read; what SQLite puts beside it inherits that."""
    try:
        # Only ever one that is not there: closing another descriptor of an open database drops SQLite's locks on it.
        os.close(os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        return
    except OSError as error:
        raise RecordError(f"{file} cannot be made: {error.strerror}", hint="see: agentops doctor") from error
