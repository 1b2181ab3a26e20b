"""Continuous batching: decides before each step which tokens of which sequences are computed in it.

Sequences that decode come first, one token each; what is left of the step goes to prompts, cut into chunks. A sequence
is admitted when all the blocks it can ever need are there, so that none is thrown out half-way. One whose next block is
being computed by another waits for it and finds it cached. It holds integers only and is owned by one thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from agentops.engine.blocks import BlockPool
from agentops.engine.sequence import Chunk, Sequence

LOGIT_ROWS = 256
"""Rows of a step whose logits prompts and choices may ask for: a row is as wide as the vocabulary."""


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
        """The coming step. Empty only when there is nothing to do."""
        chunks: list[Chunk] = []
        budget = _Budget(self._prefill_tokens, LOGIT_ROWS)
        for sequence in self.running:
            if sequence.decodes and sequence.pending == 1:
                chunks.append(Chunk(sequence, sequence.computed, 1))
            elif sequence.pending:
                chunks += budget.spend(sequence)
        passed: list[Sequence] = []
        claimed = self._claims(self.running)
        while self.waiting and budget.tokens and budget.logits:
            sequence = self.waiting.popleft()
            decision = self._admit(sequence, claimed)
            if decision != "admitted":
                passed.append(sequence)
                if decision == "full":
                    break
                continue
            claimed |= self._claims([sequence])
            chunks += budget.spend(sequence)
        self.waiting.extendleft(reversed(passed))
        return chunks

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
        if sequence.decodes and sum(map(_lines, self.running)) + _lines(sequence) > self._max_batch:
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


def _lines(sequence: Sequence) -> int:
    """How many rows of a step it takes when it decodes, with those that have yet to fork from it."""
    waiting = 0 if sequence.computed >= sequence.fork_at else len(sequence.forks)
    return 1 + waiting if sequence.decodes else 0
