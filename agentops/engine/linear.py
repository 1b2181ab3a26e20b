"""One factory for every linear layer of a model: callers get a callable and never ask which kernel is inside.

float32 is the reference: weights dequantized, everything in single precision. int4 hands 4-bit GPTQ codes to torch's own
kernels; what they cannot take (8 bits, odd sizes, the output head) keeps its weights in float16 and its arithmetic in
float32: a head that answers in bfloat16 rounds logits near 30 to steps of 1/8 and changes one argmax in forty.
It knows nothing of decoders.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from agentops.engine import gptq
from agentops.engine.checkpoint import Checkpoint, Quantization
from agentops.engine.decoder import Linear
from agentops.errors import ModelBroken, ModelUnsupported

Kernel = Literal["float32", "int4"]

_LEAST_ROWS = 16


def choose_kernel(wanted: Literal["auto", "int4", "float32"], checkpoint: Checkpoint) -> Kernel:
    """
    Raises:
        ModelUnsupported: int4 was asked for and the model is not quantized.
    """
    if wanted == "int4" and checkpoint.quantization is None:
        raise ModelUnsupported(
            f"{checkpoint.folder} is not quantized, so the int4 kernel cannot run it",
            hint="quantize it with `agentops models prepare`, or set engine.kernel to auto",
        )
    return "int4" if wanted != "float32" and checkpoint.quantization is not None else "float32"


def make_linear(checkpoint: Checkpoint, prefixes: Sequence[str], kernel: Kernel, device: str) -> Linear:
    """A layer with the outputs of all `prefixes` side by side: float32 (rows, inputs) -> float32 (rows, outputs).

    Raises:
        ModelBroken: tensors are missing or contradict each other.
    """
    bias = _bias(checkpoint, prefixes)
    bias = None if bias is None else bias.to(device)
    if kernel == "float32":
        return _Dense(_dequantized(checkpoint, prefixes).to(device), bias)
    packed = _packable(checkpoint, prefixes)
    if packed is None:
        return _exact(_dequantized(checkpoint, prefixes), bias, device)
    codes, order, group = packed
    if device != "cpu":
        return _Int4Cuda(codes, order, group, bias, device)
    return _Int4Cpu(codes, order, group, bias)


def for_prompts(linear: Linear) -> Linear:
    """The same layer in the form that is fastest for the many rows of a prompt."""
    return linear.for_prompts if isinstance(linear, _Int4Cpu) else linear


class _Dense:
    """A weight matrix in float32."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, rows: Tensor) -> Tensor:
        return functional.linear(rows, self.weight, self.bias)


class _Half:
    """A weight matrix kept in float16, multiplied with float32 rows into float32 (FBGEMM, on x86 processors)."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.packed = torch.ops.quantized.linear_prepack_fp16(weight.contiguous(), bias)

    def __call__(self, rows: Tensor) -> Tensor:
        outputs: Tensor = torch.ops.quantized.linear_dynamic_fp16(rows.contiguous(), self.packed)
        return outputs


class _Int4Cpu:
    """torch's int4 kernel, which is fastest for few rows; where the processor has bfloat16 arithmetic, `for_prompts` is a dense
    copy, which is fastest for many. In both a row's result does not depend on the other rows."""

    def __init__(self, codes: gptq.Codes, order: Tensor | None, group: int, bias: Tensor | None) -> None:
        self.group, self.order, self.bias = group, order, bias
        self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.codes.to(torch.int32), 1)
        self.scales = _scales_and_zeros(codes)
        self.for_prompts = _Bfloat16(_spread(codes, group), order, bias) if multiplies_bfloat16() else self

    def __call__(self, rows: Tensor) -> Tensor:
        # The kernel is an order of magnitude slower when it is fed float32 or float16.
        rows = (rows if self.order is None else rows[:, self.order]).bfloat16()
        outputs: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.packed, self.group, self.scales).float()
        return outputs if self.bias is None else outputs + self.bias


class _Bfloat16:
    """A weight matrix in bfloat16; `order` is that of the inputs."""

    def __init__(self, weight: Tensor, order: Tensor | None, bias: Tensor | None) -> None:
        self.weight, self.order, self.bias = weight.bfloat16(), order, bias

    def __call__(self, rows: Tensor) -> Tensor:
        count = len(rows)
        rows = (rows if self.order is None else rows[:, self.order]).bfloat16()
        # For one row the threads share out its inputs and add their sums up, and for more they share out rows and outputs.
        rows = functional.pad(rows, (0, 0, 0, max(0, _LEAST_ROWS - count)))
        outputs = functional.linear(rows, self.weight)[:count].float()
        return outputs if self.bias is None else outputs + self.bias


class _Int4Cuda:
    """torch's int4 kernel for CUDA; codes are packed in pairs, the even input in the high half."""

    def __init__(self, codes: gptq.Codes, order: Tensor | None, group: int, bias: Tensor | None, device: str) -> None:
        self.group, self.bias = group, bias
        self.order = None if order is None else order.to(device)
        tiles = next(tiles for tiles in (8, 4, 2) if codes.codes.shape[1] % (tiles * 16) == 0)
        pairs = (codes.codes[:, ::2] << 4) | codes.codes[:, 1::2]
        self.packed = torch.ops.aten._convert_weight_to_int4pack(pairs.to(device).contiguous(), tiles)
        self.scales = _scales_and_zeros(codes).to(device)

    def __call__(self, rows: Tensor) -> Tensor:
        rows = (rows if self.order is None else rows[:, self.order]).bfloat16()
        outputs: Tensor = torch.ops.aten._weight_int4pack_mm(rows, self.packed, self.group, self.scales).float()
        return outputs if self.bias is None else outputs + self.bias


def multiplies_bfloat16() -> bool:
    """Whether the processor has arithmetic for it; emulated, it is slower than the int4 kernel."""
    return bool(torch.cpu._is_avx512_bf16_supported())


def _exact(weight: Tensor, bias: Tensor | None, device: str) -> Linear:
    if device == "cpu" and "fbgemm" in torch.backends.quantized.supported_engines:
        return _Half(weight, bias)
    return _Dense(weight.to(device), bias)


def _scales_and_zeros(codes: gptq.Codes) -> Tensor:
    """(groups, outputs, 2) for weight = (code - 8) * scale + zero, which is how the kernels count."""
    zeros = (8 - codes.zeros.float()) * codes.scales
    return torch.stack((codes.scales, zeros), dim=2).transpose(0, 1).contiguous().bfloat16()


def _spread(codes: gptq.Codes, group: int) -> Tensor:
    """float32 (outputs, inputs) weights of codes whose groups are neighbouring inputs."""
    outputs, inputs = codes.codes.shape
    grouped = codes.codes.float().view(outputs, -1, group)
    return ((grouped - codes.zeros.float()[:, :, None]) * codes.scales[:, :, None]).view(outputs, inputs)


def _packable(checkpoint: Checkpoint, prefixes: Sequence[str]) -> tuple[gptq.Codes, Tensor | None, int] | None:
    """The joined codes, the order in which inputs are taken so that groups are neighbours (None: as they are), and the
    group size; None where the int4 kernels cannot take the layer."""
    how = checkpoint.quantization
    if how is None or how.bits != 4 or not all(checkpoint.is_quantized(prefix) for prefix in prefixes):
        return None
    parts = [_codes(checkpoint, prefix, how) for prefix in prefixes]
    indexes = [_group_index(checkpoint, prefix, how, part.codes.shape[1]) for prefix, part in zip(prefixes, parts, strict=True)]
    inputs = parts[0].codes.shape[1]
    group = inputs if how.group_size == -1 else how.group_size
    outputs = sum(part.codes.shape[0] for part in parts)
    sizes = group in (32, 64, 128, 256) and inputs % group == 0 and outputs % 16 == 0
    if not sizes or any(not torch.equal(index, indexes[0]) for index in indexes):
        return None
    if bool((torch.bincount(indexes[0].long(), minlength=inputs // group) != group).any()):
        return None
    order = torch.argsort(indexes[0], stable=True)
    joined = gptq.Codes(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
    if torch.equal(order, torch.arange(inputs)):
        return joined, None, group
    return joined._replace(codes=joined.codes[:, order].contiguous()), order, group


def _codes(checkpoint: Checkpoint, prefix: str, how: Quantization) -> gptq.Codes:
    qweight, qzeros, scales = (checkpoint.tensor(f"{prefix}.{part}") for part in ("qweight", "qzeros", "scales"))
    return gptq.unpack(qweight, qzeros, scales, bits=how.bits, offset_zero=how.offset_zero)


def _group_index(checkpoint: Checkpoint, prefix: str, how: Quantization, inputs: int) -> Tensor:
    if f"{prefix}.g_idx" not in checkpoint.entries:
        return gptq.plain_groups(inputs, how.group_size)
    index = checkpoint.tensor(f"{prefix}.g_idx")
    groups = gptq.group_count(inputs, how.group_size)
    if bool((index.min() < 0) | (index.max() >= groups)):
        raise ModelBroken(
            f"{checkpoint.folder}: '{prefix}.g_idx' points outside its {groups} groups",
            hint="prepare or download the model again",
        )
    return index


def _dequantized(checkpoint: Checkpoint, prefixes: Sequence[str]) -> Tensor:
    return torch.cat([dense_weight(checkpoint, prefix) for prefix in prefixes])


def dense_weight(checkpoint: Checkpoint, prefix: str) -> Tensor:
    """float32 (outputs, inputs) of one layer, dequantized where it is packed."""
    how = checkpoint.quantization
    if how is None or not checkpoint.is_quantized(prefix):
        return checkpoint.tensor(f"{prefix}.weight").float()
    qweight, qzeros, scales = (checkpoint.tensor(f"{prefix}.{part}") for part in ("qweight", "qzeros", "scales"))
    index = _group_index(checkpoint, prefix, how, qweight.shape[0] * 32 // how.bits)
    return gptq.dequantize(qweight, qzeros, scales, index, bits=how.bits, group_size=how.group_size, offset_zero=how.offset_zero)


def _bias(checkpoint: Checkpoint, prefixes: Sequence[str]) -> Tensor | None:
    if not any(f"{prefix}.bias" in checkpoint.entries for prefix in prefixes):
        return None
    return torch.cat([_bias_of(checkpoint, prefix) for prefix in prefixes])


def _bias_of(checkpoint: Checkpoint, prefix: str) -> Tensor:
    if f"{prefix}.bias" in checkpoint.entries:
        return checkpoint.tensor(f"{prefix}.bias").float()
    name = f"{prefix}.scales" if checkpoint.is_quantized(prefix) else f"{prefix}.weight"
    shape = checkpoint.entries[name].shape
    return torch.zeros(shape[1] if checkpoint.is_quantized(prefix) else shape[0])
