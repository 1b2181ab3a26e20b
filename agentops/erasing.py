"""Erasing: takes a thread, or all threads of a user, out of everything in the home folder, so that no byte of them is left.

What is taken: their runs with spans, scores, states and the contents that nobody else's runs have; their checkpoints; what the
journal's files still hold of what the store has taken; journal files that could not be read whole; and the kept KV cache, which
does not say whose it is. Runs that were forked from them have their state, and go too. Documents, datasets and files that tools
wrote belong to nobody here and stay.

Checkpoints and journal go before the rows that tell whose they are, so that the same call can be made again; and a file in the
home says, of nobody, that the room which rows took is still to be cleared: the next erase does that before anything else.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from agentops.checkpoints import checkpoint_folder, lease, open_checkpointer
from agentops.errors import RecordError, ThreadBusy
from agentops.settings import Settings
from agentops.store import Removed, RunRow, Store, open_store, open_writer
from agentops.sync import run_sync
from agentops.tracer.drain import catch_up, drain
from agentops.tracer.journal import SUFFIX, overwrite
from agentops.tracer.redaction import is_pseudonym


@dataclass(frozen=True, slots=True)
class Erased:
    """What was erased, or would be. `shared` counts contents that stay because other runs have the same; `left` says what could
    not be taken, and what to do."""

    threads: tuple[str, ...]
    runs: int
    spans: int = 0
    scores: int = 0
    contents: int = 0
    shared: int = 0
    files: int = 0
    left: tuple[str, ...] = ()


def erase(settings: Settings, *, user: str | None = None, thread: str | None = None, dry_run: bool = False) -> Erased:
    """Erases a thread, or every thread in which a run was labelled with the user. With `dry_run` nothing is changed.

    Raises:
        ThreadBusy: one of the threads is at work.
        RecordError: there is none.
        StoreLocked: the record cannot be written now; nothing was erased.
    """
    if not dry_run:
        finish(settings)
    catch_up(settings, wait=True)
    whose, files = _Whose(user, thread), 0
    while True:
        with open_store(settings) as store:
            runs = _concerned(store, settings, whose)
            threads = tuple(sorted({run.thread_id for run in runs}))
            named = {key for run in runs for key in _contents(store, run)}
        if not runs:
            said = f"of user '{user}'" if user is not None else f"on thread '{thread}'"
            raise RecordError(f"no run {said} is on record", hint="list the runs with their threads: agentops runs")
        if busy := next((run for run in runs if run.status == "running"), None):
            raise _busy(busy.thread_id)
        if dry_run:
            return Erased(threads, len(runs), contents=len(named), files=len(_files(settings, threads)))
        more, removed = run_sync(_held(settings, threads, whose))
        files += more
        if removed is not None:
            break
    with open_store(settings) as store:
        shared = sum(store.has(key) for key in named)
    return Erased(threads, removed.runs, removed.spans, removed.scores, removed.contents, shared, files, tuple(_left(settings)))


def finish(settings: Settings) -> bool:
    """Clears what an erase that was broken off after it had removed rows has left; whether there was one.

    Raises:
        StoreLocked: the record cannot be written now.
    """
    if not (begun := _begun(settings)).exists():
        return False
    with open_writer(settings) as writer:
        writer.shrink(whole=True)
        begun.unlink(missing_ok=True)
    return True


def _begun(settings: Settings) -> Path:
    return settings.paths.home / "erasing"


@dataclass(frozen=True, slots=True)
class _Whose:
    user: str | None
    thread: str | None


async def _held(settings: Settings, threads: tuple[str, ...], whose: _Whose) -> tuple[int, Removed | None]:
    """With the sole right to all of the threads: how many files went, and what else did, or `None` where more threads are meant
    by now."""
    async with AsyncExitStack() as stack:
        for one in threads:
            held = await stack.enter_async_context(lease(settings, one))
            if settings.record.url:
                saver = await stack.enter_async_context(open_checkpointer(held, frozenset()))
                await saver.adelete_thread(one)
        files = _files(settings, threads)
        for file in files:
            file.unlink(missing_ok=True)
        return len(files), await asyncio.to_thread(_recorded, settings, threads, whose)


def _recorded(settings: Settings, threads: tuple[str, ...], whose: _Whose) -> Removed | None:
    """Takes the threads' runs out of the journal and the store, in one turn of writing: no drainer reads meanwhile."""
    folder = settings.paths.home / "journal"
    with open_writer(settings) as writer:
        drain(folder, writer)
        with open_store(settings) as store:
            # A run may have ended, or a thread been forked, before the threads were held.
            runs = _concerned(store, settings, whose)
        if {run.thread_id for run in runs} - set(threads):
            return None
        positions = writer.positions()
        for segment in folder.glob("*" + SUFFIX):
            overwrite(segment, positions.get(segment.name, 0))
        _begun(settings).touch(0o600)
        removed = writer.remove([run.id for run in runs])
        writer.shrink(whole=True)
        _begun(settings).unlink(missing_ok=True)
    return removed


def _concerned(store: Store, settings: Settings, whose: _Whose) -> list[RunRow]:
    """All runs of the threads that are meant, and of those that were forked from them."""
    everything = store.runs(limit=10_000_000)
    if whose.thread is not None:
        threads = {whose.thread}
    else:
        name, journal = str(whose.user), settings.paths.home / "journal"
        users = [(run.thread_id, str((run.settings.get("labels") or {}).get("user", ""))) for run in everything]
        threads = {thread for thread, user in users if user == name or is_pseudonym(user, name, journal)}
    forks, before = store.forks(), set[str]()
    while threads != before:
        before = set(threads)
        mine = {run.id for run in everything if run.thread_id in threads}
        threads |= {run.thread_id for run in everything if forks.get(run.id) in mine}
    return [run for run in everything if run.thread_id in threads]


def _contents(store: Store, run: RunRow) -> Iterator[str]:
    hashes = [
        run.input_hash,
        run.output_hash,
        *(key for span in store.spans(run.id) for key in (span.input_hash, span.output_hash)),
    ]
    yield from (key for key in hashes if key is not None)


def _files(settings: Settings, threads: tuple[str, ...]) -> list[Path]:
    """Checkpoints of the threads, what of the journal could not be read, and the kept KV cache. A thread's lock file stays: it is
    empty, and somebody may wait for it."""
    home, folder = settings.paths.home, checkpoint_folder(settings)
    own = [folder / f"{thread}.db{end}" for thread in threads for end in ("", "-wal", "-shm", "-journal")]
    others = [*(home / "journal").glob("*.damaged"), *(home / "prefixes").glob("*")]
    return [file for file in (*own, *others) if file.is_file()]


def _left(settings: Settings) -> Iterator[str]:
    log = settings.paths.home / "record.db-wal"
    if log.exists() and log.stat().st_size:
        yield f"a reader keeps {log} from being emptied: close what reads the record, then erase again or run a graph"


def _busy(thread: str) -> ThreadBusy:
    return ThreadBusy(f"thread {thread} is at work", hint="let it end, or stop it with: agentops cancel RUN; then erase again")
