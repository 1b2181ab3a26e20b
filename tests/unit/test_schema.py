"""What a value lacks of its schema is told; no pattern of a schema can hold whoever asks."""

from __future__ import annotations

from typing import Any

import pytest

from agentops.schema import BROKEN, PatternInvalid, matcher, violation

EVIL = r"^(a+)+$"
LONG = "a" * 200_000 + "!"


@pytest.mark.parametrize(
    ("schema", "value", "told"),
    [
        ({"type": "string", "pattern": "^[a-z]+$"}, "abc", ""),
        ({"type": "string", "pattern": "^[a-z]+$"}, "abc\n", "does not match"),
        ({"pattern": "b"}, "abc", ""),
        ({"pattern": "b"}, 7, ""),
        ({"properties": {"x": {"pattern": "^a"}}}, {"x": "ba"}, "x: 'ba' does not match"),
        ({"patternProperties": {"^n_": {"type": "integer"}}}, {"n_a": 1, "b": "x"}, ""),
        ({"patternProperties": {"^n_": {"type": "integer"}}}, {"n_a": "1"}, "n_a: '1' is not of type 'integer'"),
        ({"patternProperties": {"^n_": True}, "additionalProperties": False}, {"n_a": 1, "b": 2}, "('b' was unexpected)"),
        ({"properties": {"a": {}}, "additionalProperties": False}, {"a": 1, "b": 2, "c": 3}, "('b', 'c' were unexpected)"),
        ({"properties": {"a": {}}, "additionalProperties": {"type": "null"}}, {"a": 1, "b": 2}, "b: 2 is not of type 'null'"),
        ({"additionalProperties": True}, {"a": 1}, ""),
        ({"additionalProperties": False}, [1], ""),
        ({"pattern": "^(?=a)b"}, "a", f"{BROKEN}: the pattern cannot be used: "),
        ({"pattern": r"(a)\1"}, "aa", f"{BROKEN}: the pattern cannot be used: "),
    ],
)
def test_what_is_wrong_is_told(schema: dict[str, Any], value: Any, told: str) -> None:
    found = violation(schema, value)
    assert told in found if told else not found


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"pattern": EVIL}, LONG),
        ({"patternProperties": {EVIL: False}}, {LONG: 1}),
        ({"patternProperties": {EVIL: True}, "additionalProperties": False}, {LONG: 1}),
    ],
)
def test_no_pattern_holds_the_caller(schema: dict[str, Any], value: Any) -> None:
    # Tried one way after the other, these would take longer than the world has been there.
    violation(schema, value)


def test_a_matcher_says_why_a_pattern_cannot_be_used() -> None:
    assert matcher("tea$")("green tea")
    assert not matcher("tea$")("teapot")
    with pytest.raises(PatternInvalid, match="look-around"):
        matcher("(?<!x)y")
