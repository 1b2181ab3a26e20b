"""The KV cache's book-keeping: which block of positions belongs to whom, and which prefix a block already holds.

A block stands for `size` neighbouring positions. Blocks are counted by reference; a block nobody holds whose content is
known stays cached until its place is needed, the longest unused first. The index is keyed by namespace and by the tokens
themselves, compared one by one, so that neither a hash collision nor another tenant's request can ever hit. It holds no
tensors, knows no sequences and is owned by one thread.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple


class Namespace(NamedTuple):
    """Whose blocks may be whose: those of one model as it is computed, of one adapter on it, and of one tenant, whose name is the
    salt. The engine has no adapters yet, so that theirs is empty."""

    revision: str
    adapter: str
    salt: str


Node = Hashable
"""A place in the prefix index: a namespace at the root, then one node a block of tokens."""


class NoRoom(Exception):
    """Fewer blocks can be given than were asked for; none were taken."""


class BlockPool:
    """`total` blocks of `size` positions. Always: free + cached + used == total."""

    def __init__(self, total: int, size: int = 16) -> None:
        self.total, self.size = total, size
        self._free = list(range(total - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._holders = [0] * total
        self._index: dict[tuple[Node, tuple[int, ...]], tuple[int, int]] = {}
        self._keys: dict[int, tuple[Node, tuple[int, ...]]] = {}
        self._nodes = 0

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def cached(self) -> int:
        """Blocks that nobody holds and whose content is kept for whoever asks for it."""
        return len(self._cached)

    @property
    def used(self) -> int:
        return self.total - self.free - self.cached

    @property
    def available(self) -> int:
        """How many blocks `allocate` can give."""
        return self.free + self.cached

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.size)

    def match(self, namespace: Hashable, tokens: Sequence[int], limit: int) -> tuple[list[int], Node]:
        """Takes hold of the blocks that hold the beginning of `tokens`, `limit` blocks at most.

        Returns them in order and the node that the last of them is.
        """
        held: list[int] = []
        node: Node = ("root", namespace)
        while len(held) < limit:
            found = self._index.get(self.key(node, tokens, len(held)))
            if found is None:
                break
            block, node = found
            self._hold(block)
            held.append(block)
        return held, node

    def allocate(self, count: int) -> list[int]:
        """Takes `count` blocks, neighbours where possible.

        Raises:
            NoRoom: fewer are free or cached.
        """
        if count > self.available:
            raise NoRoom
        taken = []
        for _ in range(count):
            block = self._free.pop() if self._free else self._evict()
            self._holders[block] = 1
            taken.append(block)
        return taken

    def share(self, blocks: Sequence[int]) -> None:
        """Takes hold of blocks that somebody holds already."""
        for block in blocks:
            self._hold(block)

    def publish(self, node: Node, tokens: Sequence[int], index: int, block: int) -> Node:
        """Makes block number `index` of `tokens`, now computed, findable under `node`; returns its own node.

        Where the same content is known already, that stays and `block` remains private.
        """
        key = self.key(node, tokens, index)
        known = self._index.get(key)
        if known is None:
            self._nodes += 1
            known = self._index[key] = (block, self._nodes)
            self._keys[block] = key
        return known[1]

    def prefixes(self) -> Iterator[tuple[Hashable, tuple[int, ...], int]]:
        """Every block whose content can be found: its namespace, all tokens up to its end, and its number; ends come before what
        they go on from, and those that were not used for longest first."""
        place = {node: (key, block) for key, (block, node) in self._index.items()}
        ages = {block: age for age, block in enumerate(self._cached)}
        for key, (block, _) in sorted(self._index.items(), key=lambda item: ages.get(item[1][0], len(ages))):
            node, parts = key[0], [key[1]]
            while isinstance(node, int) and node in place:
                (node, tokens), _ = place[node]
                parts.append(tokens)
            # Without its beginning it can be found by nobody.
            if isinstance(node, tuple):
                yield node[1], tuple(token for part in reversed(parts) for token in part), block

    def release(self, blocks: Sequence[int]) -> None:
        """Lets go of blocks. Given in the order of a prompt, its end is forgotten before its beginning."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            if self._holders[block] == 0:
                if block in self._keys:
                    self._cached[block] = None
                else:
                    self._free.append(block)

    def key(self, node: Node, tokens: Sequence[int], index: int) -> tuple[Node, tuple[int, ...]]:
        """What names block number `index` of `tokens` under `node`."""
        return node, tuple(tokens[index * self.size : (index + 1) * self.size])

    def _hold(self, block: int) -> None:
        self._holders[block] += 1
        self._cached.pop(block, None)

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        del self._index[self._keys.pop(block)]
        return block


class Pins:
    """Prefixes whose blocks stay, whether or not a request holds them: `limit` blocks at most, each counted once."""

    def __init__(self, pool: BlockPool, limit: int) -> None:
        self.limit = limit
        self._pool = pool
        self._held: dict[tuple[Hashable, tuple[int, ...]], list[int]] = {}
        self._holders: Counter[int] = Counter()

    @property
    def blocks(self) -> int:
        return len(self._holders)

    def pin(self, namespace: Hashable, tokens: Sequence[int]) -> int:
        """Holds all whole blocks of `tokens` that are known, and returns how many; pinning twice is pinning once.

        Raises:
            NoRoom: more blocks than `limit` would be held; what was pinned stays as it was.
        """
        held, _ = self._pool.match(namespace, tokens, len(tokens) // self._pool.size)
        if len(self._holders.keys() | set(held)) > self.limit:
            self._pool.release(held)
            raise NoRoom
        self.unpin(namespace, tokens)
        self._held[namespace, self._whole(tokens)] = held
        self._holders.update(held)
        return len(held)

    def unpin(self, namespace: Hashable, tokens: Sequence[int]) -> int:
        """Lets go of what was pinned for exactly these tokens; returns how many blocks that were, 0 where it was not pinned."""
        held = self._held.pop((namespace, self._whole(tokens)), [])
        self._holders -= Counter(held)
        self._pool.release(held)
        return len(held)

    def _whole(self, tokens: Sequence[int]) -> tuple[int, ...]:
        return tuple(tokens[: len(tokens) // self._pool.size * self._pool.size])
