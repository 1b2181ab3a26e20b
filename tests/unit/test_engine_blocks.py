"""Blocks, prefix index and scheduler, with plain integers."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from agentops.engine.blocks import BlockPool, Namespace, NoRoom, Pins
from agentops.engine.scheduler import LOGIT_ROWS, Scheduler
from agentops.engine.sequence import Chunk, Sequence

SIZE = 4
PROMPTS = st.lists(st.integers(0, 1), min_size=1, max_size=24)
SALTS = st.sampled_from([Namespace("model", "", "one"), Namespace("model", "", "two"), Namespace("model", "adapter", "one")])


def remember(pool: BlockPool, tokens: list[int], namespace: str = "a") -> None:
    """Computes a prompt and lets go of it, as a finished request does."""
    table = pool.allocate(pool.blocks_for(len(tokens)))
    _, node = pool.match(namespace, tokens, 0)
    for index in range(len(tokens) // pool.size):
        node = pool.publish(node, tokens, index, table[index])
    pool.release(table)


def matched(pool: BlockPool, tokens: list[int], namespace: str = "a") -> int:
    held, _ = pool.match(namespace, tokens, len(tokens) // pool.size)
    pool.release(held)
    return len(held)


def test_a_prefix_is_found_as_far_as_it_is_the_same() -> None:
    pool = BlockPool(16, SIZE)
    remember(pool, list(range(10)))
    assert matched(pool, list(range(10))) == 2
    assert matched(pool, [0, 1, 2, 3, 9, 9, 9, 9]) == 1
    assert matched(pool, [9, 1, 2, 3]) == 0
    assert matched(pool, [4, 5, 6, 7]) == 0, "a block is known by everything before it, not by its own tokens"


def test_another_tenant_never_hits_and_the_same_one_does() -> None:
    pool = BlockPool(16, SIZE)
    remember(pool, list(range(8)), namespace="one")
    assert matched(pool, list(range(8)), namespace="two") == 0
    assert matched(pool, list(range(8)), namespace="one") == 2


def test_the_longest_unused_is_forgotten_first_and_ends_go_before_beginnings() -> None:
    pool = BlockPool(4, SIZE)
    old, new = [1] * 8, [2] * 8
    remember(pool, old)
    remember(pool, new)
    assert matched(pool, old) == 2
    assert matched(pool, new) == 2
    held, _ = pool.match("a", old, 2)
    pool.release(held)
    pool.release(pool.allocate(1))
    assert (matched(pool, new), matched(pool, old)) == (1, 2)


def test_what_is_held_is_never_given_away() -> None:
    pool = BlockPool(3, SIZE)
    remember(pool, [1] * 8)
    held, _ = pool.match("a", [1] * 8, 2)
    with pytest.raises(NoRoom):
        pool.allocate(2)
    assert len(pool.allocate(1)) == 1
    assert (pool.free, pool.cached, pool.used) == (0, 0, 3)
    pool.release(held)
    assert (pool.free, pool.cached, pool.used) == (0, 2, 1)


class Books(RuleBasedStateMachine):
    """Random requests against a small pool: nothing leaks, nothing is counted twice, and hits are true."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(12, SIZE)
        self.content: dict[int, tuple[str, tuple[int, ...]]] = {}
        self.held: list[list[int]] = []

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=20), namespace=st.sampled_from("ab"), keep=st.booleans())
    def request(self, tokens: list[int], namespace: str, keep: bool) -> None:
        pool = self.pool
        held, node = pool.match(namespace, tokens, len(tokens) // SIZE)
        for index, block in enumerate(held):
            assert self.content[block] == (namespace, tuple(tokens[: (index + 1) * SIZE]))
        try:
            table = held + pool.allocate(pool.blocks_for(len(tokens)) - len(held))
        except NoRoom:
            assert pool.available < pool.blocks_for(len(tokens)) - len(held)
            pool.release(held)
            return
        assert len(set(table)) == len(table)
        assert not set(table[len(held) :]) & {block for other in self.held for block in other}
        for index in range(len(held), len(tokens) // SIZE):
            self.content[table[index]] = (namespace, tuple(tokens[: (index + 1) * SIZE]))
            node = pool.publish(node, tokens, index, table[index])
        if keep:
            self.held.append(table)
        else:
            pool.release(table)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def let_go(self, data: st.DataObject) -> None:
        self.pool.release(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @invariant()
    def books_balance(self) -> None:
        pool = self.pool
        assert pool.free + pool.cached + pool.used == pool.total
        assert pool.used == len({block for table in self.held for block in table})

    def teardown(self) -> None:
        for table in self.held:
            self.pool.release(table)
        assert self.pool.used == 0


TestBooks = Books.TestCase
TestBooks.settings = hypothesis_settings(max_examples=60, stateful_step_count=30, deadline=None)


def generating(tokens: list[int], room: int = 4, namespace: str = "a") -> Sequence:
    return Sequence(namespace, list(tokens), len(tokens) - 1, None, room=room, decodes=True)


def scored(tokens: list[int], wanted_from: int, namespace: str = "a") -> Sequence:
    return Sequence(namespace, list(tokens), wanted_from, None)


def scheduler(blocks: int = 64, max_batch: int = 4, prefill_tokens: int = 16) -> Scheduler:
    return Scheduler(BlockPool(blocks, SIZE), max_batch=max_batch, prefill_tokens=prefill_tokens)


def test_a_long_prompt_is_cut_into_chunks_and_others_decode_meanwhile() -> None:
    plan = scheduler(prefill_tokens=8)
    short, long = generating([1, 2, 3]), generating(list(range(100, 120)))
    plan.add(short)
    plan.add(long)
    first = plan.plan()
    assert [(chunk.sequence, chunk.start, chunk.count) for chunk in first] == [(short, 0, 3), (long, 0, 5)]
    assert [len(chunk.wanted) for chunk in first] == [1, 0]
    plan.advance(first)
    short.tokens.append(9)
    second = plan.plan()
    assert [(chunk.sequence, chunk.start, chunk.count) for chunk in second] == [(short, 3, 1), (long, 5, 8)]
    plan.advance(second)
    plan.finish([short])
    third = plan.plan()
    assert [(chunk.sequence, chunk.start, chunk.count, len(chunk.wanted)) for chunk in third] == [(long, 13, 7, 1)]


def test_no_more_decode_together_than_allowed_and_scoring_may_pass() -> None:
    plan = scheduler(max_batch=2)
    decoding = [generating([n, n]) for n in range(3)]
    scoring = scored([7, 7, 7], 1)
    for sequence in (*decoding, scoring):
        plan.add(sequence)
    assert [chunk.sequence for chunk in plan.plan()] == [decoding[0], decoding[1], scoring]
    plan.finish([decoding[0]])
    assert decoding[2] in [chunk.sequence for chunk in plan.plan()]


def test_a_prompt_whose_beginning_is_being_computed_waits_and_finds_it() -> None:
    plan = scheduler(prefill_tokens=64)
    shared = list(range(12))
    first, second, other = generating([*shared, 50]), generating([*shared, 60]), generating([70, 71, 72, 73, 74])
    for sequence in (first, second, other):
        plan.add(sequence)
    step = plan.plan()
    assert [chunk.sequence for chunk in step] == [first, other]
    plan.advance(step)
    for sequence in (first, other):
        sequence.tokens.append(99)
    assert second in [chunk.sequence for chunk in plan.plan()]
    assert second.cached == 12


def test_at_least_the_last_token_is_computed() -> None:
    plan = scheduler(prefill_tokens=64)
    for _ in range(2):
        sequence = generating(list(range(12)))
        plan.add(sequence)
        step = plan.plan()
        plan.advance(step)
        plan.finish([sequence])
    assert sequence.cached == 8
    assert step[0].count == 4
    assert len(step[0].wanted) == 1


def test_what_the_model_made_is_not_offered_and_nobody_waits_for_it() -> None:
    plan = scheduler()
    first, second = generating([1, 2, 3, 4, 5], room=8), generating([1, 2, 3, 4, 5, 6, 7, 8, 9])
    plan.add(first)
    for made in (6, 7, 8, 9):
        plan.advance(plan.plan())
        first.tokens.append(made)
    plan.add(second)
    assert [chunk.sequence for chunk in plan.plan()] == [first, second]
    assert second.cached == SIZE == 4


def test_nobody_is_admitted_without_all_the_blocks_it_may_need() -> None:
    plan = scheduler(blocks=4)
    first, second = generating([1] * 6, room=6), generating([2] * 6, room=6)
    plan.add(first)
    plan.add(second)
    assert [chunk.sequence for chunk in plan.plan()] == [first]
    assert plan.pool.available == 1
    plan.finish([first])
    assert [chunk.sequence for chunk in plan.plan()] == [second]


def test_forks_share_the_prefix_copy_its_unfinished_block_and_start_when_it_is_there() -> None:
    plan = scheduler(prefill_tokens=4)
    prefix = [1, 2, 3, 4, 5, 6]
    fork = Sequence("a", [*prefix, 20, 21], 6, None, private=True)
    root = Sequence("a", [*prefix, 10], 5, None, forks=(fork,), fork_at=6)
    plan.add(root)
    steps = []
    while chunks := plan.plan():
        steps.append([(chunk.sequence is fork, chunk.start, chunk.count) for chunk in chunks])
        if fork in [chunk.sequence for chunk in chunks] and fork.copy_from is not None:
            assert fork.copy_from == root.table[1]
            assert fork.table[0] == root.table[0]
            assert fork.table[1] != root.table[1]
        plan.advance(chunks)
        if root.pending == fork.pending == 0:
            break
    assert steps == [[(False, 0, 4)], [(False, 4, 3)], [(True, 6, 2)]]
    plan.finish([root])
    assert plan.pool.used == 0
    assert plan.idle


def test_a_step_asks_for_a_bounded_number_of_logits() -> None:
    plan = scheduler(blocks=1000, prefill_tokens=10_000)
    sequence = scored(list(range(1000)), 100)
    plan.add(sequence)
    wanted = []
    while chunks := plan.plan():
        wanted.append(sum(len(chunk.wanted) for chunk in chunks))
        plan.advance(chunks)
        if not sequence.pending:
            break
    assert wanted == [LOGIT_ROWS, LOGIT_ROWS, LOGIT_ROWS, 900 - 3 * LOGIT_ROWS]


class Traffic(RuleBasedStateMachine):
    """Requests of several salts that come, are computed, fork, end, are cancelled, or are in a step that crashes, beside prefixes
    that are pinned: everyone is served or told, nothing leaks, nothing is shared across salts, and the pool comes to rest."""

    def __init__(self) -> None:
        super().__init__()
        self.plan = scheduler(blocks=20, max_batch=3, prefill_tokens=7)
        self.pins = Pins(self.plan.pool, 8)
        self.pinned: dict[tuple[Namespace, tuple[int, ...]], int] = {}
        self.open: list[Sequence] = []

    @rule(tokens=PROMPTS, room=st.integers(0, 6), forks=st.integers(0, 2), salt=SALTS, priority=st.integers(0, 1))
    def generate(self, tokens: list[int], room: int, forks: int, salt: Namespace, priority: int) -> None:
        def part(**how: Any) -> Sequence:
            wanted = len(tokens) - 1 if "forks" in how else len(tokens)
            return Sequence(salt, list(tokens), wanted, None, room=room, decodes=True, priority=priority, **how)

        parts = tuple(part(private=True) for _ in range(forks if room else 0))
        self._add(part(forks=parts, fork_at=len(tokens) if parts else 0))

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=12), forks=st.integers(0, 3), salt=SALTS)
    def score(self, tokens: list[int], forks: int, salt: Namespace) -> None:
        parts = tuple(Sequence(salt, [*tokens, 5, 6], len(tokens), None, private=True) for _ in range(forks))
        self._add(Sequence(salt, [*tokens, 4], len(tokens) - 1, None, forks=parts, fork_at=len(tokens)))

    def _add(self, sequence: Sequence) -> None:
        if self.plan.blocks_needed(sequence) <= self.plan.pool.total:
            self.open.append(sequence)
            self.plan.add(sequence)

    @rule()
    def step(self) -> None:
        chunks = self.plan.plan()
        if not chunks and self.open:
            hopeless = self.plan.hopeless()
            assert hopeless in self.open
            assert self.plan.blocks_needed(hopeless) > self.plan.pool.total - self.pins.blocks
            self._end(hopeless)
            return
        self._check(chunks)
        self.plan.advance(chunks)
        for sequence in list(self.open):
            self._extend(sequence)

    def _check(self, chunks: list[Chunk]) -> None:
        pool = self.plan.pool
        assert sum(chunk.count for chunk in chunks if chunk.count > 1) <= 7
        written: list[int] = []
        for chunk in chunks:
            sequence = chunk.sequence
            assert chunk.start == sequence.computed
            assert pool.blocks_for(chunk.start + chunk.count) <= len(sequence.table)
            reached = range(chunk.start // SIZE, pool.blocks_for(chunk.start + chunk.count))
            own = {sequence.table[index] for index in reached}
            written += own
            # Nobody writes where another reads: forks that have begun have a copy of what their own tokens go on in.
            for other in (part for root in self.open for part in (root, *root.forks) if part is not sequence):
                assert not own & {*other.table[: pool.blocks_for(other.computed)]}
            assert not own & {block for held in self.pins._held.values() for block in held}
            if sequence.copy_from is not None:
                assert sequence.copy_from not in sequence.table
                sequence.copy_from = None
        assert len(set(written)) == len(written)

    def _extend(self, root: Sequence) -> None:
        parts = [part for part in (root, *root.forks) if not part.over]
        if not root.table or any(part.pending for part in parts):
            return
        growing = [part for part in parts if len(part.tokens) < part.inputs + part.room]
        if not growing:
            self._end(root)
        for part in growing:
            part.tokens.append(1)

    @rule()
    def crash(self) -> None:
        """A step that was planned is never computed: those in it are ended, and only those."""
        chunks = self.plan.plan()
        inside = {chunk.sequence for chunk in chunks}
        for root in list(self.open):
            if inside & {root, *root.forks}:
                self._end(root)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self._end(self.open[data.draw(st.integers(0, len(self.open) - 1))])

    @precondition(lambda self: any(part.table for root in self.open for part in root.forks))
    @rule(data=st.data())
    def end_one_of_several(self, data: st.DataObject) -> None:
        forks = [part for root in self.open for part in root.forks if part.table and part.computed]
        if forks:
            self.plan.retire([data.draw(st.sampled_from(range(len(forks))).map(forks.__getitem__))])

    @rule(tokens=PROMPTS, salt=SALTS)
    def pin(self, tokens: list[int], salt: Namespace) -> None:
        before = self.pins.blocks
        try:
            held = self.pins.pin(salt, tokens)
        except NoRoom:
            assert self.pins.blocks == before
            return
        self.pinned[salt, tuple(tokens[: len(tokens) // SIZE * SIZE])] = held

    @precondition(lambda self: self.pinned)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        salt, tokens = data.draw(st.sampled_from(sorted(self.pinned)))
        assert self.pins.unpin(salt, tokens) == self.pinned.pop((salt, tokens))

    def _end(self, sequence: Sequence) -> None:
        self.open.remove(sequence)
        self.plan.finish([sequence])

    def _holders(self) -> list[tuple[Namespace, list[int]]]:
        tables = [(root.namespace, part.table) for root in self.open for part in (root, *root.forks)]
        return [*tables, *((key[0], held) for key, held in self.pins._held.items())]  # type: ignore[list-item]

    @invariant()
    def every_block_is_accounted_for(self) -> None:
        pool, holders = self.plan.pool, self._holders()
        assert pool.free + pool.cached + pool.used == pool.total
        counted = Counter(block for _, table in holders for block in table)
        assert [counted[block] for block in range(pool.total)] == pool._holders
        assert self.pins.blocks == len({block for held in self.pins._held.values() for block in held}) <= self.pins.limit
        assert len(set(pool._free)) == len(pool._free)
        assert not {*pool._free} & {*pool._cached}

    @invariant()
    def no_block_is_shared_across_salts(self) -> None:
        owners: dict[int, Namespace] = {}
        for namespace, table in self._holders():
            for block in table:
                assert owners.setdefault(block, namespace) == namespace
        for namespace, _, block in self.plan.pool.prefixes():
            assert owners.get(block, namespace) == namespace

    def teardown(self) -> None:
        for _ in range(2000):
            if not self.open:
                break
            self.step()
        assert not self.open
        assert self.plan.idle
        for salt, tokens in list(self.pinned):
            self.pins.unpin(salt, tokens)
        assert self.plan.pool.used == self.pins.blocks == 0
        assert self.plan.pool._holders == [0] * self.plan.pool.total


TestTraffic = Traffic.TestCase
TestTraffic.settings = hypothesis_settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_neither_blocks_nor_scheduler_know_a_tensor_library() -> None:
    program = "import sys, agentops.engine.blocks, agentops.engine.scheduler; print('torch' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout.strip() == "False"
