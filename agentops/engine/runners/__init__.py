"""Runners own the weights and the KV tensors and compute one step at a time; `Runner` is their common signature.

    rows of tokens with their positions, and each sequence's block table  ->  logits of the wanted rows

A runner knows nothing of requests, text, sampling or who shares a block with whom.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Batch:
    """The rows of one step, those of a sequence side by side and in order.

    tokens and positions have one entry a row. Sequence `i` owns `counts[i]` rows and keeps its keys and values in the
    blocks `tables[i]`: position p lies in block `tables[i][p // block]` at `p % block`. `wanted` are row numbers, rising.
    Before anything else, each of `copies` (source, target) copies a whole block.
    """

    tokens: NDArray[np.int64]
    positions: NDArray[np.int64]
    counts: Sequence[int]
    tables: Sequence[Sequence[int]]
    wanted: NDArray[np.int64]
    copies: Sequence[tuple[int, int]] = ()


class Runner(Protocol):
    """A model that computes steps. Not thread-safe: one thread owns it."""

    @property
    def device(self) -> str: ...
    @property
    def vocabulary(self) -> int: ...

    def step(self, batch: Batch) -> NDArray[np.float32]:
        """Stores the rows' keys and values and returns logits (len(wanted), vocabulary)."""
        ...

    def close(self) -> None: ...
