"""Checkpoints in a Postgres: LangGraph's saver, over one connection for each thread that is held.

The lease on a thread is an advisory lock of that connection's session; the server drops it when the process dies or the
connection breaks. All that is written goes through the same connection, so that who lost the lock cannot write, and each
transaction compares the lease's number besides. A pooler that changes the session between transactions keeps no lease.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any, ClassVar

import psycopg
from langgraph.checkpoint.base import Checkpoint
from langgraph.checkpoint.postgres.aio import AsyncPostgresSaver
from langgraph.checkpoint.serde.base import SerializerProtocol
from psycopg.rows import DictRow, dict_row, tuple_row

from agentops.checkpoints.lease import Lease, busy
from agentops.checkpoints.saver import ThreadSaver
from agentops.checkpoints.serde import Whole
from agentops.errors import JournalFull
from agentops.postgres import arguments, translation, where
from agentops.settings import Settings

_PATIENCE_MS = 700
"""How long a lease is waited for: the server needs a moment to see that the process of the one before has died."""

_PLAIN_CHARACTERS = 2_000

# A machine that vanished without a word holds no lease for longer than half a minute. What is acknowledged is on the disk.
_SESSION = """
SELECT set_config('tcp_keepalives_idle', '15', false), set_config('tcp_keepalives_interval', '5', false),
    set_config('tcp_keepalives_count', '3', false),
    CASE current_setting('synchronous_commit') WHEN 'off' THEN set_config('synchronous_commit', 'on', false) END
"""
_LEASES = "CREATE TABLE IF NOT EXISTS checkpoint_leases (thread_id TEXT PRIMARY KEY, token BIGINT NOT NULL)"
_TAKE = """
INSERT INTO checkpoint_leases AS held (thread_id, token) VALUES (%s, 1)
ON CONFLICT (thread_id) DO UPDATE SET token = held.token + 1
RETURNING token, (SELECT max(v) FROM checkpoint_migrations) AS version
"""
# An error of the server's where the number is another, so that it needs no answer before what is written is sent. While the
# transaction lasts, the lock on the row keeps the thread from being taken.
_FENCE = """
SELECT 1 / count(*) FROM (SELECT FROM checkpoint_leases WHERE thread_id = %s AND token = %s FOR SHARE) AS held
"""
_UNUSED_VALUES = """
DELETE FROM checkpoint_blobs AS kept WHERE kept.thread_id = ? AND NOT EXISTS (
    SELECT FROM (
        SELECT DISTINCT c.checkpoint_ns, v.key, v.value
        FROM checkpoints AS c CROSS JOIN LATERAL jsonb_each_text(c.checkpoint -> 'channel_versions') AS v
        WHERE c.thread_id = ?
    ) AS used
    WHERE used.checkpoint_ns = kept.checkpoint_ns AND used.key = kept.channel AND used.value = kept.version
)
"""


@asynccontextmanager
async def hold(settings: Settings, thread_id: str) -> AsyncIterator[Lease]:
    """
    Raises:
        ThreadBusy
        StoreUnavailable: no server answers, or it refuses the user.  RecordError
    """
    url = settings.record.url
    how = arguments(url)
    try:
        connection = await psycopg.AsyncConnection.connect(**how, autocommit=True, prepare_threshold=0, row_factory=dict_row)
    except psycopg.Error as error:
        raise translation(error, url) from error
    try:
        try:
            await connection.execute(_SESSION)
            token = await _take(connection, thread_id)
        except psycopg.errors.LockNotAvailable:
            raise busy(thread_id) from None
        except psycopg.Error as error:
            raise translation(error, url) from error
        yield _SessionLease(settings, thread_id, connection, token)
    finally:
        await connection.close()


async def _take(connection: psycopg.AsyncConnection[DictRow], thread_id: str) -> int:
    try:
        async with connection.transaction():
            await connection.execute(f"SET LOCAL lock_timeout = {_PATIENCE_MS}")
            await connection.execute("SELECT pg_advisory_lock(%s)", (_number(f"thread {thread_id}"),))
            taken = await (await connection.execute(_TAKE, (thread_id,))).fetchone()
    except psycopg.errors.UndefinedTable:
        taken = None
    if taken is not None and taken["version"] is not None and taken["version"] >= len(AsyncPostgresSaver.MIGRATIONS) - 1:
        return int(taken["token"])
    await _set_up(connection)
    return await _take(connection, thread_id)


async def _set_up(connection: psycopg.AsyncConnection[DictRow]) -> None:
    """Makes the tables, or brings them up to date; processes take turns."""
    turn = (_number("set up"),)
    while True:
        mine = await (await connection.execute("SELECT pg_try_advisory_lock(%s) AS mine", turn)).fetchone()
        if mine is not None and mine["mine"]:
            break
        await asyncio.sleep(0.05)  # asked in the server, the lock would hold up the indexes that its holder makes
    try:
        await AsyncPostgresSaver(connection).setup()
        await connection.execute(_LEASES)
    finally:
        await connection.execute("SELECT pg_advisory_unlock(%s)", turn)


def _number(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"agentops {name}".encode(), digest_size=8).digest(), signed=True)


class _SessionLease(Lease):
    def __init__(self, settings: Settings, thread_id: str, connection: psycopg.AsyncConnection[DictRow], token: int) -> None:
        super().__init__(settings, thread_id)
        self.connection = connection
        self._token = token

    @asynccontextmanager
    async def saver(self, serde: SerializerProtocol) -> AsyncIterator[ThreadSaver]:
        saver = _PostgresSaver(self, serde=serde)
        try:
            yield saver
        finally:
            # What LangGraph has begun to write comes to its end, and nothing begins afterwards.
            await asyncio.sleep(0)
            async with saver.lock:
                pass

    async def check(self, cursor: psycopg.AsyncCursor[Any]) -> None:
        """Within a transaction: that it fails where the lease was lost."""
        await cursor.execute(_FENCE, (self.thread_id, self._token))

    @contextmanager
    def translated(self) -> Iterator[None]:
        """The driver's errors as ours."""
        try:
            yield
        except psycopg.errors.DivisionByZero as error:
            raise self.lost("another process has taken it") from error
        except psycopg.Error as error:
            url = self.settings.record.url
            if self.connection.closed:
                raise self.lost(f"the connection to the Postgres at {where(url)} broke") from error
            if isinstance(error, psycopg.errors.DiskFull):
                said = f"no checkpoint could be written: the Postgres at {where(url)} has no room"
                raise JournalFull(said, hint="make room, then go on with: agentops resume RUN") from error
            raise translation(error, url) from error


class _PostgresSaver(ThreadSaver, AsyncPostgresSaver):
    TABLES: ClassVar = {
        "checkpoints": "checkpoint_ns, checkpoint_id, parent_checkpoint_id, type, checkpoint, metadata",
        "checkpoint_blobs": "checkpoint_ns, channel, version, type, blob",
        "checkpoint_writes": "checkpoint_ns, checkpoint_id, task_id, task_path, idx, channel, type, blob",
    }

    def __init__(self, held: _SessionLease, *, serde: SerializerProtocol) -> None:
        super().__init__(held.connection, serde=serde)
        self._held = held

    def _kept(self, checkpoint: Checkpoint) -> Checkpoint:
        # LangGraph's saver puts these into JSON, which has no NUL and no enums, and where 1e22 comes back as an int.
        values = checkpoint["channel_values"]
        whole = {
            name: Whole(value) for name, value in values.items() if isinstance(value, str | int | float) and not _plain(value)
        }
        return {**checkpoint, "channel_values": {**values, **whole}} if whole else checkpoint

    @asynccontextmanager
    async def _cursor(self, *, pipeline: bool = False) -> AsyncIterator[psycopg.AsyncCursor[DictRow]]:
        # All that LangGraph's saver reads and writes goes through here; `pipeline` is said of what it writes.
        with self._held.translated():
            async with self.lock:
                if not pipeline:
                    async with self._held.connection.cursor(binary=True) as cursor:
                        yield cursor
                    return
                connection = self._held.connection
                async with connection.pipeline(), connection.transaction(), connection.cursor(binary=True) as cursor:
                    await self._held.check(cursor)
                    yield cursor

    @asynccontextmanager
    async def _writing(self) -> AsyncIterator[None]:
        yield

    @asynccontextmanager
    async def _changing(self) -> AsyncIterator[Any]:
        with self._held.translated():
            connection = self._held.connection
            async with self.lock, connection.transaction(), _Asking(connection, row_factory=tuple_row) as cursor:
                await self._held.check(cursor)
                yield cursor

    async def _threads(self, cursor: Any, run_ids: Sequence[str]) -> list[str]:
        await cursor.execute("SELECT DISTINCT thread_id FROM checkpoints WHERE metadata ->> 'run_id' = ANY(?)", (list(run_ids),))
        return [str(row[0]) for row in await cursor.fetchall()]

    async def _delete(self, cursor: Any, thread: str, keys: Iterable[tuple[str, str]]) -> None:
        await super()._delete(cursor, thread, keys)
        await cursor.execute(_UNUSED_VALUES, (thread, thread))


class _Asking(psycopg.AsyncCursor[tuple[Any, ...]]):
    """A cursor that takes `?` for arguments."""

    async def execute(self, query: Any, params: Any = None, **how: Any) -> Any:
        return await super().execute(query.replace("?", "%s"), params, **how)

    async def executemany(self, query: Any, params_seq: Any, **how: Any) -> None:
        await super().executemany(query.replace("?", "%s"), params_seq, **how)


def _plain(value: str | int | float) -> bool:
    """Whether JSON in Postgres gives it back as it is, and it is short: what is not there is written once a change only."""
    if type(value) is str:
        return len(value) <= _PLAIN_CHARACTERS and "\0" not in value and not any("\ud800" <= one <= "\udfff" for one in value)
    return type(value) in (bool, int)
