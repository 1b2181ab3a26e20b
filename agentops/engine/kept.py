"""Prefix blocks that outlive their process: one file a block, in a folder of the home, for the next engine on the same model.

A block is found by the chain of all tokens up to its end, below everything that its numbers depend on: the model's
revision, the tenant, and how the runner computes and lays them out. What is read is checked: the checksum of its numbers,
and its tokens one by one. A file that does not fit is removed and the block computed anew. It knows no requests, and which
blocks there are only from the pool.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from agentops.engine.blocks import BlockPool

log = logging.getLogger("agentops.engine")

_AROUND = 512
"""Bytes of a file beside its numbers, about."""

Block = NDArray[Any]
"""The keys and values of a block, (layers, 2, kv heads, positions, dim)."""


class KeptPrefixes:
    """Blocks in `folder`, `limit_bytes` of them at most. `layout` names what makes numbers of one engine those of another:
    the model and how it is computed. Used by one thread; several processes may share the folder."""

    def __init__(self, folder: Path, limit_bytes: int, *, layout: Hashable, size: int) -> None:
        self._folder = folder
        self._limit = limit_bytes
        self._layout = repr(layout)
        self._size = size

    def restore(
        self, pool: BlockPool, namespace: Hashable, tokens: Sequence[int], limit: int, write: Callable[[int, Block], None]
    ) -> int:
        """Brings what follows the cached beginning of `tokens` into the pool, up to block number `limit`; returns how many.

        They are cached then as if they had been computed. `write` puts numbers into a block.
        """
        held, node = pool.match(namespace, tokens, limit)
        known = len(held)
        try:
            chain = self._chain(namespace, tokens[: known * self._size])
            for index in range(known, limit):
                own = tokens[index * self._size : (index + 1) * self._size]
                chain.update(np.array(own, np.int64).tobytes())
                found = self._read(self._folder / f"{chain.hexdigest()}.safetensors", own)
                if found is None or not pool.available:
                    break
                (block,) = pool.allocate(1)
                held.append(block)
                write(block, found)
                node = pool.publish(node, tokens, index, block)
        finally:
            # Its end before its beginning: what was used last goes last.
            pool.release(held)
        return len(held) - known

    def keep(self, prefixes: Iterable[tuple[Hashable, tuple[int, ...], int]], read: Callable[[int], Block]) -> int:
        """Writes blocks that are not there yet, each given as its namespace, all tokens up to its end and its number in the pool,
        those that were used last at the end; then forgets what was not used for longest until the limit is kept. Returns how
        many were written.
        """
        blocks, written = list(prefixes), 0
        if not blocks:
            return 0
        room = self._limit // (read(blocks[-1][2]).nbytes + _AROUND)
        try:
            self._folder.mkdir(0o700, parents=True, exist_ok=True)
            for namespace, tokens, block in blocks[max(0, len(blocks) - room) :]:
                file = self._folder / f"{self._chain(namespace, tokens).hexdigest()}.safetensors"
                if file.exists():
                    os.utime(file)
                    continue
                self._write(file, np.array(tokens[-self._size :], np.int64), read(block))
                written += 1
            self._shrink()
        except OSError as error:
            log.warning("prefixes of the KV cache could not be kept: %s", error)
        return written

    def _chain(self, namespace: Hashable, tokens: Sequence[int]) -> hashlib.blake2b:
        chain = hashlib.blake2b(json.dumps([self._layout, repr(namespace), self._size]).encode(), digest_size=20)
        chain.update(np.array(tokens, np.int64).tobytes())
        return chain

    def _read(self, file: Path, tokens: Sequence[int]) -> Block | None:
        try:
            with safe_open(file, framework="np") as opened:
                numbers: Block = opened.get_tensor("numbers")
                same = opened.get_tensor("tokens").tolist() == list(tokens)
                checksum = (opened.metadata() or {}).get("checksum")
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError, ValueError) as error:
            checksum, same, numbers = str(error), False, np.empty(0)
        if not same or checksum != _checksum(numbers):
            log.warning("a kept prefix is damaged and was removed: %s", file)
            with suppress(OSError):
                file.unlink()
            return None
        with suppress(OSError):
            os.utime(file)
        return numbers

    def _write(self, file: Path, tokens: NDArray[np.int64], numbers: Block) -> None:
        part = file.with_suffix(f".{os.getpid()}.part")
        try:
            data = save({"numbers": np.ascontiguousarray(numbers), "tokens": tokens}, {"checksum": _checksum(numbers)})
            with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as opened:
                opened.write(data)
            part.replace(file)
        finally:
            part.unlink(missing_ok=True)

    def _shrink(self) -> None:
        held = []
        for file in self._folder.iterdir():
            # Another process may be doing the same.
            with suppress(FileNotFoundError):
                about = file.stat()
                held.append((about.st_mtime_ns, about.st_size, file))
        total = sum(size for _, size, _ in held)
        for _, size, file in sorted(held):
            if total <= self._limit:
                return
            file.unlink(missing_ok=True)
            total -= size


def _checksum(numbers: Block) -> str:
    return hashlib.blake2b(np.ascontiguousarray(numbers).tobytes(), digest_size=16).hexdigest()
