"""Where a record is kept, and how it is opened: its schema's version, migrations, writers that take turns, errors in our words.

All that differs between a file of SQLite and a Postgres is a `Database`, in `sqlite` and in `postgres`; the rest of the store
does not know which of them it works on. Writers of one home take turns behind a file lock, whatever they write to: they read
the same journal.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, ClassVar

from filelock import FileLock, Timeout
from pydantic_core import to_json
from sqlalchemy import Connection, Engine, Select

from agentops.errors import RecordError, StoreBroken, StoreLocked, StoreTooNew
from agentops.settings import Settings

_MIGRATIONS = Path(__file__).parent / "migrations"
REVISIONS = sorted(path.name.partition("_")[0] for path in (_MIGRATIONS / "versions").glob("[0-9]*.py"))
HEAD = REVISIONS[-1]


def database_path(settings: Settings) -> Path:
    """The file that keeps the record where `record.url` names no server."""
    return settings.paths.home / "record.db"


def open_database(settings: Settings) -> Database:
    """
    Raises:
        SettingsError: `record.url` is no address.
        RecordError: the driver that it needs is not installed.
    """
    if settings.record.url:
        from agentops.store.postgres import PostgresDatabase

        return PostgresDatabase(settings)
    from agentops.store.sqlite import SqliteDatabase

    return SqliteDatabase(settings)


def json_text(value: object) -> str:
    """How JSON columns are written. A value that JSON does not know must not hold up what stands behind it."""
    try:
        return to_json(value).decode()
    except ValueError:
        return json.dumps(value, ensure_ascii=False, default=str)


class Database(ABC):
    """The place of a record. It connects to nothing until it is asked to; what is `shared` is written by several homes."""

    shared: ClassVar[bool]
    where: str
    """The file, or the server's address without name and password."""

    def __init__(self, settings: Settings) -> None:
        self._lock = settings.paths.home / "record.lock"
        self._timeout_s = settings.record.lock_timeout_s

    @abstractmethod
    def exists(self) -> bool:
        """False where reading would make it first."""

    @abstractmethod
    def version(self, timeout_s: float) -> str | None:
        """The schema's revision, `None` where there is none yet.

        Raises:
            StoreTooNew, StoreBroken, StoreLocked, StoreUnavailable, RecordError (within `translated`)
        """

    @abstractmethod
    def reader(self) -> Engine:
        """Connections that cannot write."""

    @abstractmethod
    def translated(self) -> AbstractContextManager[None]:
        """The database's errors as ours."""

    @abstractmethod
    def identity(self) -> object:
        """What is other when another record was put in this one's place.

        Raises:
            RecordError: it is gone.
        """

    @abstractmethod
    def changes(self, connection: Connection) -> int:
        """A number that is other after anyone has written."""

    @abstractmethod
    def listed(self, values: Sequence[str]) -> Select[tuple[str]]:
        """The values as rows, for an IN of any length."""

    @abstractmethod
    def stored(self, row: Mapping[str, Any], json_columns: Sequence[str]) -> Mapping[str, Any]:
        """A row as it is handed to the driver, without loss."""

    @abstractmethod
    def about(self) -> str:
        """For `doctor`: what it is, where, and how big.

        Raises:
            RecordError
        """

    @abstractmethod
    def _connected(self, timeout_s: float) -> Engine:
        """The writer's connection."""

    @abstractmethod
    def _migrating(self, timeout_s: float) -> AbstractContextManager[Connection | None]:
        """A transaction for what is missing of the schema; `None` when another process was faster."""

    @contextmanager
    def writer(self, timeout_s: float) -> Iterator[Engine]:
        """The one writer of this home, with the newest schema.

        Raises:
            StoreLocked, StoreTooNew, StoreBroken, StoreUnavailable, RecordError
        """
        with self.translated(), self._turn(timeout_s):
            if not self._current(timeout_s):
                self._migrate(timeout_s)
            engine = self._connected(timeout_s)
            try:
                yield engine
            finally:
                engine.dispose()

    def ensure(self) -> None:
        """Makes or upgrades the schema where that is needed, waiting for other writers only then.

        Raises:
            StoreLocked, StoreTooNew, StoreBroken, StoreUnavailable, RecordError
        """
        with self.translated():
            if self.version(self._timeout_s) == HEAD:
                return
            with self._turn(self._timeout_s):
                if self.version(self._timeout_s) != HEAD:
                    self._migrate(self._timeout_s)

    def _current(self, timeout_s: float) -> bool:
        return self.version(timeout_s) == HEAD

    def _migrate(self, timeout_s: float) -> None:
        """Runs the missing revisions in one transaction: killed half-way, nothing has changed."""
        from alembic import command
        from alembic.config import Config

        config = Config()
        config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
        config.set_main_option("path_separator", "os")
        with self._migrating(timeout_s) as connection:
            if connection is not None:
                config.attributes["connection"] = connection
                command.upgrade(config, "head")

    @contextmanager
    def _turn(self, timeout_s: float) -> Iterator[None]:
        try:
            self._lock.parent.mkdir(0o700, parents=True, exist_ok=True)
            lock = FileLock(self._lock)
            lock.acquire(timeout=timeout_s, poll_interval=0.02)
        except Timeout:
            raise self._locked() from None
        except OSError as error:
            raise RecordError(f"the record cannot be written: {error}", hint="check paths.home in: agentops config") from error
        try:
            yield
        finally:
            lock.release()

    def _known(self, found: str | None) -> str | None:
        if found is not None and found not in REVISIONS:
            raise StoreTooNew(
                f"the record was written by a newer version of this program (schema {found}, this one knows {HEAD})",
                hint="upgrade agentops-runtime, or keep the record somewhere else: record.url, paths.home",
            )
        return found

    def _foreign(self, tables: set[str], hint: str) -> StoreBroken:
        named = ", ".join(sorted(tables)[:5])
        return StoreBroken(f"{self.where} is a database of something else (tables: {named})", hint=hint)

    def _locked(self) -> StoreLocked:
        return StoreLocked(
            f"another process holds {self.where}",
            hint="wait for it to end, or allow more time with record.lock_timeout_s",
        )
