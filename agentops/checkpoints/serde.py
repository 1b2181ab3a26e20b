"""What becomes bytes in a checkpoint and comes back: plain data, and the types that a graph's own schema or the user names.

What is read back executes nothing; that the library beneath keeps to this is tried once a process.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import importlib
import logging
import threading
import typing
from collections.abc import Sequence
from typing import Any

import ormsgpack
from langgraph.checkpoint.serde import jsonplus
from langgraph.checkpoint.serde._msgpack import SAFE_MSGPACK_METHODS, SAFE_MSGPACK_TYPES
from pydantic import BaseModel

from agentops.errors import RecordError, SettingsError, StoreBroken


@dataclasses.dataclass(frozen=True, slots=True)
class Whole:
    """A value that is to be kept as bytes, whatever form a saver has for values of its kind."""

    value: Any


class StrictSerializer(jsonplus.JsonPlusSerializer):
    """Reads what it writes and nothing else: LangGraph's older JSON form can name objects to build, a pickle any code."""

    def __init__(self, types: frozenset[type]) -> None:
        super().__init__(allowed_msgpack_modules=[(kind.__module__, kind.__qualname__) for kind in types] or None)

    def dumps_typed(self, obj: Any) -> tuple[str, bytes]:
        """
        Raises:
            TypeError: something in it would be read back as a dict, a list or a text, and not as what it is.
        """
        kind, blob = super().dumps_typed(obj.value if isinstance(obj, Whole) else obj)
        refused: list[str] = []

        def look(code: int, data: bytes) -> None:
            if code == jsonplus.EXT_NUMPY_ARRAY:
                return
            named = ormsgpack.unpackb(data, ext_hook=look, option=ormsgpack.OPT_NON_STR_KEYS)
            if code == jsonplus.EXT_DELTA_SNAPSHOT:
                return
            module, name = named[:2]
            own = self._allowed_msgpack_modules
            if code == jsonplus.EXT_METHOD_SINGLE_ARG:
                known = (module, name, named[3]) in SAFE_MSGPACK_METHODS
            else:
                known = (module, name) in SAFE_MSGPACK_TYPES or (isinstance(own, set) and (module, name) in own)
            if not known:
                refused.append(f"{module}.{name}")

        if kind == "msgpack":
            ormsgpack.unpackb(blob, ext_hook=look, option=ormsgpack.OPT_NON_STR_KEYS)
        if refused:
            raise TypeError(f"{refused[-1]} is neither named by the graph's state nor in record.types")
        return kind, blob

    def loads_typed(self, data: tuple[str, bytes]) -> Any:
        if data[0] not in ("msgpack", "bytes", "bytearray", "null"):
            raise StoreBroken(
                f"a checkpoint is of the kind {str(data[0])[:40]!r}, which is never written here; nothing of it was read",
                hint="something else changed the thread; begin a new one",
            )
        return super().loads_typed(data)


# Calls that show when they are made, in every form that a checkpoint has for them; their bare argument must come back.
_HARMLESS_CALLS: tuple[tuple[int, tuple[Any, ...]], ...] = (
    (jsonplus.EXT_CONSTRUCTOR_SINGLE_ARG, ("builtins", "len", "abc")),
    (jsonplus.EXT_CONSTRUCTOR_POS_ARGS, ("os", "getcwd", [])),
    (jsonplus.EXT_CONSTRUCTOR_KW_ARGS, ("os", "getcwd", {})),
    (jsonplus.EXT_METHOD_SINGLE_ARG, ("builtins", "str", "abc", "upper")),
    (jsonplus.EXT_PYDANTIC_V1, ("os", "getcwd", {})),
    (jsonplus.EXT_PYDANTIC_V2, ("os", "getcwd", {}, "model_validate_json")),
)


@functools.cache
def try_strictness() -> None:
    """
    Raises:
        RecordError: something that a checkpoint names was called.
    """
    serializer, me = StrictSerializer(frozenset()), threading.get_ident()

    def of_others(record: logging.LogRecord) -> bool:
        return record.thread != me

    # Each call refused is logged as an attack; these are ours.
    jsonplus.logger.addFilter(of_others)
    try:
        for code, call in _HARMLESS_CALLS:
            blob = ormsgpack.packb(ormsgpack.Ext(code, ormsgpack.packb(call)))
            if serializer.loads_typed(("msgpack", blob)) != call[2]:
                raise RecordError(
                    f"the installed langgraph-checkpoint calls what a checkpoint names ({call[0]}.{call[1]}); none was opened",
                    hint="install the versions that agentops-runtime asks for",
                )
    finally:
        jsonplus.logger.removeFilter(of_others)


def named_types(names: Sequence[str]) -> frozenset[type]:
    """
    Raises:
        SettingsError: one of them is no class that can be imported.
    """
    found = set()
    for name in names:
        module, _, last = name.rpartition(".")
        try:
            kind = getattr(importlib.import_module(module), last)
        except (ImportError, AttributeError, ValueError) as error:
            raise SettingsError(f"record.types: {name!r} cannot be imported: {error}", hint="write it as module.Class") from error
        if not isinstance(kind, type):
            raise SettingsError(f"record.types: {name!r} is not a class", hint="write it as module.Class")
        found.add(kind)
    return frozenset(found)


def schema_types(*schemas: Any) -> frozenset[type]:
    """Classes that values of these state schemas consist of: dataclasses, pydantic models, enums, named tuples."""
    found: set[type] = set()
    # With the hints themselves: another would have the place in memory, and so the id, of one that is gone.
    seen: dict[int, Any] = {}

    def walk(kind: Any) -> None:
        if id(kind) in seen:
            return
        seen[id(kind)] = kind
        for part in typing.get_args(kind):
            walk(part)
        if not isinstance(kind, type):
            return
        structured = dataclasses.is_dataclass(kind) or issubclass(kind, BaseModel) or hasattr(kind, "_fields")
        if structured or issubclass(kind, enum.Enum):
            found.add(kind)
        if structured or typing.is_typeddict(kind):
            try:
                hints = typing.get_type_hints(kind, include_extras=True)
            except (NameError, TypeError):
                hints = {}
            for hint in hints.values():
                walk(hint)

    for schema in schemas:
        walk(schema)
    return frozenset(found)
