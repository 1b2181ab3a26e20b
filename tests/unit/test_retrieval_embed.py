"""The encoder computes what transformers computes, and refuses what it cannot; the fake is deterministic."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from encoders import make_tiny_encoder

from agentops.errors import ModelBroken, ModelError, ModelNotFound, ModelUnsafe, ModelUnsupported
from agentops.model_lock import write_lock
from agentops.retrieval.embed import EncoderEmbedder, HashEmbedder, open_embedder

TEXTS = [
    "A wing in a slipstream.",
    "",
    "Größe, 東京 and 🦊",
    "word " * 700,
    "the same",
    *(" ".join(["a sentence about lift and drag"] * (1 + n % 9)) for n in range(20)),
]


@pytest.fixture
def tiny_encoder(tmp_path: Path) -> Path:
    return make_tiny_encoder(tmp_path / "tiny")


def by_transformers(folder: Path, texts: list[str], max_tokens: int) -> np.ndarray:
    import torch
    from transformers import BertModel, PreTrainedTokenizerFast

    model = BertModel.from_pretrained(folder, attn_implementation="eager").eval()
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), pad_token="[PAD]")
    rows = []
    with torch.inference_mode():
        for text in texts:
            encoded = tokenizer(text, truncation=True, max_length=max_tokens, padding=False, return_tensors="pt")
            state = model(input_ids=encoded["input_ids"]).last_hidden_state[0].mean(0)
            rows.append((state / state.norm()).numpy())
    return np.stack(rows)


def check_agreement(folder: Path) -> None:
    embedder = open_embedder(folder)
    ours = embedder.embed(TEXTS)
    theirs = by_transformers(folder, TEXTS, embedder.max_tokens)
    assert ours.shape == (len(TEXTS), embedder.dimensions)
    assert ours.dtype == np.float32
    assert np.linalg.norm(ours, axis=1) == pytest.approx(np.ones(len(TEXTS)), abs=1e-5)
    assert (ours * theirs).sum(1).min() >= 0.9999
    assert abs((ours[0] * theirs[4]).sum()) < 0.9999, "the comparison must be able to fail"


def test_agrees_with_transformers_on_random_weights(tiny_encoder: Path) -> None:
    check_agreement(tiny_encoder)


@pytest.mark.model
def test_agrees_with_transformers_on_the_default_model(embedder_folder: Path) -> None:
    check_agreement(embedder_folder)


@pytest.mark.model
def test_the_default_model_knows_meaning(embedder_folder: Path) -> None:
    embedder = open_embedder(embedder_folder)
    assert embedder.dimensions == 384
    assert embedder.max_tokens == 256
    question, answer, other = embedder.embed(["Who wrote the play?", "The author was Shakespeare.", "Bread needs flour."])
    assert question @ answer > question @ other + 0.2


def test_a_text_has_the_same_vector_whatever_is_beside_it(tiny_encoder: Path) -> None:
    embedder = open_embedder(tiny_encoder)
    together = embedder.embed(TEXTS * 7)
    alone = np.stack([embedder.embed([text])[0] for text in TEXTS])
    assert np.abs(together - np.tile(alone, (7, 1))).max() < 1e-5
    assert embedder.embed([]).shape == (0, embedder.dimensions)


def test_tokens_are_counted_without_the_frame_and_without_a_cut(tiny_encoder: Path) -> None:
    embedder = open_embedder(tiny_encoder)
    assert embedder.count_tokens("") == 0
    assert embedder.count_tokens("the wing") == 2
    assert embedder.count_tokens("wing " * 1000) == 1000


def test_the_revision_follows_the_content(tiny_encoder: Path) -> None:
    first = open_embedder(tiny_encoder).revision
    assert open_embedder(tiny_encoder).revision == first
    weights = tiny_encoder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert open_embedder(tiny_encoder).revision != first


def test_torch_is_not_loaded_before_the_first_text(tiny_encoder: Path) -> None:
    code = (
        "import sys; from pathlib import Path; import agentops.retrieval.embedded; "
        "from agentops.retrieval.embed import open_embedder; "
        f"e = open_embedder(Path({str(tiny_encoder)!r})); e.revision; e.count_tokens('text'); "
        "assert 'torch' not in sys.modules; e.embed(['text']); assert 'torch' in sys.modules; "
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def _configure(**values: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return change


def _cut(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def _huge_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((1 << 40).to_bytes(8, "little") + b"{}")


def _not_a_number(folder: Path) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["encoder.layer.1.output.dense.weight"][3, 4] = np.nan
    save_file(tensors, folder / "model.safetensors")


def _changed_behind_the_lock(folder: Path) -> None:
    write_lock(folder)
    weights = folder / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)


def _huge_tokenizer(folder: Path) -> None:
    file = folder / "tokenizer.json"
    file.write_text(file.read_text() + " " * (16 << 20))


@pytest.mark.parametrize(
    ("spoil", "error", "words"),
    [
        (_configure(auto_map={"AutoModel": "evil.Model"}), ModelUnsafe, "auto_map"),
        (_configure(model_type="gpt2"), ModelUnsupported, "model_type"),
        (_configure(hidden_act="relu"), ModelUnsupported, "hidden_act"),
        (_configure(position_embedding_type="relative_key"), ModelUnsupported, "position"),
        (_configure(hidden_size="32"), ModelBroken, "hidden_size"),
        (_configure(hidden_size=10**12), ModelBroken, "hidden_size"),
        (_configure(num_attention_heads=5), ModelBroken, "multiple"),
        (_configure(num_hidden_layers=9), ModelBroken, "missing"),
        (_configure(intermediate_size=65), ModelBroken, "intermediate"),
        (lambda folder: (folder / "config.json").write_text("[]"), ModelBroken, "object"),
        (lambda folder: (folder / "config.json").write_text("{"), ModelBroken, "config.json"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), ModelBroken, "tokenizer.json"),
        (lambda folder: (folder / "tokenizer.json").unlink(), ModelBroken, "tokenizer.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), ModelBroken, "missing"),
        (_cut, ModelBroken, "model.safetensors"),
        (_huge_header, ModelBroken, "header"),
        (_not_a_number, ModelBroken, "NaN"),
        (_changed_behind_the_lock, ModelBroken, "wrong checksum"),
        (_huge_tokenizer, ModelBroken, "larger than"),
    ],
)
def test_a_broken_folder_is_named_with_its_fault(
    tiny_encoder: Path, spoil: Callable[[Path], object], error: type[ModelError], words: str
) -> None:
    spoil(tiny_encoder)
    with pytest.raises(error, match=words) as caught:
        open_embedder(tiny_encoder).embed(["text"])
    assert caught.value.hint


def test_a_missing_folder_is_said(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound):
        open_embedder(tmp_path / "nowhere")


def test_the_fake_is_deterministic_and_knows_spelling() -> None:
    fake = HashEmbedder(64)
    vectors = fake.embed(["the lift of a wing", "wings and lift", "sourdough bread", "", "!"])
    assert vectors.shape == (5, 64)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(5), abs=1e-5)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.2
    code = (
        "from agentops.retrieval.embed import HashEmbedder; print(HashEmbedder(64).embed(['the lift of a wing']).tobytes().hex())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == vectors[:1].tobytes().hex()
    assert fake.revision != HashEmbedder(128).revision


@pytest.mark.model
def test_a_vector_does_not_depend_on_how_many_threads_torch_had_where_it_is_made(embedder_folder: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    import torch

    usual, question = torch.get_num_threads(), ["With which library are PDF files parsed?"]
    embedder = open_embedder(embedder_folder, 2)
    try:
        here = embedder.embed(question)
        with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            assert pool.submit(torch.get_num_threads).result() == 1
            there = pool.submit(embedder.embed, question).result()
    finally:
        torch.set_num_threads(usual)
    assert (here == there).all()


def test_the_weights_are_read_once_by_many_threads(tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    from safetensors import torch as reader

    reads: list[object] = []
    load = reader.load_file
    monkeypatch.setattr(reader, "load_file", lambda file: reads.append(file) or load(file))
    embedder = EncoderEmbedder(tiny_encoder)
    threads = [threading.Thread(target=embedder.embed, args=(["text"],)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(reads) == 1
