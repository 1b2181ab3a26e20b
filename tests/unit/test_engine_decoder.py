"""The decoder against transformers, and the kernels against the float32 reference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from tiny_model import pack, write_tiny_model

from agentops.engine import gptq, linear
from agentops.engine.checkpoint import Checkpoint, expected_shapes, open_checkpoint
from agentops.engine.decoder import Decoder, causal_attention
from agentops.engine.linear import choose_kernel, dense_weight, make_linear
from agentops.engine.runners import Batch
from agentops.engine.runners.torch import TorchRunner, choose_device
from agentops.engine.tokenizer import ChatTokenizer
from agentops.errors import ModelUnsupported, SettingsError

ROOT = Path(__file__).resolve().parents[2]


def transformers_logits(checkpoint: Checkpoint, tokens: list[int]) -> NDArray[np.float32]:
    """What transformers computes from the same, dequantized weights in float32."""
    import transformers

    raw = json.loads((checkpoint.folder / "config.json").read_text())
    raw.pop("quantization_config", None)
    config = transformers.AutoConfig.for_model(**raw)
    config._attn_implementation = "eager"
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.to_empty(device="cpu")
    state = {}
    for name, shape in expected_shapes(checkpoint.config).items():
        prefix = name.removesuffix(".weight")
        state[name] = dense_weight(checkpoint, prefix) if len(shape) == 2 else checkpoint.tensor(name).float()
        if f"{prefix}.bias" in checkpoint.entries:
            state[f"{prefix}.bias"] = checkpoint.tensor(f"{prefix}.bias").float()
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert unexpected == []
    assert set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    # Rotary frequencies are no weights: made on "meta", they have to be made again.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    with torch.inference_mode():
        logits: NDArray[np.float32] = model.eval()(torch.tensor([tokens])).logits[0].numpy()
    return logits


def runner(checkpoint: Checkpoint, kernel: Any = "float32", blocks: int = 128) -> TorchRunner:
    return TorchRunner(checkpoint, kernel=kernel, device="cpu", blocks=blocks, threads=2)


def run(model: TorchRunner, tokens: list[int], *, chunk: int = 1 << 20, table: list[int] | None = None) -> NDArray[np.float32]:
    """Logits of every position, `chunk` tokens a step."""
    table = list(range(-(-len(tokens) // 16))) if table is None else table
    found = []
    for start in range(0, len(tokens), chunk):
        part = tokens[start : start + chunk]
        rows = np.arange(len(part), dtype=np.int64)
        found.append(model.step(Batch(np.array(part, np.int64), rows + start, [len(part)], [table], rows)))
    return np.concatenate(found)


def relative_error(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> float:
    """Mean over positions of |difference| / |reference|."""
    return float((np.linalg.norm(ours - theirs, axis=1) / np.linalg.norm(theirs, axis=1)).mean())


def same_argmax(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> float:
    return float((ours.argmax(1) == theirs.argmax(1)).mean())


def some_tokens(count: int, vocabulary: int = 384) -> list[int]:
    return [int(token) for token in np.random.default_rng(3).integers(3, vocabulary, count)]


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

# What AutoGPTQ, GPTQModel and optimum write beside what says how codes are packed.
OF_OTHER_TOOLS = {
    "is_marlin_format": False,
    "damp_percent": 0.01,
    "true_sequential": True,
    "static_groups": False,
    "model_name_or_path": None,
    "model_file_base_name": None,
    "lm_head": False,
    "pack_dtype": "int32",
    "meta": {"quantizer": ["gptqmodel:7.6.0"], "uri": "https://example.org", "damp_auto_increment": 0.0025},
    "use_cuda_fp16": False,
    "dataset": None,
    "modules_in_block_to_quantize": None,
}
YARN = {"rope_theta": 10000.0, "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"tie_word_embeddings": True},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1, "head_dim": 32},
        {"rope_parameters": {"rope_theta": 5000.0, **LLAMA3}},
        {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "linear", "factor": 4.0}},
        {"architecture": "MistralForCausalLM", "sliding_window": None},
        {"architecture": "Qwen2ForCausalLM", "use_sliding_window": False},
        {"architecture": "Qwen3ForCausalLM"},
        {"architecture": "Qwen3ForCausalLM", "tie_word_embeddings": True, "head_dim": 32, "rope_parameters": YARN},
        {"architecture": "Qwen3ForCausalLM", "bits": 4},
        {"attention_bias": True},
        {"rope_parameters": YARN},
        {"rope_parameters": {**YARN, "truncate": False, "beta_fast": 16, "beta_slow": 2}},
        {"rope_parameters": {**YARN, "mscale": 1.5, "mscale_all_dim": 0.7}},
        {"rope_parameters": {**YARN, "attention_factor": 1.3}},
        {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "dynamic", "factor": 4.0}},
        {"rope_theta": 10000.0, "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
        {"bits": 4},
        {"bits": 8},
    ],
    ids=str,
)
def test_float32_agrees_with_transformers(tmp_path: Path, settings: dict[str, Any]) -> None:
    checkpoint = open_checkpoint(write_tiny_model(tmp_path, **settings))
    tokens = some_tokens(100)
    theirs = transformers_logits(checkpoint, tokens)
    ours = run(runner(checkpoint), tokens)
    assert np.abs(ours - theirs).max() / np.abs(theirs).max() < 1e-4
    assert relative_error(ours, theirs) < 1e-4
    assert same_argmax(ours, theirs) == 1.0


def test_chunks_scattered_blocks_and_company_change_nothing(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_tiny_model(tmp_path))
    model = runner(checkpoint)
    tokens, other = some_tokens(90), some_tokens(40)[::-1]
    whole = run(model, tokens)
    assert np.allclose(run(model, tokens, chunk=7), whole, atol=1e-4)
    assert np.allclose(run(model, tokens, chunk=1, table=[9, 3, 40, 41, 7, 100]), whole, atol=1e-4)
    both = model.step(
        Batch(
            np.array(tokens + other, np.int64),
            np.concatenate([np.arange(90), np.arange(40)]),
            [90, 40],
            [[20, 21, 22, 23, 24, 25], [50, 30, 51]],
            np.array([89, 129]),
        )
    )
    assert np.allclose(both[0], whole[89], atol=1e-4)
    assert np.allclose(both[1], run(model, other)[39], atol=1e-4)


@pytest.mark.parametrize("gathered", [2**25, 120 * 2 * 16, 1])
def test_sequences_that_decode_together_get_what_each_gets_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gathered: int
) -> None:
    monkeypatch.setattr("agentops.engine.runners.torch._GATHERED", gathered)
    checkpoint = open_checkpoint(write_tiny_model(tmp_path))
    model = runner(checkpoint)
    with torch.inference_mode():
        model._cache.fill_(float("nan"))  # what was never written must never be seen
    lengths, random = [40, 33, 60, 1, 2, 7, 120, 64], np.random.default_rng(5)
    prompts = [[int(token) for token in random.integers(3, 384, length)] for length in lengths]
    tables = [[int(block) for block in random.permutation(np.arange(index * 10, index * 10 + 10))] for index in range(8)]
    alone = [run(model, prompt, table=table)[-1] for prompt, table in zip(prompts, tables, strict=True)]
    last, at = np.array([prompt[-1] for prompt in prompts]), np.array(lengths) - 1
    ends = Batch(last, at, [1] * 8, tables, np.arange(8), made=[True] * 8)
    assert np.allclose(model.step(ends), np.stack(alone), atol=1e-4)


def test_what_a_step_gathers_is_bounded_however_many_decode(tmp_path: Path) -> None:
    model = runner(open_checkpoint(write_tiny_model(tmp_path)), blocks=512)
    count, table = 300, list(range(512))
    batch = Batch(np.zeros(count, np.int64), np.full(count, 8191), [1] * count, [table] * count, np.arange(count))
    rows = [len(part.mask) for part in model._together(batch)]
    assert sum(rows) == count
    # 2 heads of 16 numbers, keys and values, as stored and once more in float32.
    assert max(rows) * 8192 * 2 * 16 * 2 * 6 < 500_000_000


def test_a_copied_block_is_as_good_as_the_first(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_tiny_model(tmp_path))
    model = runner(checkpoint)
    tokens = some_tokens(24)
    whole = run(model, tokens, table=[0, 1])
    last = model.step(Batch(np.array(tokens[20:]), np.arange(20, 24), [4], [[0, 5]], np.array([3]), copies=[(1, 5)]))
    assert np.allclose(last[0], whole[23], atol=1e-4)


def test_layer_by_layer_without_a_cache_is_the_same_model(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_tiny_model(tmp_path))
    model = Decoder(checkpoint.config, checkpoint.tensor, lambda names: make_linear(checkpoint, names, "float32", "cpu"))
    one, two = some_tokens(30), some_tokens(300)[30:]
    positions = torch.cat([torch.arange(len(one)), torch.arange(len(two))])
    hidden, attend = model.embed(torch.tensor(one + two)), causal_attention(checkpoint.config, [len(one), len(two)])
    for layer in model.layers:
        hidden = layer(hidden, model.rotation(positions), attend)
    logits = model.logits(hidden).numpy()
    reference = runner(checkpoint)
    assert np.allclose(logits[: len(one)], run(reference, one), atol=1e-4)
    assert np.allclose(logits[len(one) :], run(reference, two), atol=1e-4)


@pytest.mark.parametrize("bfloat16", [True, False], ids=["with bfloat16", "without"])
@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("shuffled", [False, True], ids=["plain", "act-order"])
@pytest.mark.parametrize("zeros", [8, 3], ids=["symmetric", "asymmetric"])
def test_the_int4_kernel_computes_what_the_codes_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int, shuffled: bool, zeros: int, bfloat16: bool
) -> None:
    monkeypatch.setattr(linear, "multiplies_bfloat16", lambda: bfloat16)
    folder = write_tiny_model(tmp_path, bits=4)
    random = torch.Generator().manual_seed(1)
    names = [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"]
    tensors = load_file(folder / "model.safetensors")
    index = gptq.plain_groups(64, 32)
    index = index[torch.randperm(64, generator=random)] if shuffled else index
    for name in names:
        outputs = tensors[f"{name}.scales"].shape[1]
        codes = torch.randint(0, 16, (outputs, 64), generator=random).to(torch.uint8)
        zero = torch.full((outputs, 2), zeros, dtype=torch.uint8)
        scales = torch.rand((outputs, 2), generator=random) * 0.05 + 0.01
        for part, value in gptq.pack(codes, scales, zero, bits=4, g_idx=index)._asdict().items():
            tensors[f"{name}.{part}"] = value.clone()
    save_file(tensors, folder / "model.safetensors")
    checkpoint = open_checkpoint(folder)
    fast, reference = (make_linear(checkpoint, names, kernel, "cpu") for kernel in ("int4", "float32"))
    inputs = torch.randn((rows, 64), generator=random)
    error = (fast(inputs) - reference(inputs)).norm() / reference(inputs).norm()
    assert 0 < error < 1e-2


def laid_out(rows: NDArray[np.int64], bits: int) -> NDArray[np.int32]:
    """(codes, columns) -> (words, columns): codes one after the other along the first axis, lowest bits first."""
    words = np.zeros((len(rows) * bits // 32, rows.shape[1]), np.int64)
    for place, row in enumerate(rows):
        words[place * bits // 32] |= row << place * bits % 32
    return words.astype(np.uint32).view(np.int32)


@pytest.mark.parametrize("where", ["quantize_config.json", "config.json"])
@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("desc_act", [False, True], ids=["plain", "act-order"])
@pytest.mark.parametrize("sym", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("group", [-1, 32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_every_layout_computes_what_its_codes_stand_for(
    tmp_path: Path, bits: int, group: int, sym: bool, desc_act: bool, layout: str, where: str
) -> None:
    random = np.random.default_rng(5)
    shape = {"hidden_size": 128, "head_dim": 32, "num_hidden_layers": 1}
    plain = write_tiny_model(tmp_path / "plain", **shape)
    tensors = load_file(plain / "model.safetensors")
    stored = dict(tensors)
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        outputs, inputs = tensors[name].shape
        groups = 1 if group == -1 else inputs // group
        codes = random.integers(0, 2**bits, (inputs, outputs))
        zeros = np.full((groups, outputs), 2 ** (bits - 1)) if sym else random.integers(1, 2**bits, (groups, outputs))
        scales = random.uniform(0.5, 1.5, (groups, outputs)).astype(np.float16) / np.float16(2**bits * 4)
        index = np.arange(inputs) // (inputs if group == -1 else group)
        index = random.permutation(index) if desc_act else index
        tensors[name] = torch.from_numpy(((codes - zeros[index]) * scales[index].astype(np.float32)).T.astype(np.float32).copy())
        del stored[name]
        at = name.removesuffix(".weight")
        stored[f"{at}.qweight"] = torch.from_numpy(laid_out(codes, bits))
        less = 1 if layout == "gptq" else 0
        stored[f"{at}.qzeros"] = torch.from_numpy(laid_out((zeros - less).T, bits).T.copy())
        stored[f"{at}.scales"] = torch.from_numpy(scales)
        stored[f"{at}.g_idx"] = torch.from_numpy(index.astype(np.int32))
    save_file(tensors, plain / "model.safetensors")
    packed = write_tiny_model(tmp_path / "packed", **shape)
    (packed / "model.safetensors").unlink()
    save_file(stored, packed / f"gptq_model-{bits}bit-{group}g.safetensors")
    how = {"bits": bits, "group_size": group, "desc_act": desc_act, "sym": sym, "checkpoint_format": layout, **OF_OTHER_TOOLS}
    raw = json.loads((packed / "config.json").read_text())
    if where == "config.json":
        raw["quantization_config"] = {"quant_method": "gptq", **how}
        (packed / "config.json").write_text(json.dumps(raw))
    else:
        (packed / "quantize_config.json").write_text(json.dumps(how))
    tokens = some_tokens(40)
    theirs = run(runner(open_checkpoint(plain)), tokens)
    assert relative_error(run(runner(open_checkpoint(packed)), tokens), theirs) < 1e-5
    assert 0 < relative_error(run(runner(open_checkpoint(packed), "int4"), tokens), theirs) < 5e-2


def test_layers_the_int4_kernel_cannot_take_still_run(tmp_path: Path) -> None:
    for settings in ({"bits": 8}, {"bits": 4, "group_size": 16}):
        checkpoint = open_checkpoint(write_tiny_model(tmp_path / str(settings), **settings))
        tokens = some_tokens(50)
        ours, reference = (run(runner(checkpoint, kernel), tokens) for kernel in ("int4", "float32"))
        assert 0 < relative_error(ours, reference) < 5e-2


def test_a_kernel_or_device_that_is_not_there_is_refused(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_tiny_model(tmp_path))
    assert choose_kernel("auto", checkpoint) == "float32"
    with pytest.raises(ModelUnsupported, match="not quantized"):
        choose_kernel("int4", checkpoint)
    if not torch.cuda.is_available():
        assert choose_device("auto") == "cpu"
        with pytest.raises(SettingsError, match="no usable GPU"):
            choose_device("cuda")


def test_rounding_to_codes_is_close_to_the_weights() -> None:
    weight = torch.randn(32, 64)
    parts = pack(weight, 8, 32)
    again = gptq.dequantize(*parts, bits=8, group_size=32)
    assert (again - weight).norm() / weight.norm() < 1e-2


# --- the real model ---


@pytest.fixture(scope="module")
def real(model_folder: Path) -> Checkpoint:
    return open_checkpoint(model_folder)


@pytest.fixture(scope="module")
def real_tokens(real: Checkpoint) -> list[int]:
    pages = sorted((ROOT / "docs").glob("*.md"))
    tokens = ChatTokenizer(real).encode("\n\n".join(page.read_text(encoding="utf-8") for page in pages))
    assert len(tokens) >= 1000
    return tokens[:1000]


@pytest.fixture(scope="module")
def reference(real: Checkpoint, real_tokens: list[int]) -> NDArray[np.float32]:
    return run(runner(real), real_tokens)


@pytest.fixture(scope="module")
def fast(real: Checkpoint) -> TorchRunner:
    return runner(real, "int4")


@pytest.mark.model
def test_the_default_model_in_float32_agrees_with_transformers(
    real: Checkpoint, real_tokens: list[int], reference: NDArray[np.float32]
) -> None:
    tokens = real_tokens[:200]
    theirs = transformers_logits(real, tokens)
    ours = reference[:200]
    assert np.abs(ours - theirs).max() / np.abs(theirs).max() < 1e-4
    assert relative_error(ours, theirs) < 1e-4
    assert same_argmax(ours, theirs) == 1.0


@pytest.mark.model
@pytest.mark.parametrize("chunk", [5, 1000], ids=["int4-kernel", "many-rows"])
def test_the_default_model_with_the_int4_kernel_stays_close(
    fast: TorchRunner, real_tokens: list[int], reference: NDArray[np.float32], chunk: int
) -> None:
    ours = run(fast, real_tokens, chunk=chunk)
    error, same = relative_error(ours, reference), same_argmax(ours, reference)
    print(f"int4 in steps of {chunk}: mean relative logit error {error:.4f}, same argmax {same:.1%}")
    assert error <= 2e-2
    assert same >= 0.97
