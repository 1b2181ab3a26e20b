"""Payloads: anything becomes JSON of a bounded size, with marks for what JSON cannot say and for what was cut."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langgraph.types import Command, Interrupt, Send
from pydantic import BaseModel

from agentops.records import Message, Request, content_hash
from agentops.tracer import to_plain
from agentops.tracer.payload import Payload, encode, encode_packed, pack

LIMIT = 100_000


class Form(BaseModel):
    name: str
    inner: list[int]


@dataclass
class Point:
    x: int
    other: object = None


class Hostile:
    def __repr__(self) -> str:
        raise RuntimeError("no")


class Liar:
    @property
    def content(self) -> str:
        raise RuntimeError("no content")

    additional_kwargs: dict[str, Any] = {}  # noqa: RUF012
    type = "ai"


def kept(value: Any, limit: int = LIMIT) -> Any:
    payload = encode(value, limit)
    assert not payload.truncated
    return json.loads(payload.data)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ({"a": [1, 2.5, None, True, "ü"]}, {"a": [1, 2.5, None, True, "ü"]}),
        ((1, (2,)), [1, [2]]),
        ({3, 1}, {"$set": [1, 3]}),
        (b"ab", {"$bytes": content_hash("ab"), "size": 2}),
        (float("nan"), {"$number": "nan"}),
        pytest.param(10**5000, {"$number": "16610 bits"}, id="a huge integer"),
        (Form(name="n", inner=[1]), {"name": "n", "inner": [1]}),
        (Point(1, Point(2)), {"x": 1, "other": {"x": 2, "other": None}}),
        (Path("a/b"), "a/b"),
        (datetime(2026, 11, 22, tzinfo=UTC), "2026-11-22 00:00:00+00:00"),
        (ValueError("bad"), {"$error": "ValueError: bad"}),
        ({1: "a", (2, 3): "b"}, {"1": "a", "(2, 3)": "b"}),
        (HumanMessage("hi"), {"role": "user", "content": "hi"}),
        (ToolMessage("3", tool_call_id="c1", name="add"), {"role": "tool", "content": "3", "name": "add", "tool_call_id": "c1"}),
        (Send("node", {"x": 1}), {"$send": "node", "arg": {"x": 1}}),
        (Request(messages=(Message("user", "q"),)).messages, [{"role": "user", "content": "q"}]),
        ("a\udc80", "a\udc80"),
    ],
)
def test_what_a_value_looks_like(value: Any, shown: Any) -> None:
    assert kept(value) == shown
    assert to_plain(value) == shown
    assert packed(value) in (encode(value, LIMIT), None)


class Size(IntEnum):
    SMALL = 3


class Pair(NamedTuple):
    a: int
    b: object


@pytest.mark.parametrize(
    "value",
    [
        {"size": Size.SMALL, "pair": Pair(1, Pair(2, ()))},
        {"number": np.float64(0.1), "array": np.arange(2), "other": np.float32(2)},
        Counter("abca"),
        [float("nan"), float("inf"), -0.0, 1e16, 1e-7, 2**64 - 1, -(2**63)],
        Point(1, [Form(name="n", inner=[]), {Path("a")}, bytearray(b"x"), memoryview(b"y"), timedelta(1)]),
        Command(update={"messages": [AIMessage("a", tool_calls=[{"name": "add", "args": {"a": 1}, "id": "c1"}])]}),
        HumanMessage("hi", status="beside the fields"),
    ],
)
def test_what_is_packed_first_is_the_same_in_the_end(value: Any) -> None:
    assert packed(value) == encode(value, LIMIT)


@pytest.mark.parametrize("value", [{1: "a"}, {(2, 3): "b"}, "a\udc80", 2**64, "x" * LIMIT], ids=lambda value: repr(value)[:12])
def test_what_cannot_be_packed_is_told(value: Any) -> None:
    assert pack(value, LIMIT) is None


def packed(value: Any, limit: int = LIMIT) -> Payload | None:
    return None if (found := pack(value, limit)) is None else encode_packed(found, limit)


def test_tool_calls_usage_commands_and_interrupts_are_kept() -> None:
    message = AIMessage(
        "",
        tool_calls=[{"name": "add", "args": {"a": 1}, "id": "c1"}],
        usage_metadata={"input_tokens": 3, "output_tokens": 2, "total_tokens": 5},
    )
    shown = kept(message)
    assert shown["tool_calls"][0]["args"] == {"a": 1}
    assert shown["usage_metadata"]["total_tokens"] == 5
    assert kept(Command(resume="yes"))["resume"] == "yes"
    assert kept(Interrupt(value="ok?", id="1"))["value"] == "ok?"


def test_cycles_hostile_objects_and_depth_end() -> None:
    loop: dict[str, Any] = {"a": []}
    loop["a"].append(loop)
    assert kept(loop) == {"a": [{"$cycle": "dict"}]}
    twice = [1]
    assert kept([twice, twice]) == [[1], [1]], "the same object twice is no cycle"
    assert kept(Hostile())["$repr"] == "(its repr failed)"
    assert "$repr" in kept(Liar())
    deep: list[Any] = []
    for _ in range(5_000):
        deep = [deep]
    assert b"$repr" in encode(deep, LIMIT).data


def test_a_huge_string_is_cut_with_a_mark_and_its_neighbours_stay() -> None:
    value = {"before": "b", "text": "x" * 50_000_000, "after": "the end", "list": list(range(100))}
    payload = encode(value, LIMIT)
    assert payload.truncated
    assert LIMIT // 10 < len(payload.data) <= LIMIT
    shown = json.loads(payload.data)
    assert shown["before"] == "b"
    assert shown["after"] == "the end"
    assert shown["list"] == list(range(100))
    assert "[cut: 50,000,000 characters in all]" in shown["text"]


def test_many_entries_are_cut_with_a_count() -> None:
    payload = encode({"items": [f"item {number}" for number in range(100_000)]}, 10_000)
    items = json.loads(payload.data)["items"]
    assert payload.truncated
    assert items[0] == "item 0"
    assert items[-1]["$cut"].endswith("of 100,000 items")
    assert len(payload.data) <= 10_000


def test_escapes_do_not_break_the_limit() -> None:
    payload = encode(["\x00" * 30_000, "字" * 30_000], 20_000)
    assert payload.truncated
    assert len(payload.data) <= 20_000
    json.loads(payload.data)


def test_equal_content_has_equal_names() -> None:
    assert encode({"a": 1}, LIMIT).hash == encode({"a": 1}, LIMIT).hash != encode({"a": 2}, LIMIT).hash


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()) | st.binary() | st.builds(Hostile),
        lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner) | st.frozensets(st.integers()),
        max_leaves=40,
    ),
    st.integers(min_value=1_000, max_value=5_000),
)
def test_any_value_becomes_valid_json_below_the_limit(value: Any, limit: int) -> None:
    payload, later = encode(value, limit), packed(value, limit)
    json.loads(payload.data)
    assert len(payload.data) <= limit
    assert later is None or (later.data, later.hash) == (payload.data, payload.hash) or (later.truncated and payload.truncated)
