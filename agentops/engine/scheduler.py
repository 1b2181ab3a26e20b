"""Continuous batching: decides before each step which tokens of which sequences are computed in it.

Sequences that decode come first, one token each; what is left of the step goes to prompts, cut into chunks. A sequence
is admitted when all the blocks it can ever need are there, so that none is thrown out half-way. One whose next block is
being computed by another waits for it and finds it cached.

Nobody is held up by how much another wants: of those of the highest priority, whoever has least at work is admitted first,
and may be beyond the batch. Where
several decode, a step takes at most twice as long as one of the smallest of them alone: the others' sequences take turns in
what is left of it. A prompt is read in pieces so small that those who decode hardly feel it. How long steps take is learned
from those that were (`Pace`). It holds integers only and is owned by one thread.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from itertools import zip_longest
from typing import Literal

from agentops.engine.blocks import BlockPool
from agentops.engine.pace import Pace
from agentops.engine.sequence import Chunk, Sequence

LOGIT_ROWS = 256
"""Rows of a step whose logits prompts and choices may ask for: a row is as wide as the vocabulary."""

_STRETCH = 1.9
"""How much longer a step may take for the sake of others that decode."""
_PROMPT_STRETCH = 2.5
"""How much longer it may take for the sake of prompts."""


@dataclass(slots=True)
class _Budget:
    """What is left of a step for tokens that are not decoded."""

    tokens: int
    logits: int

    def spend(self, sequence: Sequence) -> list[Chunk]:
        start, silent = sequence.computed, max(0, sequence.wanted_from - sequence.computed)
        count = min(sequence.pending, self.tokens, silent + self.logits)
        if count == 0:
            return []
        chunk = Chunk(sequence, start, count)
        self.tokens -= count
        self.logits -= len(chunk.wanted)
        return [chunk]


class Scheduler:
    """`max_batch` sequences decode together at most; a step computes `prefill_tokens` prompt tokens at most."""

    def __init__(self, pool: BlockPool, *, max_batch: int, prefill_tokens: int) -> None:
        self.pool = pool
        self.pace = Pace()
        self._turns = 0
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._max_batch = max_batch
        self._prefill_tokens = prefill_tokens

    def blocks_needed(self, sequence: Sequence) -> int:
        """What admission takes when nothing is cached."""
        own = self.pool.blocks_for(len(sequence.tokens) + sequence.room)
        shared = sequence.fork_at // self.pool.size
        return own + sum(self.pool.blocks_for(len(fork.tokens) + fork.room) - shared for fork in sequence.forks)

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    def plan(self) -> list[Chunk]:
        """The coming step. Empty only when there is nothing to do, or nothing that can be: see `hopeless`."""
        chunks = [Chunk(sequence, sequence.computed, 1) for sequence in self._decoding()]
        budget = _Budget(self._room_for_prompts(len(chunks)), LOGIT_ROWS)
        for sequence in self._least_first([one for one in self.running if one.pending and not _makes(one)]):
            chunks += budget.spend(sequence)
        claimed = self._claims(self.running)
        for sequence in self._least_first(self.waiting):
            if not (budget.tokens and budget.logits):
                break
            decision = self._admit(sequence, claimed)
            if decision == "full":
                break
            if decision == "admitted":
                self.waiting.remove(sequence)
                claimed |= self._claims([sequence])
                chunks += budget.spend(sequence)
        for chunk in chunks:
            self._turns += 1
            chunk.sequence.turn = self._turns
        return chunks

    def hopeless(self) -> Sequence | None:
        """Who would wait for ever: nothing is at work whose end could make room, and the first in line has too little."""
        return None if self.running or not self.waiting else self._least_first(self.waiting)[0]

    def took(self, chunks: Iterable[Chunk], seconds: float) -> None:
        """A step of these took that long."""
        made = read = 0
        for chunk in chunks:
            if chunk.start >= chunk.sequence.inputs:
                made += chunk.count
            else:
                read += chunk.count
        self.pace.learn(made, read, seconds)

    def _decoding(self) -> list[Sequence]:
        """Those that get their next token in the coming step."""
        lines: dict[Hashable, list[Sequence]] = {}
        for sequence in self.running:
            if _makes(sequence):
                lines.setdefault(sequence.share, []).append(sequence)
        if len(lines) < 2 or not self.pace.known:
            return [sequence for line in lines.values() for sequence in line]
        for line in lines.values():
            line.sort(key=lambda one: one.turn)
        # One of each at a time: the shortest lines are in it whole before a longer one has as many again.
        taken = [one for row in zip_longest(*lines.values()) for one in row if one is not None]
        least = min(map(len, lines.values()))
        allowed, surely = _STRETCH * self.pace.seconds(least), least * len(lines)
        while len(taken) > surely and self.pace.seconds(len(taken)) > allowed:
            taken.pop()
        return taken

    def _room_for_prompts(self, made: int) -> int:
        if not made or not self.pace.known:
            return self._prefill_tokens
        room = self.pace.room(made, _PROMPT_STRETCH * self.pace.seconds(made))
        return min(self._prefill_tokens, max(self.pool.size, room // self.pool.size * self.pool.size))

    def _least_first(self, sequences: Iterable[Sequence]) -> list[Sequence]:
        """By priority; then in the order in which they came, but one of each share at a time, those first whose share has least
        at work."""
        at_work = Counter(sequence.share for sequence in self.running)
        ranked = []
        for sequence in sorted(sequences, key=lambda one: -one.priority):
            ranked.append((-sequence.priority, at_work[sequence.share], sequence))
            at_work[sequence.share] += 1
        return [sequence for *_, sequence in sorted(ranked, key=lambda entry: entry[:2])]

    def advance(self, chunks: Iterable[Chunk]) -> None:
        """Books a computed step: full blocks become findable, forks whose beginning is there start."""
        for chunk in chunks:
            sequence = chunk.sequence
            if sequence.over:
                continue
            sequence.computed = chunk.start + chunk.count
            # What the model made is computed by other kernels than a prompt, so it is not the same to the last bit.
            offered = 0 if sequence.private else min(sequence.computed, sequence.inputs)
            while (sequence.published + 1) * self.pool.size <= offered:
                block = sequence.table[sequence.published]
                sequence.node = self.pool.publish(sequence.node, sequence.tokens, sequence.published, block)
                sequence.published += 1
            if sequence.forks and chunk.start < sequence.fork_at <= sequence.computed:
                self._start_forks(sequence)

    def finish(self, sequences: Iterable[Sequence]) -> None:
        """Takes the sequences of one owner out, whatever their state, and gives their blocks back."""
        self.retire(part for sequence in sequences for part in (sequence, *sequence.forks))

    def retire(self, parts: Iterable[Sequence]) -> None:
        """Takes sequences out by themselves; what forked from them goes on."""
        for part in parts:
            if not part.over:
                part.over = True
                self.pool.release(part.table)
                part.table = []
        self.running = [sequence for sequence in self.running if not sequence.over]
        self.waiting = deque(sequence for sequence in self.waiting if not sequence.over)

    def _claims(self, sequences: Iterable[Sequence]) -> set[object]:
        """The blocks that the sequences will compute next, as keys of the prefix index."""
        size = self.pool.size
        return {
            self.pool.key(sequence.node, sequence.tokens, sequence.published)
            for sequence in sequences
            if not sequence.private and sequence.inputs >= (sequence.published + 1) * size
        }

    def _admit(self, sequence: Sequence, claimed: set[object]) -> Literal["admitted", "later", "full"]:
        """later: others may go first.  full: the blocks are not there, and nobody may take them from under it."""
        pool = self.pool
        if sequence.decodes:
            # Who has nothing at work need not wait for the batch of another to become smaller.
            idle = all(other.share != sequence.share for other in self.running)
            if sum(map(_lines, self.running)) + _lines(sequence) > self._max_batch * (2 if idle else 1):
                return "later"
        held, node = pool.match(sequence.namespace, sequence.tokens, sequence.wanted_from // pool.size)
        full = len(sequence.tokens) >= (len(held) + 1) * pool.size
        wanted = len(held) < sequence.wanted_from // pool.size
        if full and wanted and pool.key(node, sequence.tokens, len(held)) in claimed:
            pool.release(held)
            return "later"
        if self.blocks_needed(sequence) - len(held) > pool.available:
            pool.release(held)
            return "full"
        sequence.table = held + pool.allocate(pool.blocks_for(len(sequence.tokens) + sequence.room) - len(held))
        sequence.computed = sequence.cached = len(held) * pool.size
        sequence.published, sequence.node = len(held), node
        shared = sequence.fork_at // pool.size
        for fork in sequence.forks:
            pool.share(sequence.table[:shared])
            fork.table = sequence.table[:shared] + pool.allocate(pool.blocks_for(len(fork.tokens) + fork.room) - shared)
        self.running.append(sequence)
        return "admitted"

    def _start_forks(self, sequence: Sequence) -> None:
        shared = sequence.fork_at // self.pool.size
        for fork in sequence.forks:
            fork.computed = sequence.fork_at
            if sequence.fork_at % self.pool.size:
                fork.copy_from = sequence.table[shared]
            self.running.append(fork)


def _makes(sequence: Sequence) -> bool:
    """Whether its next token is one that the model made."""
    return sequence.decodes and sequence.pending == 1


def _lines(sequence: Sequence) -> int:
    """How many rows of a step it takes when it decodes, with those that have yet to fork from it."""
    waiting = 0 if sequence.computed >= sequence.fork_at else len(sequence.forks)
    return 1 + waiting if sequence.decodes else 0
