"""A runner without a model that checks what a model cannot: that every row sees its own sequence's tokens and no others'.

It keeps, in each slot of the cache, which token was put there and for which position. The logits of a row follow from the tokens
that its block table leads to, so that an answer can be told beforehand by `answer`, and one lost copy, one stale or foreign block
changes it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agentops.engine.checkpoint import open_checkpoint
from agentops.engine.local import BLOCK, LocalEngine
from agentops.engine.runners import Batch
from agentops.engine.tokenizer import ChatTokenizer
from agentops.records import ModelInfo
from agentops.settings import load_settings


class ScriptedRunner:
    """A `Runner` of `blocks` blocks. `before` is called with each step and may raise; `vocabulary` tokens are all it can say."""

    device = "cpu"

    def __init__(self, blocks: int, vocabulary: int, block: int = BLOCK) -> None:
        self.vocabulary, self._block = vocabulary, block
        self._slots = np.full((blocks * block, 2), -1, np.int64)
        self.steps = 0
        self.before = lambda batch: None

    def step(self, batch: Batch) -> NDArray[np.float32]:
        self.steps += 1
        self.before(batch)
        size = self._block
        for source, target in batch.copies:
            self._slots[target * size : (target + 1) * size] = self._slots[source * size : (source + 1) * size]
        row, logits, wanted = 0, [], set(batch.wanted.tolist())
        for count, table in zip(batch.counts, batch.tables, strict=True):
            for at in range(row, row + count):
                position = int(batch.positions[at])
                self._slots[table[position // size] * size + position % size] = int(batch.tokens[at]), position
            lengths = [int(batch.positions[at]) + 1 for at in range(row, row + count) if at in wanted]
            logits += [likely(self._read(table, length), self.vocabulary) for length in lengths]
            row += count
        return np.array(logits, np.float32).reshape(len(batch.wanted), self.vocabulary)

    def _read(self, table: Sequence[int], length: int) -> list[int]:
        slots = (np.array(table)[:, None] * self._block + np.arange(self._block)).reshape(-1)[:length]
        tokens, positions = self._slots[slots].T
        assert positions.tolist() == list(range(length)), "a block holds other positions than its table says"
        return list(map(int, tokens))

    @property
    def layout(self) -> Hashable:
        return "scripted"

    def read_block(self, block: int) -> NDArray[Any]:
        return self._slots[block * self._block : (block + 1) * self._block].copy()

    def write_block(self, block: int, numbers: NDArray[Any]) -> None:
        self._slots[block * self._block : (block + 1) * self._block] = numbers

    def close(self) -> None:
        pass


def likely(tokens: Sequence[int], vocabulary: int) -> NDArray[np.float32]:
    """Logits that follow from all of `tokens`; one token stands out, never a control token, which are the first three."""
    digest = hashlib.blake2b(np.array(tokens, np.int64).tobytes(), digest_size=8).digest()
    logits = np.zeros(vocabulary, np.float32)
    logits[3 + int.from_bytes(digest) % (vocabulary - 3)] = 12.0
    return logits


def answer(prompt: Sequence[int], count: int, vocabulary: int) -> tuple[int, ...]:
    """The tokens that a greedy request gets after `prompt`."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(likely(tokens, vocabulary).argmax()))
    return tuple(tokens[len(prompt) :])


def scripted_engine(folder: Path, **settings: Any) -> tuple[LocalEngine, ScriptedRunner]:
    """An engine with the tokenizer of a model folder and a scripted runner."""
    flags = {"engine.kv_tokens": 4096, **{f"engine.{name}": value for name, value in settings.items()}}
    loaded = load_settings(flags, environment={})
    checkpoint = open_checkpoint(folder)
    size, blocks = checkpoint.config.vocabulary, loaded.engine.kv_tokens // BLOCK
    runner = ScriptedRunner(blocks, size)
    info = ModelInfo("scripted", "b2:0", "none", min(checkpoint.config.context, blocks * BLOCK), size, 0, 0, "none", "cpu")
    return LocalEngine(runner, ChatTokenizer(checkpoint), info, loaded), runner
