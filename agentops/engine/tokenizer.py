"""Text to tokens and back: the model's tokenizer, its chat template, and text that appears piece by piece.

What users and documents say is not trusted: in a conversation, the spelling of a control token is text and never becomes
one, and half a surrogate pair is read as U+FFFD. It knows nothing of sequences or of what is asked of them.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from llguidance import LLTokenizer
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from agentops.engine.checkpoint import Checkpoint
from agentops.engine.sampler import Grammar, compile_constraint
from agentops.engine.template import ChatTemplate
from agentops.errors import ModelBroken, ModelUnsupported
from agentops.records import Constraint, Message

_TEMPLATE_BYTES = 256 * 1024
_PRIVATE_USE = range(0x10F000, 0x10FFFE)
_HELD_TOKENS = 8
_TOKENIZER_BYTES = 64 * 1024 * 1024
_SURROGATE = re.compile("[\ud800-\udfff]")


class ChatTokenizer:
    """The tokenizer of a checkpoint. May be used from several threads at once.

    Raises (when made):
        ModelBroken: tokenizer.json or the template cannot be read, or there are tokens that the model does not know.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._source = _read(checkpoint.folder / "tokenizer.json")
        self._folder = checkpoint.folder
        self._vocabulary = checkpoint.config.vocabulary
        self._tokenizer = self._load()
        # Such a token would fail in the middle of a step, which others share.
        if (highest := max(self._tokenizer.get_vocab().values(), default=-1)) >= self._vocabulary:
            raise ModelBroken(
                f"{self._folder}: tokenizer.json has the token {highest:,}, the model knows {self._vocabulary:,} tokens",
                hint="tokenizer and weights belong to different models: prepare or download the model again",
            )
        self._lock = threading.Lock()
        self._grammar_tokenizer: LLTokenizer | None = None
        settings = checkpoint.read_json("tokenizer_config.json") or {}
        self._bos, self._eos = (_token_text(settings.get(name)) for name in ("bos_token", "eos_token"))
        eos = list(checkpoint.config.eos)
        if self._eos and (token := self._tokenizer.token_to_id(self._eos)) is not None:
            eos.append(token)
        self.eos = frozenset(token for token in eos if token < self._vocabulary)
        self._specials = [token.content for token in self._tokenizer.get_added_tokens_decoder().values() if token.special]
        template = self._template_text(settings)
        self._template = None if template is None else ChatTemplate(template, str(self._folder))

    def compile(self, constraint: Constraint) -> Grammar:
        """A constraint over this tokenizer's tokens. The first call takes a moment, a big schema takes one each.

        Raises:
            ConstraintInvalid
        """
        with self._lock:
            if self._grammar_tokenizer is None:
                self._grammar_tokenizer = LLTokenizer(self._source, n_vocab=self._vocabulary, eos_token=sorted(self.eos) or None)
        return compile_constraint(constraint, self._grammar_tokenizer)

    def encode(self, text: str) -> list[int]:
        """A text taken as it is: control tokens spelled in it count as such, and a model that wants a first token gets it."""
        return self._tokenizer.encode(_whole(text)).ids

    def encode_more(self, text: str) -> list[int]:
        """A text that follows others: nothing is put before it and no control token is made."""
        return self._plain.encode(_whole(text), add_special_tokens=False).ids

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """A conversation through the chat template, up to where the answer begins.

        Raises:
            ModelUnsupported: the model has no template.
            UsageError: the template refuses the conversation.
            ModelBroken: the template fails.
        """
        messages = [Message(message.role, _whole(message.content)) for message in messages]
        spelled = [token for token in self._specials if any(token in message.content for message in messages)]
        if not spelled:
            return self._tokenizer.encode(self._render(messages), add_special_tokens=False).ids
        # Each spelled control token travels through the template as one private character nobody else uses.
        used = set().union(*(message.content for message in messages))
        free = (chr(code) for code in _PRIVATE_USE if chr(code) not in used)
        stand_ins = dict(zip(sorted(spelled, key=len, reverse=True), free, strict=False))
        hidden = [Message(message.role, _replaced(message.content, stand_ins)) for message in messages]
        ids: list[int] = []
        text, spelling = "", {mark: token for token, mark in stand_ins.items()}
        for character in self._render(hidden):
            if character not in spelling:
                text += character
                continue
            ids += self._tokenizer.encode(text, add_special_tokens=False).ids + self.encode_more(spelling[character])
            text = ""
        return ids + self._tokenizer.encode(text, add_special_tokens=False).ids

    def trim_text(self, ids: list[int], room: int) -> list[int]:
        """The end of an encoded text, `room` tokens long. A first token that the model wants stays."""
        first = self._tokenizer.encode("").ids[:1]
        if ids[:1] != first:
            first = []
        return first + ids[len(ids) - room + len(first) :]

    def trim_chat(self, messages: Sequence[Message], room: int) -> list[int] | None:
        """A conversation cut to `room` tokens: whole old turns go first, then the beginning of the last turn.

        A user's turn goes with all that answered it, for many templates want a user to begin. System messages stay.
        None where they alone do not fit.
        """
        kept = list(messages)
        ids = self.encode_chat(kept)
        turns = [at for at, message in enumerate(messages) if message.role != "system"]
        gone: set[int] = set()
        while len(ids) > room and len(turns) > 1:
            users = (place for place, at in enumerate(turns) if place and messages[at].role == "user")
            oldest = next(users, 1)
            gone.update(turns[:oldest])
            turns = turns[oldest:]
            ids = self.encode_chat([message for at, message in enumerate(kept) if at not in gone])
        while len(ids) > room:
            if not turns or not (last := kept[turns[0]]).content:
                return None
            kept[turns[0]] = Message(last.role, self.cut_front(last.content, len(ids) - room))
            ids = self.encode_chat([message for at, message in enumerate(kept) if at not in gone])
        return ids

    def cut_front(self, text: str, tokens: int) -> str:
        """The text without its first `tokens` tokens, or a few more: characters stay whole."""
        text = _whole(text)
        offsets = self._plain.encode(text, add_special_tokens=False).offsets
        # The tokens of one character all begin where it begins.
        begin = next((start for start, _ in offsets[tokens:] if start > 0), len(text))
        return text[begin:]

    def writer(self, prompt: Sequence[int], stop: Sequence[str]) -> Writer:
        return Writer(self._tokenizer, prompt, stop)

    @cached_property
    def _plain(self) -> Tokenizer:
        tokenizer = self._load()
        tokenizer.encode_special_tokens = True
        return tokenizer

    def _load(self) -> Tokenizer:
        try:
            tokenizer = Tokenizer.from_str(self._source)
        # The library raises bare Exception for every fault of the file.
        except Exception as error:
            raise ModelBroken(
                f"{self._folder / 'tokenizer.json'} cannot be read: {error}", hint="prepare or download the model again"
            ) from error
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return tokenizer

    def _template_text(self, settings: dict[str, Any]) -> str | None:
        file = self._folder / "chat_template.jinja"
        if file.is_file():
            text: Any = (
                file.read_text(encoding="utf-8") if file.stat().st_size <= _TEMPLATE_BYTES else "x" * (_TEMPLATE_BYTES + 1)
            )
        else:
            text = settings.get("chat_template")
        if isinstance(text, list):
            text = next(
                (entry.get("template") for entry in text if isinstance(entry, dict) and entry.get("name") == "default"), None
            )
        if text is not None and (not isinstance(text, str) or len(text.encode()) > _TEMPLATE_BYTES):
            raise ModelBroken(
                f"{self._folder}: the chat template is no text of at most {_TEMPLATE_BYTES:,} bytes",
                hint="get the model from a source you trust",
            )
        return text

    def _render(self, messages: Sequence[Message]) -> str:
        if self._template is None:
            raise ModelUnsupported(
                f"{self._folder} has no chat template, so it takes no conversations",
                hint="use an instruct model, or give the request a text instead of messages",
            )
        return self._template.render(messages, bos_token=self._bos, eos_token=self._eos)


class Writer:
    """Text as its tokens arrive: never half a character, never the beginning of a stop string that may yet complete."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        before = list(prompt[-_HELD_TOKENS:])
        # A prompt that ends inside a character would be given out with the first whole one.
        if tokenizer.decode(before).endswith("\ufffd"):
            before = []
        self._stream = DecodeStream(ids=before, skip_special_tokens=True)
        self._stop = [_whole(text) for text in stop if text]
        self._held = ""
        self.text = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that has become certain with this token. Sets `stopped` when a stop string is complete."""
        self._held += self._stream.step(self._tokenizer, token) or ""
        ends = [at for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if ends:
            self.stopped = True
            return self._give(min(ends))
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        return self._give(len(self._held) - keep)

    def finish(self) -> str:
        """What was held back and can no longer become a stop string. An unfinished character is dropped."""
        return "" if self.stopped else self._give(len(self._held))

    def _give(self, length: int) -> str:
        given, self._held = self._held[:length], self._held[length:]
        self.text += given
        return given


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-size:])), 0)


def _replaced(text: str, stand_ins: dict[str, str]) -> str:
    for token, mark in stand_ins.items():
        text = text.replace(token, mark)
    return text


def _token_text(value: Any) -> str:
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else ""


def _whole(text: str) -> str:
    """The text as it can be encoded: pairs of surrogates are characters, half a pair is U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") if _SURROGATE.search(text) else text


def _read(file: Path) -> str:
    try:
        if (size := file.stat().st_size) <= _TOKENIZER_BYTES:
            return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ModelBroken(f"{file} cannot be read: {error}", hint="prepare or download the model again") from error
    raise ModelBroken(f"{file} has {size:,} bytes; at most {_TOKENIZER_BYTES:,} are read", hint="it is no tokenizer")
