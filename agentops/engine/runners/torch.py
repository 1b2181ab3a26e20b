"""The runner in torch: the readable reference, and the path to a GPU.

Keys and values lie in one tensor (layers, 2, kv heads, blocks * 16, dim): a block is 16 neighbouring slots, so that the
blocks of a sequence that happen to be neighbours are read as one. The reference kernel keeps them in float32, the others in
float16.

With the int4 kernel on a CPU, what a row gets is the same to the last bit whatever else is in the step: tokens that the model
made and tokens of prompts are computed apart, each kind by kernels that treat every row alike, and attention always sees a
position in the same shapes. It knows nothing of requests, text or sampling.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from agentops.engine.checkpoint import Checkpoint
from agentops.engine.decoder import TILE, Attend, Decoder, Tile, causal_tiles, dot_attention
from agentops.engine.linear import Kernel, for_prompts, make_linear, multiplies_bfloat16
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
    """Sequences of about the same length with one row each: their row numbers (a slice if they are all), their slots
    (sequences * length, filled up with slots of their own), and what must not be seen, (sequences, 1, 1, length)."""

    rows: Tensor | slice
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
            self._prompts = self._model.with_linears(for_prompts)
            self._cache = torch.empty(
                (config.layers, 2, config.kv_heads, blocks * block, config.head_dim),
                dtype=torch.float32 if kernel == "float32" else torch.float16,
                device=device,
            )
        self._config = config
        self._block = block
        self._device = device
        self._kernel = kernel

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
        logits = np.empty((len(batch.wanted), self.vocabulary), np.float32)
        with torch.inference_mode():
            self._copy(batch.copies)
            for made, rows, wanted in batch.kinds():
                logits[wanted] = self._compute(self._model if made else self._prompts, rows, made)
        return logits

    def _compute(self, model: Decoder, batch: Batch, made: bool) -> NDArray[np.float32]:
        parts = self._together(batch) if made else self._apart(batch)
        written = torch.from_numpy(self._written(batch)).to(self._device)

        def attend(layer: int) -> Attend:
            return lambda queries, keys, values: self._attend(layer, parts, written, queries, keys, values)

        tokens, positions, wanted = (
            torch.from_numpy(rows).to(self._device) for rows in (batch.tokens, batch.positions, batch.wanted)
        )
        logits: NDArray[np.float32] = model(tokens, positions, attend, wanted).cpu().numpy()
        return logits

    @property
    def layout(self) -> Hashable:
        """As `Runner.layout`."""
        shape = (*self._cache.shape[:3], self._block, self._cache.shape[4])
        return "torch", torch.__version__, self._kernel, self._device, str(self._cache.dtype), multiplies_bfloat16(), shape

    def read_block(self, block: int) -> NDArray[Any]:
        """As `Runner.read_block`."""
        numbers: NDArray[Any] = self._cache[:, :, :, self._slots_of(block)].cpu().numpy()
        return numbers

    def write_block(self, block: int, numbers: NDArray[Any]) -> None:
        """As `Runner.write_block`."""
        with torch.inference_mode():
            self._cache[:, :, :, self._slots_of(block)] = torch.from_numpy(numbers).to(self._device)

    def _slots_of(self, block: int) -> slice:
        return slice(block * self._block, (block + 1) * self._block)

    def close(self) -> None:
        """Gives the memory of weights and cache back."""
        self._model = self._prompts = self._cache = None  # type: ignore[assignment]

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

    def _apart(self, batch: Batch) -> list[_Part]:
        """Prompts, each attended to by itself."""
        stops = np.cumsum(batch.counts)
        return [
            self._part(slice(int(stop) - count, int(stop)), self._slots(table, int(batch.positions[stop - 1]) + 1))
            for count, stop, table in zip(batch.counts, stops, batch.tables, strict=True)
        ]

    def _part(self, rows: slice, slots: NDArray[np.int64]) -> _Part:
        count, length, first = rows.stop - rows.start, len(slots), int(slots[0])
        tiles = causal_tiles(self._config, length - count, count, self._device)
        if slots[-1] - first == length - 1 and bool((np.diff(slots) == 1).all()):
            return _Part(rows, slice(first, first + length), tiles)
        return _Part(rows, torch.from_numpy(slots).to(self._device), tiles)

    def _together(self, batch: Batch) -> list[_Together]:
        """Made tokens, attended to at once where their sequences fill up to the same length."""
        alike: dict[int, list[int]] = {}
        for row, position in enumerate(batch.positions):
            alike.setdefault(_filled(int(position) + 1), []).append(row)
        groups = []
        for length, rows in alike.items():
            size = max(1, _GATHERED // (length * self._config.kv_heads * self._config.head_dim))
            groups += [self._group(batch, length, rows[at : at + size]) for at in range(0, len(rows), size)]
        return groups

    def _group(self, batch: Batch, length: int, rows: list[int]) -> _Together:
        lengths = batch.positions[rows] + 1
        slots = [self._slots(batch.tables[row], int(own)) for row, own in zip(rows, lengths, strict=True)]
        filled = np.concatenate([np.pad(own, (0, length - len(own)), mode="edge") for own in slots])
        hidden = torch.from_numpy(np.arange(length) >= lengths[:, None])
        mask = torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf)[:, None, None]
        places = slice(None) if len(rows) == len(batch.counts) else torch.tensor(rows).to(self._device)
        return _Together(places, torch.from_numpy(filled).to(self._device), mask.to(self._device))

    def _slots(self, table: Sequence[int], length: int) -> NDArray[np.int64]:
        used = np.asarray(table[: -(-length // self._block)], np.int64)
        return (used[:, None] * self._block + np.arange(self._block)).reshape(-1)[:length]

    def _attend(
        self, layer: int, parts: Sequence[_Part | _Together], written: Tensor, queries: Tensor, keys: Tensor, values: Tensor
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
                length = held.shape[2]
                whole = torch.zeros((*held.shape[:2], -(-length // TILE) * TILE, held.shape[3]), device=self._device)
                whole[:, :, :length] = held
                attended[part.rows] = dot_attention(queries[part.rows], whole[0], whole[1], part.tiles)
        return attended


def _filled(length: int) -> int:
    """The length to which a sequence is filled up for attention, from its own length alone: 2 ** n or 3 * 2 ** n."""
    power = 1 << max(6, (length - 1).bit_length())
    return power * 3 // 4 if length <= power * 3 // 4 else power


def _attend_together(queries: Tensor, held: Tensor, mask: Tensor) -> Tensor:
    """queries (sequences, heads, dim); held (2, kv heads, sequences * length, dim); returns the shape of the queries."""
    count, heads, dim = queries.shape
    kv_heads = held.shape[1]
    keys, values = held.view(2, kv_heads, count, -1, dim).transpose(1, 2)
    grouped = queries.view(count, kv_heads, -1, dim)
    # Eight rows: otherwise the kernel's scratch memory begins where a thread's number says, and with that sums change.
    filled = functional.pad(grouped, (0, 0, 0, -grouped.shape[2] % 8))
    attended = functional.scaled_dot_product_attention(filled, keys, values, attn_mask=mask)
    return attended[:, :, : grouped.shape[2]].reshape(count, heads, dim)
