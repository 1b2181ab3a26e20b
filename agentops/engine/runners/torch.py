"""The runner in torch: the readable reference, and the path to a GPU.

Keys and values lie in one tensor (layers, 2, kv heads, blocks * 16, dim): a block is 16 neighbouring slots, so that the
blocks of a sequence that happen to be neighbours are read without a copy. The reference kernel keeps them in float32, the
others in float16. It knows nothing of requests, text or sampling.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agentops.engine.checkpoint import Checkpoint
from agentops.engine.decoder import Attend, Decoder, Tile, causal_tiles, dot_attention
from agentops.engine.linear import Kernel, make_linear
from agentops.engine.runners import Batch
from agentops.engine.workers import cores
from agentops.errors import SettingsError


def choose_device(wanted: Literal["auto", "cpu", "cuda"]) -> str:
    """
    Raises:
        SettingsError: a GPU was asked for and torch finds none.
    """
    if wanted == "cpu":
        return "cpu"
    found = torch.cuda.is_available()
    if wanted == "cuda" and not found:
        raise SettingsError("engine.device is cuda, but torch finds no usable GPU", hint="set engine.device to auto or cpu")
    return "cuda" if found else "cpu"


@dataclass(frozen=True, slots=True)
class _Part:
    """One sequence's rows in a step: where they stand, where its keys lie, and what each row may see."""

    rows: slice
    slots: slice | Tensor
    tiles: list[Tile]


class TorchRunner:
    """Computes steps with torch on `device` ("cpu" or "cuda").

    `blocks` of `block` positions are reserved; a CPU commits their memory when they are first written. `threads` 0 is one
    a core.
    """

    def __init__(
        self, checkpoint: Checkpoint, *, kernel: Kernel, device: str, blocks: int, block: int = 16, threads: int = 0
    ) -> None:
        config = checkpoint.config
        self._threads = threads or cores()
        self._owner: int | None = None

        def tensor(name: str) -> Tensor:
            return checkpoint.tensor(name).to(device)

        with torch.inference_mode():
            self._model = Decoder(config, tensor, lambda prefixes: make_linear(checkpoint, prefixes, kernel, device))
            self._cache = torch.empty(
                (config.layers, 2, config.kv_heads, blocks * block, config.head_dim),
                dtype=torch.float32 if kernel == "float32" else torch.float16,
                device=device,
            )
        self._config = config
        self._block = block
        self._device = device

    @property
    def device(self) -> str:
        return self._device

    @property
    def vocabulary(self) -> int:
        return self._config.vocabulary

    def step(self, batch: Batch) -> NDArray[np.float32]:
        """As `Runner.step`."""
        if self._owner != threading.get_ident():
            # torch keeps the number of threads per calling thread.
            torch.set_num_threads(self._threads)
            self._owner = threading.get_ident()
        with torch.inference_mode():
            self._copy(batch.copies)
            parts = self._parts(batch)
            written = torch.from_numpy(self._written(batch)).to(self._device)

            def attend(layer: int) -> Attend:
                return lambda queries, keys, values: self._attend(layer, parts, written, queries, keys, values)

            tokens, positions, wanted = (
                torch.from_numpy(rows).to(self._device) for rows in (batch.tokens, batch.positions, batch.wanted)
            )
            logits: NDArray[np.float32] = self._model(tokens, positions, attend, wanted).cpu().numpy()
            return logits

    def close(self) -> None:
        """Gives the memory of weights and cache back."""
        self._model = self._cache = None  # type: ignore[assignment]

    def _copy(self, copies: Sequence[tuple[int, int]]) -> None:
        size = self._block
        for source, target in copies:
            taken = self._cache[:, :, :, source * size : (source + 1) * size]
            self._cache[:, :, :, target * size : (target + 1) * size] = taken

    def _written(self, batch: Batch) -> NDArray[np.int64]:
        tables = [np.asarray(table, np.int64) for table in batch.tables]
        ends = np.cumsum(batch.counts)
        at = [batch.positions[end - count : end] for end, count in zip(ends, batch.counts, strict=True)]
        return np.concatenate(
            [
                table[positions // self._block] * self._block + positions % self._block
                for table, positions in zip(tables, at, strict=True)
            ]
        )

    def _parts(self, batch: Batch) -> list[_Part]:
        parts, start = [], 0
        for count, table in zip(batch.counts, batch.tables, strict=True):
            length = int(batch.positions[start + count - 1]) + 1
            tiles = causal_tiles(self._config, length - count, count, self._device)
            parts.append(_Part(slice(start, start + count), self._slots(table, length), tiles))
            start += count
        return parts

    def _slots(self, table: Sequence[int], length: int) -> slice | Tensor:
        used = np.asarray(table[: -(-length // self._block)], np.int64)
        if (np.diff(used) == 1).all():
            first = int(used[0]) * self._block
            return slice(first, first + length)
        slots = (used[:, None] * self._block + np.arange(self._block)).reshape(-1)[:length]
        return torch.from_numpy(slots).to(self._device)

    def _attend(self, layer: int, parts: list[_Part], written: Tensor, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        cache = self._cache[layer]
        cache[0].index_copy_(1, written, keys.transpose(0, 1).to(cache.dtype))
        cache[1].index_copy_(1, written, values.transpose(0, 1).to(cache.dtype))
        results = []
        for part in parts:
            held = cache[:, :, part.slots] if isinstance(part.slots, slice) else cache.index_select(2, part.slots)
            k, v = held.float()
            results.append(dot_attention(queries[part.rows], k, v, part.tiles))
        return results[0] if len(results) == 1 else torch.cat(results)
