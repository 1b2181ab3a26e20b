"""Turns any value into JSON that can be kept: never an exception, never a drop, never more than the limit.

What JSON cannot say is marked with a key that starts with `$`: `$bytes`, `$set`, `$cycle`, `$repr`, `$number`, `$send`,
`$cut`. A value above the limit keeps its shape and loses the middle of what is long; the payload is then flagged as
truncated. Nothing here can be turned back into objects, and nothing here reads or writes files.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from datetime import date, time, timedelta
from decimal import Decimal
from enum import Enum
from pathlib import PurePath
from typing import Any
from uuid import UUID

from agentops.records import content_hash

_DEPTH = 60
_REPR_CHARACTERS = 2_000
_ROLES = {"human": "user", "ai": "assistant", "system": "system", "tool": "tool"}


@dataclass(frozen=True, slots=True)
class Payload:
    """JSON as UTF-8 bytes, named by its content; `truncated` when something had to be cut."""

    hash: str
    data: bytes
    truncated: bool


def encode(value: Any, limit_bytes: int) -> Payload:
    """The value as JSON of at most `limit_bytes` (and a mark's few bytes where something was cut)."""
    try:
        data = _dump(_Plainer(limit_bytes, cut=False).plain(value, 0))
        if len(data) <= limit_bytes:
            return Payload(content_hash(data), data, truncated=False)
    except _TooBigError:
        pass
    room = limit_bytes
    for _ in range(8):
        data = _dump(_Plainer(room, cut=True).plain(value, 0))
        if len(data) <= limit_bytes:
            break
        # Escapes and multi-byte characters make JSON longer than the characters counted; try again with less.
        room = max(64, int(room * 0.8 * limit_bytes / len(data)))
    return Payload(content_hash(data), data, truncated=True)


def to_plain(value: Any) -> Any:
    """The value as JSON knows it (dicts, lists, strings, numbers), whole, with marks for what JSON cannot say."""
    return _Plainer(sys.maxsize, cut=False).plain(value, 0)


def _dump(plain: Any) -> bytes:
    # A lone surrogate becomes `\udcXX`, which is JSON's own way to write it.
    return json.dumps(plain, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "backslashreplace")


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
        if value is None or value is True or value is False:
            return value
        kind = type(value)
        if kind is str:
            return self.text(value)
        if kind is int:
            return value if value.bit_length() <= 1024 else {"$number": f"{value.bit_length()} bits"}
        if kind is float:
            return value if math.isfinite(value) else {"$number": str(value)}
        if depth > _DEPTH:
            return self.unknown(value)
        if id(value) in self.path:
            return {"$cycle": kind.__name__}
        self.path.add(id(value))
        try:
            return self.compound(value, depth)
        except _TooBigError:
            raise
        except Exception:
            return self.unknown(value)
        finally:
            self.path.discard(id(value))

    def compound(self, value: Any, depth: int) -> Any:
        match value:
            case Mapping():
                return self.mapping(list(value.items()), depth)
            case list() | tuple():
                return self.sequence(list(value), depth)
            case set() | frozenset():
                return {"$set": self.sequence(sorted(value, key=repr), depth)}
            case bytes() | bytearray() | memoryview():
                raw = bytes(value)
                return {"$bytes": content_hash(raw), "size": len(raw)}
            case Enum():
                return self.plain(value.value, depth + 1)
            case str():
                return self.text(str(value))
            case bool() | int() | float():
                return self.plain(int(value) if isinstance(value, int) else float(value), depth + 1)
            case UUID() | PurePath() | Decimal() | date() | time() | timedelta():
                return self.text(str(value))
            case BaseException():
                return {"$error": self.text(f"{type(value).__name__}: {value}")}
        return self.object(value, depth)

    def object(self, value: Any, depth: int) -> Any:
        kind = type(value)
        if isinstance(value, type):
            return self.unknown(value)
        if hasattr(value, "content") and hasattr(value, "additional_kwargs") and hasattr(value, "type"):
            return self.mapping(list(_message(value).items()), depth)
        if is_dataclass(value):
            return self.mapping([(spec.name, getattr(value, spec.name)) for spec in fields(value)], depth)
        names = getattr(kind, "model_fields", None)
        if isinstance(names, dict):
            return self.mapping([(name, getattr(value, name)) for name in names], depth)
        if kind.__name__ == "Send" and hasattr(value, "arg"):
            return self.mapping([("$send", value.node), ("arg", value.arg)], depth)
        return self.unknown(value)

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

    def unknown(self, value: Any) -> dict[str, Any]:
        kind = type(value)
        try:
            shown = repr(value)
        except Exception:
            shown = "(its repr failed)"
        return {"$repr": self.text(shown[:_REPR_CHARACTERS]), "$type": f"{kind.__module__}.{kind.__qualname__}"}

    def spend(self, count: int) -> None:
        self.room -= count
        if self.room < 0 and not self.cut:
            raise _TooBigError


def _message(message: Any) -> dict[str, Any]:
    """A LangChain message in the form chat models speak of: role, content, and what else is not empty."""
    found = {"role": _ROLES.get(message.type, message.type), "content": message.content}
    for name in ("name", "tool_calls", "tool_call_id", "status", "usage_metadata", "additional_kwargs"):
        value = getattr(message, name, None)
        if value and value != "success":
            found[name] = value
    return found
