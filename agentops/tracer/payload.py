"""Turns any value into JSON that can be kept: never an exception, never a drop, never more than the limit.

What JSON cannot say is marked with a key that starts with `$`: `$bytes`, `$set`, `$cycle`, `$repr`, `$number`, `$send`,
`$cut`. A value above the limit keeps its shape and loses the middle of what is long; the payload is then flagged as
truncated. Nothing here can be turned back into objects, and nothing here reads or writes files.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from datetime import date, time, timedelta
from decimal import Decimal
from enum import Enum
from functools import lru_cache, partial
from pathlib import PurePath
from typing import Any
from uuid import UUID

from agentops.records import content_hash

_DEPTH = 60
_REPR_CHARACTERS = 2_000
# Python refuses to write longer integers as text.
_INTEGER_BITS = 14_000
_MESSAGE = {"content", "additional_kwargs", "type"}
_TOLD = ("name", "tool_calls", "tool_call_id", "status", "usage_metadata", "additional_kwargs")
_ROLES = {"human": "user", "ai": "assistant", "system": "system", "tool": "tool"}


@dataclass(frozen=True, slots=True)
class Payload:
    """JSON as UTF-8 bytes, named by its content; `truncated` when something had to be cut."""

    hash: str
    data: bytes
    truncated: bool


def encode(value: Any, limit_bytes: int) -> Payload:
    """The value as JSON of at most `limit_bytes` (and a mark's few bytes where something was cut)."""
    data = _whole(value, limit_bytes)
    if data is not None:
        return Payload(content_hash(data), data, truncated=False)
    room = limit_bytes
    for _ in range(8):
        data = _dump(_Plainer(room, cut=True).plain(value, 0))
        if len(data) <= limit_bytes:
            break
        # Escapes and multi-byte characters make JSON longer than the characters counted; try again with less.
        room = max(64, int(room * 0.8 * limit_bytes / len(data)))
    assert data is not None
    return Payload(content_hash(data), data, truncated=True)


def _whole(value: Any, limit_bytes: int) -> bytes | None:
    """The JSON of a value that fits, else `None`."""
    try:
        # The encoder in C walks what JSON knows and asks for the rest: ten times faster than a walk of our own.
        data = _dump(value)
    except (TypeError, ValueError, RecursionError, RuntimeError):
        try:
            data = _dump(_Plainer(limit_bytes, cut=False).plain(value, 0))
        except _TooBigError:
            return None
    return data if len(data) <= limit_bytes else None


def to_plain(value: Any) -> Any:
    """The value as JSON knows it (dicts, lists, strings, numbers), whole, with marks for what JSON cannot say."""
    return _Plainer(sys.maxsize, cut=False).plain(value, 0)


def public(channels: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a graph's channels, without those that LangGraph has made for itself."""
    return {name: value for name, value in channels.items() if not name.startswith(("__", "branch:"))}


def state_hash(value: Any) -> str:
    """The hash of a value's whole JSON, whatever its size, with the keys of mappings in order."""
    try:
        # As for payloads: every superstep asks for this, and the encoder in C is ten times faster than the walk.
        text = _SORTED.encode(value)
    except (TypeError, ValueError, RecursionError, RuntimeError):
        text = json.dumps(to_plain(value), sort_keys=True, ensure_ascii=True)
    return content_hash(text)


def _dump(value: Any) -> bytes:
    # A lone surrogate becomes `\udcXX`, which is JSON's own way to write it.
    return _ENCODER.encode(value).encode("utf-8", "backslashreplace")


def _shape(value: Any) -> Any:
    """One level of a value that JSON does not know, as one that it does; what is inside is not looked at."""
    try:
        return _shaper(type(value))(value)  # type: ignore[arg-type]
    except Exception:
        return _unknown(value)


@lru_cache(maxsize=2_000)
def _shaper(kind: type) -> Callable[[Any], Any]:
    """What gives the values of a type their shape, which is looked for once."""
    for kinds, shape in _SHAPES:
        if issubclass(kind, kinds):
            return shape
    if isinstance(names := getattr(kind, "model_fields", None), dict) and set(names) >= _MESSAGE:
        return partial(_message, names=tuple(name for name in _TOLD if name in names))
    return _other


def _other(value: Any) -> Any:
    kind = type(value)
    if hasattr(value, "content") and hasattr(value, "additional_kwargs") and hasattr(value, "type"):
        return _message(value)
    if is_dataclass(value):
        return {spec.name: getattr(value, spec.name) for spec in fields(value)}
    if isinstance(names := getattr(kind, "model_fields", None), dict):
        return {name: getattr(value, name) for name in names}
    if kind.__name__ == "Send" and hasattr(value, "arg"):
        return {"$send": value.node, "arg": value.arg}
    return _unknown(value)


def _bytes(value: Any) -> dict[str, Any]:
    raw = bytes(value)
    return {"$bytes": content_hash(raw), "size": len(raw)}


def _unknown(value: Any) -> dict[str, Any]:
    kind = type(value)
    try:
        shown = repr(value)
    except Exception:
        shown = "(its repr failed)"
    return {"$repr": shown[:_REPR_CHARACTERS], "$type": f"{kind.__module__}.{kind.__qualname__}"}


_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=_shape)
_SORTED = json.JSONEncoder(sort_keys=True, allow_nan=False, default=_shape)


class _TooBigError(Exception):
    pass


class _Plainer:
    """One walk over a value. Without `cut` it gives up as soon as the room is used; with it, it shortens."""

    def __init__(self, room: int, *, cut: bool) -> None:
        self.room = room
        self.cut = cut
        self.path: set[int] = set()

    def plain(self, value: Any, depth: int) -> Any:
        self.spend(4)
        match value:
            case None | bool():
                return value
            case str():
                return self.text(str(value))
            case int():
                return int(value) if value.bit_length() <= _INTEGER_BITS else {"$number": f"{value.bit_length()} bits"}
            case float():
                return float(value) if math.isfinite(value) else {"$number": str(value)}
        if depth > _DEPTH:
            return self.mapping(list(_unknown(value).items()), depth)
        if id(value) in self.path:
            return {"$cycle": type(value).__name__}
        self.path.add(id(value))
        try:
            shape = value if isinstance(value, dict | list | tuple) else _shape(value)
            if isinstance(shape, dict):
                return self.mapping(list(shape.items()), depth)
            if isinstance(shape, list | tuple):
                return self.sequence(list(shape), depth)
            return self.plain(shape, depth + 1)
        finally:
            self.path.discard(id(value))

    def mapping(self, items: list[tuple[Any, Any]], depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for index, (key, item) in enumerate(items):
            if self.cut and self.room <= 0:
                found["$cut"] = f"{len(items) - index:,} of {len(items):,} entries"
                break
            found[self.text(key if isinstance(key, str) else repr(key))] = self.plain(item, depth + 1)
        return found

    def sequence(self, items: list[Any], depth: int) -> list[Any]:
        found: list[Any] = []
        for index, item in enumerate(items):
            if self.cut and self.room <= 0:
                found.append({"$cut": f"{len(items) - index:,} of {len(items):,} items"})
                break
            found.append(self.plain(item, depth + 1))
        return found

    def text(self, value: str) -> str:
        size = len(value)
        # Half of what is left, so that one huge string does not push out everything after it.
        if self.cut and size > (share := max(32, self.room // 2)):
            self.spend(share)
            return f"{value[: share * 3 // 4]} …[cut: {size:,} characters in all]… {value[size - share // 4 :]}"
        self.spend(size)
        return value

    def spend(self, count: int) -> None:
        self.room -= count
        if self.room < 0 and not self.cut:
            raise _TooBigError


def _message(message: Any, names: Sequence[str] = _TOLD) -> dict[str, Any]:
    """A LangChain message in the form chat models speak of: role, content, and what else is not empty. `names` are those of its
    fields that may be told; what was put there beside the fields is looked for only where there is something."""
    found = {"role": _ROLES.get(message.type, message.type), "content": message.content}
    for name in _TOLD if getattr(message, "__pydantic_extra__", None) else names:
        value = getattr(message, name, None)
        if value and value != "success":
            found[name] = value
    return found


_SHAPES: list[tuple[tuple[type, ...], Callable[[Any], Any]]] = [
    ((Mapping,), lambda value: dict(value.items())),
    ((set, frozenset), lambda value: {"$set": sorted(value, key=repr)}),
    ((bytes, bytearray, memoryview), _bytes),
    ((Enum,), lambda value: value.value),
    ((UUID, PurePath, Decimal, date, time, timedelta), str),
    ((BaseException,), lambda value: {"$error": f"{type(value).__name__}: {value}"}),
    ((type,), _unknown),
]
