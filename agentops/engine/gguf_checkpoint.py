"""Turns a GGUF file of the Llama family into a checkpoint folder as transformers reads it.

Weights are dequantized to float16, names and the order of the rotary dimensions are those of transformers, and
`config.json`, `tokenizer.json` and `tokenizer_config.json` are made from the file's metadata. It knows nothing of where
the file came from or what becomes of the folder.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, ReaderTensor, dequantize
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from agentops.engine.safetensors_stream import SafetensorsWriter
from agentops.errors import ModelBroken, ModelUnsupported

_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL_TOKEN = 3


def convert_gguf(file: Path, folder: Path) -> None:
    """Writes a float16 checkpoint into `folder`, which must exist.

    Raises:
        ModelBroken: the file is not GGUF or ends early.
        ModelUnsupported: another architecture or tokenizer than Llama with byte-level BPE.
    """
    try:
        source = _Source(GGUFReader(file))
        config = _config(source)
        tokenizer, tokenizer_config = _tokenizer(source)
        _write_weights(source, config, folder / "model.safetensors")
    except (ValueError, KeyError, IndexError) as error:
        raise ModelBroken(
            f"{file.name} cannot be read as GGUF: {error}", hint="remove the file and prepare the model again"
        ) from error
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in (("config.json", config), ("tokenizer_config.json", tokenizer_config)):
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


class _Source:
    """The reader's fields as plain values, and its tensors by name."""

    def __init__(self, reader: GGUFReader) -> None:
        self._fields = reader.fields
        self.tensors: dict[str, ReaderTensor] = {tensor.name: tensor for tensor in reader.tensors}

    def get(self, key: str, default: Any = None) -> Any:
        return self._fields[key].contents() if key in self._fields else default

    def need(self, key: str) -> Any:
        return self._fields[key].contents()


def _config(source: _Source) -> dict[str, Any]:
    if (architecture := source.need("general.architecture")) != "llama":
        raise ModelUnsupported(f"GGUF architecture '{architecture}' is not supported", hint="use a Llama-family file or a hub id")
    heads, hidden = source.need("llama.attention.head_count"), source.need("llama.embedding_length")
    head_dim = source.get("llama.attention.key_length", hidden // heads)
    if source.get("llama.rope.dimension_count", head_dim) != head_dim or source.get("llama.rope.scaling.type", "none") != "none":
        raise ModelUnsupported("GGUF with partial or scaled rotary embeddings is not supported", hint="use the model's hub id")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": source.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": source.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": source.get("tokenizer.ggml.padding_token_id"),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": source.need("llama.feed_forward_length"),
        "max_position_embeddings": source.need("llama.context_length"),
        "mlp_bias": False,
        "num_attention_heads": heads,
        "num_hidden_layers": source.need("llama.block_count"),
        "num_key_value_heads": source.get("llama.attention.head_count_kv", heads),
        # The file keeps them as 32-bit floats; 9.99999974e-06 was 1e-05.
        "rms_norm_eps": float(f"{source.need('llama.attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_theta": float(f"{source.get('llama.rope.freq_base', 10000.0):.6g}"),
        "rope_scaling": None,
        "tie_word_embeddings": "output.weight" not in source.tensors,
        "torch_dtype": "float16",
        "use_cache": True,
        "vocab_size": len(source.need("tokenizer.ggml.tokens")),
    }


def _write_weights(source: _Source, config: dict[str, Any], path: Path) -> None:
    names = {
        name: own
        for block in range(config["num_hidden_layers"])
        for theirs, ours in _LAYER_NAMES.items()
        for name, own in ((f"model.layers.{block}.{ours}.weight", f"blk.{block}.{theirs}.weight"),)
    }
    names = {"model.embed_tokens.weight": "token_embd.weight", **names, "model.norm.weight": "output_norm.weight"}
    if not config["tie_word_embeddings"]:
        names["lm_head.weight"] = "output.weight"
    layout = {
        name: (torch.float16, tuple(int(size) for size in reversed(source.tensors[own].shape))) for name, own in names.items()
    }
    with SafetensorsWriter(path, layout) as writer:
        for name, own in names.items():
            tensor = source.tensors[own]
            weight = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
            if name.endswith("q_proj.weight"):
                weight = unpermute(weight, config["num_attention_heads"])
            elif name.endswith("k_proj.weight"):
                weight = unpermute(weight, config["num_key_value_heads"])
            writer.write(name, weight.to(torch.float16))


def unpermute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key projection from llama.cpp's order, which pairs neighbouring dimensions for the rotation,
    to transformers', which pairs the two halves of a head."""
    outputs, inputs = weight.shape
    return weight.reshape(heads, outputs // heads // 2, 2, inputs).transpose(1, 2).reshape(outputs, inputs)


def _tokenizer(source: _Source) -> tuple[Tokenizer, dict[str, Any]]:
    kind, style = source.need("tokenizer.ggml.model"), source.get("tokenizer.ggml.pre", "")
    if (kind, style) != ("gpt2", "smollm"):
        raise ModelUnsupported(f"GGUF tokenizer '{kind}/{style}' is not supported", hint="use the model's hub id instead")
    tokens: list[str] = source.need("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in source.need("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    # Each digit stands alone, everything else splits as in GPT-2.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    types = source.need("tokenizer.ggml.token_type")
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])

    def named(role: str) -> str | None:
        index = source.get(f"tokenizer.ggml.{role}_token_id")
        return None if index is None else tokens[index]

    return tokenizer, {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "add_bos_token": bool(source.get("tokenizer.ggml.add_bos_token", False)),
        "bos_token": named("bos"),
        "eos_token": named("eos"),
        "unk_token": named("unknown"),
        "pad_token": named("padding"),
        "additional_special_tokens": [token for token in special if token in (named("bos"), named("eos"))],
        "chat_template": source.get("tokenizer.chat_template"),
        "clean_up_tokenization_spaces": False,
        "model_max_length": source.need("llama.context_length"),
    }
