"""Texts to vectors: a BERT encoder that reads safetensors, and a fake that needs no model.

The encoder runs in torch on the CPU, which is imported when the first text is embedded, not before. It computes what
sentence-transformers computes for such a folder (mean or first-token pooling, then length 1) and trains nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import threading
import unicodedata
import zlib
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from agentops.errors import ModelBroken, ModelNotFound, ModelUnsafe, ModelUnsupported
from agentops.model_lock import check_lock

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor

MAX_TOKENS = 256
_BATCH_TOKENS = 8192
_BATCH_ROWS = 64
_CHARACTERS = 200_000
_HEADER_BYTES = 16 << 20
_TOKENIZER_BYTES = 16 << 20
_CONFIG_BYTES = 1 << 20
_MEND = "remove the folder and let it be prepared again: agentops models prepare"


class _Shape(NamedTuple):
    layers: int
    heads: int
    hidden: int
    inner: int
    vocabulary: int
    positions: int
    epsilon: float
    max_tokens: int
    first_token: bool


class EncoderEmbedder:
    """A BERT encoder from a local folder (`config.json`, `model.safetensors`, `tokenizer.json`).

    Safe to use from several threads, and the same text has the same vector in each of them, to the last bit. Texts longer
    than `max_tokens` are cut. `threads` is how many torch computes with; 0 for as many as it would in the thread that embeds
    first.
    """

    def __init__(self, folder: Path, threads: int = 0) -> None:
        self._folder = folder
        self._threads = threads
        self._shape = _read_shape(folder)
        self._lock = threading.Lock()
        self._weights: _Weights | None = None
        if not (folder / "model.safetensors").is_file():
            raise ModelBroken(f"{folder}: model.safetensors is missing", hint=_MEND)
        self._cutting = _read_tokenizer(folder)
        self._cutting.enable_truncation(self.max_tokens)
        self._counting = _read_tokenizer(folder)

    @property
    def name(self) -> str:
        return self._folder.name

    @cached_property
    def revision(self) -> str:
        """Content hash of everything that decides a vector: configuration, tokenizer and weights."""
        total = hashlib.blake2b(repr(self._shape).encode(), digest_size=16)
        for part in ("tokenizer.json", "model.safetensors"):
            with (self._folder / part).open("rb") as file:
                total.update(hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest())
        return "b2:" + total.hexdigest()

    @property
    def dimensions(self) -> int:
        return self._shape.hidden

    @property
    def max_tokens(self) -> int:
        return self._shape.max_tokens

    def count_tokens(self, text: str) -> int:
        """Tokens of `text`, the two special ones that frame every text not among them."""
        return len(self._counting.encode(text, add_special_tokens=False).ids)

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Shape (len(texts), dimensions), rows of length 1, in the order of `texts`.

        Raises:
            ModelBroken: the weights are unreadable or contradict the configuration.
        """
        import torch

        out = np.empty((len(texts), self.dimensions), np.float32)
        if not texts:
            return out
        weights = self._load()
        # torch keeps the number of threads per calling thread, and sums are cut up by it: with another one the last bits differ.
        if torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)
        # Nothing beyond the cut matters; tokenizing megabytes of it would.
        rows = [encoding.ids for encoding in self._cutting.encode_batch([text[:_CHARACTERS] for text in texts])]
        with torch.inference_mode():
            for batch in _batches([len(row) for row in rows]):
                length = max(len(rows[i]) for i in batch)
                ids = torch.zeros(len(batch), length, dtype=torch.long)
                mask = torch.zeros(len(batch), length, dtype=torch.bool)
                for place, i in enumerate(batch):
                    ids[place, : len(rows[i])] = torch.tensor(rows[i])
                    mask[place, : len(rows[i])] = True
                out[batch] = _encode(weights, self._shape, ids, mask).numpy()
        return out

    def _load(self) -> _Weights:
        with self._lock:
            if self._weights is None:
                import torch

                self._threads = self._threads or torch.get_num_threads()
                self._weights = _Weights.read(self._folder / "model.safetensors", self._shape)
            return self._weights


def open_embedder(folder: Path, threads: int = 0) -> EncoderEmbedder:
    """The embedder of a folder. Reads configuration and tokenizer now, the weights when the first text is embedded.

    Where the folder has a `model.lock`, it is checked first.

    Raises:
        ModelNotFound: no such folder.
        ModelBroken: a file is missing, unreadable, or not what the lock says.
        ModelUnsafe: the configuration names code to be loaded.
        ModelUnsupported: not a BERT encoder.
    """
    if not folder.is_dir():
        raise ModelNotFound(f"there is no embedding model in {folder}", hint="prepare one with: agentops models prepare")
    check_lock(folder)
    return EncoderEmbedder(folder, threads)


class HashEmbedder:
    """A deterministic embedder without a model: hashed words and character n-grams, so that texts which share them are near.

    For tests and try-outs. It knows spelling, not meaning.
    """

    def __init__(self, dimensions: int = 256) -> None:
        self._dimensions = dimensions

    @property
    def name(self) -> str:
        return "hash"

    @property
    def revision(self) -> str:
        return f"hash-1-{self._dimensions}"

    @property
    def dimensions(self) -> int:
        return self._dimensions

    def count_tokens(self, text: str) -> int:
        return len(re.findall(r"\w+|[^\w\s]", text))

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        out = np.zeros((len(texts), self._dimensions), np.float32)
        for row, text in zip(out, texts, strict=True):
            for word in re.findall(r"\w+", unicodedata.normalize("NFKC", text).lower()):
                for place, weight in _hashed(word[:64]):
                    row[place % self._dimensions] += weight
            norm = float(np.linalg.norm(row))
            if norm:
                row /= norm
            else:
                row[0] = 1.0
        return out


@lru_cache(maxsize=65_536)
def _hashed(word: str) -> tuple[tuple[int, float], ...]:
    framed = f"<{word}>"
    grams = [(framed, 2.0)] + [(framed[i : i + n], 0.5) for n in (3, 4) for i in range(len(framed) - n + 1)]
    hashes = [(zlib.crc32(gram.encode()), weight) for gram, weight in grams]
    return tuple((value >> 1, weight if value & 1 else -weight) for value, weight in hashes)


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Places grouped by similar length, so that little of a batch is padding."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) == _BATCH_ROWS or (len(batch) + 1) * lengths[batch[0]] > _BATCH_TOKENS):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


class _Layer(NamedTuple):
    attention: tuple[Tensor, Tensor]
    """Query, key and value stacked: one product instead of three."""
    attention_out: tuple[Tensor, Tensor]
    attention_norm: tuple[Tensor, Tensor]
    inner: tuple[Tensor, Tensor]
    outer: tuple[Tensor, Tensor]
    norm: tuple[Tensor, Tensor]


class _Weights(NamedTuple):
    words: Tensor
    positions: Tensor
    norm: tuple[Tensor, Tensor]
    layers: tuple[_Layer, ...]

    @staticmethod
    def read(file: Path, shape: _Shape) -> _Weights:
        import torch
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        with file.open("rb") as raw:
            if int.from_bytes(raw.read(8), "little") > _HEADER_BYTES:
                raise ModelBroken(f"{file}: its header is too large to be true", hint=_MEND)
        try:
            tensors = {name.removeprefix("bert."): tensor for name, tensor in load_file(file).items()}
        except (SafetensorError, OSError, ValueError) as error:
            raise ModelBroken(f"{file}: {error}", hint=_MEND) from error

        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise ModelBroken(f"{file}: {name} holds NaN or infinity", hint=_MEND)

        def take(name: str, *wanted: int) -> Tensor:
            tensor = tensors.get(name)
            if tensor is None or tuple(tensor.shape) != wanted:
                state = "missing" if tensor is None else f"{tuple(tensor.shape)}, not {wanted}"
                raise ModelBroken(f"{file}: {name} is {state}", hint=_MEND)
            return tensor.float()

        def linear(name: str, rows: int, columns: int) -> tuple[Tensor, Tensor]:
            return take(f"{name}.weight", rows, columns), take(f"{name}.bias", rows)

        def norm(name: str) -> tuple[Tensor, Tensor]:
            return take(f"{name}.weight", hidden), take(f"{name}.bias", hidden)

        hidden, layers = shape.hidden, []
        for i in range(shape.layers):
            at = f"encoder.layer.{i}"
            parts = [linear(f"{at}.attention.self.{part}", hidden, hidden) for part in ("query", "key", "value")]
            layers.append(
                _Layer(
                    attention=(torch.cat([weight for weight, _ in parts]), torch.cat([bias for _, bias in parts])),
                    attention_out=linear(f"{at}.attention.output.dense", hidden, hidden),
                    attention_norm=norm(f"{at}.attention.output.LayerNorm"),
                    inner=linear(f"{at}.intermediate.dense", shape.inner, hidden),
                    outer=linear(f"{at}.output.dense", hidden, shape.inner),
                    norm=norm(f"{at}.output.LayerNorm"),
                )
            )
        # A single text is always of the first type, so its vector belongs to every position.
        positions = take("embeddings.position_embeddings.weight", shape.positions, hidden)[: shape.max_tokens]
        types = tensors.get("embeddings.token_type_embeddings.weight")
        return _Weights(
            words=take("embeddings.word_embeddings.weight", shape.vocabulary, hidden),
            positions=positions if types is None else positions + types[0].float(),
            norm=norm("embeddings.LayerNorm"),
            layers=tuple(layers),
        )


def _encode(weights: _Weights, shape: _Shape, ids: Tensor, mask: Tensor) -> Tensor:
    """Token ids and mask (rows, length) to unit vectors (rows, hidden)."""
    from torch.nn import functional

    rows, length = ids.shape

    def normed(values: Tensor, norm: tuple[Tensor, Tensor]) -> Tensor:
        return functional.layer_norm(values, (shape.hidden,), *norm, eps=shape.epsilon)

    state = normed(weights.words[ids] + weights.positions[:length], weights.norm)
    seen = None if bool(mask.all()) else mask[:, None, None, :]
    for layer in weights.layers:
        stacked = functional.linear(state, *layer.attention).view(rows, length, 3, shape.heads, shape.hidden // shape.heads)
        query, key, value = stacked.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=seen)
        mixed = mixed.transpose(1, 2).reshape(rows, length, shape.hidden)
        state = normed(state + functional.linear(mixed, *layer.attention_out), layer.attention_norm)
        inner = functional.gelu(functional.linear(state, *layer.inner))
        state = normed(state + functional.linear(inner, *layer.outer), layer.norm)
    if shape.first_token:
        pooled = state[:, 0]
    else:
        kept = mask[:, :, None].float()
        pooled = (state * kept).sum(1) / kept.sum(1)
    return functional.normalize(pooled, dim=1)


def _read_tokenizer(folder: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    file = folder / "tokenizer.json"
    if file.is_file() and file.stat().st_size > _TOKENIZER_BYTES:
        raise ModelBroken(f"{file}: larger than the {_TOKENIZER_BYTES:,} bytes that are read", hint=_MEND)
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise ModelBroken(f"{file}: {error}", hint=_MEND) from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _read_json(file: Path) -> dict[str, Any]:
    try:
        if file.stat().st_size > _CONFIG_BYTES:
            raise ModelBroken(f"{file}: larger than the {_CONFIG_BYTES:,} bytes that are read", hint=_MEND)
        value = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelBroken(f"{file}: {error}", hint=_MEND) from error
    if not isinstance(value, dict):
        raise ModelBroken(f"{file}: not a JSON object", hint=_MEND)
    return value


def _read_shape(folder: Path) -> _Shape:
    file = folder / "config.json"
    config = _read_json(file)
    if "auto_map" in config or "custom_pipelines" in config:
        raise ModelUnsafe(f"{file} names code to be loaded (auto_map)", hint="use a model that needs no code of its own")
    expected = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute"}
    for key, value in expected.items():
        if config.get(key, value) != value or "model_type" not in config:
            raise ModelUnsupported(
                f"{folder.name}: embedding models with {key} = {config.get(key)!r} are not supported",
                hint="use a BERT encoder such as all-minilm-l6-v2",
            )

    def number(key: str, high: int) -> int:
        value = config.get(key)
        if not isinstance(value, int) or not 0 < value <= high:
            raise ModelBroken(f"{file}: {key} is {value!r}", hint=_MEND)
        return value

    heads, hidden, positions = (
        number("num_attention_heads", 256),
        number("hidden_size", 16_384),
        number("max_position_embeddings", 65_536),
    )
    if hidden % heads:
        raise ModelBroken(f"{file}: hidden_size {hidden} is no multiple of num_attention_heads {heads}", hint=_MEND)
    extra = {
        name: _read_json(folder / name) if (folder / name).is_file() else {}
        for name in ("sentence_bert_config.json", "1_Pooling/config.json")
    }
    limit = extra["sentence_bert_config.json"].get("max_seq_length")
    epsilon = config.get("layer_norm_eps", 1e-12)
    return _Shape(
        layers=number("num_hidden_layers", 256),
        heads=heads,
        hidden=hidden,
        inner=number("intermediate_size", 65_536),
        vocabulary=number("vocab_size", 10_000_000),
        positions=positions,
        epsilon=epsilon if isinstance(epsilon, float) and math.isfinite(epsilon) else 1e-12,
        max_tokens=min(limit if isinstance(limit, int) and limit > 2 else MAX_TOKENS, positions, MAX_TOKENS),
        first_token=extra["1_Pooling/config.json"].get("pooling_mode_cls_token") is True,
    )
