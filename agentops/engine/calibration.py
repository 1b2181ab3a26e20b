"""Text to calibrate on and text to judge by, made without any data file.

Calibration text is what the interpreter carries (Python's documentation topics) and what the model itself says when it is
asked about everyday subjects or left to talk: a model's own samples show the activations that matter to it. Judged is
prose that is in neither: the documentation strings of the standard library. It knows nothing of quantization.
"""

from __future__ import annotations

import ast
import importlib.util
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice

import torch
from torch import Tensor
from torch.nn import functional

from agentops.engine.checkpoint import Checkpoint
from agentops.engine.decoder import Attend, Decoder
from agentops.engine.linear import make_linear
from agentops.engine.tokenizer import ChatTokenizer
from agentops.engine.workers import open_workers
from agentops.errors import ModelUnsupported
from agentops.records import Message

_LENGTH, _PROSE, _SAMPLES, _BATCH = 256, 8, 24, 12
_SAMPLED_BYTES = 2 << 30
_JUDGED = (
    "argparse",
    "bisect",
    "calendar",
    "codecs",
    "collections",
    "contextlib",
    "difflib",
    "doctest",
    "fractions",
    "functools",
    "gettext",
    "heapq",
    "inspect",
    "ipaddress",
    "locale",
    "mailbox",
    "optparse",
    "pathlib",
    "random",
    "shutil",
    "statistics",
    "subprocess",
    "textwrap",
    "threading",
    "turtle",
    "typing",
    "zipfile",
)
_SUBJECTS = (
    "the water cycle", "how a bicycle stays upright", "the causes of the First World War", "baking bread at home",
    "photosynthesis", "compound interest", "the history of the printing press", "how vaccines work", "black holes",
    "writing a letter of complaint", "the rules of chess", "sorting algorithms", "a healthy breakfast", "volcanoes",
    "renting a flat", "the French Revolution", "how an aeroplane wing makes lift", "heat transfer in a thin plate",
    "training a dog", "supply and demand", "the human heart", "relational databases", "the Roman Empire", "jazz music",
    "electric cars", "plate tectonics", "how to learn a language", "the immune system", "planning a holiday in Italy",
    "measuring temperature", "the theatre of Shakespeare", "soil and compost", "probability", "the solar system",
    "turbulence in pipes", "first aid for burns", "bridges and how they carry load", "email etiquette", "DNA",
    "the Silk Road", "budgeting for a student", "the periodic table", "version control with git", "coral reefs",
    "negotiating a salary", "the steam engine", "the taste of coffee", "road safety", "fossils", "networks of computers",
    "the court system", "sleep", "the violin", "recycling plastic", "weather forecasts", "the Olympic Games",
    "machine learning", "stress and exercise", "the invention of paper", "pressure and the boiling point of water",
)  # fmt: skip
_ASKING = (
    "Explain {} to a beginner.",
    "What should everyone know about {}?",
    "Write a short story in which {} plays a part.",
    "List five facts about {}.",
    "Summarize {} in one paragraph.",
    "Write a question and its answer about {}.",
    "What are common mistakes about {}?",
    "Describe {} in technical terms.",
)


def topics() -> Iterator[str]:
    """Python's documentation topics, the long ones of prose."""
    from pydoc_data.topics import topics as texts

    for _, text in sorted(texts.items()):
        if len(text) > 1500:
            yield text


def documentation_strings() -> Iterator[str]:
    """The longer documentation strings of some modules of the standard library, read without importing them."""
    for name in _JUDGED:
        spec = importlib.util.find_spec(name)
        source = getattr(spec.loader, "get_source", lambda _: None)(name) if spec else None
        for node in ast.walk(ast.parse(source or "")):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node) or ""
                if len(text) > 600:
                    yield text


def questions() -> Iterator[str]:
    """What a person could ask, without end."""
    for number, subject in enumerate(cycle(_SUBJECTS)):
        yield _ASKING[number * 5 % len(_ASKING)].format(subject)


def pieces(
    texts: Iterator[str], encode: Callable[[str], Sequence[int]], *, length: int, count: int, skip: int = 0
) -> list[Tensor]:
    """At most `count` int64 tensors of at most `length` tokens, one from the start of each text, every `1 + skip`-th text."""
    made: list[Tensor] = []
    for number, text in enumerate(texts):
        if number % (1 + skip) == 0:
            tokens = encode(text)[:length]
            if len(tokens) > length // 2:
                made.append(torch.tensor(tokens, dtype=torch.int64))
        if len(made) == count:
            break
    return made


def sample(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    count: int,
    length: int,
    temperature: float,
    seed: int,
    threads: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[Tensor]:
    """`count` rows of `length` tokens, int64: a prompt, the model's words after it, and when it ends its turn the next prompt."""
    batches = -(-count // _BATCH)
    done = [0] * batches
    telling = threading.Lock()

    def batch(index: int) -> list[Tensor]:
        def step(steps: int) -> None:
            with telling:
                done[index] = steps
                if progress:
                    progress(sum(done), batches * length)

        rows = min(_BATCH, count - index * _BATCH)
        return _sample_batch(decoder, cycle(prompts[index::batches]), rows, length, temperature, seed + index, step)

    with open_workers(threads) as each:
        return [row for rows in each(batch, range(batches)) for row in rows]


def _sample_batch(
    decoder: Decoder,
    prompts: Iterator[Sequence[int]],
    count: int,
    length: int,
    temperature: float,
    seed: int,
    progress: Callable[[int], None],
) -> list[Tensor]:
    """All rows stand at the same position at every step, so that one batch serves prompts of any length."""
    config = decoder.config
    generator = torch.Generator().manual_seed(seed)
    waiting = [list(next(prompts)) for _ in range(count)]
    ended = [False] * count
    rows = torch.zeros(count, length, dtype=torch.int64)
    cache = torch.zeros(config.layers, 2, count, config.kv_heads, length, config.head_dim)
    for step in range(length):
        for row, tokens in enumerate(waiting):
            if ended[row]:
                tokens.extend(next(prompts))
            ended[row] = not tokens and int(rows[row, step]) in config.eos
            if tokens:
                rows[row, step] = tokens.pop(0)
        attends = [_cached(part, step) for part in cache]
        logits = decoder(rows[:, step], torch.full((count,), step), attends.__getitem__, torch.arange(count))
        if step + 1 < length:
            # One uniform number a row; torch.multinomial draws one for every word of the vocabulary.
            reached = functional.softmax(logits / temperature, dim=1).cumsum(1)
            drawn = torch.searchsorted(reached, torch.rand(count, 1, generator=generator))[:, 0]
            rows[:, step + 1] = drawn.clamp(max=config.vocabulary - 1)
        progress(step + 1)
    return list(rows)


def _cached(cache: Tensor, step: int) -> Attend:
    """Attention of one new token in each row to that row's earlier ones; `cache` is (2, rows, kv heads, length, dim)."""

    def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        rows, heads, dim = queries.shape
        cache[0, :, :, step], cache[1, :, :, step] = keys, values
        grouped = queries.view(rows, keys.shape[1], -1, dim)
        attended = functional.scaled_dot_product_attention(grouped, cache[0, :, :, : step + 1], cache[1, :, :, : step + 1])
        return attended.reshape(rows, heads, dim)

    return attend


@dataclass(frozen=True, slots=True)
class Texts:
    """int64 token ids, (length,) each, and in words what they are."""

    calibration: list[Tensor]
    held_out: list[Tensor]
    about: str
    held_out_about: str


def make_texts(checkpoint: Checkpoint, threads: int, progress: Callable[[str, int, int], None]) -> Texts:
    """Calibration and held-out texts for a float checkpoint.

    A model too big to be held whole in float32 is not sampled from.
    """
    tokenizer = ChatTokenizer(checkpoint)
    held_out = pieces(documentation_strings(), tokenizer.encode, length=384, count=8)
    prose = pieces(topics(), tokenizer.encode, length=_LENGTH, count=_PROSE, skip=5)
    about = f"{len(prose)} of Python's documentation topics"
    sampled: list[Tensor] = []
    if checkpoint.weight_bytes <= _SAMPLED_BYTES:
        decoder = float_decoder(checkpoint)
        asked = [_asked(tokenizer, question) for question in islice(questions(), 120)]
        # Half of the rows answer questions, half say whatever comes where a text begins.
        prompts = [prompt for question in asked for prompt in (_text_start(checkpoint, tokenizer) or question, question)]
        sampled = sample(
            decoder,
            prompts,
            count=_SAMPLES,
            length=_LENGTH,
            temperature=1.0,
            seed=1,
            threads=threads,
            progress=lambda done, total: progress("calibrate", done, total),
        )
        about += f", {len(sampled)} samples of the model itself"
    return Texts([*prose, *sampled], held_out, about, "documentation strings of the standard library")


def _text_start(checkpoint: Checkpoint, tokenizer: ChatTokenizer) -> list[int]:
    """The token between texts in training; models with a chat form often have another one as their first."""
    between = tokenizer.encode("<|endoftext|>")
    if len(between) == 1:
        return between
    return [] if checkpoint.config.bos is None else [checkpoint.config.bos]


def _asked(tokenizer: ChatTokenizer, question: str) -> list[int]:
    try:
        return tokenizer.encode_chat([Message("user", question)])
    except ModelUnsupported:  # a base model, without a chat template
        return tokenizer.encode(question)


def float_decoder(checkpoint: Checkpoint) -> Decoder:
    """The model in float32, on the CPU."""
    return Decoder(checkpoint.config, checkpoint.tensor, lambda names: make_linear(checkpoint, names, "float32", "cpu"))
