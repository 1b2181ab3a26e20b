"""Opening the database file: schema version, migrations under a lock, and SQLite's errors in our words.

Old SQLite versions can damage a file when two connections write or checkpoint at the same time, so writers take turns
behind a file lock and close their connection before they leave it; readers open the file read-only.
"""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import quote

from filelock import FileLock, Timeout
from pydantic_core import to_json
from sqlalchemy import Engine, create_engine, event
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import QueuePool, StaticPool

from agentops.errors import RecordError, StoreBroken, StoreLocked, StoreTooNew
from agentops.settings import Settings

_MIGRATIONS = Path(__file__).parent / "migrations"
REVISIONS = sorted(path.name.partition("_")[0] for path in (_MIGRATIONS / "versions").glob("[0-9]*.py"))
HEAD = REVISIONS[-1]


def database_path(settings: Settings) -> Path:
    return settings.paths.home / "record.db"


def _connect(path: Path, mode: str, timeout_s: float) -> sqlite3.Connection:
    return sqlite3.connect(
        f"file:{quote(str(path))}?mode={mode}", uri=True, timeout=timeout_s, isolation_level=None, check_same_thread=False
    )


def reading_engine(path: Path, timeout_s: float) -> Engine:
    return create_engine("sqlite://", creator=lambda: _connect(path, "ro", timeout_s), poolclass=QueuePool)


@contextmanager
def writing_engine(settings: Settings, timeout_s: float) -> Iterator[Engine]:
    """The one writer of the file, with the newest schema.

    Raises:
        StoreLocked, StoreTooNew, StoreBroken, RecordError
    """
    path = database_path(settings)
    with translated(path), _turn(path, timeout_s):
        if version(path, timeout_s) != HEAD:
            migrate(path, timeout_s)
        engine = _writer(path, timeout_s)
        try:
            yield engine
        finally:
            engine.dispose()


def json_text(value: object) -> str:
    """How JSON columns are written. A value that JSON does not know must not hold up what stands behind it."""
    try:
        return to_json(value).decode()
    except ValueError:
        return json.dumps(value, ensure_ascii=False, default=str)


def _writer(path: Path, timeout_s: float) -> Engine:
    engine = create_engine(
        "sqlite://", creator=lambda: _connect(path, "rwc", timeout_s), poolclass=StaticPool, json_serializer=json_text
    )

    @event.listens_for(engine, "connect")
    def _pragmas(connection: sqlite3.Connection, _: object) -> None:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")
        # Less often than after each batch; it is done at the latest when the connection is closed.
        connection.execute("PRAGMA wal_autocheckpoint=4000")

    @event.listens_for(engine, "begin")
    def _begin(connection: object) -> None:
        # The driver would start a transaction too late for DDL, and as a reader.
        connection.exec_driver_sql("BEGIN IMMEDIATE")  # type: ignore[attr-defined]

    return engine


@contextmanager
def _turn(path: Path, timeout_s: float) -> Iterator[None]:
    try:
        path.parent.mkdir(0o700, parents=True, exist_ok=True)
        lock = FileLock(path.with_suffix(".lock"))
        lock.acquire(timeout=timeout_s, poll_interval=0.02)
    except Timeout:
        raise _locked(path) from None
    except OSError as error:
        raise RecordError(f"the record cannot be written: {error}", hint="check paths.home in: agentops config") from error
    try:
        yield
    finally:
        lock.release()


def ensure(settings: Settings) -> None:
    """Makes or upgrades the schema where that is needed, waiting for other writers only then."""
    path, timeout_s = database_path(settings), settings.record.lock_timeout_s
    with translated(path):
        if version(path, timeout_s) == HEAD:
            return
        with _turn(path, timeout_s):
            if version(path, timeout_s) != HEAD:
                migrate(path, timeout_s)


def version(path: Path, timeout_s: float) -> str | None:
    """The schema's revision, `None` where there is none yet."""
    if not path.exists() or path.stat().st_size == 0:
        return None
    with closing(_connect(path, "ro", timeout_s)) as connection:
        names = {row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if "alembic_version" not in names:
            if not names:
                return None
            raise StoreBroken(
                f"{path} is a database of something else (tables: {', '.join(sorted(names)[:5])})",
                hint="move the file away, or point paths.home at another folder",
            )
        row = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    found = str(row[0]) if row else None
    if found is not None and found not in REVISIONS:
        raise StoreTooNew(
            f"the record was written by a newer version of this program (schema {found}, this one knows {HEAD})",
            hint="upgrade agentops-runtime, or point paths.home at another folder",
        )
    return found


def migrate(path: Path, timeout_s: float) -> None:
    """Runs the missing revisions in one transaction: killed half-way, nothing has changed."""
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    # What people asked and got is in it: for its owner's eyes only.
    path.touch(mode=0o600)
    engine = _writer(path, timeout_s)
    try:
        with engine.begin() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
    finally:
        engine.dispose()


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """SQLite's errors as ours."""
    try:
        yield
    except (sqlite3.DatabaseError, DBAPIError) as error:
        cause = error.orig if isinstance(error, DBAPIError) else error
        text = str(cause)
        if re.search("locked|busy", text):
            raise _locked(path) from error
        if re.search("not a database|malformed|no such (table|column)", text):
            raise StoreBroken(
                f"{path} is damaged or no database: {text}",
                hint="move the file away to start a new record; new runs are recorded meanwhile in the journal beside it",
            ) from error
        raise RecordError(f"{path}: {text}", hint="check the disk's free space and the permissions of paths.home") from error


def _locked(path: Path) -> StoreLocked:
    return StoreLocked(
        f"another process holds {path}",
        hint="wait for it to end, or allow more time with record.lock_timeout_s",
    )
