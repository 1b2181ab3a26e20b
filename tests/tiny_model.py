"""Makes model folders small enough for every test: random weights, a tokenizer trained on a few sentences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from agentops.engine import gptq
from agentops.engine.checkpoint import expected_shapes

VOCABULARY = 384
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_TEXT = ["the quick brown fox jumps over the lazy dog", "what is the capital of the country", "yes no maybe", "one two three"]


def config(architecture: str = "LlamaForCausalLM", **changes: Any) -> dict[str, Any]:
    return {
        "architectures": [architecture],
        "model_type": architecture.removesuffix("ForCausalLM").lower(),
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 128,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 512,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
        **changes,
    }


def write_tiny_model(folder: Path, *, bits: int | None = None, group_size: int = 32, shards: int = 1, **settings: Any) -> Path:
    """A model folder; `bits` packs its linear layers as GPTQ does. The same arguments give the same weights."""
    folder.mkdir(parents=True, exist_ok=True)
    described = config(**settings)
    (folder / "config.json").write_text(json.dumps(described))
    _write_tokenizer(folder)
    random = torch.Generator().manual_seed(7)
    tensors: dict[str, torch.Tensor] = {}
    inputs = ("q_proj", "k_proj", "v_proj")
    biased = (*inputs, "o_proj") if described.get("attention_bias") else inputs if described["model_type"] == "qwen2" else ()
    for name, shape in expected_shapes(_shape(folder)).items():
        if len(shape) == 1:
            tensors[name] = 1 + 0.1 * torch.randn(shape, generator=random)
            continue
        weight = torch.randn(shape, generator=random) * (1.0 if "embed" in name else 2.0) / shape[1] ** 0.5
        prefix = name.removesuffix(".weight")
        if prefix.endswith(biased):
            tensors[f"{prefix}.bias"] = 0.1 * torch.randn(shape[0], generator=random)
        if bits is None or not name.endswith("proj.weight"):
            tensors[name] = weight
            continue
        for part, value in pack(weight, bits, group_size)._asdict().items():
            tensors[f"{prefix}.{part}"] = value
    if bits is not None:
        how = {"quant_method": "gptq", "bits": bits, "group_size": group_size, "desc_act": False, "sym": True}
        (folder / "config.json").write_text(json.dumps({**described, "quantization_config": how}))
    _save(folder, tensors, shards)
    return folder


def pack(weight: torch.Tensor, bits: int, group_size: int) -> gptq.Packed:
    """Rounds to the nearest code."""
    outputs, inputs = weight.shape
    grouped = weight.view(outputs, -1, group_size)
    scales = (grouped.abs().amax(2) / (2 ** (bits - 1) - 1)).half().float()
    zeros = torch.full_like(scales, 2 ** (bits - 1))
    codes = (grouped / scales[:, :, None] + zeros[:, :, None]).round().clamp(0, 2**bits - 1).view(outputs, inputs)
    return gptq.pack(codes.to(torch.uint8), scales, zeros.to(torch.uint8), bits=bits, g_idx=gptq.plain_groups(inputs, group_size))


def _shape(folder: Path) -> Any:
    from agentops.engine import checkpoint

    return checkpoint._decoder_config(folder, json.loads((folder / "config.json").read_text()))


def _save(folder: Path, tensors: dict[str, torch.Tensor], shards: int) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(tensors)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[shard::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def _write_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = [AddedToken(text, special=True) for text in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT * 50, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
