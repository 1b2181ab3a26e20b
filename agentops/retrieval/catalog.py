"""The embedded index's truth: one SQLite file with documents, vectors and the numbers of all changes.

A stored document is never changed in place: what replaces it is a new row with a higher `seq`, and the old row's `seq` is
kept in `removed` until the derived lexical index has followed. Knows rows and transactions, nothing of searching.

Rollback journal instead of a write-ahead log: several processes open the file, and SQLite 3.7.0 to 3.51.2 can damage a
log that several of them reset (https://sqlite.org/wal.html, section 11). Writers take turns behind a lock file.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from agentops.errors import RetrievalError

VERSION = 1

_SCHEMA = """
CREATE TABLE counter (generation INTEGER NOT NULL);
INSERT INTO counter VALUES (0);
CREATE TABLE collection (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT NOT NULL UNIQUE,
    embedder TEXT NOT NULL,
    revision TEXT NOT NULL,
    dimensions INTEGER NOT NULL,
    generation INTEGER NOT NULL,
    followed INTEGER NOT NULL
);
CREATE TABLE document (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    collection INTEGER NOT NULL REFERENCES collection (number) ON DELETE CASCADE,
    id TEXT NOT NULL,
    source TEXT NOT NULL,
    text TEXT NOT NULL,
    metadata TEXT NOT NULL,
    hash TEXT NOT NULL,
    embedded TEXT NOT NULL,
    generation INTEGER NOT NULL,
    UNIQUE (collection, id)
);
CREATE INDEX document_source ON document (collection, source, id);
CREATE INDEX document_embedded ON document (collection, embedded);
CREATE INDEX document_generation ON document (collection, generation);
CREATE TABLE vector (
    seq INTEGER PRIMARY KEY REFERENCES document (seq) ON DELETE CASCADE,
    value BLOB NOT NULL
);
CREATE TABLE removed (
    seq INTEGER PRIMARY KEY,
    collection INTEGER NOT NULL REFERENCES collection (number) ON DELETE CASCADE,
    generation INTEGER NOT NULL
);
"""
# counter: rises with every change of any collection, so that a collection made anew never repeats a generation.
# collection.followed: the lexical index has been at this generation; what was removed before is forgotten.
# document.embedded: hash of the text that the vector stands for.


class Catalog:
    """The file `documents.sqlite` in `folder`. Connections live for one transaction, so any thread may call."""

    def __init__(self, folder: Path, lock_timeout_s: float) -> None:
        self._folder = folder
        self._file = folder / "documents.sqlite"
        self._timeout = lock_timeout_s

    @contextmanager
    def turn(self) -> Iterator[None]:
        """This thread's turn to write, among all threads and processes.

        Raises:
            RetrievalError: another one keeps it for longer than the time-out, or the folder cannot be written.
        """
        lock = FileLock(self._folder / "index.lock", timeout=self._timeout, poll_interval=0.01)
        try:
            self._folder.parent.mkdir(0o700, parents=True, exist_ok=True)
            self._folder.mkdir(0o700, exist_ok=True)
            lock.acquire()
        except Timeout:
            raise RetrievalError(
                f"another process has been writing to the index in {self._folder} for more than {self._timeout:g} s",
                hint="wait until it is done, or end it, and try again",
            ) from None
        except OSError as error:
            raise RetrievalError(f"the index in {self._folder} cannot be written: {error}", hint="check the folder") from error
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """One consistent state of everything, until the block ends. A catalogue not made yet reads as an empty one."""
        with self._open(write=False) as connection:
            yield connection

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction: all of it is stored when the block ends, or nothing. To be used inside `turn`."""
        with self._open(write=True) as connection:
            yield connection

    @contextmanager
    def _open(self, *, write: bool) -> Iterator[sqlite3.Connection]:
        try:
            with closing(self._begin(write=write)) as connection:
                try:
                    yield connection
                except BaseException:
                    connection.execute("ROLLBACK")
                    raise
                connection.execute("COMMIT")
        except sqlite3.Error as error:
            raise self._explained(error) from error

    def _begin(self, *, write: bool, empty: bool = False) -> sqlite3.Connection:
        empty = empty or not (write or self._file.exists())
        address = ":memory:" if empty else f"{self._file.absolute().as_uri()}?mode={'rwc' if write else 'rw'}"
        connection = sqlite3.connect(address, uri=True, timeout=self._timeout, isolation_level=None)
        try:
            connection.row_factory = sqlite3.Row
            connection.execute("PRAGMA foreign_keys = ON")
            connection.execute("PRAGMA secure_delete = ON")
            connection.execute("BEGIN IMMEDIATE" if write else "BEGIN")
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version > VERSION:
                raise RetrievalError(
                    f"the index in {self._folder} was written by a newer version of this program", hint="update agentops-runtime"
                )
            if version == 0:
                if not (write or empty):
                    # The process that was making it died.
                    connection.close()
                    return self._begin(write=False, empty=True)
                for statement in _SCHEMA.split(";"):
                    connection.execute(statement)
                connection.execute(f"PRAGMA user_version = {VERSION}")
        except BaseException:
            connection.close()
            raise
        return connection

    def _explained(self, error: sqlite3.Error) -> RetrievalError:
        name = getattr(error, "sqlite_errorname", "")
        if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
            return RetrievalError(
                f"the index in {self._folder} is locked by another process", hint="wait until it is done, and try again"
            )
        if name.startswith("SQLITE_FULL"):
            return RetrievalError(f"no space is left for the index in {self._folder}", hint="free some disk space and try again")
        if name.startswith(("SQLITE_NOTADB", "SQLITE_CORRUPT")):
            return RetrievalError(
                f"the index in {self._folder} is damaged ({error})",
                hint=f"remove {self._folder} and ingest the documents again",
            )
        return RetrievalError(f"the index in {self._folder} cannot be used: {error}", hint="check the folder and its disk")
