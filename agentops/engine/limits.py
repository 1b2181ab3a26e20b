"""What a request may ask for, whatever engine it goes to: checked before any work is done on it."""

from __future__ import annotations

from agentops.errors import InputTooLarge, UsageError
from agentops.records import Request, ScoreRequest

_STOPS, _STOP_CHARACTERS = 32, 500
_CHOICES = 1_000
_TOKENS = 10_000
_TOP_LOGPROBS = 100
_ANSWERS = 128


def check_request(request: Request, input_bytes: int) -> None:
    """
    Raises:
        UsageError: a number or list outside its bounds, or not exactly one of messages and text.
        InputTooLarge: messages or text above `input_bytes`.
    """
    _check_input(request, input_bytes)
    _within_turn(request)
    _within("max_tokens", request.max_tokens, 0, 10_000_000)
    _within("temperature", request.temperature, 0, 100)
    _within("top_p", request.top_p, 1e-6, 1)
    _within("top_k", request.top_k, 0, 10_000_000)
    _within("min_p", request.min_p, 0, 1)
    _within("repetition_penalty", request.repetition_penalty, 0.01, 100)
    _within("presence_penalty", request.presence_penalty, -100, 100)
    _within("top_logprobs", request.top_logprobs, 0, _TOP_LOGPROBS)
    _within("n", request.n, 1, _ANSWERS)
    _within("seed", request.seed or 0, 0, 2**63 - 1)
    if len(request.stop) > _STOPS or any(not 0 < len(text) <= _STOP_CHARACTERS for text in request.stop):
        raise UsageError(
            f"at most {_STOPS} stop strings of 1 to {_STOP_CHARACTERS} characters are possible",
            hint="take some out, or look for them in the finished text",
        )
    for name, tokens in (("stop_tokens", request.stop_tokens), ("logit_bias", request.logit_bias)):
        if len(tokens) > _TOKENS or any(type(token) is not int or token < 0 for token in tokens):
            raise UsageError(f"{name} names at most {_TOKENS:,} tokens, each by its number")
    for value in request.logit_bias.values():
        _within("logit_bias", value, -100, 100)


def check_score_request(request: ScoreRequest, input_bytes: int) -> None:
    """
    Raises:
        UsageError, InputTooLarge: as `check_request`; also for no choices, too many, or an empty one.
    """
    _check_input(request, input_bytes - sum(len(choice.encode(errors="replace")) for choice in request.choices))
    _within_turn(request)
    if not 1 <= len(request.choices) <= _CHOICES or not all(request.choices):
        raise UsageError(f"a score request has 1 to {_CHOICES:,} choices, none of them empty")


def _check_input(request: Request | ScoreRequest, limit: int) -> None:
    if (request.text is None) == (not request.messages):
        raise UsageError("a request has either messages or a text, and not both")
    texts = [message.content for message in request.messages] if request.text is None else [request.text]
    # Characters first: encoding a huge string only to measure it would be work already.
    if sum(map(len, texts)) > limit or (size := sum(len(text.encode(errors="replace")) for text in texts)) > limit:
        size = sum(map(len, texts))
        raise InputTooLarge(
            f"the input has more than {max(0, limit):,} bytes ({size:,} characters)",
            hint="shorten the input, or raise engine.input_bytes",
        )


def _within_turn(request: Request | ScoreRequest) -> None:
    _within("priority", request.priority, -1_000, 1_000)
    _within("deadline_s", request.deadline_s, 0, 10_000_000)


def _within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise UsageError(f"{name} must be between {low:g} and {high:g}, not {value!r}")
