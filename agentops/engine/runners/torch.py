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
from torch.nn import functional

from agentops.engine.checkpoint import Checkpoint
from agentops.engine.decoder import Attend, Decoder, Tile, causal_tiles, dot_attention
from agentops.engine.linear import Kernel, make_linear
from agentops.engine.runners import Batch
from agentops.engine.workers import cores
from agentops.errors import SettingsError

_GATHERED = 2**25
"""Numbers in the keys that one group of sequences gathers; with the values, and both again as float32, 12 bytes each."""


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
class _Together:
    """Sequences of about the same length with one row each: their row numbers, their slots (sequences * length, shorter
    ones filled up with slots of their own), and what must not be seen, (sequences, 1, 1, length)."""

    rows: Tensor
    slots: Tensor
    mask: Tensor


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
        """The slot of each row."""
        starts = np.cumsum([0, *batch.counts])
        slots = []
        for table, start, stop in zip(batch.tables, starts, starts[1:], strict=False):
            positions = batch.positions[start:stop]
            slots.append(np.asarray(table, np.int64)[positions // self._block] * self._block + positions % self._block)
        return np.concatenate(slots)

    def _parts(self, batch: Batch) -> list[_Part | _Together]:
        parts: list[_Part | _Together] = []
        decoding: dict[int, list[tuple[int, NDArray[np.int64]]]] = {}
        start = 0
        for count, table in zip(batch.counts, batch.tables, strict=True):
            length = int(batch.positions[start + count - 1]) + 1
            slots = self._slots(table, length)
            if count == 1:
                decoding.setdefault(length.bit_length(), []).append((start, slots))
            else:
                parts.append(self._part(slice(start, start + count), slots))
            start += count
        for alike in decoding.values():
            longest = max(len(slots) for _, slots in alike)
            size = max(1, _GATHERED // (longest * self._config.kv_heads * self._config.head_dim))
            for at in range(0, len(alike), size):
                group = alike[at : at + size]
                if len(group) == 1:
                    row, slots = group[0]
                    parts.append(self._part(slice(row, row + 1), slots))
                else:
                    parts.append(self._together(group))
        return parts

    def _part(self, rows: slice, slots: NDArray[np.int64]) -> _Part:
        count, length, first = rows.stop - rows.start, len(slots), int(slots[0])
        tiles = causal_tiles(self._config, length - count, count, self._device)
        if slots[-1] - first == length - 1 and bool((np.diff(slots) == 1).all()):
            return _Part(rows, slice(first, first + length), tiles)
        return _Part(rows, torch.from_numpy(slots).to(self._device), tiles)

    def _together(self, alike: list[tuple[int, NDArray[np.int64]]]) -> _Together:
        length = max(len(slots) for _, slots in alike)
        padded = np.stack([np.pad(slots, (0, length - len(slots)), mode="edge") for _, slots in alike])
        hidden = np.arange(length) >= np.array([len(slots) for _, slots in alike])[:, None]
        mask = torch.zeros(hidden.shape).masked_fill(torch.from_numpy(hidden), -torch.inf)
        rows = torch.tensor([row for row, _ in alike])
        return _Together(
            rows.to(self._device), torch.from_numpy(padded.reshape(-1)).to(self._device), mask[:, None, None].to(self._device)
        )

    def _slots(self, table: Sequence[int], length: int) -> NDArray[np.int64]:
        used = np.asarray(table[: -(-length // self._block)], np.int64)
        return (used[:, None] * self._block + np.arange(self._block)).reshape(-1)[:length]

    def _attend(
        self, layer: int, parts: list[_Part | _Together], written: Tensor, queries: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        cache = self._cache[layer]
        cache[0].index_copy_(1, written, keys.transpose(0, 1).to(cache.dtype))
        cache[1].index_copy_(1, written, values.transpose(0, 1).to(cache.dtype))
        attended = torch.empty_like(queries)
        for part in parts:
            if isinstance(part, _Together):
                attended[part.rows] = _attend_together(queries[part.rows], cache.index_select(2, part.slots).float(), part.mask)
            else:
                held = cache[:, :, part.slots] if isinstance(part.slots, slice) else cache.index_select(2, part.slots)
                held_keys, held_values = held.float()
                attended[part.rows] = dot_attention(queries[part.rows], held_keys, held_values, part.tiles)
        return attended


def _attend_together(queries: Tensor, held: Tensor, mask: Tensor) -> Tensor:
    """queries (sequences, heads, dim); held (2, kv heads, sequences * length, dim); returns the shape of the queries."""
    _, kv_heads, _, dim = held.shape
    count = len(queries)
    keys, values = held.view(2, kv_heads, count, -1, dim).transpose(1, 2)
    grouped = queries.view(count, kv_heads, -1, dim)
    return functional.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask).reshape(queries.shape)
