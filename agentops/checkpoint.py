"""Checkpoints: LangGraph's SQLite saver, one file and one owner a thread.

The lease on a thread is an exclusive lock on a file beside its checkpoints; the system drops it when the process dies.
With one file a thread there is never a second process writing it, so SQLite's WAL-reset defect (versions 3.7.0 to
3.51.2) cannot be met. What is read back may only become types that the graph's own schema names.
This module knows nothing of runs, spans or models.
"""

from __future__ import annotations

import dataclasses
import enum
import fcntl
import os
import re
import typing
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import aiosqlite
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver
from pydantic import BaseModel

from agentops.errors import RecordError, StoreBroken, ThreadBusy, UsageError
from agentops.settings import Settings

_THREAD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def checkpoint_folder(settings: Settings) -> Path:
    return settings.paths.home / "threads"


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


@contextmanager
def lease(settings: Settings, thread_id: str) -> Iterator[None]:
    """Sole right to run a thread, within and across processes, until the block ends or the process dies.

    Raises:
        ThreadBusy: another run holds it.
    """
    folder = checkpoint_folder(settings)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / f"{check_thread_id(thread_id)}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise RecordError(f"{folder} cannot be written: {error.strerror}", hint="see: agentops doctor") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ThreadBusy(
                f"thread {thread_id} is in use by another run",
                hint="wait for it to end (agentops runs --status running), or use another --thread",
            ) from None
        yield
    finally:
        os.close(handle)


@asynccontextmanager
async def open_checkpointer(settings: Settings, thread_id: str, types: frozenset[type]) -> AsyncIterator[AsyncSqliteSaver]:
    """The saver of one thread. Hold its `lease` around this.

    `types` may be built while reading, beside LangGraph's list of safe ones.

    Raises:
        StoreBroken: the file is not a database.
    """
    file = checkpoint_folder(settings) / f"{check_thread_id(thread_id)}.db"
    allowed = [(kind.__module__, kind.__qualname__) for kind in types]
    serializer = JsonPlusSerializer(allowed_msgpack_modules=allowed or None)
    async with aiosqlite.connect(file) as connection:
        saver = AsyncSqliteSaver(connection, serde=serializer)
        try:
            await saver.setup()
            await connection.execute("PRAGMA synchronous=FULL")
        except aiosqlite.DatabaseError as error:
            raise StoreBroken(
                f"the checkpoints of thread {thread_id} cannot be read: {error}",
                hint=f"move {file} away; the thread then starts anew",
            ) from error
        yield saver


def schema_types(*schemas: Any) -> frozenset[type]:
    """Classes that values of these state schemas consist of: dataclasses, pydantic models, enums, named tuples."""
    found: set[type] = set()
    seen: set[int] = set()

    def walk(kind: Any) -> None:
        if id(kind) in seen:
            return
        seen.add(id(kind))
        for part in typing.get_args(kind):
            walk(part)
        if not isinstance(kind, type):
            return
        structured = dataclasses.is_dataclass(kind) or issubclass(kind, BaseModel) or hasattr(kind, "_fields")
        if structured or issubclass(kind, enum.Enum):
            found.add(kind)
        if structured or typing.is_typeddict(kind):
            try:
                hints = typing.get_type_hints(kind, include_extras=True)
            except (NameError, TypeError):
                hints = {}
            for hint in hints.values():
                walk(hint)

    for schema in schemas:
        walk(schema)
    return frozenset(found)
