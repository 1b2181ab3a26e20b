"""Checkpoints: what a graph's state was after each step, kept by thread; in files, one a thread, or in a Postgres.

Whoever reads or writes the checkpoints of a thread holds its lease. What is read back may only become types that the graph's own
schema or the user names, and executes nothing. This package knows nothing of runs, spans or models.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from agentops.checkpoints import sqlite
from agentops.checkpoints.lease import Lease, check_thread_id
from agentops.checkpoints.saver import ThreadSaver, Told, telling
from agentops.checkpoints.serde import StrictSerializer, named_types, schema_types, try_strictness
from agentops.checkpoints.sqlite import checkpoint_folder
from agentops.errors import RecordError
from agentops.settings import Settings

__all__ = [
    "Lease",
    "ThreadSaver",
    "Told",
    "check_thread_id",
    "checkpoint_folder",
    "lease",
    "open_checkpointer",
    "schema_types",
    "telling",
]


@asynccontextmanager
async def lease(settings: Settings, thread_id: str) -> AsyncIterator[Lease]:
    """Sole right to run a thread, within and across processes, until the block ends or the process dies.

    Raises:
        ThreadBusy: another run holds it.
        UsageError: nothing can be called so.
        RecordError: where checkpoints are kept cannot be reached or written.
    """
    check_thread_id(thread_id)
    async with _place(settings)(settings, thread_id) as held:
        yield held


def _place(settings: Settings) -> Callable[[Settings, str], AbstractAsyncContextManager[Lease]]:
    if not settings.record.url:
        return sqlite.hold
    try:
        from agentops.checkpoints import postgres
    except ImportError as error:
        raise RecordError(
            f"checkpoints in Postgres need a library that is not here: {error}", hint="pip install 'agentops-runtime[postgres]'"
        ) from error
    return postgres.hold


@asynccontextmanager
async def open_checkpointer(held: Lease, types: frozenset[type], told: Told | None = None) -> AsyncIterator[ThreadSaver]:
    """The saver of the thread that is held.

    `types` may be built while reading, beside LangGraph's list of safe ones. `told` is called with every state that is saved.

    Raises:
        StoreBroken: what is there is no record of checkpoints; while reading, it was not written by this program.
        RecordError: it cannot be made, or the library beneath would execute what a checkpoint names.
        SettingsError: `record.types` names something that is no class.
        LeaseLost: another process went on with the thread.
    """
    try_strictness()
    async with held.saver(StrictSerializer(types | named_types(held.settings.record.types))) as saver:
        saver.told = told
        yield saver
