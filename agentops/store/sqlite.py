"""A record in a file of SQLite, in the home folder.

Old SQLite versions can damage a file when two connections write or checkpoint at the same time, so writers close their
connection before they give their turn away; readers open the file read-only.
"""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import Any, ClassVar
from urllib.parse import quote

from sqlalchemy import Connection, Engine, Select, create_engine, event, func, select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import QueuePool, StaticPool

from agentops.errors import RecordError, StoreBroken
from agentops.settings import Settings
from agentops.store.opening import Database, database_path, json_text


class SqliteDatabase(Database):
    """`record.db` of a home, which is written by this home alone."""

    shared: ClassVar[bool] = False

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._path = database_path(settings)
        self.where = str(self._path)

    def exists(self) -> bool:
        return self._path.exists() and self._path.stat().st_size > 0

    def version(self, timeout_s: float) -> str | None:
        if not self.exists():
            return None
        with closing(self._connect("ro", timeout_s)) as connection:
            names = {row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if "alembic_version" not in names:
                if not names:
                    return None
                raise self._foreign(names, "move the file away, or point paths.home at another folder")
            row = connection.execute("SELECT version_num FROM alembic_version").fetchone()
        return self._known(str(row[0]) if row else None)

    def reader(self) -> Engine:
        return create_engine("sqlite://", creator=lambda: self._connect("ro", self._timeout_s), poolclass=QueuePool)

    @contextmanager
    def translated(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.DatabaseError, DBAPIError) as error:
            cause = error.orig if isinstance(error, DBAPIError) else error
            text = str(cause)
            if re.search("locked|busy", text):
                raise self._locked() from error
            if re.search("not a database|malformed|no such (table|column)", text):
                raise StoreBroken(
                    f"{self.where} is damaged or no database: {text}",
                    hint="move the file away to start a new record; new runs are recorded meanwhile in the journal beside it",
                ) from error
            hint = "check the disk's free space and the permissions of paths.home"
            raise RecordError(f"{self.where}: {text}", hint=hint) from error

    def identity(self) -> object:
        try:
            found = self._path.stat()
        except OSError as error:
            raise RecordError(f"the record at {self.where} is gone", hint="it is looked for again and again") from error
        return found.st_dev, found.st_ino

    def changes(self, connection: Connection) -> int:
        return int(connection.exec_driver_sql("PRAGMA data_version").scalar_one())

    def listed(self, values: Sequence[str]) -> Select[tuple[str]]:
        return select(func.json_each(json.dumps(list(values))).table_valued("value").c.value)

    def stored(self, row: Mapping[str, Any], json_columns: Sequence[str]) -> Mapping[str, Any]:
        return row

    def about(self) -> str:
        return f"{self.where}, {self._path.stat().st_size / 1e6:.1f} MB"

    def _connect(self, mode: str, timeout_s: float) -> sqlite3.Connection:
        return sqlite3.connect(
            f"file:{quote(self.where)}?mode={mode}", uri=True, timeout=timeout_s, isolation_level=None, check_same_thread=False
        )

    def _connected(self, timeout_s: float) -> Engine:
        engine = create_engine(
            "sqlite://", creator=lambda: self._connect("rwc", timeout_s), poolclass=StaticPool, json_serializer=json_text
        )

        @event.listens_for(engine, "connect")
        def _pragmas(connection: sqlite3.Connection, _: object) -> None:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=NORMAL")
            # Less often than after each batch; it is done at the latest when the connection is closed.
            connection.execute("PRAGMA wal_autocheckpoint=4000")

        @event.listens_for(engine, "begin")
        def _begin(connection: Connection) -> None:
            # The driver would start a transaction too late for DDL, and as a reader.
            connection.exec_driver_sql("BEGIN IMMEDIATE")

        return engine

    @contextmanager
    def _migrating(self, timeout_s: float) -> Iterator[Connection]:
        # What people asked and got is in it: for its owner's eyes only.
        self._path.touch(mode=0o600)
        engine = self._connected(timeout_s)
        try:
            with engine.begin() as connection:
                yield connection
        finally:
            engine.dispose()
