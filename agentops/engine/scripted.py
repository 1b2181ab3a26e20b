"""`ScriptedEngine` plays answers that a test wrote, with the manners of a real engine and none of its weight.

It streams word by word, honours stop strings and `max_tokens`, refuses answers that break the request's constraint, and
counts usage: a token is a word with the white space before it, and the longest prefix that an earlier request of the
same tenant had is "cached".
It loads neither torch nor a tokenizer and decides nothing by itself: what the script does not answer is an error.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from typing import Any

from agentops.clock import Clock, SystemClock
from agentops.engine.limits import check_request, check_score_request
from agentops.errors import ConstraintInvalid, EngineClosed, PromptTooLong
from agentops.records import (
    ChoiceScore,
    Completion,
    Constraint,
    Delta,
    FinishReason,
    Generation,
    ModelInfo,
    Request,
    ScoreRequest,
    Scores,
    Timing,
    Usage,
)

Answer = str | Exception
Answers = Sequence[Answer] | Mapping[str, Answer] | Callable[[Request], Answer]
ScoreScript = Callable[[ScoreRequest], Sequence[float]]

_TOKEN = re.compile(r"\s*\S+|\s+$")


class ScriptedEngine:
    """An `Engine` for tests.

    answers: a list is played in order; a mapping answers with the value of the first key that occurs in the last message
        (or the text), and its key "" answers everything else; a function is asked. An exception in place of an answer is
        raised.
    scores: gives each choice's total log-probability; without it, earlier choices are likelier.
    delay_s: pause before the first and between all pieces of an answer.
    context_tokens, input_bytes: limits, as a real engine has them.

    `requests` and `score_requests` hold what was asked, `cancelled` counts streams that were closed early.
    """

    def __init__(
        self,
        answers: Answers = (),
        *,
        scores: ScoreScript | None = None,
        name: str = "scripted",
        delay_s: float = 0.0,
        context_tokens: int = 1_000_000,
        input_bytes: int = 4_000_000,
        clock: Clock | None = None,
    ) -> None:
        self.requests: list[Request] = []
        self.score_requests: list[ScoreRequest] = []
        self.cancelled = 0
        self._answers = answers
        self._played = 0
        self._scores = scores
        self._name = name
        self._delay_s = delay_s
        self._context_tokens = context_tokens
        self._input_bytes = input_bytes
        self._clock = clock or SystemClock()
        self._seen: dict[str, set[tuple[str, ...]]] = {}
        self._closed = False

    @property
    def info(self) -> ModelInfo:
        return ModelInfo(
            name=self._name,
            revision="b2:" + hashlib.blake2b(self._name.encode(), digest_size=16).hexdigest(),
            architecture="scripted",
            context_tokens=self._context_tokens,
            vocabulary=0,
            parameters=0,
            weight_bytes=0,
            quantization="none",
            device="none",
        )

    async def stream(self, request: Request) -> AsyncIterator[Delta | Generation]:
        """As `Engine.stream`.

        Raises:
            ConstraintInvalid: also when the scripted answer does not satisfy the request's constraint.
            LookupError: the script has no answer for the request.
        """
        begin = self._clock.monotonic_ns()
        self._check_open()
        check_request(request, self._input_bytes)
        prompt, trimmed = self._prompt(request)
        _check_constraint(request.constraint)
        self.requests.append(request)
        answer = self._answer(request)
        if isinstance(answer, Exception):
            raise answer
        _check_answer(answer, request.constraint)
        pieces, reason = _limited(answer, request)
        others = [_answered(self._further(request), request) for _ in range(request.n - 1)]
        first = begin
        made = 0
        try:
            for piece in pieces:
                await asyncio.sleep(self._delay_s)
                self._check_open()
                first = first if made else self._clock.monotonic_ns()
                made += 1
                yield Delta(piece)
        except GeneratorExit:
            self.cancelled += 1
            raise
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        end = self._clock.monotonic_ns()
        yield Generation(
            text="".join(pieces),
            finish_reason=reason,
            usage=self._usage(
                prompt, request.tenant, output=len(pieces) + sum(len(one.tokens) for one in others), trimmed=trimmed
            ),
            timing=Timing(prefill_ms=(first - begin) / 1e6, decode_ms=(end - first) / 1e6, first_token_ms=(first - begin) / 1e6),
            model=self._name,
            device="none",
            **_tokens_of(pieces, request),
            others=tuple(others),
        )

    async def score(self, request: ScoreRequest) -> Scores:
        """As `Engine.score`; a choice's total is spread evenly over its tokens."""
        begin = self._clock.monotonic_ns()
        self._check_open()
        check_score_request(request, self._input_bytes)
        self.score_requests.append(request)
        await asyncio.sleep(self._delay_s)
        prompt, _ = self._prompt(Request(messages=request.messages, text=request.text, max_tokens=0))
        totals = self._scores(request) if self._scores else [-float(rank + 1) for rank in range(len(request.choices))]
        if len(totals) != len(request.choices):
            raise LookupError(f"the script scored {len(totals)} of {len(request.choices)} choices")
        choices, tokens = [], 0
        for choice, total in zip(request.choices, totals, strict=True):
            count = max(1, len(_tokens(choice)))
            tokens += count
            choices.append(ChoiceScore(choice, (total / count,) * count))
        usage = self._usage(prompt, request.tenant)
        usage += Usage(input_tokens=tokens, computed_tokens=tokens)
        took = (self._clock.monotonic_ns() - begin) / 1e6
        return Scores(tuple(choices), usage, Timing(prefill_ms=took, first_token_ms=took), self._name, "none")

    async def close(self) -> None:
        self._closed = True

    def _check_open(self) -> None:
        if self._closed:
            raise EngineClosed("the engine was closed", hint="open a new one")

    def _prompt(self, request: Request) -> tuple[tuple[str, ...], int]:
        text = request.text
        if text is None:
            text = "\n".join(f"{message.role}: {message.content}" for message in request.messages)
        tokens = _tokens(text)
        room = self._context_tokens - request.max_tokens
        if len(tokens) <= room:
            return tokens, 0
        if not request.trim or room < 1:
            raise PromptTooLong(len(tokens), request.max_tokens, self._context_tokens)
        return tokens[-room:], len(tokens) - room

    def _answer(self, request: Request) -> Answer:
        if callable(self._answers):
            return self._answers(request)
        said = request.text if request.text is not None else request.messages[-1].content
        if isinstance(self._answers, Mapping):
            for key, answer in self._answers.items():
                if key and key in said:
                    return answer
            if "" in self._answers:
                return self._answers[""]
            raise LookupError(f"the script has no answer for {said[-200:]!r}; its keys are {list(self._answers)}")
        if self._played >= len(self._answers):
            raise LookupError(f"the script's {len(self._answers)} answers are used up; the next request was {said[-200:]!r}")
        self._played += 1
        return self._answers[self._played - 1]

    def _further(self, request: Request) -> str:
        answer = self._answer(request)
        if isinstance(answer, Exception):
            raise answer
        _check_answer(answer, request.constraint)
        return answer

    def _usage(self, prompt: tuple[str, ...], tenant: str, *, output: int = 0, trimmed: int = 0) -> Usage:
        seen = self._seen.setdefault(tenant, set())
        # The last token is always computed: its logits are what the answer starts from.
        cached = max((_shared(prompt, earlier) for earlier in seen), default=0)
        cached = max(0, min(cached, len(prompt) - 1))
        seen.add(prompt)
        return Usage(len(prompt), output, cached, len(prompt) - cached, trimmed)


def _tokens(text: str) -> tuple[str, ...]:
    return tuple(_TOKEN.findall(text))


def _token_id(piece: str) -> int:
    return int.from_bytes(hashlib.blake2b(piece.encode(), digest_size=3).digest())


def _shared(one: Sequence[str], other: Sequence[str]) -> int:
    for index, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return index
    return min(len(one), len(other))


def _limited(answer: str, request: Request) -> tuple[list[str], FinishReason]:
    ends = [at for stop in request.stop if stop and (at := answer.find(stop)) >= 0]
    pieces = list(_tokens(answer[: min(ends)] if ends else answer))
    ending = [at for at, piece in enumerate(pieces) if _token_id(piece) in request.stop_tokens]
    if ending and ending[0] < request.max_tokens:
        return pieces[: ending[0]], "stop"
    if len(pieces) > request.max_tokens:
        return pieces[: request.max_tokens], "length"
    return pieces, "stop"


def _answered(answer: str, request: Request) -> Completion:
    pieces, reason = _limited(answer, request)
    return Completion("".join(pieces), reason, **_tokens_of(pieces, request))


def _tokens_of(pieces: Sequence[str], request: Request) -> dict[str, Any]:
    """Every token is certain: its logarithm is 0, and nothing else is likely."""
    tokens = tuple(map(_token_id, pieces))
    top = tuple(((token, 0.0),) for token in tokens) if request.top_logprobs else ()
    return {"tokens": tokens, "logprobs": (0.0,) * len(tokens), "top_logprobs": top}


def _check_constraint(constraint: Constraint | None) -> None:
    if constraint is None:
        return
    value = constraint.value
    sound = {
        "json_schema": isinstance(value, dict),
        "regex": isinstance(value, str) and _compiles(value),
        "lark": isinstance(value, str) and _described(value),
        "choice": isinstance(value, Iterable)
        and not isinstance(value, str)
        and bool(value)
        and all(isinstance(v, str) and v for v in value),
    }[constraint.kind]
    if not sound:
        raise ConstraintInvalid(f"not a valid {constraint.kind} constraint: {value!r}", hint="see agentops.records.Constraint")


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def _described(grammar: str) -> bool:
    from llguidance import LLMatcher

    return not LLMatcher.validate_grammar(LLMatcher.grammar_from_lark(grammar))


def _derives(grammar: str, text: str) -> bool:
    from llguidance import LLMatcher, LLTokenizer

    matcher, raw = LLMatcher(LLTokenizer("byte"), LLMatcher.grammar_from_lark(grammar), log_level=0), text.encode()
    return bool(matcher.try_consume_tokens(list(raw)) == len(raw) and matcher.is_accepting())


def _check_answer(answer: str, constraint: Constraint | None) -> None:
    if constraint is None:
        return
    if constraint.kind == "choice":
        fits = answer in constraint.value
    elif constraint.kind == "regex":
        fits = re.fullmatch(constraint.value, answer) is not None
    elif constraint.kind == "lark":
        fits = _derives(constraint.value, answer)
    else:
        fits = _matches(answer, constraint.value)
    if not fits:
        raise ConstraintInvalid(
            f"the scripted answer {answer[:200]!r} does not satisfy the {constraint.kind} constraint", hint="mend the script"
        )


def _matches(answer: str, schema: dict[str, Any]) -> bool:
    try:
        return _valid(json.loads(answer), schema)
    except ValueError:
        return False


_KINDS: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}


def _valid(value: Any, schema: Any) -> bool:
    """The everyday part of JSON schema: type, enum, const, properties, required, items and their bounds."""
    if not isinstance(schema, dict):
        return schema is not False
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if not isinstance(kinds, list) or any(kind not in list(_KINDS) for kind in kinds):
        raise ConstraintInvalid(f"{kinds!r} is no type of JSON schema", hint="it knows " + ", ".join(_KINDS))
    if kinds and not any(isinstance(value, _KINDS[kind]) and (kind == "boolean") == isinstance(value, bool) for kind in kinds):
        return False
    if ("enum" in schema and value not in schema["enum"]) or ("const" in schema and value != schema["const"]):
        return False
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        if any(name not in value for name in schema.get("required", ())):
            return False
        if schema.get("additionalProperties") is False and any(name not in properties for name in value):
            return False
        return all(_valid(value[name], part) for name, part in properties.items() if name in value)
    if isinstance(value, list):
        low, high = schema.get("minItems", 0), schema.get("maxItems", len(value))
        return low <= len(value) <= high and all(_valid(item, schema.get("items", {})) for item in value)
    return True
