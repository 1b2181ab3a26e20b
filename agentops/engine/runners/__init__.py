"""Runners own the weights and the KV tensors and compute one step at a time; `Runner` is their common signature.

    rows of tokens with their positions, and each sequence's block table  ->  logits of the wanted rows

A runner knows nothing of requests, text, sampling or who shares a block with whom.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Batch:
    """The rows of one step, those of a sequence side by side and in order.

    tokens and positions have one entry a row. Sequence `i` owns `counts[i]` rows and keeps its keys and values in the
    blocks `tables[i]`: position p lies in block `tables[i][p // block]` at `p % block`. `wanted` are row numbers, rising.
    Before anything else, each of `copies` (source, target) copies a whole block. `made` says which sequences have one row,
    for a token that the model made; the others' rows are of prompts.
    """

    tokens: NDArray[np.int64]
    positions: NDArray[np.int64]
    counts: Sequence[int]
    tables: Sequence[Sequence[int]]
    wanted: NDArray[np.int64]
    copies: Sequence[tuple[int, int]] = ()
    made: Sequence[bool] = ()

    def kinds(self) -> Iterator[tuple[bool, Batch, NDArray[np.bool_]]]:
        """The rows of prompts and those of made tokens as steps of their own: whether they were made, the step, and which of
        `wanted` are in it. Copies are left out."""
        made = np.array(self.made or [False] * len(self.counts))
        of_row = np.repeat(made, self.counts)
        for kind in (False, True):
            rows, wanted = np.flatnonzero(of_row == kind), of_row[self.wanted] == kind
            if len(rows):
                owners = [i for i, own in enumerate(made) if own == kind]
                counts, tables = [self.counts[i] for i in owners], [self.tables[i] for i in owners]
                places = np.searchsorted(rows, self.wanted[wanted])
                yield kind, Batch(self.tokens[rows], self.positions[rows], counts, tables, places), wanted


class Runner(Protocol):
    """A model that computes steps. Not thread-safe: one thread owns it."""

    @property
    def device(self) -> str: ...
    @property
    def vocabulary(self) -> int: ...

    def step(self, batch: Batch) -> NDArray[np.float32]:
        """Stores the rows' keys and values and returns logits (len(wanted), vocabulary)."""
        ...

    @property
    def layout(self) -> Hashable:
        """What the numbers in a block depend on beside the model: they are good for a runner with the same."""
        ...

    def read_block(self, block: int) -> NDArray[Any]:
        """The keys and values in a block of the cache, (layers, 2, kv heads, positions, dim)."""
        ...

    def write_block(self, block: int, numbers: NDArray[Any]) -> None:
        """Puts them back, to the last bit."""
        ...

    def close(self) -> None: ...
