"""GPTQ tensors: the layout on disk, and that quantizing one layer is worth its trouble."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agentops.engine.gptq import choose_scales, dequantize, dequantize_codes, pack, plain_groups, quantize, unpack
from agentops.errors import ModelBroken, ModelUnsupported


@st.composite
def layers(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, int, bool]:
    bits, group = draw(st.sampled_from([2, 3, 4, 8])), draw(st.sampled_from([-1, 32, 64, 128]))
    outputs, inputs = 32 * draw(st.integers(1, 3)), 32 * draw(st.integers(1, 5))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    groups = 1 if group == -1 else -(-inputs // group)
    codes = torch.randint(0, 2**bits, (outputs, inputs), dtype=torch.uint8, generator=random)
    zeros = torch.randint(0, 2**bits, (outputs, groups), dtype=torch.uint8, generator=random)
    scales = torch.rand(outputs, groups, generator=random).half().float()
    return codes, scales, zeros, bits, group, draw(st.booleans())


@given(layers())
@settings(max_examples=60, deadline=None)
def test_what_is_packed_is_unpacked(layer: tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, int, bool]) -> None:
    codes, scales, zeros, bits, group, offset = layer
    g_idx = plain_groups(codes.shape[1], group)
    packed = pack(codes, scales, zeros, bits=bits, g_idx=g_idx, offset_zero=offset)
    found = unpack(packed.qweight, packed.qzeros, packed.scales, bits=bits, offset_zero=offset)
    assert torch.equal(found.codes, codes)
    assert torch.equal(found.zeros, zeros)
    assert torch.equal(found.scales, scales)
    expected = (codes.float() - zeros.float()[:, g_idx.long()]) * scales[:, g_idx.long()]
    assert torch.equal(dequantize(*packed, bits=bits, group_size=group, offset_zero=offset), expected)


@pytest.mark.parametrize(("bits", "rows"), [(2, 4), (3, 6), (4, 8), (8, 16)])
def test_shapes_and_types_are_autogptqs(bits: int, rows: int) -> None:
    codes, scales, zeros = torch.zeros(96, 64, dtype=torch.uint8), torch.ones(96, 2), torch.zeros(96, 2, dtype=torch.uint8)
    packed = pack(codes, scales, zeros, bits=bits, g_idx=plain_groups(64, 32))
    assert [tuple(tensor.shape) for tensor in packed] == [(rows, 96), (2, 96 * bits // 32), (2, 96), (64,)]
    assert [tensor.dtype for tensor in packed] == [torch.int32, torch.int32, torch.float16, torch.int32]


def test_codes_lie_along_the_inputs_lowest_bits_first() -> None:
    codes = torch.zeros(8, 16, dtype=torch.uint8)
    codes[3, 0], codes[3, 1], codes[3, 7], codes[3, 8] = 1, 2, 15, 5
    packed = pack(codes, torch.ones(8, 1), torch.full((8, 1), 8, dtype=torch.uint8), bits=4, g_idx=plain_groups(16, -1))
    assert packed.qweight[0, 3].item() & 0xFFFFFFFF == 1 | 2 << 4 | 15 << 28
    assert packed.qweight[1, 3].item() == 5
    assert packed.qweight[0, 2].item() == 0


def test_a_symmetric_zero_point_is_stored_less_one_in_format_1_only() -> None:
    codes, scales, zeros = torch.zeros(8, 8, dtype=torch.uint8), torch.ones(8, 1), torch.full((8, 1), 8, dtype=torch.uint8)
    for offset, stored in ((True, 0x77777777), (False, 0x88888888)):
        packed = pack(codes, scales, zeros, bits=4, g_idx=plain_groups(8, -1), offset_zero=offset)
        assert packed.qzeros.item() & 0xFFFFFFFF == stored


def test_three_bits_straddle_words() -> None:
    codes = torch.zeros(32, 32, dtype=torch.uint8)
    codes[0, 10], codes[0, 21] = 0b101, 0b011
    packed = pack(codes, torch.ones(32, 1), torch.ones(32, 1, dtype=torch.uint8), bits=3, g_idx=plain_groups(32, -1))
    words = [value & 0xFFFFFFFF for value in packed.qweight[:, 0].tolist()]
    assert sum(word << 32 * index for index, word in enumerate(words)) == 0b101 << 30 | 0b011 << 63


def test_activation_order_on_disk_is_honoured() -> None:
    random = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 16, (16, 64), dtype=torch.uint8, generator=random)
    scales, zeros = torch.tensor([[1.0, 10.0]]).repeat(16, 1), torch.full((16, 2), 8, dtype=torch.uint8)
    g_idx = plain_groups(64, 32)[torch.randperm(64, generator=random)]
    weight = dequantize(*pack(codes, scales, zeros, bits=4, g_idx=g_idx), bits=4, group_size=32)
    assert torch.equal(weight[:, 5], (codes[:, 5].float() - 8) * (1.0 if g_idx[5] == 0 else 10.0))


def test_what_contradicts_itself_is_refused() -> None:
    codes, scales, zeros = torch.zeros(16, 64, dtype=torch.uint8), torch.ones(16, 2), torch.ones(16, 2, dtype=torch.uint8)
    packed = pack(codes, scales, zeros, bits=4, g_idx=plain_groups(64, 32))
    with pytest.raises(ModelBroken, match="8 bits"):
        unpack(packed.qweight, packed.qzeros, packed.scales, bits=8)
    with pytest.raises(ModelBroken, match="groups of 64"):
        dequantize(*packed, bits=4, group_size=64)
    with pytest.raises(ModelBroken, match="g_idx"):
        dequantize(*packed._replace(g_idx=packed.g_idx + 1), bits=4, group_size=32)
    with pytest.raises(ModelUnsupported, match="5 bits"):
        unpack(packed.qweight, packed.qzeros, packed.scales, bits=5)
    with pytest.raises(ModelUnsupported, match="12 x 64"):
        pack(torch.zeros(12, 64), torch.ones(12, 1), torch.ones(12, 1), bits=4, g_idx=plain_groups(64, -1))


def correlated(inputs: int, rows: int = 2048) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs as a model's are: correlated, some far louder than others. Returns them and their Hessian."""
    random = torch.Generator().manual_seed(3)
    mixing = torch.randn(inputs // 4, inputs, generator=random)
    rows_seen = torch.randn(rows, inputs // 4, generator=random) @ mixing + 0.3 * torch.randn(rows, inputs, generator=random)
    rows_seen = rows_seen * torch.randn(inputs, generator=random).exp()
    return rows_seen, rows_seen.t() @ rows_seen


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, -1), (4, 96), (8, 64)])
def test_gptq_beats_rounding_on_inputs_it_did_not_see(bits: int, group: int, sym: bool) -> None:
    rows, _ = correlated(256)
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(4)) * 0.05
    seen, unseen = rows[:1024], rows[1024:]
    codes = quantize(weight, seen.t() @ seen, bits=bits, group_size=group, sym=sym)
    g_idx = plain_groups(256, group)
    scales, zeros = choose_scales(weight, torch.ones(256), bits=bits, group_size=group, sym=sym)
    steps, offsets = scales[:, g_idx.long()], zeros.float()[:, g_idx.long()]
    rounded = ((weight / steps).round() + offsets).clamp(0, 2**bits - 1).sub(offsets).mul(steps)

    def error(approximation: torch.Tensor) -> float:
        return float(((approximation - weight) @ unseen.t()).square().mean())

    assert error(dequantize_codes(codes, g_idx)) < 0.7 * error(rounded)
    assert int(codes.codes.max()) < 2**bits
    if sym:
        assert bool((codes.zeros == 2 ** (bits - 1)).all())


def test_scales_survive_float16() -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(5)) * 1e-3
    for sym in (True, False):
        scales, _ = choose_scales(weight, torch.ones(64), bits=4, group_size=32, sym=sym)
        assert torch.equal(scales.half().float(), scales)


@pytest.mark.parametrize("spoiled", [torch.nan, torch.inf, -1e30])
def test_inputs_that_cannot_be_reckoned_with_are_refused(spoiled: float) -> None:
    _, hessian = correlated(64)
    hessian[3, 3] = spoiled
    with pytest.raises(ModelBroken, match="calibration text"):
        quantize(torch.ones(32, 64), hessian, bits=4, group_size=32)


def test_zero_weights_and_silent_inputs_do_no_harm() -> None:
    _, hessian = correlated(64)
    hessian[:, 7] = hessian[7, :] = 0
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(6))
    weight[4] = 0
    restored = dequantize_codes(quantize(weight, hessian, bits=4, group_size=32), plain_groups(64, 32))
    assert bool(torch.isfinite(restored).all())
    assert float(restored[4].abs().max()) == 0
    silent = quantize(weight, torch.zeros(64, 64), bits=4, group_size=32)
    assert float((dequantize_codes(silent, plain_groups(64, 32)) - weight).abs().max()) < 0.5
