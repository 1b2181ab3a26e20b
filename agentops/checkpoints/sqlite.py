"""Checkpoints in files: LangGraph's SQLite saver, one file and one owner a thread.

The lease on a thread is an exclusive lock on a file beside its checkpoints; the system drops it when the process dies.
With one file a thread there is never a second process writing it, so SQLite's WAL-reset defect (versions 3.7.0 to
3.51.2) cannot be met.
What is to be written goes to the connection's thread as far as it is there, and onto the disk in one transaction: a step of a
graph costs one way there and back and one fsync, however many tasks it has. Conversations are for their owner's eyes: folder
and files are made so that nobody else can read them.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, closing, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, ClassVar, ParamSpec, TypeVar

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import ChannelVersions, Checkpoint, CheckpointMetadata, CheckpointTuple, DeltaChannelHistory
from langgraph.checkpoint.serde.base import SerializerProtocol
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver

from agentops.checkpoints.lease import Lease, busy
from agentops.checkpoints.saver import ThreadSaver
from agentops.errors import JournalFull, RecordError, StoreBroken
from agentops.settings import Settings

P = ParamSpec("P")
T = TypeVar("T")
_TAKEN = "another process has taken it"
_GATHERED_S = 0.001
"""How long what a task has written waits for what else belongs to its step. The step's checkpoint waits for nothing."""
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
        thread = ThreadPoolExecutor(1, f"checkpoints-{self.thread_id[:20]}")
        try:
            connection = await _there(thread, sqlite3.connect, file, check_same_thread=False)
            try:
                saver = _SqliteSaver(self, connection, thread, serde=serde)
                try:
                    await _there(thread, self._fence, saver)
                except sqlite3.OperationalError as error:
                    # What it holds is not in question.
                    full = "full" in str(error) or "disk I/O" in str(error)
                    kind, hint = (JournalFull, "make room, then run it again") if full else (RecordError, "see: agentops doctor")
                    said = f"the checkpoints of thread {self.thread_id} cannot be written: {error} ({file})"
                    raise kind(said, hint=hint) from error
                except sqlite3.DatabaseError as error:
                    raise StoreBroken(
                        f"the checkpoints of thread {self.thread_id} cannot be read: {error}",
                        hint=f"move {file} away; the thread then starts anew",
                    ) from error
                try:
                    yield saver
                finally:
                    # LangGraph leaves a run that failed while writes of others are under way: those that have begun come to
                    # their end.
                    await asyncio.sleep(0)
                    await saver.settle()
            finally:
                await _there(thread, connection.close)
        finally:
            thread.shutdown(wait=False)

    def _fence(self, saver: _SqliteSaver) -> None:
        """
        Raises:
            LeaseLost
        """
        saver.statements.setup()
        connection = saver.statements.conn
        # Taken when the thread is first looked at: what others wrote before that is seen.
        connection.executescript(f"PRAGMA synchronous=FULL; {_LEASE} {_TAKE if self._token is None else ''}")
        newest = [int(token) for (token,) in connection.execute("SELECT token FROM lease")]
        if newest != [self._token or newest[0]]:
            raise self.lost(_TAKEN)
        self._token = newest[0]
        fences = (
            _FENCE.format(table=table, change=change, token=self._token, taken=_TAKEN)
            for table in saver.TABLES
            for change in ("INSERT", "UPDATE", "DELETE")
        )
        connection.executescript("".join(fences))


async def _there(thread: ThreadPoolExecutor, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What `work` returns in that thread. Once it has begun, it is waited for, cancelled or not."""
    running = asyncio.get_running_loop().run_in_executor(thread, lambda: work(*args, **kwargs))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait([running])
        raise


_Statement = tuple[str, Sequence[Any]]


class _Statements(SqliteSaver):
    """LangGraph's synchronous saver. What it would write is not executed but collected, in the form for `executemany`."""

    def __init__(self, connection: sqlite3.Connection, *, serde: SerializerProtocol) -> None:
        super().__init__(connection, serde=serde)
        self._collected: list[_Statement] = []

    @contextmanager
    def cursor(self, transaction: bool = True) -> Iterator[Any]:
        if transaction:
            yield self
            return
        with closing(self.conn.cursor()) as cursor:
            yield cursor

    def execute(self, query: str, arguments: Sequence[Any]) -> None:
        self.executemany(query, [arguments])

    def executemany(self, query: str, rows: Sequence[Any]) -> None:
        self._collected.append((query, rows))

    def take(self) -> list[_Statement]:
        found, self._collected = self._collected, []
        return found


class _OneThread(AsyncSqliteSaver):
    """LangGraph's synchronous saver for asynchronous callers: values are packed by the caller, and SQLite has a thread."""

    def __init__(self, connection: sqlite3.Connection, thread: ThreadPoolExecutor, *, serde: SerializerProtocol) -> None:
        super().__init__(None, serde=serde)  # type: ignore[arg-type]  # all that would use its connection is below
        self.statements = _Statements(connection, serde=serde)
        self._thread = thread
        self._waiting: list[tuple[list[_Statement], asyncio.Future[None]]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._writer: asyncio.Task[None] | None = None

    async def setup(self) -> None:
        """It was made with all it needs."""

    async def settle(self) -> None:
        """Returns when all that was to be written is, or could not be."""
        self._write()
        while self._writer is not None:
            await asyncio.wait([self._writer])

    async def aput(
        self, config: RunnableConfig, checkpoint: Checkpoint, metadata: CheckpointMetadata, new_versions: ChannelVersions
    ) -> RunnableConfig:
        saved = self.statements.put(config, checkpoint, metadata, new_versions)
        await self._written(self.statements.take(), at_once=True)
        return saved

    async def aput_writes(
        self, config: RunnableConfig, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str = ""
    ) -> None:
        self.statements.put_writes(config, writes, task_id, task_path)
        await self._written(self.statements.take(), at_once=False)

    async def adelete_thread(self, thread_id: str) -> None:
        self.statements.delete_thread(thread_id)
        await self._written(self.statements.take(), at_once=True)

    async def aget_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        return await self._read(self.statements.get_tuple, config)

    async def alist(
        self,
        config: RunnableConfig | None,
        *,
        filter: dict[str, Any] | None = None,
        before: RunnableConfig | None = None,
        limit: int | None = None,
    ) -> AsyncIterator[CheckpointTuple]:
        found = self.statements.list(config, filter=filter, before=before, limit=limit)
        try:
            while (one := await self._read(next, found, None)) is not None:
                yield one
        finally:
            with suppress(RuntimeError):  # the thread has come to its end, and the connection with it
                self._thread.submit(found.close)  # type: ignore[attr-defined]  # it is a generator

    async def aget_delta_channel_history(
        self, *, config: RunnableConfig, channels: Sequence[str]
    ) -> Mapping[str, DeltaChannelHistory]:
        return await self._read(self.statements.get_delta_channel_history, config=config, channels=channels)

    async def _read(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        # What was written before is seen, also where it still waits.
        self._write()
        async with self.lock:
            return await _there(self._thread, work, *args, **kwargs)

    async def _written(self, statements: list[_Statement], *, at_once: bool) -> None:
        done: asyncio.Future[None] = self.loop.create_future()
        self._waiting.append((statements, done))
        if at_once:
            self._write()
        elif self._timer is None:
            self._timer = self.loop.call_later(_GATHERED_S, self._write)
        await done

    def _write(self) -> None:
        """Has all that waits written."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._waiting and self._writer is None:
            # A task of its own: who waits for one of the group may be cancelled.
            self._writer = self.loop.create_task(self._write_groups())

    async def _write_groups(self) -> None:
        try:
            while self._waiting:
                async with self.lock:
                    group, self._waiting = self._waiting, []
                    errors = await _there(self._thread, self._transaction, [statements for statements, _ in group])
                for (_, done), error in zip(group, errors, strict=True):
                    if done.done():
                        continue
                    if error is None:
                        done.set_result(None)
                    else:
                        done.set_exception(error)
        finally:
            self._writer = None

    def _transaction(self, group: list[list[_Statement]]) -> list[Exception | None]:
        """Writes all in one transaction, or, where that fails, each in one of its own; what befell each."""
        connection = self.statements.conn
        try:
            for statements in group:
                for query, rows in statements:
                    connection.executemany(query, rows)
            connection.commit()
        except Exception as error:  # a name that is no UTF-8 is no error of SQLite's; whoever waits is told of it all the same
            connection.rollback()
            if len(group) == 1:
                return [error]
            return [self._transaction([one])[0] for one in group]
        return [None] * len(group)


class _SqliteSaver(ThreadSaver, _OneThread):
    TABLES: ClassVar = {
        "checkpoints": "checkpoint_ns, checkpoint_id, parent_checkpoint_id, type, checkpoint, metadata",
        "writes": "checkpoint_ns, checkpoint_id, task_id, task_path, idx, channel, type, value",
    }

    def __init__(
        self, held: Lease, connection: sqlite3.Connection, thread: ThreadPoolExecutor, *, serde: SerializerProtocol
    ) -> None:
        super().__init__(connection, thread, serde=serde)
        self._held = held
        # What cannot be packed is refused before anything is waited for.
        self._order = nullcontext()

    @asynccontextmanager
    async def _writing(self) -> AsyncIterator[None]:
        try:
            yield
        except sqlite3.IntegrityError as error:
            if _TAKEN not in str(error):
                raise
            raise self._held.lost(_TAKEN) from error

    @asynccontextmanager
    async def _changing(self) -> AsyncIterator[Any]:
        await self.settle()
        async with self._writing(), self.lock:
            connection = self.statements.conn
            cursor = _Cursor(connection.cursor(), self._thread)
            try:
                yield cursor
                await _there(self._thread, connection.commit)
            except BaseException:
                await _there(self._thread, connection.rollback)
                raise

    async def _threads(self, cursor: Any, run_ids: Sequence[str]) -> list[str]:
        await cursor.execute("SELECT DISTINCT thread_id FROM checkpoints")
        return [str(row[0]) for row in await cursor.fetchall()]


class _Cursor:
    def __init__(self, cursor: sqlite3.Cursor, thread: ThreadPoolExecutor) -> None:
        self._cursor = cursor
        self._thread = thread

    async def execute(self, query: str, arguments: Sequence[Any] = ()) -> None:
        await _there(self._thread, self._cursor.execute, query, arguments)

    async def executemany(self, query: str, rows: Sequence[Sequence[Any]]) -> None:
        await _there(self._thread, self._cursor.executemany, query, rows)

    async def fetchall(self) -> list[Any]:
        return await _there(self._thread, self._cursor.fetchall)


def _make_private(file: Path) -> None:
    """An empty file that only its owner may read; what SQLite puts beside it inherits that."""
    try:
        # Only ever one that is not there: closing another descriptor of an open database drops SQLite's locks on it.
        os.close(os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        return
    except OSError as error:
        raise RecordError(f"{file} cannot be made: {error.strerror}", hint="see: agentops doctor") from error
