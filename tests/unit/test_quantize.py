"""The walk through a model: what is written can be opened and computes nearly what the float model did."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from agentops.engine import gptq
from agentops.engine.calibration import float_decoder, make_texts, pieces, sample
from agentops.engine.checkpoint import Checkpoint, open_checkpoint
from agentops.engine.decoder import causal_attention
from agentops.engine.quantize import Quality, Recipe, largest_group, perplexity, quantize_checkpoint
from agentops.engine.safetensors_stream import SafetensorsWriter
from agentops.errors import ModelUnsupported
from tests.tiny_model import VOCABULARY, write_tiny_model


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(write_tiny_model(tmp_path_factory.mktemp("tiny") / "float", tie_word_embeddings=True))


@pytest.fixture(scope="module")
def texts(source: Checkpoint) -> list[torch.Tensor]:
    prompts = [[1, 40 + number] for number in range(24)]
    return sample(float_decoder(source), prompts, count=24, length=64, temperature=0.7, seed=3, threads=1)


@pytest.fixture
def quantized(source: Checkpoint, texts: list[torch.Tensor], tmp_path: Path) -> Callable[..., tuple[Checkpoint, Quality]]:
    def make(checkpoint: Checkpoint = source, recipe: Recipe | None = None, threads: int = 1) -> tuple[Checkpoint, Quality]:
        target = Path(tmp_path / f"made-{len(list(tmp_path.iterdir()))}")
        target.mkdir()
        recipe = recipe or Recipe()
        quality = quantize_checkpoint(checkpoint, target, recipe, calibration=texts[:16], held_out=texts[16:], threads=threads)
        return open_checkpoint(target), quality

    return make


def logits(checkpoint: Checkpoint, text: torch.Tensor) -> torch.Tensor:
    attend = causal_attention(checkpoint.config, [len(text)])
    with torch.inference_mode():
        return float_decoder(checkpoint)(text, torch.arange(len(text)), lambda _: attend, torch.arange(len(text)))


def test_the_folder_opens_and_answers_nearly_as_before(
    source: Checkpoint, texts: list[torch.Tensor], quantized: Callable[..., tuple[Checkpoint, Quality]]
) -> None:
    made, quality = quantized()
    assert made.quantization is not None
    assert (made.quantization.bits, made.quantization.group_size, made.quantization.sym) == (4, 32, True)
    assert not made.quantization.desc_act
    # Random weights magnify every error: at 4 bits the answers are near, at 8 bits they are the same.
    for bits, likeness in ((4, 0.8), (8, 0.99)):
        rough, _ = quantized(recipe=Recipe(bits=bits))
        before, after = logits(source, texts[20]), logits(rough, texts[20])
        assert likeness < float(torch.nn.functional.cosine_similarity(before, after).mean()) < 0.99999
    assert quality.calibration_tokens == 16 * 64
    assert quality.held_out_tokens == 8 * 63


def test_the_perplexities_are_those_of_the_two_folders(
    source: Checkpoint, texts: list[torch.Tensor], quantized: Callable[..., tuple[Checkpoint, Quality]]
) -> None:
    made, quality = quantized()
    assert quality.float_perplexity == pytest.approx(perplexity(float_decoder(source), texts[16:], threads=1), rel=1e-4)
    assert quality.quantized_perplexity == pytest.approx(perplexity(float_decoder(made), texts[16:], threads=1), rel=1e-3)
    by_hand = [-logits(source, text)[:-1].log_softmax(1).gather(1, text[1:, None]) for text in texts[16:]]
    assert quality.float_perplexity == pytest.approx(float(torch.cat(by_hand).mean().exp()), rel=1e-3)


def test_names_and_shapes_are_those_other_loaders_know(quantized: Callable[..., tuple[Checkpoint, Quality]]) -> None:
    made, _ = quantized(recipe=Recipe(bits=8, group_size=-1))
    with safe_open(made.folder / "model.safetensors", framework="pt") as file:  # type: ignore[no-untyped-call]
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    layer = "model.layers.1."
    assert shapes[layer + "self_attn.q_proj.qweight"] == (16, 64)
    assert shapes[layer + "mlp.down_proj.qweight"] == (32, 64)
    assert shapes[layer + "mlp.down_proj.qzeros"] == (1, 16)
    assert shapes[layer + "mlp.down_proj.scales"] == (1, 64)
    assert shapes[layer + "mlp.gate_proj.g_idx"] == (64,)
    assert layer + "mlp.gate_proj.weight" not in shapes
    assert "lm_head.weight" not in shapes
    config = json.loads((made.folder / "config.json").read_text())
    assert config["quantization_config"] == json.loads((made.folder / "quantize_config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "gptq"
    assert (made.folder / "tokenizer_config.json").is_file()


def test_the_result_does_not_depend_on_the_number_of_threads(quantized: Callable[..., tuple[Checkpoint, Quality]]) -> None:
    one, two = quantized(threads=1)[0], quantized(threads=3)[0]
    assert (one.folder / "model.safetensors").read_bytes() == (two.folder / "model.safetensors").read_bytes()


def test_biases_and_an_own_head_are_kept(tmp_path: Path, quantized: Callable[..., tuple[Checkpoint, Quality]]) -> None:
    folder = write_tiny_model(tmp_path / "qwen", architecture="Qwen2ForCausalLM", tie_word_embeddings=False)
    source = open_checkpoint(folder)
    made, _ = quantized(source)
    for name in ("model.layers.0.self_attn.k_proj.bias", "lm_head.weight", "model.norm.weight"):
        assert torch.allclose(made.tensor(name).float(), source.tensor(name), rtol=1e-3, atol=1e-4)
    text = torch.arange(50, 90)
    assert torch.nn.functional.cosine_similarity(logits(source, text), logits(made, text)).mean() > 0.8


def test_what_is_quantized_already_is_refused(tmp_path: Path) -> None:
    packed = open_checkpoint(write_tiny_model(tmp_path / "packed", bits=4))
    with pytest.raises(ModelUnsupported, match="quantized already"):
        quantize_checkpoint(packed, tmp_path, Recipe(), calibration=[], held_out=[])


def test_the_largest_group_divides_every_layer(source: Checkpoint, tmp_path: Path) -> None:
    assert largest_group(source.config) == 64
    odd = open_checkpoint(write_tiny_model(tmp_path / "odd", hidden_size=48, intermediate_size=80))
    assert largest_group(odd.config) == -1


def test_samples_begin_with_their_prompts_and_follow_the_model(source: Checkpoint) -> None:
    decoder = float_decoder(source)
    prompts = [[1, 50, 51, 52], [1, 60]]
    rows = sample(decoder, prompts, count=20, length=24, temperature=1e-4, seed=1, threads=2)
    assert [row[:2].tolist() for row in rows[:1]] == [[1, 50]]
    assert all(len(row) == 24 for row in rows)
    assert all(int(row.max()) < VOCABULARY for row in rows)
    greedy = logits(source, rows[0]).argmax(1)
    ended = (rows[0] == 2).nonzero()
    until = int(ended[0]) if len(ended) else 23
    assert rows[0][4 : until + 1].tolist() == greedy[3:until].tolist()
    again = sample(decoder, prompts, count=20, length=24, temperature=1e-4, seed=1, threads=1)
    assert all(torch.equal(one, other) for one, other in zip(rows, again, strict=True))


def test_calibration_and_judged_text_are_apart(source: Checkpoint) -> None:
    stages: list[str] = []
    made = make_texts(source, 1, lambda stage, done, total: stages.append(stage))
    assert len(made.calibration) > 10
    assert len(made.held_out) > 5
    judged = {tuple(text[:32].tolist()) for text in made.held_out}
    assert not judged & {tuple(text[:32].tolist()) for text in made.calibration}
    assert "calibrate" in stages


def test_pieces_leaves_out_what_is_short() -> None:
    made = pieces(iter(["a" * 100, "b", "c" * 30]), lambda text: [ord(letter) for letter in text], length=40, count=5)
    assert [len(text) for text in made] == [40, 30]


def test_a_safetensors_file_is_written_tensor_by_tensor(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    layout = {"a": (torch.float16, (2, 3)), "b": (torch.int32, (4,)), "empty": (torch.float32, (0,))}
    with SafetensorsWriter(file, layout) as writer:
        writer.write("a", torch.ones(3, 2, dtype=torch.float16).t())
        writer.write("b", torch.arange(4, dtype=torch.int32))
        writer.write("empty", torch.empty(0))
    with safe_open(file, framework="pt") as opened:  # type: ignore[no-untyped-call]
        assert opened.get_tensor("b").tolist() == [0, 1, 2, 3]
        assert opened.get_tensor("a").shape == (2, 3)


@pytest.mark.parametrize("wrong", ["name", "type", "shape", "missing"])
def test_a_safetensors_file_that_differs_from_its_header_is_refused(tmp_path: Path, wrong: str) -> None:
    tensors = {"name": ("b", torch.ones(2)), "type": ("a", torch.ones(2).half()), "shape": ("a", torch.ones(3))}

    def write() -> None:
        with SafetensorsWriter(tmp_path / "x.safetensors", {"a": (torch.float32, (2,))}) as writer:
            if wrong in tensors:
                writer.write(*tensors[wrong])

    with pytest.raises(ValueError, match=r"expected a|ends before a"):
        write()


def test_the_packed_weights_are_gptqs(source: Checkpoint, quantized: Callable[..., tuple[Checkpoint, Quality]]) -> None:
    made, _ = quantized()
    prefix = "model.layers.0.mlp.up_proj"
    parts = [made.tensor(f"{prefix}.{part}") for part in gptq.Packed._fields]
    weight = gptq.dequantize(*parts, bits=4, group_size=32)
    original = source.tensor(f"{prefix}.weight").float()
    assert float((weight - original).square().mean()) < 0.03 * float(original.square().mean())
