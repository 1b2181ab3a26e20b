"""Turns any value into JSON that can be kept: never an exception, never a drop, never more than the limit.

What JSON cannot say is marked with a key that starts with `$`: `$bytes`, `$set`, `$cycle`, `$repr`, `$number`, `$send`,
`$cut`. A value above the limit keeps its shape and loses the middle of what is long; the payload is then flagged as
truncated. Where there are rules of redaction, every text passes them here, before it is cut. Nothing here can be turned back
into objects, and nothing here reads or writes files.
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

import ormsgpack

from agentops.records import content_hash
from agentops.tracer.redaction import LONGEST, Redactor, Sweep

_DEPTH = 60
_REPR_CHARACTERS = 2_000
# Python refuses to write longer integers as text.
_INTEGER_BITS = 14_000
_PACKING = ormsgpack.OPT_PASSTHROUGH_DATACLASS | ormsgpack.OPT_PASSTHROUGH_DATETIME
_MESSAGE = {"content", "additional_kwargs", "type"}
_TOLD = ("name", "tool_calls", "tool_call_id", "status", "usage_metadata", "additional_kwargs")
# What of an event names things, and is found by these names again: not text of anybody's.
_NAMES = {
    "t",
    "id",
    "run_id",
    "thread_id",
    "root_id",
    "parent_id",
    "span_id",
    "experiment_id",
    "case_id",
    "kind",
    "name",
    "status",
}
_NAMES |= {"segment", "graph", "node", "task", "checkpoint_ns", "source", "model", "prompt_name", "prompt_version", "dataset"}
_NAMES |= {"dataset_hash", "hash", "input_hash", "output_hash", "pending_hash"}
_ATTRIBUTES = {"prompts", "result", "pending", "server_tools", "checkpoint", "resumed_from", "forked_from", "forked_at"}
_ATTRIBUTES |= {"error_type", "noted"}
_ROLES = {"human": "user", "ai": "assistant", "system": "system", "tool": "tool"}


@dataclass(frozen=True, slots=True)
class Payload:
    """JSON as UTF-8 bytes, named by its content; `truncated` when something had to be cut. `redacted` counts the marks that stand
    for what was taken out, `unredacted` the texts left out as a whole because that failed."""

    hash: str
    data: bytes
    truncated: bool
    redacted: int = 0
    unredacted: int = 0


def encode(value: Any, limit_bytes: int, redactor: Redactor | None = None) -> Payload:
    """The value as JSON of at most `limit_bytes` (and a mark's few bytes where something was cut)."""
    sweep = Sweep(redactor) if redactor is not None else None
    data = _whole(value, limit_bytes, sweep)
    if data is not None:
        return _named(data, sweep, truncated=False)
    room = limit_bytes
    for _ in range(8):
        sweep = Sweep(redactor) if redactor is not None else None
        data = _dump(_Plainer(room, cut=True, sweep=sweep).plain(value, 0))
        if len(data) <= limit_bytes:
            break
        # Escapes and multi-byte characters make JSON longer than the characters counted; try again with less.
        room = max(64, int(room * 0.8 * limit_bytes / len(data)))
    assert data is not None
    return _named(data, sweep, truncated=True)


def pack(value: Any, limit_bytes: int) -> bytes | None:
    """The value as it is now, in msgpack: ten times faster than its JSON, which `encode_packed` makes where nobody waits. `None`
    where msgpack cannot say it or needs more than `limit_bytes`."""
    try:
        packed: bytes = ormsgpack.packb(value, default=_packable, option=_PACKING)
    except (TypeError, ValueError, RecursionError, RuntimeError):
        return None
    return packed if len(packed) <= limit_bytes else None


def encode_packed(packed: bytes, limit_bytes: int) -> Payload:
    """What `encode` would have made of a value that was packed.

    Raises:
        ValueError: it is no msgpack.
    """
    return encode(ormsgpack.unpackb(packed), limit_bytes)


def _named(data: bytes, sweep: Sweep | None, *, truncated: bool) -> Payload:
    counted = (sweep.marks, sweep.faults) if sweep is not None else ()
    return Payload(content_hash(data), data, truncated, *counted)


def _whole(value: Any, limit_bytes: int, sweep: Sweep | None) -> bytes | None:
    """The JSON of a value that fits, else `None`."""
    try:
        if sweep is not None:
            return _walked(value, limit_bytes, sweep)
        # The encoder in C walks what JSON knows and asks for the rest: ten times faster than a walk of our own.
        data = _dump(value)
    except (TypeError, ValueError, RecursionError, RuntimeError):
        return _walked(value, limit_bytes, sweep)
    return data if len(data) <= limit_bytes else None


def _walked(value: Any, limit_bytes: int, sweep: Sweep | None) -> bytes | None:
    try:
        data = _dump(_Plainer(limit_bytes, cut=False, sweep=sweep).plain(value, 0))
    except _TooBigError:
        return None
    return data if len(data) <= limit_bytes else None


def redacted(event: Mapping[str, Any], redactor: Redactor) -> dict[str, Any]:
    """An event of the journal with the texts in it redacted; payloads were before they were named. The attributes of a span tell
    `redacted`, how many marks were made, and `unredacted`, how many texts were left out, beside those of its payloads."""
    if event["t"] in ("payload", "prompt"):
        return dict(event)
    sweep = Sweep(redactor)
    walk = _Plainer(sys.maxsize, cut=False, sweep=sweep)
    found = dict(event)
    for name, value in event.items():
        if name not in _NAMES and isinstance(value, str | dict | list):
            found[name] = walk.attributes(value) if name in ("attributes", "settings") else walk.plain(value, 0)
    if event["t"] == "span" and (sweep.marks or sweep.faults):
        found["attributes"] = counted(found.get("attributes") or {}, sweep.marks, sweep.faults)
    return found


def counted(attributes: Mapping[str, Any], marks: int, faults: int) -> dict[str, Any]:
    """A span's attributes with so many more marks and texts left out."""
    more = {"redacted": marks, "unredacted": faults}
    return {**attributes, **{name: attributes.get(name, 0) + count for name, count in more.items() if count}}


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


def _packable(value: Any) -> Any:
    """As `_shape`, also of what JSON knows and msgpack does not."""
    match value:
        case tuple():
            return list(value)
        case float():
            return float(value)
    return _shape(value)


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

    def __init__(self, room: int, *, cut: bool, sweep: Sweep | None = None) -> None:
        self.room = room
        self.cut = cut
        self.sweep = sweep
        self.path: set[int] = set()

    def plain(self, value: Any, depth: int) -> Any:
        self.spend(4)
        match value:
            case None | bool():
                return value
            case str():
                return self.text(str(value))
            case int() if self.sweep is not None and value.bit_length() < 64:
                return self.sweep.number(int(value))
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
            name = self.text(key if isinstance(key, str) else repr(key))
            if self.sweep is None:
                found[name] = self.plain(item, depth + 1)
                continue
            while name in found:
                name += "*"
            secret = isinstance(key, str) and isinstance(item, str)
            found[name] = self.text(item, key) if secret else self.plain(item, depth + 1)
        if self.sweep is not None and isinstance(found.get("tokens"), list) and found.get("text") != dict(items).get("text"):
            # A model's tokens say what its text does.
            found.update({name: [] for name in ("tokens", "logprobs", "top_logprobs") if name in found})
        return found

    def attributes(self, value: Any) -> Any:
        """What is noted of a run or a span: flat, with names of other things on record among it."""
        if not isinstance(value, dict) or self.sweep is None:
            return self.plain(value, 0)
        found: dict[str, Any] = {name: item for name, item in value.items() if name in _ATTRIBUTES}
        rest = {name: item for name, item in value.items() if name not in _ATTRIBUTES}
        if isinstance(partial := rest.get("partial"), list):
            # Pieces of a stream, which may part what is to be found.
            rest["partial"] = ["".join(map(str, partial))]
        if isinstance(noted := value.get("noted"), dict):
            found["noted"] = {
                kind: [self.text(one) if isinstance(one, str) else one for one in values] for kind, values in noted.items()
            }
        plain: dict[str, Any] = self.mapping(list(rest.items()), 0)
        for place, kept in ((value, plain), (value.get("settings"), plain.get("settings"))):
            match place, kept:
                case {"labels": {"user": str(user)}}, {"labels": dict(labels)}:
                    labels["user"] = self.sweep.redactor.pseudonym(user, self.sweep)
        return {**plain, **found}

    def sequence(self, items: list[Any], depth: int) -> list[Any]:
        found: list[Any] = []
        for index, item in enumerate(items):
            if self.cut and self.room <= 0:
                found.append({"$cut": f"{len(items) - index:,} of {len(items):,} items"})
                break
            found.append(self.plain(item, depth + 1))
        return found

    def text(self, value: str, name: str = "") -> str:
        size = len(value)
        # Half of what is left, so that one huge string does not push out everything after it.
        if self.cut and size > (share := max(32, self.room // 2)):
            self.spend(share)
            return f"{self.start(value, share * 3 // 4)} …[cut: {size:,} characters in all]… {self.end(value, share // 4)}"
        self.spend(size)
        return value if self.sweep is None else self.sweep.under(name, value)

    def start(self, value: str, size: int) -> str:
        if self.sweep is None:
            return value[:size]
        # What is parted by the end of what is looked at cannot be found; it lies in what is then left out.
        return self.sweep.text(value[: size + LONGEST])[:-LONGEST][:size]

    def end(self, value: str, size: int) -> str:
        if self.sweep is None:
            return value[len(value) - size :]
        return self.sweep.text(value[max(0, len(value) - size - LONGEST) :])[LONGEST:][-size:]

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
