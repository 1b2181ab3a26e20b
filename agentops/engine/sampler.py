"""Turns logits into a token: greedy or drawn, under a grammar where one is asked for.

Log-probabilities are those of the model itself, before temperature, cuts and grammar. Drawing is reproducible: the same
logits and the same seed give the same token. It knows token numbers, not text; grammars are compiled by llguidance.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from numpy.typing import NDArray

from agentops.errors import ConstraintInvalid
from agentops.records import Constraint, Request

Logits = NDArray[np.float32]

_CHOICES = 10_000
_GRAMMAR_BYTES = 1_000_000


class Grammar:
    """What may follow, token by token. Make it with `compile_constraint`."""

    def __init__(self, matcher: LLMatcher, vocabulary: int) -> None:
        self._matcher = matcher
        self._mask = np.zeros((vocabulary + 31) // 32, dtype=np.int32)

    def allowed(self, vocabulary: int) -> NDArray[np.bool_]:
        """bool (vocabulary,): which tokens may come next.

        Raises:
            ConstraintInvalid: the grammar grew beyond the matcher's limits.
        """
        self._matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        if self._matcher.is_error():
            raise _invalid(self._matcher.get_error())
        return np.unpackbits(self._mask.view(np.uint8), bitorder="little", count=vocabulary).astype(np.bool_)

    def accept(self, token: int) -> bool:
        """Takes the token in; True when nothing can follow any more."""
        self._matcher.consume_token(token)
        if self._matcher.is_error():
            raise _invalid(self._matcher.get_error())
        return bool(self._matcher.is_stopped())

    def twin(self) -> Grammar:
        """Another that goes on from here by itself."""
        return Grammar(self._matcher.deep_copy(), len(self._mask) * 32)


def compile_constraint(constraint: Constraint, tokenizer: LLTokenizer) -> Grammar:
    """
    Raises:
        ConstraintInvalid: it is not of the form its kind asks for, or cannot be compiled.
    """
    grammar = _grammar(constraint)
    if len(grammar) > _GRAMMAR_BYTES:
        raise _invalid(f"it has {len(grammar):,} characters, the limit is {_GRAMMAR_BYTES:,}")
    matcher = LLMatcher(tokenizer, grammar, log_level=0)
    if matcher.is_error():
        raise _invalid(matcher.get_error())
    return Grammar(matcher, tokenizer.vocab_size)


def check_constraint(constraint: Constraint) -> None:
    """
    Raises:
        ConstraintInvalid: it cannot be compiled, whatever the tokenizer is.
    """
    if error := LLMatcher.validate_grammar(_grammar(constraint)):
        raise _invalid(error)


def _grammar(constraint: Constraint) -> str:
    value = constraint.value
    try:
        if constraint.kind == "json_schema":
            if not isinstance(value, dict):
                raise _invalid("a JSON schema is a dict")
            # Free white space is where a small model loses its way: it can go on for ever.
            spacing = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
            return LLMatcher.grammar_from_json_schema(json.dumps(value), overrides=spacing)  # type: ignore[arg-type]
        if constraint.kind == "regex":
            if not isinstance(value, str):
                raise _invalid("a regular expression is a string")
            return LLMatcher.grammar_from_regex(value)
        if constraint.kind == "lark":
            if not isinstance(value, str):
                raise _invalid("a Lark grammar is a string")
            return LLMatcher.grammar_from_lark(value)
        choices = [value] if isinstance(value, str) else list(value)
        if not choices or len(choices) > _CHOICES or not all(isinstance(choice, str) and choice for choice in choices):
            raise _invalid(f"choices are 1 to {_CHOICES:,} strings that are not empty")
        return LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices))
    except (TypeError, ValueError, RecursionError) as error:
        raise _invalid(str(error)) from error


def _invalid(why: str) -> ConstraintInvalid:
    return ConstraintInvalid(
        f"the constraint cannot be used: {why.strip()[:500]}", hint="see agentops.records.Constraint for the four kinds"
    )


class Chosen(NamedTuple):
    """A token, its log-probability, the likeliest tokens in its place with theirs, and whether the grammar ends with it."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    over: bool


class Sampler:
    """One sequence's choices: how is what `request` says. `prompt` are its tokens, `generator` draws where there is a
    temperature."""

    def __init__(
        self, request: Request, *, prompt: Sequence[int], generator: np.random.Generator, grammar: Grammar | None = None
    ) -> None:
        self._request = request
        self._generator = generator
        self._grammar = grammar
        self._bias = (np.array(list(request.logit_bias), np.int64), np.array(list(request.logit_bias.values()), np.float32))
        self._read = set(prompt) if request.repetition_penalty != 1 else set()
        self._made: set[int] = set()

    def choose(self, logits: Logits) -> Chosen:
        """The next token of logits (vocabulary,).

        Raises:
            ConstraintInvalid: the grammar grew beyond the matcher's limits.
        """
        weighed = self._weighed(logits)
        token = int(np.argmax(weighed)) if self._request.temperature == 0 else self._draw(weighed)
        self._made.add(token)
        over = self._grammar is not None and self._grammar.accept(token)
        total = log_sum_exp(logits)
        top = _likeliest(logits, self._request.top_logprobs)
        return Chosen(token, float(logits[token] - total), tuple((one, float(logits[one] - total)) for one in top), over)

    def _weighed(self, logits: Logits) -> Logits:
        """The logits after penalties, bias and grammar."""
        asked = self._request
        if asked.repetition_penalty == 1 and asked.presence_penalty == 0 and not asked.logit_bias:
            return self._ruled(logits)
        weighed = logits.copy()
        if asked.repetition_penalty != 1:
            seen = np.fromiter(self._read | self._made, np.int64)
            held = weighed[seen]
            weighed[seen] = np.where(held > 0, held / asked.repetition_penalty, held * asked.repetition_penalty)
        weighed[np.fromiter(self._made, np.int64)] -= asked.presence_penalty
        tokens, values = self._bias
        weighed[tokens] += values
        return self._ruled(weighed)

    def _ruled(self, logits: Logits) -> Logits:
        return logits if self._grammar is None else np.where(self._grammar.allowed(len(logits)), logits, np.float32(-np.inf))

    def _draw(self, logits: Logits) -> int:
        asked = self._request
        scaled = logits.astype(np.float64) / asked.temperature
        order = np.argsort(-scaled, kind="stable")
        if asked.top_k:
            order = order[: asked.top_k]
        weights = np.exp(scaled[order] - scaled[order[0]])
        if asked.min_p:
            # The likeliest has the weight 1.
            weights = weights[: int(np.count_nonzero(weights >= asked.min_p))]
        shares = np.cumsum(weights / weights.sum())
        # The token that crosses the line is still in, so that there is always one.
        kept = int(np.searchsorted(shares, asked.top_p)) + 1 if asked.top_p < 1 else len(shares)
        point = self._generator.random() * shares[min(kept, len(shares)) - 1]
        return int(order[np.searchsorted(shares, point, side="right")])


def _likeliest(logits: Logits, count: int) -> list[int]:
    """The numbers of the `count` greatest, greatest first, of equal ones the lowest number first."""
    if count == 0:
        return []
    count = min(count, len(logits))
    least = np.partition(logits, -count)[-count]
    found = np.flatnonzero(logits >= least)
    return [int(token) for token in found[np.argsort(-logits[found], kind="stable")][:count]]


def log_sum_exp(logits: NDArray[Any]) -> NDArray[Any]:
    """Over the last axis."""
    top = logits.max(axis=-1, keepdims=True)
    return np.asarray(np.log(np.exp(logits - top).sum(axis=-1)) + top[..., 0])


def log_probabilities(logits: Logits, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
    """(rows, vocabulary) and (rows,) -> (rows,): how likely each token was, as natural logarithms."""
    return np.asarray(np.take_along_axis(logits, tokens[:, None], axis=1)[:, 0] - log_sum_exp(logits))
