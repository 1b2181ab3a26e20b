"""Opens a model folder without trusting it: everything is checked before a tensor library sees a byte.

Reads the layouts that transformers, AutoGPTQ and GPTQModel write: `config.json`, `quantize_config.json` or the
`quantization_config` inside it, `tokenizer.json`, and weights in safetensors files, whole or in shards. Only the keys
named here are read from the JSON files; keys that make other loaders run code are refused, and so is every pickle.

It knows nothing of decoders or kernels, and does not load torch before the first tensor is asked for.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from agentops.errors import ModelBroken, ModelNotFound, ModelUnsafe, ModelUnsupported
from agentops.model_lock import check_lock, file_digests
from agentops.records import content_hash

if TYPE_CHECKING:
    import torch

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")

_HEADER_BYTES = 16 * 1024 * 1024
_CONFIG_BYTES = 1024 * 1024
_TOKENIZER_BYTES = 64 * 1024 * 1024
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".dill", ".npy", ".npz")
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_CODE_KEYS = ("auto_map", "custom_pipelines", "custom_generate", "trust_remote_code")
# A value with a slash in these names a repository on a hub, from which transformers fetches code.
_HUB_KEYS = re.compile(r"^_?(attn|experts|kernels?)_implementation")
_ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("BOOL", "U8", "I8"), 1),
}
_FLOATS = ("F64", "F32", "F16", "BF16")
_PACKED = ("I32",)
_INDEXES = ("I32", "I64")


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched. `kind` is linear (all by `factor`), or by how often a frequency turns within the
    `original_context`: those of few turns are stretched, those of many kept, and those between `low_turns` and `high_turns`
    blended, along the turns (llama3) or along the dimensions (yarn, between whole ones where `truncate`). `attention`
    multiplies queries and keys."""

    kind: Literal["linear", "llama3", "yarn"]
    factor: float
    low_turns: float = 1.0
    high_turns: float = 4.0
    original_context: int = 8192
    attention: float = 1.0
    truncate: bool = True


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """The shape of a decoder. Sizes are counts, `context` is in tokens, `eos` holds every token that ends a turn."""

    architecture: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocabulary: int
    context: int
    rope_theta: float
    rope_scaling: RopeScaling | None
    eps: float
    tied: bool
    bos: int | None
    eos: tuple[int, ...]

    @property
    def normed_heads(self) -> bool:
        """Whether each head's query and key are normed before they are rotated."""
        return self.architecture == "Qwen3ForCausalLM"


@dataclass(frozen=True, slots=True)
class Quantization:
    """How the quantized layers are packed. `group_size` -1 is one group for all inputs of a layer.

    `checkpoint_format` gptq stores each zero point less one, gptq_v2 stores it as it is.
    """

    bits: int
    group_size: int
    desc_act: bool
    sym: bool
    checkpoint_format: str = "gptq"

    @property
    def offset_zero(self) -> bool:
        return self.checkpoint_format == "gptq"


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor as its file's header declares it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]


class Checkpoint:
    """A checked model folder. Make it with `open_checkpoint`."""

    def __init__(
        self,
        folder: Path,
        config: DecoderConfig,
        quantization: Quantization | None,
        entries: Mapping[str, TensorEntry],
        digests: Mapping[str, str] | None,
    ) -> None:
        self.folder = folder
        self.config = config
        self.quantization = quantization
        self.entries = entries
        self._digests = digests
        self._files: dict[Path, Any] = {}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.entries)

    @property
    def weight_bytes(self) -> int:
        return sum(entry.bytes for entry in self.entries.values())

    def is_quantized(self, prefix: str) -> bool:
        """Whether the linear layer `prefix` is stored in GPTQ's packed form."""
        return f"{prefix}.qweight" in self.entries

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor as stored, mapped from the file.

        Raises:
            ModelBroken: no such tensor, or a floating-point tensor holds NaN or infinity.
        """
        import torch
        from safetensors import SafetensorError, safe_open

        entry = self.entries.get(name)
        if entry is None:
            raise ModelBroken(f"{self.folder}: tensor '{name}' is missing", hint="prepare or download the model again")
        try:
            if entry.file not in self._files:
                self._files[entry.file] = safe_open(entry.file, framework="pt")
            value: torch.Tensor = self._files[entry.file].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ModelBroken(
                f"{entry.file}: tensor '{name}' cannot be read: {error}", hint="prepare or download the model again"
            ) from error
        if entry.dtype in _FLOATS and not bool(torch.isfinite(value).all()):
            raise ModelBroken(
                f"{entry.file}: tensor '{name}' holds NaN or infinity", hint="the weights are damaged: prepare the model again"
            )
        return value

    @cached_property
    def revision(self) -> str:
        """Content hash of the weights, the configuration and the tokenizer."""
        digests = self._digests or file_digests(self.folder)
        return content_hash("\n".join(f"{name} {digest}" for name, digest in sorted(digests.items())))

    def read_json(self, name: str) -> dict[str, Any] | None:
        """A checked JSON file beside the weights, or None where there is none."""
        file = self.folder / name
        return _read_json(file, _TOKENIZER_BYTES) if file.is_file() else None


def open_checkpoint(folder: Path) -> Checkpoint:
    """Checks everything but the values of the tensors and returns the folder's `Checkpoint`.

    Order: `model.lock` where there is one, then files that could execute code, the JSON files, the headers of the
    weights, and each tensor's shape against the configuration.

    Raises:
        ModelNotFound: there is no such folder.
        ModelUnsafe: a pickle or a key that loads code; nothing was loaded.
        ModelBroken: a wrong checksum, a missing or cut-off file, a shape that contradicts the configuration.
        ModelUnsupported: another architecture or quantization.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ModelNotFound(f"there is no model folder {folder}", hint="see the models there are with: agentops models list")
    digests = check_lock(folder)
    _refuse_pickles(folder)
    raw = _read_json(_existing(folder, "config.json"), _CONFIG_BYTES)
    _existing(folder, "tokenizer.json")
    for file in sorted(folder.glob("*.json")):
        if file.name not in ("tokenizer.json", "vocab.json", "added_tokens.json"):
            _refuse_code(file, _read_json(file, _TOKENIZER_BYTES))
    config = _decoder_config(folder, raw)
    quantization = _quantization(folder, raw)
    entries = dict(_entries(folder))
    _check_shapes(folder, config, quantization, entries)
    return Checkpoint(folder, config, quantization, entries, digests)


def expected_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """The float tensors of a decoder of this shape by name; linear layers as (outputs, inputs)."""
    hidden, queries, keys = config.hidden, config.heads * config.head_dim, config.kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocabulary, hidden)}
    for layer in range(config.layers):
        at = f"model.layers.{layer}"
        shapes[f"{at}.input_layernorm.weight"] = (hidden,)
        shapes[f"{at}.self_attn.q_proj.weight"] = (queries, hidden)
        shapes[f"{at}.self_attn.k_proj.weight"] = (keys, hidden)
        shapes[f"{at}.self_attn.v_proj.weight"] = (keys, hidden)
        shapes[f"{at}.self_attn.o_proj.weight"] = (hidden, queries)
        if config.normed_heads:
            shapes[f"{at}.self_attn.q_norm.weight"] = (config.head_dim,)
            shapes[f"{at}.self_attn.k_norm.weight"] = (config.head_dim,)
        shapes[f"{at}.post_attention_layernorm.weight"] = (hidden,)
        shapes[f"{at}.mlp.gate_proj.weight"] = (config.ffn, hidden)
        shapes[f"{at}.mlp.up_proj.weight"] = (config.ffn, hidden)
        shapes[f"{at}.mlp.down_proj.weight"] = (hidden, config.ffn)
    shapes["model.norm.weight"] = (hidden,)
    if not config.tied:
        shapes["lm_head.weight"] = (config.vocabulary, hidden)
    return shapes


# --- files ---


def _existing(folder: Path, name: str) -> Path:
    file = folder / name
    if not file.is_file():
        raise ModelBroken(
            f"{folder} is not a model folder: {name} is missing",
            hint="a model folder holds config.json, tokenizer.json and *.safetensors",
        )
    return file


def _read_json(file: Path, limit: int) -> dict[str, Any]:
    try:
        if file.stat().st_size > limit:
            raise ModelBroken(f"{file} has {file.stat().st_size:,} bytes; at most {limit:,} are read", hint="it is no model file")
        tree = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelBroken(f"{file} cannot be read as JSON: {error}", hint="prepare or download the model again") from error
    if not isinstance(tree, dict):
        raise ModelBroken(f"{file} holds no JSON object", hint="prepare or download the model again")
    return tree


def _refuse_pickles(folder: Path) -> None:
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() in _PICKLES:
            hint = f"take {file.name} out of the folder"
            if not any(folder.glob("*.safetensors")):
                hint = "get the model as safetensors, or convert it with its maker's own tools in a place of its own"
            raise ModelUnsafe(
                f"{folder}: {file.name} can hold a pickle, which executes code when it is read; nothing was loaded", hint=hint
            )


def _refuse_code(file: Path, tree: Any) -> None:
    pending = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, dict):
            for key, value in node.items():
                asks_hub = _HUB_KEYS.match(key) and isinstance(value, str) and "/" in value
                if (key in _CODE_KEYS and value) or asks_hub:
                    raise ModelUnsafe(
                        f"{file}: '{key}' asks for code to be loaded with the model; nothing was loaded",
                        hint="use a model of a supported architecture, without code of its own",
                    )
            pending.extend(node.values())
        elif isinstance(node, list):
            pending.extend(node)


# --- configuration ---


def _number(folder: Path, raw: Mapping[str, Any], key: str, low: float, high: float, default: Any = None) -> Any:
    value = raw.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ModelBroken(
            f"{folder / 'config.json'}: {key} must be a number from {low:g} to {high:g}, not {value!r}",
            hint="the configuration is damaged: prepare or download the model again",
        )
    return value


def _decoder_config(folder: Path, raw: Mapping[str, Any]) -> DecoderConfig:
    architectures = raw.get("architectures")
    architecture = str(architectures[0]) if isinstance(architectures, list) and architectures else "(none named)"
    if architecture not in ARCHITECTURES:
        raise ModelUnsupported(f"{folder}: this engine does not run {architecture}", hint="it runs " + ", ".join(ARCHITECTURES))
    activation = raw.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ModelUnsupported(f"{folder}: this engine does not run the activation {activation!r}", hint="it runs silu")

    def whole(key: str, low: int, high: int, default: int | None = None) -> int:
        return int(_number(folder, raw, key, low, high, default))

    hidden, heads = whole("hidden_size", 1, 1 << 17), whole("num_attention_heads", 1, 4096)
    context = whole("max_position_embeddings", 1, 1 << 24, 2048)
    window = raw.get("sliding_window")
    if window is not None and raw.get("use_sliding_window", True) and whole("sliding_window", 1, 1 << 24) < context:
        context = whole("sliding_window", 1, 1 << 24)
    rope = raw.get("rope_parameters") or {}
    config = DecoderConfig(
        architecture=architecture,
        hidden=hidden,
        layers=whole("num_hidden_layers", 1, 4096),
        heads=heads,
        kv_heads=whole("num_key_value_heads", 1, heads, heads),
        head_dim=whole("head_dim", 2, 4096, 128 if architecture == "Qwen3ForCausalLM" else max(2, hidden // heads)),
        ffn=whole("intermediate_size", 1, 1 << 20),
        vocabulary=whole("vocab_size", 1, 1 << 24),
        context=context,
        rope_theta=float(_number(folder, {**raw, **rope}, "rope_theta", 1.0, 1e12, 10_000.0)),
        rope_scaling=_rope_scaling(folder, {"max_position_embeddings": context} | (raw.get("rope_scaling") or rope)),
        eps=float(_number(folder, raw, "rms_norm_eps", 0.0, 1.0, 1e-6)),
        tied=bool(raw.get("tie_word_embeddings", False)),
        bos=_token_ids(raw.get("bos_token_id"))[0] if _token_ids(raw.get("bos_token_id")) else None,
        eos=_end_tokens(folder, raw),
    )
    if config.heads % config.kv_heads or config.head_dim % 2:
        raise ModelBroken(
            f"{folder / 'config.json'}: {heads} heads of {config.head_dim} and {config.kv_heads} key-value heads do not fit",
            hint="the configuration is damaged: prepare or download the model again",
        )
    return config


def _rope_scaling(folder: Path, raw: Mapping[str, Any]) -> RopeScaling | None:
    kind = raw.get("rope_type") or raw.get("type") or "default"
    if kind in ("default", "dynamic"):
        # Dynamic scaling begins beyond the context that the model was trained for, which is where this engine ends.
        return None

    def number(key: str, default: float | None = None) -> float:
        return float(_number(folder, raw, key, 1e-3, 1e6, default))

    factor = float(_number(folder, raw, "factor", 1.0, 1e6))
    original = int(_number(folder, raw, "original_max_position_embeddings", 1, 1 << 24, raw["max_position_embeddings"]))
    match kind:
        case "linear":
            return RopeScaling("linear", factor)
        case "llama3":
            return RopeScaling("llama3", factor, number("low_freq_factor", 1.0), number("high_freq_factor", 4.0), original)
        case "yarn":
            # https://arxiv.org/abs/2309.00071, with the two more factors that DeepSeek's models have.
            shares = [raw.get(name) or 0 for name in ("mscale", "mscale_all_dim")]
            over, under = (number("mscale"), number("mscale_all_dim")) if all(shares) else (1.0, 0.0)
            growth = 0.1 * math.log(factor)
            attention = number("attention_factor", (1 + over * growth) / (1 + under * growth))
            turns = number("beta_slow", 1.0), number("beta_fast", 32.0)
            return RopeScaling("yarn", factor, *turns, original, attention, bool(raw.get("truncate", True)))
    raise ModelUnsupported(
        f"{folder}: this engine does not run rotary scaling {kind!r}", hint="it runs default, linear, dynamic, llama3 and yarn"
    )


def _token_ids(raw: Any) -> tuple[int, ...]:
    values = raw if isinstance(raw, list) else [raw]
    return tuple(value for value in values if isinstance(value, int) and not isinstance(value, bool) and value >= 0)


def _end_tokens(folder: Path, raw: Mapping[str, Any]) -> tuple[int, ...]:
    found = _token_ids(raw.get("eos_token_id"))
    generation = folder / "generation_config.json"
    if generation.is_file():
        found += _token_ids(_read_json(generation, _CONFIG_BYTES).get("eos_token_id"))
    return tuple(dict.fromkeys(found))


def _quantization(folder: Path, raw: Mapping[str, Any]) -> Quantization | None:
    declared = raw.get("quantization_config")
    file = folder / "quantize_config.json"
    if declared is None and file.is_file():
        declared = _read_json(file, _CONFIG_BYTES)
    if declared is None:
        return None
    if not isinstance(declared, dict):
        raise ModelBroken(f"{folder}: quantization_config is no JSON object", hint="prepare or download the model again")

    def unsupported(what: str) -> ModelUnsupported:
        return ModelUnsupported(f"{folder}: this engine does not read {what}", hint="it reads GPTQ with 4 or 8 bits")

    method = declared.get("quant_method", "gptq")
    layout = declared.get("checkpoint_format") or declared.get("format") or "gptq"
    if method != "gptq":
        raise unsupported(f"the quantization {method!r}")
    if layout not in ("gptq", "gptq_v2") or declared.get("is_marlin_format"):
        raise unsupported(f"the packing {layout if layout != 'gptq' else 'marlin'!r}")
    if declared.get("dynamic"):
        raise unsupported("settings that differ from layer to layer ('dynamic')")
    bits, group = declared.get("bits"), declared.get("group_size", -1)
    if isinstance(bits, bool) or bits not in (4, 8):
        raise unsupported(f"{bits!r} bits")
    if isinstance(group, bool) or not isinstance(group, int) or not (group == -1 or 1 <= group <= 1 << 20):
        raise ModelBroken(f"{folder}: group_size {group!r} is no group size", hint="prepare or download the model again")
    return Quantization(int(bits), group, bool(declared.get("desc_act", False)), bool(declared.get("sym", True)), layout)


# --- weights ---


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        mapped = _read_json(index, _TOKENIZER_BYTES).get("weight_map")
        names = sorted({str(name) for name in mapped.values()}) if isinstance(mapped, dict) else []
        for name in names:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise ModelUnsafe(f"{index} points outside the folder: {name!r}", hint="get the model from a source you trust")
        if names:
            return [_existing(folder, name) for name in names]
    for pattern in ("model*.safetensors", "gptq_model-*bit-*g.safetensors"):
        if found := sorted(folder.glob(pattern)):
            return found
    raise ModelBroken(
        f"{folder}: there are no weights (model*.safetensors or gptq_model-*bit-*g.safetensors)",
        hint="prepare or download the model again",
    )


def _entries(folder: Path) -> Iterator[tuple[str, TensorEntry]]:
    seen: dict[str, Path] = {}
    for file in _weight_files(folder):
        for name, entry in _header(file):
            if name in seen:
                raise ModelBroken(
                    f"{folder}: tensor '{name}' is in {seen[name].name} and in {file.name}", hint="keep one set of weights"
                )
            seen[name] = file
            yield name, entry


def _header(file: Path) -> Iterator[tuple[str, TensorEntry]]:
    """The tensors a safetensors file declares, each checked against the file's size.

    Format: https://huggingface.co/docs/safetensors, eight bytes of header length, the header in JSON, the data.
    """

    def broken(what: str) -> ModelBroken:
        return ModelBroken(f"{file}: {what}", hint="the file is damaged or cut off: prepare or download the model again")

    size = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(8)
        if start.startswith(_PICKLE_STARTS):
            raise ModelUnsafe(
                f"{file} is a pickle under another name; nothing was loaded", hint="get the model from a source you trust"
            )
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= _HEADER_BYTES:
            raise broken(f"its header claims {length:,} bytes; 2 to {_HEADER_BYTES:,} are possible")
        if 8 + length > size:
            raise broken("it ends inside its header")
        try:
            header = json.loads(opened.read(length))
        except (ValueError, RecursionError) as error:
            raise broken(f"its header is no JSON: {error}") from error
    if not isinstance(header, dict):
        raise broken("its header is no JSON object")
    spans: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            sound = all(type(value) is int and value >= 0 for value in (begin, end, *shape))
        except (TypeError, KeyError, ValueError):
            sound = False
        if not sound:
            raise broken(f"the header's entry for tensor '{name}' is malformed")
        if dtype not in _ITEM_BYTES:
            raise ModelUnsupported(f"{file}: tensor '{name}' has the type {dtype}", hint="it reads " + ", ".join(_ITEM_BYTES))
        described = TensorEntry(file, dtype, tuple(shape))
        if end - begin != described.bytes:
            raise broken(f"tensor '{name}' of shape {shape} is said to take {end - begin:,} bytes, not {described.bytes:,}")
        if 8 + length + end > size:
            raise broken(f"it ends inside tensor '{name}' ({size:,} bytes, {8 + length + end:,} are needed)")
        spans.append((begin, end, name))
        yield name, described
    at = 0
    for begin, end, name in sorted(spans):
        if begin != at:
            raise broken(f"tensor '{name}' is said to begin at byte {begin:,} of the data, but the one before it ends at {at:,}")
        at = end
    if 8 + length + at != size:
        raise broken(f"{size - 8 - length - at:,} bytes follow the last tensor")


def _check_shapes(
    folder: Path, config: DecoderConfig, quantization: Quantization | None, entries: Mapping[str, TensorEntry]
) -> None:
    def check(name: str, shape: tuple[int, ...], types: Sequence[str] = _FLOATS) -> None:
        if name not in entries:
            raise ModelBroken(f"{folder}: tensor '{name}' is missing", hint="prepare or download the model again")
        if entries[name].shape != shape:
            raise ModelBroken(
                f"{folder}: tensor '{name}' has shape {entries[name].shape}, the configuration asks for {shape}",
                hint="configuration and weights belong to different models: prepare or download the model again",
            )
        if entries[name].dtype not in types:
            raise ModelBroken(
                f"{folder}: tensor '{name}' has the type {entries[name].dtype}; it must be {' or '.join(types)}",
                hint="the weights are damaged or packed in another way: prepare or download the model again",
            )

    for name, shape in expected_shapes(config).items():
        prefix = name.removesuffix(".weight")
        if len(shape) == 2 and f"{prefix}.qweight" in entries:
            if quantization is None:
                raise ModelBroken(
                    f"{folder}: '{prefix}' is quantized, but no quantization_config says how",
                    hint="the folder lacks quantize_config.json: prepare or download the model again",
                )
            outputs, inputs = shape
            group = inputs if quantization.group_size == -1 else quantization.group_size
            groups, bits = -(-inputs // group), quantization.bits
            check(f"{prefix}.qweight", (inputs * bits // 32, outputs), _PACKED)
            check(f"{prefix}.qzeros", (groups, outputs * bits // 32), _PACKED)
            check(f"{prefix}.scales", (groups, outputs))
            if f"{prefix}.g_idx" in entries:
                check(f"{prefix}.g_idx", (inputs,), _INDEXES)
        else:
            check(name, shape)
        if len(shape) == 2 and f"{prefix}.bias" in entries:
            check(f"{prefix}.bias", (shape[0],))
