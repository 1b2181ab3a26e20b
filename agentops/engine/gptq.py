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

from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional

from agentops.errors import ModelBroken, ModelUnsupported

BITS = (2, 3, 4, 8)
_BLOCK = 64
_DAMPINGS = 12
_MEND = "the weights are damaged: download the model again"
_GRID = tuple(1.05 - 0.02 * step for step in range(33))


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
        ModelUnsupported: other than 2, 3, 4 or 8 bits.
        ModelBroken: the shapes contradict each other.
    """
    _check_bits(bits)
    groups, outputs = scales.shape
    if qweight.ndim != 2 or qweight.shape[1] != outputs or tuple(qzeros.shape) != (groups, outputs * bits // 32):
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
        ModelUnsupported: other than 2, 3, 4 or 8 bits, or sizes that do not fill whole 32-bit words.
    """
    _check_bits(bits)
    outputs, inputs = codes.shape
    if inputs * bits % 32 or outputs * bits % 32:
        raise ModelUnsupported(f"a {outputs} x {inputs} layer does not fill whole words at {bits} bits")
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
    return dequantize_codes(parts, g_idx)


def dequantize_codes(parts: Codes, g_idx: Tensor) -> Tensor:
    """The float32 (out, in) weights that unpacked codes stand for."""
    index = g_idx.to(parts.codes.device, torch.int64)
    return (parts.codes.float() - parts.zeros.float()[:, index]) * parts.scales[:, index]


def quantize(weight: Tensor, hessian: Tensor, *, bits: int, group_size: int, sym: bool = True, damping: float = 0.01) -> Codes:
    """GPTQ (https://arxiv.org/abs/2210.17323) of one (out, in) weight, with `hessian` = sum of x x^T over inputs x, (in, in).

    Scales are chosen beforehand, per group of neighbouring inputs, by the error that each of a grid of them would cause;
    then inputs are visited by falling importance and each one's rounding error is made good in those still to come.
    The result has plain groups although it was made in activation order.

    Raises:
        ModelBroken: the Hessian holds NaN or infinity, or cannot be inverted whatever is added to its diagonal.
    """
    inputs = weight.shape[1]
    importance = hessian.diagonal()
    scales, zeros = choose_scales(weight, importance, bits=bits, group_size=group_size, sym=sym)
    order = importance.argsort(descending=True)
    index = plain_groups(inputs, group_size).to(order.device, torch.int64)[order]
    factor = _inverse_factor(hessian[order][:, order], damping)
    # One input is one contiguous row from here on.
    rest, steps, offsets = weight.float().t()[order], scales.t()[index], zeros.t()[index].float()
    codes = torch.empty_like(rest, dtype=torch.uint8)
    for start in range(0, inputs, _BLOCK):
        end = min(start + _BLOCK, inputs)
        block, errors = rest[start:end], torch.empty_like(rest[start:end])
        for row in range(end - start):
            at = start + row
            code = torch.round(block[row] / steps[at]).add_(offsets[at]).clamp_(0, 2**bits - 1)
            codes[at] = code
            errors[row] = (block[row] - (code - offsets[at]) * steps[at]) / factor[at, at]
            block[row + 1 :].addr_(factor[at, at + 1 : end], errors[row], alpha=-1)
        rest[end:].addmm_(factor[start:end, end:].t(), errors, alpha=-1)
    stored = torch.empty_like(codes)
    stored[order] = codes
    return Codes(stored.t().contiguous(), scales, zeros)


def choose_scales(weight: Tensor, importance: Tensor, *, bits: int, group_size: int, sym: bool = True) -> tuple[Tensor, Tensor]:
    """float32 scales (exact in float16) and uint8 zeros, (out, groups), by least squared error weighted by `importance` (in,)."""
    outputs, inputs = weight.shape
    size, groups = inputs if group_size == -1 else group_size, group_count(inputs, group_size)
    padding = groups * size - inputs
    values = functional.pad(weight.float(), (0, padding)).view(outputs, groups, size)
    weights = functional.pad(importance.float(), (0, padding)).view(groups, size)
    top, middle = 2**bits - 1, 2 ** (bits - 1)
    if sym:
        low = high = values.abs().amax(2)
    else:
        low, high = values.amin(2).clamp(max=0).neg(), values.amax(2).clamp(min=0)
    best = torch.full_like(high, torch.inf)
    scales, zeros = torch.ones_like(high), torch.full_like(high, middle)
    for shrink in _GRID:
        step = ((low + high) * shrink / top).to(torch.float16).float()
        step = torch.where(step > 0, step, 1.0)
        # Zero points begin at 1: less one, a 0 would be stored as `top`, which some readers take for `top + 1`.
        zero = torch.full_like(step, middle) if sym else torch.round(low * shrink / step).clamp(1, top)
        code = torch.round(values / step[..., None]).add_(zero[..., None]).clamp_(0, top)
        error = (code.sub_(zero[..., None]).mul_(step[..., None]).sub_(values).square_() * weights).sum(2)
        better = error < best
        best = torch.where(better, error, best)
        scales, zeros = torch.where(better, step, scales), torch.where(better, zero, zeros)
    return scales, zeros.to(torch.uint8)


def _inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor of the inverse of the damped Hessian."""
    if not bool(torch.isfinite(hessian).all()):
        raise ModelBroken("a layer's inputs are NaN or infinite on the calibration text", hint=_MEND)
    mean = hessian.diagonal().mean().clamp(min=1e-12)
    for _ in range(_DAMPINGS):
        damped = hessian + torch.eye(len(hessian), device=hessian.device) * (damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return cast(Tensor, upper)
        damping *= 10
    raise ModelBroken("a layer's inputs on the calibration text cannot be reckoned with", hint=_MEND)


def group_count(inputs: int, group_size: int) -> int:
    """How many groups a row of `inputs` weights has; the last one may be short."""
    return 1 if group_size == -1 else -(-inputs // group_size)


def plain_groups(inputs: int, group_size: int) -> Tensor:
    """The `g_idx` of neighbouring inputs: int32 (in,)."""
    return torch.arange(inputs, dtype=torch.int32) // (inputs if group_size == -1 else group_size)


def _within(index: Tensor, groups: int) -> bool:
    return bool((index.amin() >= 0) & (index.amax() < groups))


def _check_bits(bits: int) -> None:
    if bits not in BITS:
        raise ModelUnsupported(f"GPTQ with {bits} bits is not supported", hint="use a checkpoint of 4 or 8 bits")


def _unpack_rows(packed: Tensor, bits: int) -> Tensor:
    """(words, columns) int32 -> (words * 32 / bits, columns) int32."""
    if 32 % bits == 0:
        shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=packed.device)
        values: Tensor = (packed.to(torch.int32)[:, None, :] >> shifts[None, :, None]) & (2**bits - 1)
        return values.flatten(0, 1)
    # Codes of 3 bits straddle words: each is cut out of its word and the next one, joined.
    words = packed.to(torch.int64) & 0xFFFFFFFF
    starts = torch.arange(0, 32 * packed.shape[0], bits, device=packed.device)
    low, high = starts // 32, (starts // 32 + 1).clamp(max=packed.shape[0] - 1)
    pairs: Tensor = words[low] | words[high] << 32
    return (pairs >> (starts % 32)[:, None]).bitwise_and(2**bits - 1).to(torch.int32)


def _pack_rows(values: Tensor, bits: int) -> Tensor:
    """(rows, columns) -> (rows * bits / 32, columns) int32."""
    starts = torch.arange(0, bits * values.shape[0], bits, device=values.device)
    shifted = values.to(torch.int64) << (starts % 32)[:, None]
    words = torch.zeros(bits * values.shape[0] // 32, values.shape[1], dtype=torch.int64, device=values.device)
    words.index_add_(0, starts // 32, shifted & 0xFFFFFFFF)
    if 32 % bits:
        straddling = starts % 32 + bits > 32
        words.index_add_(0, starts[straddling] // 32 + 1, shifted[straddling] >> 32)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
