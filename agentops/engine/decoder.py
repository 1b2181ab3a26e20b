"""The Llama-family decoder as plain torch: embedding, layers of attention and feed-forward, norm, head.

It works on rows: one token with its position is a row, whatever sequence it belongs to. Linear layers are callables made
elsewhere (`linear.py`, or the quantizer's recording ones) and attention is a callable given at each step, so that this
file is nothing but the model's arithmetic (https://arxiv.org/abs/2302.13971; grouped queries https://arxiv.org/abs/2305.13245).
It knows nothing of files, caches, sequences or sampling.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from agentops.engine.checkpoint import DecoderConfig

TILE = 64
"""Positions in a tile of attention."""

Linear = Callable[[Tensor], Tensor]
"""(rows, inputs) -> (rows, outputs)."""

MakeLinear = Callable[[tuple[str, ...]], Linear]
"""Names of layers that share their input -> one linear layer with their outputs side by side."""

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""queries (rows, heads, dim), keys and values (rows, kv heads, dim) -> (rows, heads, dim)."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One block of the decoder. `qkv` and `gate_up` hold the layers that share an input, in that order."""

    config: DecoderConfig
    attention_norm: Tensor
    qkv: Linear
    o: Linear
    ffn_norm: Tensor
    gate_up: Linear
    down: Linear
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None

    def __call__(self, hidden: Tensor, rotation: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        """(rows, hidden) -> (rows, hidden)."""
        config, rows = self.config, hidden.shape[0]
        heads = self.qkv(rms_norm(hidden, self.attention_norm, config.eps)).view(rows, -1, config.head_dim)
        queries, keys, values = heads.split_with_sizes([config.heads, config.kv_heads, config.kv_heads], dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            queries, keys = rms_norm(queries, self.q_norm, config.eps), rms_norm(keys, self.k_norm, config.eps)
        attended = attend(rotate(queries, rotation), rotate(keys, rotation), values)
        hidden = hidden + self.o(attended.reshape(rows, -1))
        gate, up = self.gate_up(rms_norm(hidden, self.ffn_norm, config.eps)).chunk(2, dim=1)
        return hidden + self.down(functional.silu(gate) * up)


class Decoder:
    """A whole model. `tensor` hands out the float tensors by their checkpoint names, `linear` makes the layers.

    To run it layer by layer: `embed`, each of `layers` with `rotation(positions)` and an `Attend`, then `logits`.
    """

    def __init__(self, config: DecoderConfig, tensor: Callable[[str], Tensor], linear: MakeLinear) -> None:
        self.config = config
        self.embedding = tensor("model.embed_tokens.weight")
        self.layers = tuple(self._layer(f"model.layers.{index}", tensor, linear) for index in range(config.layers))
        self.norm = tensor("model.norm.weight").float()
        self.head = linear(("model.embed_tokens" if config.tied else "lm_head",))
        self._frequencies = rotary_frequencies(config).to(self.embedding.device)

    def _layer(self, at: str, tensor: Callable[[str], Tensor], linear: MakeLinear) -> Layer:
        return Layer(
            config=self.config,
            attention_norm=tensor(f"{at}.input_layernorm.weight").float(),
            qkv=linear((f"{at}.self_attn.q_proj", f"{at}.self_attn.k_proj", f"{at}.self_attn.v_proj")),
            o=linear((f"{at}.self_attn.o_proj",)),
            ffn_norm=tensor(f"{at}.post_attention_layernorm.weight").float(),
            gate_up=linear((f"{at}.mlp.gate_proj", f"{at}.mlp.up_proj")),
            down=linear((f"{at}.mlp.down_proj",)),
            q_norm=tensor(f"{at}.self_attn.q_norm.weight").float() if self.config.normed_heads else None,
            k_norm=tensor(f"{at}.self_attn.k_norm.weight").float() if self.config.normed_heads else None,
        )

    def with_linears(self, change: Callable[[Linear], Linear]) -> Decoder:
        """The same model with other linear layers."""
        twin = copy.copy(self)
        twin.layers = tuple(
            replace(x, qkv=change(x.qkv), o=change(x.o), gate_up=change(x.gate_up), down=change(x.down)) for x in self.layers
        )
        twin.head = change(self.head)
        return twin

    def embed(self, tokens: Tensor) -> Tensor:
        """int64 (rows,) -> float32 (rows, hidden)."""
        return functional.embedding(tokens, self.embedding).float()

    def rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """int64 (rows,) -> cosines and sines, each float32 (rows, 1, dim), times what scaling multiplies them with."""
        angles = positions[:, None].float() * self._frequencies
        angles = torch.cat((angles, angles), dim=1)[:, None, :]
        factor = self.config.rope_scaling.attention if self.config.rope_scaling else 1.0
        return angles.cos() * factor, angles.sin() * factor

    def logits(self, hidden: Tensor) -> Tensor:
        """(rows, hidden) after the last layer -> float32 (rows, vocabulary)."""
        return self.head(rms_norm(hidden, self.norm, self.config.eps))

    def __call__(self, tokens: Tensor, positions: Tensor, attend: Callable[[int], Attend], wanted: Tensor) -> Tensor:
        """Logits (len(wanted), vocabulary) of the wanted rows; `attend` is asked for each layer's attention."""
        hidden, rotation = self.embed(tokens), self.rotation(positions)
        for index, layer in enumerate(self.layers):
            hidden = layer(hidden, rotation, attend(index))
        return self.logits(hidden[wanted])


@dataclass(frozen=True, slots=True)
class Tile:
    """New rows of a sequence that stand in one tile, the first of them `at` this place in it, and `mask`, (TILE * query heads
    of a key-value head, length): which row of the tile sees what."""

    rows: slice
    at: int
    mask: Tensor


def causal_tiles(config: DecoderConfig, past: int, rows: int, device: str = "cpu") -> list[Tile]:
    """What `rows` new tokens after `past` others may see.

    Tiles lie at multiples of TILE positions and see whole tiles, so that a position is always computed in the same shapes:
    how its prompt was cut into steps changes nothing, to the last bit.
    """
    groups = config.heads // config.kv_heads
    tiles = []
    for start in range(past // TILE * TILE, past + rows, TILE):
        first, stop = max(start, past), min(start + TILE, past + rows)
        reach = torch.arange(start, start + TILE, device=device)[:, None] >= torch.arange(start + TILE, device=device)[None, :]
        mask = torch.zeros(reach.shape, device=device).masked_fill(~reach, -torch.inf).repeat(groups, 1)
        tiles.append(Tile(slice(first - past, stop - past), first - start, mask))
    return tiles


def causal_attention(config: DecoderConfig, lengths: Sequence[int]) -> Attend:
    """Attention without a cache over whole sequences that lie one after the other in the rows."""
    lengths = list(lengths)
    tiles = {length: causal_tiles(config, 0, length) for length in set(lengths)}

    def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        parts = zip(*(part.split_with_sizes(lengths) for part in (queries, keys, values)), strict=True)
        return torch.cat([dot_attention(q, whole_tiles(k), whole_tiles(v), tiles[len(q)]) for q, k, v in parts])

    return attend


def whole_tiles(rows: Tensor) -> Tensor:
    """(rows, heads, dim) -> (heads, rows, dim) with zeros up to the end of the last tile."""
    return functional.pad(rows.transpose(0, 1), (0, 0, 0, -len(rows) % TILE))


def dot_attention(queries: Tensor, keys: Tensor, values: Tensor, tiles: Sequence[Tile]) -> Tensor:
    """Attention of one sequence's new rows, (rows, heads, dim) to the same.

    keys and values (kv heads, length, dim) are those of the whole sequence up to the end of a tile, `tiles` its `causal_tiles`.
    """
    _, heads, dim = queries.shape
    kv_heads = keys.shape[0]
    results = []
    for tile in tiles:
        new, length = queries[tile.rows], tile.mask.shape[1]
        rows = functional.pad(new, (0, 0, 0, 0, tile.at, TILE - tile.at - len(new))) if len(new) < TILE else new
        # The query heads of one key-value head become rows of their own, so that keys are not copied for each of them.
        grouped = rows.reshape(TILE, kv_heads, heads // kv_heads, dim).permute(1, 2, 0, 3).reshape(1, kv_heads, -1, dim)
        seen_keys, seen_values = keys[None, :, :length], values[None, :, :length]
        attended = functional.scaled_dot_product_attention(grouped, seen_keys, seen_values, attn_mask=tile.mask)
        attended = attended.reshape(kv_heads, heads // kv_heads, TILE, dim).permute(2, 0, 1, 3).reshape(TILE, heads, dim)
        results.append(attended[tile.at : tile.at + len(new)])
    return results[0] if len(results) == 1 else torch.cat(results)


def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """https://arxiv.org/abs/1910.07467."""
    return hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + eps) * weight


def rotate(heads: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary positions (https://arxiv.org/abs/2104.09864) in the half-split order of Llama checkpoints."""
    cosines, sines = rotation
    first, second = heads.chunk(2, dim=-1)
    return heads * cosines + torch.cat((-second, first), dim=-1) * sines


def rotary_frequencies(config: DecoderConfig) -> Tensor:
    """float32 (head_dim / 2,) radians a position."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "llama3":
        turns = scaling.original_context * frequencies / (2 * math.pi)
        kept = (turns - scaling.low_turns) / (scaling.high_turns - scaling.low_turns)
    else:
        # A frequency's place where it would turn so often within the original context.
        first, last = (
            config.head_dim * math.log(scaling.original_context / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))
            for turns in (scaling.high_turns, scaling.low_turns)
        )
        if scaling.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, config.head_dim - 1)
        kept = 1 - (torch.arange(len(frequencies)) - first) / (last - first or 1e-3)
    kept = kept.clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / scaling.factor
