"""A record in a database of Postgres, which several homes and machines may share.

What Postgres refuses is kept by an escape and given back as it was: NUL characters in text and in JSON, and JSON's NaN and
infinities, which Python writes. Every writing transaction begins with an update of the schema's one row. Whoever comes second
waits for it, so that rows are numbered in the order in which they can be seen; and that row tells readers that something changed.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import psycopg
from psycopg.abc import Buffer
from psycopg.adapt import Dumper, Loader
from psycopg.types.json import set_json_loads
from sqlalchemy import JSON, Connection, Engine, Select, cast, create_engine, event, func, select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import QueuePool

from agentops.errors import StoreBroken
from agentops.postgres import arguments, translation, where
from agentops.settings import Settings
from agentops.store.opening import HEAD, Database, json_text

_MARK = "\x1a"
_TEXT_ESCAPES = {"\0": f"{_MARK}0", _MARK: f"{_MARK}1"}
_JSON_ESCAPES = {r"\u0000": r"\u001a0", r"\u001a": r"\u001a1"}
# A pair of backslashes goes first: what follows one is no escape. A string is passed over on the way to a number.
_JSON_TOKENS = re.compile(r'"(?:[^"\\]|\\.)*"|NaN|-?Infinity')
_JSON_KEPT = re.compile(r"\\\\|\\u0000|\\u001a")
_JSON_FOUND = re.compile(r'\\\\|\\u001a[01]|"\\u001a(NaN|-?Infinity)"')
_MIGRATION = 0x6167656E746F7073
"""The key of the lock behind which the schema is made."""
_writers: dict[tuple[object, ...], Engine] = {}


class PostgresDatabase(Database):
    """The database of `record.url`."""

    shared: ClassVar[bool] = True

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._url = settings.record.url
        self._arguments = arguments(self._url)
        self.where = where(self._url)

    def exists(self) -> bool:
        return True

    def version(self, timeout_s: float) -> str | None:
        with self._connect(timeout_s) as connection:
            return self._version(connection)

    def reader(self) -> Engine:
        def connect() -> psycopg.Connection[Any]:
            connection = self._connect(self._timeout_s)
            connection.execute("SET default_transaction_read_only = on")
            return connection

        return create_engine(
            "postgresql+psycopg://",
            creator=connect,
            poolclass=QueuePool,
            isolation_level="AUTOCOMMIT",
            pool_pre_ping=True,
            use_native_hstore=False,
        )

    @contextmanager
    def translated(self) -> Iterator[None]:
        try:
            yield
        except (psycopg.Error, DBAPIError) as error:
            cause = error.orig if isinstance(error, DBAPIError) else error
            raise translation(cause or error, self._url) from error

    def identity(self) -> object:
        return self.where

    def changes(self, connection: Connection) -> int:
        return int(connection.exec_driver_sql("SELECT xmin::text FROM alembic_version").scalar_one())

    def listed(self, values: Sequence[str]) -> Select[tuple[str]]:
        return select(func.json_array_elements_text(cast(list(values), JSON)).column_valued())

    def stored(self, row: Mapping[str, Any], json_columns: Sequence[str]) -> Mapping[str, Any]:
        changed = {name: text for name in json_columns if (text := _kept(row[name])) is not row[name]}
        return {**row, **changed} if changed else row

    def about(self) -> str:
        with self.translated(), self._connect(self._timeout_s) as connection:
            row = connection.execute("SELECT current_setting('server_version'), pg_database_size(current_database())").fetchone()
        assert row
        return f"PostgreSQL {row[0].split()[0]} at {self.where}, {row[1] / 1e6:.1f} MB"

    def _connect(self, timeout_s: float) -> psycopg.Connection[Any]:
        # The driver takes no less than two seconds for a connection.
        patience = min(int(self._arguments["connect_timeout"]), max(2, math.ceil(timeout_s)))
        connection = psycopg.connect(**{**self._arguments, "connect_timeout": patience}, autocommit=True)
        try:
            encoding = connection.info.parameter_status("server_encoding")
            if encoding != "UTF8":
                raise StoreBroken(
                    f"the database at {self.where} cannot keep every text: its encoding is {encoding}",
                    hint="make one that can: createdb --encoding=UTF8 --template=template0 NAME",
                )
            connection.adapters.register_dumper(str, _TextDumper)
            for name, loader in (("text", _TextLoader), ("varchar", _TextLoader), ("numeric", _NumberLoader)):
                connection.adapters.register_loader(name, loader)
            set_json_loads(_loaded, connection)
            connection.execute(f"SET lock_timeout = {max(1, round(timeout_s * 1000))}")
        except BaseException:
            connection.close()
            raise
        return connection

    def _version(self, connection: psycopg.Connection[Any]) -> str | None:
        tables = connection.execute("SELECT tablename::text FROM pg_tables WHERE schemaname = current_schema()")
        names = {row[0] for row in tables}
        # The checkpoints may be in the same database, and be there first.
        other = {name for name in names if not name.startswith("checkpoint")}
        if other and not {"alembic_version", "journal_position"} <= names:
            hint = "name another database in record.url, or a schema of its own: ?options=-csearch_path%3DNAME"
            raise self._foreign(other, hint)
        row = connection.execute("SELECT version_num FROM alembic_version").fetchone() if other else None
        return self._known(str(row[0]) if row else None)

    def _current(self, timeout_s: float) -> bool:
        # It is looked at again when a transaction begins.
        return self._key(timeout_s) in _writers or super()._current(timeout_s)

    def _connected(self, timeout_s: float) -> Engine:
        # What it asks of a server when it first connects is not to be asked at every drain.
        if (engine := _writers.get(self._key(timeout_s))) is None:
            engine = _writers[self._key(timeout_s)] = self._engine(timeout_s)

            @event.listens_for(engine, "begin")
            def _begin(connection: Connection) -> None:
                turn = "UPDATE alembic_version SET version_num = version_num RETURNING version_num"
                try:
                    if self._known(connection.exec_driver_sql(turn).scalar()) == HEAD:
                        return
                except BaseException:
                    _writers.pop(self._key(timeout_s), None)
                    raise
                raise StoreBroken(f"the record at {self.where} has changed meanwhile", hint="try again")

        return engine

    def _key(self, timeout_s: float) -> tuple[object, ...]:
        return self._url, self._lock, timeout_s

    def _engine(self, timeout_s: float) -> Engine:
        def connect() -> psycopg.Connection[Any]:
            connection = self._connect(timeout_s)
            connection.autocommit = False
            return connection

        return create_engine(
            "postgresql+psycopg://",
            creator=connect,
            poolclass=QueuePool,
            pool_size=1,
            use_native_hstore=False,
            json_serializer=lambda value: _kept(json_text(value)),
        )

    @contextmanager
    def _migrating(self, timeout_s: float) -> Iterator[Connection | None]:
        engine = self._engine(timeout_s)
        try:
            with engine.begin() as connection:
                connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_MIGRATION})")
                driver = connection.connection.driver_connection
                assert isinstance(driver, psycopg.Connection)
                yield None if self._version(driver) == HEAD else connection
        finally:
            engine.dispose()


class _TextDumper(Dumper):
    """Text with its NUL characters escaped."""

    def dump(self, obj: str) -> bytes:
        if "\0" in obj or _MARK in obj:
            obj = re.sub("[\0\x1a]", lambda found: _TEXT_ESCAPES[found[0]], obj)
        return obj.encode()


class _TextLoader(Loader):
    """Text as it was before it was escaped."""

    def load(self, data: Buffer) -> str:
        text = bytes(data).decode()
        return re.sub("\x1a([01])", lambda found: "\0" if found[1] == "0" else _MARK, text) if _MARK in text else text


class _NumberLoader(Loader):
    """Sums and means as SQLite gives them: whole, or floating."""

    def load(self, data: Buffer) -> int | float:
        text = bytes(data).decode()
        return int(text) if text.lstrip("-").isdecimal() else float(text)


def _kept(text: str) -> str:
    """JSON as Postgres takes it."""
    if "NaN" in text or "Infinity" in text:
        text = _JSON_TOKENS.sub(lambda found: found[0] if found[0][0] == '"' else f'"{_NUMBER}{found[0]}"', text)
        return _JSON_KEPT.sub(_keep, text).replace(_NUMBER, r"\u001a")
    return _JSON_KEPT.sub(_keep, text) if r"\u00" in text else text


_NUMBER = "\x00"
"""Stands in JSON, where it cannot occur by itself, until all other escapes are made."""


def _keep(found: re.Match[str]) -> str:
    return _JSON_ESCAPES.get(found[0], found[0])


def _loaded(text: str | bytes) -> Any:
    """The value of JSON that was `_kept`."""
    if isinstance(text, bytes):
        text = text.decode()
    if r"\u001a" in text:
        text = _JSON_FOUND.sub(_give_back, text)
    return json.loads(text)


def _give_back(found: re.Match[str]) -> str:
    match found[0]:
        case r"\u001a0":
            return r"\u0000"
        case r"\u001a1":
            return r"\u001a"
    return found[1] or found[0]
