"""What of the record may go, by a rule, and taking it away: runs with their spans, contents, scores and checkpoints.

It is safe while runs go on. A thread's lease is held while its runs are taken away, and what the journal holds is stored before,
in the same turn of writing; a thread that is in use is left for the next time. Killed in the middle, nothing is half there that
the same call does not finish.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

from agentops.checkpoints import checkpoint_folder, lease, open_checkpointer
from agentops.errors import ThreadBusy
from agentops.settings import Settings
from agentops.store import Removed, RunRow, open_store, open_writer
from agentops.tracer.drain import catch_up, drain

RECENT_S = 900
"""A process may still name what such runs have said without giving it again, see `Tracer.payload`."""
_UNFINISHED = ("queued", "running", "waiting")
_THREADS_AT_ONCE, _CONNECTIONS_AT_ONCE = 200, 16
_ALL = 10**9


@dataclass(frozen=True, slots=True)
class Rule:
    """Which runs stay: at most the `runs` newest, none that began before `since_ns`; `None` is no limit. With a `graph`, it is
    asked of that graph's runs alone."""

    runs: int | None = None
    since_ns: int | None = None
    graph: str | None = None
    experiments: bool = False
    """Also runs that experiments refer to; their results stay."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The runs that a rule lets go, oldest first, and how many it would but for what they are: not at their end, of an
    experiment, just ended, or pinned."""

    runs: Sequence[RunRow] = ()
    unfinished: int = 0
    in_experiments: int = 0
    recent: int = 0
    pinned: int = 0
    stay: int = 0
    thinned: Sequence[str] = ()
    """Runs that stay and were sampled out: their spans go."""


@dataclass(slots=True)
class Pruned:
    """What went. `busy` are threads that were in use, whose runs are still there."""

    removed: Removed = field(default_factory=Removed)
    threads: int = 0
    busy: list[str] = field(default_factory=list)


def plan(settings: Settings, rule: Rule, *, now_ns: int) -> Plan:
    """
    Raises:
        RecordError: the record cannot be read.
    """
    catch_up(settings)
    with open_store(settings) as store:
        runs = store.runs(graph=rule.graph, limit=_ALL)
        bound_ids, sampled_out, pins = store.case_runs(), store.sampled_out(), store.pinned()
        kept = set() if rule.experiments else bound_ids
    beyond = [
        run
        for place, run in enumerate(runs)
        if (rule.runs is not None and place >= rule.runs) or (rule.since_ns is not None and run.started_ns < rule.since_ns)
    ]
    pinned = [run for run in beyond if run.id in pins]
    beyond = [run for run in beyond if run.id not in pins]
    unfinished = [run for run in beyond if run.status in _UNFINISHED]
    finished = [run for run in beyond if run.status not in _UNFINISHED]
    bound = [run for run in finished if run.id in kept]
    recent = [run for run in finished if run.id not in kept and (run.ended_ns or run.started_ns) > now_ns - RECENT_S * 10**9]
    spared = {run.id for run in (*unfinished, *bound, *recent)}
    going = [run for run in reversed(beyond) if run.id not in spared]
    old = {run.id for run in runs if (run.ended_ns or now_ns) <= now_ns - RECENT_S * 10**9}
    thinned = sorted((sampled_out & old) - bound_ids - pins - {run.id for run in going})
    stay = len(runs) - len(going)
    return Plan(going, len(unfinished), len(bound), len(recent), len(pinned), stay, thinned)


async def prune(settings: Settings, chosen: Plan, *, tell: Callable[[int, int], None] = lambda done, total: None) -> Pruned:
    """Takes the runs of a plan away, and gives the room back. `tell` is called with how many are done, and of how many.

    Raises:
        StoreLocked, StoreUnavailable, RecordError: what went before is gone; the rest can be taken away by another call.
    """
    found = Pruned()
    of_thread: dict[str, list[str]] = {}
    for run in chosen.runs:
        of_thread.setdefault(run.thread_id, []).append(run.id)
    threads, done = list(of_thread), 0
    at_once = _CONNECTIONS_AT_ONCE if settings.record.url else _THREADS_AT_ONCE
    for at in range(0, len(threads), at_once):
        part = {thread: of_thread[thread] for thread in threads[at : at + at_once]}
        await _prune(settings, part, found)
        done += sum(map(len, part.values()))
        tell(done, len(chosen.runs))
    for at in range(0, len(chosen.thinned), at_once):
        with open_writer(settings) as writer:
            found.removed += writer.thin(chosen.thinned[at : at + at_once])
    if found.removed.spans or found.removed.runs:
        with open_writer(settings) as writer:
            writer.shrink()
    return found


async def _prune(settings: Settings, going: dict[str, list[str]], found: Pruned) -> None:
    async with AsyncExitStack() as leases:
        held = {}
        for thread in going:
            try:
                held[thread] = await leases.enter_async_context(lease(settings, thread))
            except ThreadBusy:
                found.busy.append(thread)
        with open_writer(settings) as writer:
            # A run that began on one of the threads since the plan was made, and has ended, is known then.
            if (journal := settings.paths.home / "journal").is_dir():
                drain(journal, writer)
            with open_store(settings) as store:
                empty = [
                    thread for thread in held if {run.id for run in store.runs(thread=thread, limit=_ALL)} <= {*going[thread]}
                ]
            # Before the runs: where this ends in the middle, the runs tell the next call what is left to do.
            for thread in empty:
                if settings.record.url:
                    async with open_checkpointer(held[thread], frozenset()) as saver:
                        await saver.adelete_thread(thread)
                else:
                    # The lease's own file stays: others may wait for it. A log without its database would be read into the next.
                    for ending in ("db-wal", "db-shm", "db"):
                        (checkpoint_folder(settings) / f"{thread}.{ending}").unlink(missing_ok=True)
            found.removed += writer.remove([run for thread in held for run in going[thread]], keep_results=True)
        found.threads += len(empty)
