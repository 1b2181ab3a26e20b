"""A BERT encoder with random weights, small enough to be made for every test and real enough for every library."""

from __future__ import annotations

import json
from pathlib import Path

HIDDEN, INNER, LAYERS, POSITIONS = 32, 64, 2, 64
WORDS = "the a an wing lift drag word sentence about and text same of in slipstream fox bread steam file one two three . ! # -"


def make_tiny_encoder(folder: Path) -> Path:
    """Writes config, tokenizer and weights of two layers with 32 dimensions into `folder`."""
    import numpy as np
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    folder.mkdir(parents=True)
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        *WORDS.split(),
        *"bcdefghijklmnopqrstuvwxyz",
        *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz"),
    ]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    tokenizer.enable_truncation(16)
    tokenizer.enable_padding(length=16)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "hidden_act": "gelu",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "max_position_embeddings": POSITIONS,
        "vocab_size": len(words),
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modules.json").write_text("[]")
    shapes = {
        "embeddings.word_embeddings.weight": (len(words), HIDDEN),
        "embeddings.position_embeddings.weight": (POSITIONS, HIDDEN),
        "embeddings.token_type_embeddings.weight": (2, HIDDEN),
        "embeddings.LayerNorm.weight": (HIDDEN,),
        "pooler.dense.weight": (HIDDEN, HIDDEN),
    }
    for i in range(LAYERS):
        at = f"encoder.layer.{i}"
        shapes |= {f"{at}.attention.self.{part}.weight": (HIDDEN, HIDDEN) for part in ("query", "key", "value")}
        shapes |= {f"{at}.attention.output.dense.weight": (HIDDEN, HIDDEN), f"{at}.intermediate.dense.weight": (INNER, HIDDEN)}
        shapes |= {f"{at}.output.dense.weight": (HIDDEN, INNER)}
        shapes |= {f"{at}.attention.output.LayerNorm.weight": (HIDDEN,), f"{at}.output.LayerNorm.weight": (HIDDEN,)}
    random = np.random.default_rng(1)
    tensors = {name: random.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}
    for name, shape in shapes.items():
        if not name.endswith("embeddings.weight"):
            tensors[name.removesuffix("weight") + "bias"] = random.normal(0, 0.1, shape[0]).astype(np.float32)
    save_file(tensors, folder / "model.safetensors")
    return folder
