"""Quantizes a float checkpoint by GPTQ, layer by layer, and measures what it cost.

Calibration and held-out text walk through the model together. At each layer the calibration rows are pushed through the
float weights to collect one Hessian for each distinct input, the weights are quantized, and all rows go on through the
quantized ones, so that later layers learn of earlier ones' errors. The held-out rows also go on through the float
weights: both perplexities come out of the one pass. Memory holds one layer and the activations, never the whole model.

It knows nothing of where checkpoints and texts come from.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from agentops.engine.checkpoint import Checkpoint, DecoderConfig, expected_shapes
from agentops.engine.decoder import Attend, Decoder, Layer, Linear, causal_attention
from agentops.engine.gptq import Codes, Packed, dequantize_codes, group_count, pack, plain_groups, quantize
from agentops.engine.safetensors_stream import SafetensorsWriter
from agentops.engine.workers import Each, open_workers
from agentops.errors import ModelBroken, ModelUnsupported

Progress = Callable[[str, int, int], None]
"""Called with the name of a stage, what is done of it, and its total."""

_CHUNK_ROWS = 2048
_NOTHING = torch.empty(0)


@dataclass(frozen=True, slots=True)
class Recipe:
    """What to make: `group_size` -1 is one group for all inputs of a layer."""

    bits: int = 4
    group_size: int = 32
    sym: bool = True
    damping: float = 0.01

    @property
    def label(self) -> str:
        group = "rows" if self.group_size == -1 else f"{self.group_size}g"
        return f"gptq-{self.bits}bit-{group}" + ("" if self.sym else "-asym")


@dataclass(frozen=True, slots=True)
class Quality:
    """Perplexity on held-out text before and after, and how many tokens were calibrated on and measured."""

    float_perplexity: float
    quantized_perplexity: float
    calibration_tokens: int
    held_out_tokens: int


def quantize_checkpoint(
    source: Checkpoint,
    target: Path,
    recipe: Recipe,
    *,
    calibration: Sequence[Tensor],
    held_out: Sequence[Tensor],
    threads: int = 0,
    progress: Progress | None = None,
) -> Quality:
    """Writes `model.safetensors`, the configuration and the tokenizer's files into the folder `target`, which must exist.

    `calibration` and `held_out` are int64 token ids, (length,) each. Embeddings, head and norms become float16.

    Raises:
        ModelUnsupported: the source is quantized already, or a layer's sizes cannot be packed.
        ModelBroken: a tensor is missing or not finite.
    """
    if source.quantization is not None:
        raise ModelUnsupported(f"{source.folder} is quantized already", hint="quantize the float model it was made from")
    layout = _layout(source, recipe)
    report = progress or (lambda stage, done, total: None)
    with (
        SafetensorsWriter(target / "model.safetensors", layout) as writer,
        open_workers(threads) as each,
        torch.inference_mode(),
    ):
        quality = _Pass(source, recipe, writer, each).run(calibration, held_out, report)
    _write_configuration(source, target, recipe)
    return quality


def perplexity(decoder: Decoder, texts: Sequence[Tensor], threads: int = 0) -> float:
    """exp of the mean negative log-probability of every token but the first of each text of int64 ids."""
    with open_workers(threads) as each, torch.inference_mode():
        states = [_embedded(decoder, chunk) for chunk in _chunks(texts)]
        for layer in decoder.layers:
            each(partial(_State.advance, layer=layer), states)
        return _perplexity(decoder, states, each)


class _Stage:
    """A linear layer that is loaded when its turn comes and quantized in place."""

    def __init__(self, names: tuple[str, ...], source: Checkpoint) -> None:
        self.names = names
        self._source = source
        self._bias: Tensor | None = None
        self.weight: Tensor = _NOTHING

    def load(self) -> None:
        self.weight = torch.cat([self._source.tensor(f"{name}.weight") for name in self.names]).float()
        if any(f"{name}.bias" in self._source.entries for name in self.names):
            self._bias = torch.cat([self._source.tensor(f"{name}.bias") for name in self.names]).float()

    def free(self) -> None:
        self.weight, self._bias = _NOTHING, None

    def __call__(self, rows: Tensor) -> Tensor:
        if self.weight is _NOTHING:
            self.load()
        return functional.linear(rows, self.weight, self._bias)


class _State:
    """The hidden rows of some texts between two layers."""

    def __init__(self, hidden: Tensor, rotation: tuple[Tensor, Tensor], attend: Attend, texts: Sequence[Tensor]) -> None:
        self.hidden = hidden
        self.texts = texts
        self.seen: list[Tensor] = []
        self._rotation = rotation
        self._attend = attend

    def advance(self, layer: Layer) -> None:
        self.hidden = layer(self.hidden, self._rotation, self._attend)

    def record(self, layer: Layer) -> None:
        """Leaves in `seen` what each of the layer's stages is given."""
        self.seen = []

        def watched(stage: Linear) -> Linear:
            def call(rows: Tensor) -> Tensor:
                self.seen.append(rows)
                return stage(rows)

            return call

        def last(rows: Tensor) -> Tensor:
            self.seen.append(rows)
            return torch.zeros_like(self.hidden)

        watching = replace(layer, qkv=watched(layer.qkv), o=watched(layer.o), gate_up=watched(layer.gate_up), down=last)
        watching(self.hidden, self._rotation, self._attend)

    def copy(self) -> _State:
        return _State(self.hidden, self._rotation, self._attend, self.texts)


class _Pass:
    """One walk through the model, writing as it goes."""

    def __init__(self, source: Checkpoint, recipe: Recipe, writer: SafetensorsWriter, each: Each) -> None:
        self._source = source
        self._recipe = recipe
        self._writer = writer
        self._each = each
        self._stages: list[_Stage] = []
        self._decoder = Decoder(source.config, source.tensor, self._stage)

    def _stage(self, names: tuple[str, ...]) -> _Stage:
        self._stages.append(_Stage(names, self._source))
        return self._stages[-1]

    def run(self, calibration: Sequence[Tensor], held_out: Sequence[Tensor], report: Progress) -> Quality:
        decoder = self._decoder
        learned = [_embedded(decoder, chunk) for chunk in _chunks(calibration)]
        judged = [_embedded(decoder, chunk) for chunk in _chunks(held_out)]
        judged_float = [state.copy() for state in judged]
        self._write_float("model.embed_tokens.weight")
        report("layers", 0, len(decoder.layers))
        for index, layer in enumerate(decoder.layers):
            stages = self._stages[4 * index : 4 * index + 4]
            for stage in stages:
                stage.load()
            self._each(partial(_State.advance, layer=layer), judged_float)
            self._each(partial(_State.record, layer=layer), learned)
            quantized = self._quantize(stages, learned)
            self._each(partial(_State.advance, layer=layer), [*learned, *judged])
            self._write_layer(f"model.layers.{index}", stages, quantized)
            for stage in stages:
                stage.free()
            report("layers", index + 1, len(decoder.layers))
        self._write_float("model.norm.weight")
        if not self._source.config.tied:
            self._write_float("lm_head.weight")
        report("perplexity", 0, 2)
        before = _perplexity(decoder, judged_float, self._each)
        report("perplexity", 1, 2)
        after = _perplexity(decoder, judged, self._each)
        report("perplexity", 2, 2)
        return Quality(before, after, sum(map(len, calibration)), sum(len(text) - 1 for text in held_out))

    def _quantize(self, stages: Sequence[_Stage], learned: Sequence[_State]) -> list[Codes]:
        """Every stage's codes; its weight becomes what they stand for."""
        recipe = self._recipe

        def one(index: int) -> Codes:
            stage = stages[index]
            inputs = stage.weight.shape[1]
            hessian = torch.zeros(inputs, inputs)
            for state in learned:
                hessian.addmm_(state.seen[index].t(), state.seen[index])
            codes = quantize(
                stage.weight, hessian, bits=recipe.bits, group_size=recipe.group_size, sym=recipe.sym, damping=recipe.damping
            )
            stage.weight = dequantize_codes(codes, plain_groups(inputs, recipe.group_size))
            return codes

        # The longest first, so that the others fit in beside it.
        order = sorted(range(len(stages)), key=lambda index: -stages[index].weight.shape[1])
        done = dict(zip(order, self._each(one, order), strict=True))
        for state in learned:
            state.seen = []
        return [done[index] for index in range(len(stages))]

    def _write_float(self, name: str) -> None:
        value = self._source.tensor(name).to(torch.float16)
        if not bool(torch.isfinite(value).all()):
            raise ModelBroken(f"tensor '{name}' does not fit into float16", hint="this model cannot be quantized here")
        self._writer.write(name, value)

    def _write_layer(self, at: str, stages: Sequence[_Stage], quantized: Sequence[Codes]) -> None:
        packed: dict[str, Packed] = {}
        for stage, codes in zip(stages, quantized, strict=True):
            sizes = [self._source.entries[f"{name}.weight"].shape[0] for name in stage.names]
            for name, *parts in zip(stage.names, *(part.split_with_sizes(sizes) for part in codes), strict=True):
                g_idx = plain_groups(parts[0].shape[1], self._recipe.group_size)
                packed[name] = pack(*parts, bits=self._recipe.bits, g_idx=g_idx)
        for name in expected_shapes(self._source.config):
            prefix = name.removesuffix(".weight")
            if prefix in packed:
                for part, tensor in zip(Packed._fields, packed[prefix], strict=True):
                    self._writer.write(f"{prefix}.{part}", tensor)
            elif name.startswith(f"{at}."):
                self._write_float(name)
            if name.startswith(f"{at}.") and f"{prefix}.bias" in self._source.entries:
                self._write_float(f"{prefix}.bias")


def _chunks(texts: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Texts in batches of a bounded number of rows."""
    batch: list[Tensor] = []
    for text in texts:
        if batch and sum(map(len, batch)) + len(text) > _CHUNK_ROWS:
            yield batch
            batch = []
        batch.append(text)
    if batch:
        yield batch


def _embedded(decoder: Decoder, texts: Sequence[Tensor]) -> _State:
    positions = torch.cat([torch.arange(len(text)) for text in texts])
    attend = causal_attention(decoder.config, [len(text) for text in texts])
    return _State(decoder.embed(torch.cat(list(texts))), decoder.rotation(positions), attend, texts)


def _perplexity(decoder: Decoder, states: Sequence[_State], each: Each) -> float:
    def loss(part: tuple[Tensor, Tensor]) -> float:
        hidden, text = part
        return float(functional.cross_entropy(decoder.logits(hidden[:-1]), text[1:], reduction="sum"))

    parts = [
        part
        for state in states
        for part in zip(state.hidden.split_with_sizes([len(text) for text in state.texts]), state.texts, strict=True)
    ]
    return math.exp(sum(each(loss, parts)) / max(1, sum(len(text) - 1 for _, text in parts)))


def _layout(source: Checkpoint, recipe: Recipe) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name, shape in expected_shapes(source.config).items():
        prefix = name.removesuffix(".weight")
        if len(shape) == 2 and prefix.startswith("model.layers."):
            outputs, inputs = shape
            if inputs * recipe.bits % 32 or outputs * recipe.bits % 32:
                raise ModelUnsupported(f"{prefix} of {outputs} x {inputs} cannot be packed at {recipe.bits} bits")
            groups = group_count(inputs, recipe.group_size)
            layout[f"{prefix}.qweight"] = torch.int32, (inputs * recipe.bits // 32, outputs)
            layout[f"{prefix}.qzeros"] = torch.int32, (groups, outputs * recipe.bits // 32)
            layout[f"{prefix}.scales"] = torch.float16, (groups, outputs)
            layout[f"{prefix}.g_idx"] = torch.int32, (inputs,)
        else:
            layout[name] = torch.float16, shape
        if f"{prefix}.bias" in source.entries:
            layout[f"{prefix}.bias"] = torch.float16, source.entries[f"{prefix}.bias"].shape
    return layout


def largest_group(config: DecoderConfig) -> int:
    """The largest usual group size that divides the inputs of every layer; -1 when none does."""
    sizes = (config.hidden, config.heads * config.head_dim, config.ffn)
    return next((group for group in (128, 64, 32) if all(size % group == 0 for size in sizes)), -1)


def quantize_config(recipe: Recipe) -> dict[str, Any]:
    """The content of `quantize_config.json`, in AutoGPTQ's words."""
    return {
        "bits": recipe.bits,
        "group_size": recipe.group_size,
        "damp_percent": recipe.damping,
        "desc_act": False,
        "static_groups": True,
        "sym": recipe.sym,
        "true_sequential": False,
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "model_name_or_path": None,
        "model_file_base_name": "model",
    }


def _write_configuration(source: Checkpoint, target: Path, recipe: Recipe) -> None:
    config = source.read_json("config.json") or {}
    for outdated in ("torch_dtype", "dtype"):
        config.pop(outdated, None)
    config |= {"torch_dtype": "float16", "quantization_config": quantize_config(recipe)}
    for name, content in (("config.json", config), ("quantize_config.json", quantize_config(recipe))):
        (target / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for name in TOKENIZER_FILES:
        if (source.folder / name).is_file():
            shutil.copyfile(source.folder / name, target / name)


TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
)
