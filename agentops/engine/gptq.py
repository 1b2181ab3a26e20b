"""GPTQ tensors: how quantized weights lie on disk, and how one layer's weights become them.

The layout is AutoGPTQ's (format 1), which vLLM, GPTQModel, optimum and transformers read. For a linear layer of
`inputs` -> `outputs` and groups of neighbouring inputs:

    qweight  int32    (inputs * bits / 32, outputs)   codes, packed along the inputs, lowest bits first
    qzeros   int32    (groups, outputs * bits / 32)   zero points less one, packed along the outputs
    scales   float16  (groups, outputs)
    g_idx    int32    (inputs,)                       group of each input

    weight[o, i] = scales[g, o] * (code[i, o] - zero[g, o]),  g = g_idx[i]

Format 2 (`checkpoint_format: gptq_v2`) stores the zero points as they are. This module knows tensors only: nothing of
models, files or calibration text.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from agentops.errors import ModelBroken, ModelUnsupported

BITS = (4, 8)


class Packed(NamedTuple):
    """The four tensors of a quantized linear layer, as they lie on disk."""

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor


class Codes(NamedTuple):
    """The same weights unpacked: `codes` uint8 (out, in), `scales` float32 and `zeros` uint8 (out, groups)."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor


def unpack(qweight: Tensor, qzeros: Tensor, scales: Tensor, *, bits: int, offset_zero: bool = True) -> Codes:
    """The integers inside packed tensors. `offset_zero` is True for format 1.

    Raises:
        ModelUnsupported: other than 4 or 8 bits.
        ModelBroken: the shapes contradict each other.
    """
    lanes = _lanes(bits)
    groups, outputs = scales.shape
    if qweight.ndim != 2 or qweight.shape[1] != outputs or tuple(qzeros.shape) != (groups, outputs // lanes):
        raise ModelBroken(
            f"GPTQ tensors contradict each other: qweight {tuple(qweight.shape)}, qzeros {tuple(qzeros.shape)}, "
            f"scales {tuple(scales.shape)} at {bits} bits",
            hint="the checkpoint is damaged or its quantize_config names other bits; prepare or download it again",
        )
    zeros = _unpack_rows(qzeros.t().contiguous(), bits)
    if offset_zero:
        zeros = (zeros + 1) & (2**bits - 1)
    return Codes(
        _unpack_rows(qweight, bits).t().contiguous().to(torch.uint8),
        scales.t().contiguous().to(torch.float32),
        zeros.contiguous().to(torch.uint8),
    )


def pack(codes: Tensor, scales: Tensor, zeros: Tensor, *, bits: int, g_idx: Tensor, offset_zero: bool = True) -> Packed:
    """The inverse of `unpack`: (out, in) codes, (out, groups) scales and zeros, (in,) group of each input.

    Raises:
        ModelUnsupported: other than 4 or 8 bits, or sizes that do not fill whole 32-bit words.
    """
    lanes = _lanes(bits)
    outputs, inputs = codes.shape
    if inputs % lanes or outputs % lanes:
        raise ModelUnsupported(f"a {outputs} x {inputs} layer cannot be packed at {bits} bits: not multiples of {lanes}")
    stored = zeros.t().to(torch.int64)
    if offset_zero:
        stored = (stored - 1) & (2**bits - 1)
    return Packed(
        _pack_rows(codes.t(), bits),
        _pack_rows(stored.t(), bits).t().contiguous(),
        scales.t().contiguous().to(torch.float16),
        g_idx.to(torch.int32).contiguous(),
    )


def dequantize(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor, *, bits: int, group_size: int, offset_zero: bool = True
) -> Tensor:
    """The float32 (out, in) weights that packed tensors stand for.

    `group_size` -1 is one group for all inputs. Any `g_idx` is honoured, also that of activation order.

    Raises:
        ModelUnsupported, ModelBroken: as `unpack`; also when `g_idx` or the number of groups does not fit.
    """
    parts = unpack(qweight, qzeros, scales, bits=bits, offset_zero=offset_zero)
    inputs, groups = parts.codes.shape[1], parts.scales.shape[1]
    if groups != group_count(inputs, group_size) or tuple(g_idx.shape) != (inputs,) or not _within(g_idx, groups):
        raise ModelBroken(
            f"GPTQ groups contradict each other: {inputs} inputs in groups of {group_size}, {groups} scales a row, "
            f"g_idx {tuple(g_idx.shape)}",
            hint="the checkpoint is damaged or its quantize_config names another group size; prepare or download it again",
        )
    index = g_idx.to(torch.int64)
    return (parts.codes.to(torch.float32) - parts.zeros.to(torch.float32)[:, index]) * parts.scales[:, index]


def group_count(inputs: int, group_size: int) -> int:
    """How many groups a row of `inputs` weights has; the last one may be short."""
    return 1 if group_size == -1 else -(-inputs // group_size)


def plain_groups(inputs: int, group_size: int) -> Tensor:
    """The `g_idx` of neighbouring inputs: int32 (in,)."""
    return torch.arange(inputs, dtype=torch.int32) // (inputs if group_size == -1 else group_size)


def _within(index: Tensor, groups: int) -> bool:
    return bool((index.amin() >= 0) & (index.amax() < groups))


def _lanes(bits: int) -> int:
    if bits not in BITS:
        raise ModelUnsupported(f"GPTQ with {bits} bits is not supported", hint="use a checkpoint of 4 or 8 bits")
    return 32 // bits


def _unpack_rows(packed: Tensor, bits: int) -> Tensor:
    """(words, columns) int32 -> (words * lanes, columns) int32."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=packed.device)
    values = (packed.to(torch.int32)[:, None, :] >> shifts[None, :, None]) & (2**bits - 1)
    return values.reshape(-1, packed.shape[1])


def _pack_rows(values: Tensor, bits: int) -> Tensor:
    """(rows, columns) -> (rows / lanes, columns) int32."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int64, device=values.device)
    words = (values.to(torch.int64).reshape(-1, len(shifts), values.shape[1]) << shifts[None, :, None]).sum(1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32).contiguous()
