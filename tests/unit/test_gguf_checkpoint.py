"""A GGUF file becomes the checkpoint it was made from: the same weights, the same tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import regex
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from agentops.engine.calibration import float_decoder
from agentops.engine.checkpoint import Checkpoint, open_checkpoint
from agentops.engine.decoder import causal_attention
from agentops.engine.gguf_checkpoint import convert_gguf
from agentops.errors import ModelBroken, ModelUnsupported
from tests.tiny_model import TEMPLATE, write_tiny_model

_NAMES = {
    r"model\.layers\.(\d+)\.input_layernorm": r"blk.\1.attn_norm",
    r"model\.layers\.(\d+)\.self_attn\.([qkv])_proj": r"blk.\1.attn_\2",
    r"model\.layers\.(\d+)\.self_attn\.o_proj": r"blk.\1.attn_output",
    r"model\.layers\.(\d+)\.post_attention_layernorm": r"blk.\1.ffn_norm",
    r"model\.layers\.(\d+)\.mlp\.(gate|up|down)_proj": r"blk.\1.ffn_\2",
    r"model\.embed_tokens": "token_embd",
    r"model\.norm": "output_norm",
    r"lm_head": "output",
}


def llama_cpp_order(weight: np.ndarray, heads: int) -> np.ndarray:
    """As llama.cpp's converter writes query and key projections."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


@pytest.fixture
def make_gguf(tmp_path: Path) -> Callable[..., tuple[Path, Checkpoint]]:
    def make(quantization: str = "F32", tied: bool = False, **metadata: Any) -> tuple[Path, Checkpoint]:
        source = open_checkpoint(write_tiny_model(tmp_path / "source", tie_word_embeddings=tied))
        tokenizer = json.loads((source.folder / "tokenizer.json").read_text())
        vocabulary = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].__getitem__)
        # The weights have rows for more tokens than training found.
        vocabulary += [f"<unused{number}>" for number in range(source.config.vocabulary - len(vocabulary))]
        file = tmp_path / "model.gguf"
        writer = gguf.GGUFWriter(file, metadata.get("architecture", "llama"))
        writer.add_block_count(2)
        writer.add_context_length(512)
        writer.add_embedding_length(64)
        writer.add_feed_forward_length(128)
        writer.add_head_count(4)
        writer.add_head_count_kv(2)
        writer.add_rope_freq_base(10000.0)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_rope_dimension_count(metadata.get("rotary", 16))
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(metadata.get("pre", "smollm"))
        writer.add_token_list(vocabulary)
        writer.add_token_types([3 if token.startswith("<|") else 1 for token in vocabulary])
        writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_chat_template(TEMPLATE)
        for name in source.names:
            own = name.removesuffix(".weight")
            for pattern, theirs in _NAMES.items():
                own = re.sub(f"^{pattern}$", theirs, own)
            weight = source.tensor(name).float().numpy()
            if ".attn_q" in own or ".attn_k" in own:
                weight = llama_cpp_order(weight, 4 if "attn_q" in own else 2)
            kind = gguf.GGMLQuantizationType[quantization if weight.ndim == 2 else "F32"]
            writer.add_tensor(f"{own}.weight", gguf.quantize(weight, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return file, source

    return make


def converted(file: Path) -> Checkpoint:
    folder = file.parent / "converted"
    folder.mkdir()
    convert_gguf(file, folder)
    return open_checkpoint(folder)


@pytest.mark.parametrize("tied", [True, False])
def test_the_converted_model_computes_the_same(make_gguf: Callable[..., tuple[Path, Checkpoint]], tied: bool) -> None:
    file, source = make_gguf(tied=tied)
    made = converted(file)
    for field in (
        "hidden",
        "layers",
        "heads",
        "kv_heads",
        "head_dim",
        "ffn",
        "vocabulary",
        "context",
        "rope_theta",
        "eps",
        "tied",
    ):
        assert getattr(made.config, field) == getattr(source.config, field), field
    assert (made.config.bos, made.config.eos) == (1, (2,))
    text = torch.arange(40, 80)
    attend = causal_attention(source.config, [40])
    with torch.inference_mode():
        before, after = (
            float_decoder(model)(text, torch.arange(40), lambda _: attend, torch.arange(40)) for model in (source, made)
        )
    assert float((before - after).abs().max()) < 0.02 * float(before.abs().max())


def test_quantized_tensors_are_dequantized(make_gguf: Callable[..., tuple[Path, Checkpoint]]) -> None:
    file, source = make_gguf("Q8_0")
    made = converted(file)
    for name in ("model.embed_tokens.weight", "model.layers.1.self_attn.k_proj.weight", "model.layers.0.mlp.down_proj.weight"):
        original = source.tensor(name)
        assert 0 < float((made.tensor(name).float() - original).abs().max()) < 0.01 * float(original.abs().max())


def test_tokens_are_those_of_the_file(make_gguf: Callable[..., tuple[Path, Checkpoint]]) -> None:
    file, source = make_gguf()
    made = Tokenizer.from_file(str(converted(file).folder / "tokenizer.json"))
    theirs = Tokenizer.from_file(str(source.folder / "tokenizer.json"))
    for text in ("the quick brown fox", "<|im_start|>user\nyes<|im_end|>\n", "  what  is é 日本 🎉"):
        assert made.encode(text).ids == theirs.encode(text).ids
        assert made.decode(made.encode(text).ids, skip_special_tokens=False) == text
    assert made.token_to_id("<|im_end|>") == 2
    assert made.encode("1234").tokens == ["1", "2", "3", "4"]
    settings = json.loads((file.parent / "converted" / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == TEMPLATE
    assert (settings["bos_token"], settings["eos_token"]) == ("<|im_start|>", "<|im_end|>")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [({"architecture": "gemma"}, "gemma"), ({"pre": "llama-bpe"}, "gpt2/llama-bpe"), ({"rotary": 8}, "rotary")],
)
def test_what_this_engine_does_not_run_is_refused(
    make_gguf: Callable[..., tuple[Path, Checkpoint]], metadata: dict[str, Any], message: str
) -> None:
    file, _ = make_gguf(**metadata)
    with pytest.raises(ModelUnsupported, match=message):
        converted(file)


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.1, 0.6, 0.99])
def test_a_cut_off_file_is_refused(make_gguf: Callable[..., tuple[Path, Checkpoint]], keep: float) -> None:
    file, _ = make_gguf()
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(ModelBroken, match=r"model\.gguf cannot be read as GGUF"):
        converted(file)


# GPT-2's splitting, after every digit has been cut out, as llama.cpp's "smollm" does it.
_WORDS = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")


def byte_letters() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + index) for index, byte in enumerate(rest)}


class Reference:
    """Byte-pair encoding as the paper has it: the best-ranked neighbouring pair is merged until there is none."""

    def __init__(self, folder: Path) -> None:
        model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
        self.vocabulary: dict[str, int] = model["vocab"]
        merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
        self.ranks = {merge: rank for rank, merge in enumerate(merges)}
        self.letters = byte_letters()

    def encode(self, text: str) -> list[int]:
        words = [word for part in regex.split(r"(\p{N})", text) if part for word in _WORDS.findall(part)]
        return [self.vocabulary[piece] for word in words for piece in self.merge(word) if piece in self.vocabulary]

    def knows(self, text: str) -> bool:
        """Whether the vocabulary has every byte; a few control characters and unused planes are not in it."""
        return all(self.letters[byte] in self.vocabulary for byte in text.encode())

    def merge(self, word: str) -> list[str]:
        # A byte that the vocabulary does not have is gone before its neighbours are merged.
        pieces = [letter for letter in (self.letters[byte] for byte in word.encode()) if letter in self.vocabulary]
        while len(pieces) > 1:
            rank, at = min((self.ranks.get(pair, 1 << 30), index) for index, pair in enumerate(pairwise(pieces)))
            if rank == 1 << 30:
                break
            pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
        return pieces


@pytest.fixture(scope="session")
def pair(model_folder: Path) -> tuple[Tokenizer, Reference]:
    return Tokenizer.from_file(str(model_folder / "tokenizer.json")), Reference(model_folder)


@pytest.mark.model
@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=60))
@example(text="\x82\U00079000")
@settings(max_examples=300, deadline=None)
def test_the_default_models_tokens_are_the_references(pair: tuple[Tokenizer, Reference], text: str) -> None:
    tokenizer, reference = pair
    # Hypothesis also tries strings that stand in the project's code, the names of special tokens among them.
    assume(not any(token.content in text for token in tokenizer.get_added_tokens_decoder().values()))
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert ids == reference.encode(text)
    if reference.knows(text):
        assert tokenizer.decode(ids) == text


@pytest.mark.model
def test_the_default_models_tokens_on_prose(pair: tuple[Tokenizer, Reference]) -> None:
    from pydoc_data.topics import topics

    tokenizer, reference = pair
    for name in ("assignment", "context-managers", "formatstrings"):
        text = topics.get(name, "")[:4000] + " naïve façade — 12,345.67 日本語 हिन्दी 🎉👩‍👩‍👧 ½²٣"
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert ids == reference.encode(text)
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode("<|im_start|>user\nhi<|im_end|>").ids[:2] == [1, 4093]
