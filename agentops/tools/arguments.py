"""Arguments of a tool as a model writes them: held to the part of the tool's schema whose every text ends in time.

A grammar alone makes each token fit, but a text that is cut fits nothing. So the grammar is given less than the schema
allows: strings, lists and numbers of bounded length, no keys that are not named, references unrolled, and all of it no
longer than there are tokens. This module asks no model by itself and runs no tool.
"""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any

from agentops.engine.sampler import check_constraint
from agentops.errors import ConstraintInvalid, ToolError
from agentops.records import Constraint, Generation
from agentops.schema import repeats

Schema = dict[str, Any]
Part = tuple[Schema, int]
"""What may be written, and how many bytes it has at most."""

_BYTES_A_TOKEN = 2.5
"""What a token of ordinary text has at least on average; a model that stays below it is held to one byte."""
_CHARACTER_BYTES, _ESCAPED_BYTES = 4, 6
_KEY_CHARACTERS, _KEY = 24, r'^[^\x00-\x1f\x7f-\x9f"\\]{1,24}$'
_TEXT = r"^[^\x00-\x08\x0b-\x1f\x7f-\x9f]*$"
"""No control characters but tab and line feed: a terminal may show it one day."""
_NUMBER, _INTEGER, _STEP = 10**15, 10**18, 1e-9
_EXACT = 2**53
"""Beyond it the grammar's numbers are rounded."""
_PATTERN_CHARACTERS = 100
_PLAIN = re.compile(r"\^(?:[A-Za-z0-9_ @:;,=/#%&!~*+{})\[\]-]|\((?!\?)|\(\?:|(?<!\()\?|\\[d.+*?()\[\]{}|/^$-])*\$")
"""A pattern of ASCII signs from beginning to end, which are two bytes at most in JSON."""
_NODES = 5_000

_MONTH_DAY = "(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)|02-(?:0[1-9]|1[0-9]|2[0-8])"
_LEAP = "(?:19(?:0[48]|[2468][048]|[13579][26])|20(?:[02468][048]|[13579][26]))-02-29"
_DATE = f"(?:[1-9][0-9]{{3}}-(?:{_MONTH_DAY})|{_LEAP})"
_ZONE = "(?:Z|[+-](?:0[0-9]|1[0-2]):[0-5][0-9])"
_TIME = f"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9]{_ZONE}"
_PERIOD = "P(?:[0-9]{1,4}D(?:T[0-9]{1,2}H)?|T(?:[0-9]{1,3}H(?:[0-9]{1,2}M)?|[0-9]{1,4}M(?:[0-9]{1,2}S)?|[0-9]{1,6}S))"
_FORMATS: dict[str, Part] = {
    "date": ({"type": "string", "pattern": f"^{_DATE}$"}, 12),
    "time": ({"type": "string", "pattern": f"^{_TIME}$"}, 16),
    "date-time": ({"type": "string", "pattern": f"^{_DATE}T{_TIME}$"}, 27),
    "duration": ({"type": "string", "pattern": f"^{_PERIOD}$"}, 14),
    "uuid": ({"type": "string", "format": "uuid"}, 38),
    "ipv4": ({"type": "string", "format": "ipv4"}, 17),
    "ipv6": ({"type": "string", "format": "ipv6"}, 47),
}
"""Of dates and times the part that every reader takes: no leap seconds, no year 0."""
_LONG_FORMATS = ("email", "hostname", "uri")
_SAID_ELSEWHERE = frozenset(
    (
        *("not", "if", "then", "else", "contains", "minContains", "maxContains", "patternProperties"),
        *("dependentSchemas", "dependentRequired", "dependencies", "unevaluatedItems", "unevaluatedProperties"),
        *("$dynamicRef", "$recursiveRef"),
    )
)


@dataclass(frozen=True, slots=True)
class _Room:
    """How much may be written: characters of a string (a quarter inside lists), entries of a list, nestings of a type in
    itself, and whether what is optional may be."""

    characters: int
    entries: int
    nestings: int
    optional: bool = True


_WIDE = ((2000, 32, 3), (1000, 24, 3), (500, 16, 3), (300, 12, 2), (200, 10, 2), (120, 8, 2))
_NARROW = ((80, 6, 1), (50, 5, 1), (30, 4, 1), (20, 3, 1), (12, 2, 0), (8, 2, 0), (4, 1, 0))
_LADDER = (
    *(_Room(*sizes) for sizes in (*_WIDE, *_NARROW)),
    *(_Room(*sizes, optional=False) for sizes in _NARROW),
)
"""Tried from the widest on."""

Ask = Callable[[Schema], Awaitable[Generation]]
Misfit = Callable[[Any], str]
"""Says what keeps arguments from fitting; nothing where they fit."""


async def write(tool: str, schema: Schema, max_tokens: int, ask: Ask, misfit: Misfit) -> dict[str, Any]:
    """Arguments that fit, as `ask` has a model write them within `max_tokens` under the schema that it is given.

    Raises:
        ToolError: the schema cannot be put into a grammar, more tokens are needed for it, or the model, not being held to
            the grammar, wrote something else twice.
    """
    if not schema.get("properties"):
        return {}
    wrong, hint = "", ""
    for form in forms(tool, schema, max_tokens):
        try:
            made = await ask(form)
        except ConstraintInvalid as error:
            raise _unheld(tool, error) from error
        if made.finish_reason != "stop":
            wrong, hint = f"they were cut after {max_tokens} tokens", "give it more tokens"
            continue
        arguments, wrong = read(schema, made.text)
        wrong = wrong or misfit(arguments)
        if not wrong:
            return arguments
        hint = "ask it otherwise, or mend the schema"
    raise ToolError(f"the model wrote no arguments that fit '{tool}': {wrong}", hint=hint)


def read(schema: Schema, text: str) -> tuple[dict[str, Any], str]:
    """The arguments in a model's text, or why there are none. What a list may have once is kept once."""
    try:
        arguments = json.loads(text)
    except (ValueError, RecursionError) as error:
        return {}, f"they are no JSON: {error}"
    if not isinstance(arguments, dict):
        return {}, "they are no JSON object"
    for place in repeats(schema, arguments):
        place[:] = [item for number, item in enumerate(place) if item not in place[:number]]
    return arguments, ""


def check(tool: str, schema: Schema) -> None:
    """
    Raises:
        ToolError: no grammar can hold a model to that schema.
    """
    form = next(forms(tool, schema, 4_000))
    try:
        check_constraint(Constraint("json_schema", form))
    except ConstraintInvalid as error:
        raise _unheld(tool, error) from error


def forms(tool: str, schema: Schema, tokens: int) -> Iterator[Schema]:
    """The schema twice, smaller: as much of it as usually ends within so many tokens, then as much as always does. Every
    value that fits one of them fits the schema, but for what only a whole value tells (a list's items all different,
    exactly one of several).

    Raises:
        ToolError
    """
    usual = _bounded(tool, schema, int(tokens * _BYTES_A_TOKEN), 1)
    sure = _bounded(tool, schema, tokens, _CHARACTER_BYTES)
    if usual is None and sure is None:
        least = _Writing(schema, _LADDER[-1], _CHARACTER_BYTES).whole()
        if least is None:
            raise ToolError(f"the arguments of '{tool}' have no end: a type holds itself", hint="make it optional there")
        raise ToolError(f"the arguments of '{tool}' may need {least[1]:,} tokens, and {tokens:,} are given", hint="give more")
    yield from (form for form in (usual, sure) if form is not None)


def described(schema: Schema) -> str:
    """The arguments for a model to read, one a line."""
    lines = []
    for name, node in (schema.get("properties") or {}).items():
        node = node if isinstance(node, dict) else {}
        left_out = "" if name in (schema.get("required") or ()) else ", optional"
        about = " ".join(str(node.get("description", "")).split())
        lines.append(f"- {name} ({_named(schema, node)}{left_out}){': ' if about else ''}{about}")
    return "\n".join(lines)


def _named(root: Schema, node: Any, depth: int = 0) -> str:
    """A type in words."""
    if not isinstance(node, dict) or depth > 3:
        return "anything"
    if isinstance(reference := node.get("$ref"), str):
        named = {key: one for word in ("$defs", "definitions") for key, one in (root.get(word) or {}).items()}
        return _named(root, named.get(reference.rpartition("/")[2]), depth + 1)
    if "enum" in node or "const" in node:
        return "one of " + ", ".join(json.dumps(one, ensure_ascii=False) for one in node.get("enum", [node.get("const")]))
    for word in ("anyOf", "oneOf"):
        if node.get(word):
            kinds = dict.fromkeys(_named(root, one, depth + 1) for one in node[word])
            return " or ".join(kind for kind in kinds if kind != "null")
    kind = node.get("type") or _kind(node) or "anything"
    if isinstance(kind, list):
        return " or ".join(str(one) for one in kind if one != "null")
    if kind == "array":
        return f"list of {_named(root, node['items'], depth + 1)}" if isinstance(node.get("items"), dict) else "list"
    if kind == "object" and node.get("properties"):
        return "object with " + ", ".join(node["properties"])
    return f"{kind}, {node['format']}" if kind == "string" and "format" in node else str(kind)


def _unheld(tool: str, error: Exception) -> ToolError:
    simpler = "keep to types that JSON has, and to patterns without look-around and back-references"
    return ToolError(f"the arguments of '{tool}' cannot be held to their schema: {error}", hint=simpler)


def _bounded(tool: str, schema: Schema, room_bytes: int, character_bytes: int) -> Schema | None:
    for room in _LADDER:
        try:
            part = _Writing(schema, room, character_bytes).whole()
        except _TooMany:
            continue
        except _Unwritable as error:
            raise _unheld(tool, error) from error
        if part is not None and part[1] <= room_bytes:
            return part[0]
    return None


class _Unwritable(Exception):
    """The schema says something that no grammar says."""


class _TooMany(Exception):
    """Unrolled, the schema grows beyond all bounds."""


class _Writing:
    """One schema made small enough to be written. A part that cannot end is None: whoever holds it goes without."""

    def __init__(self, root: Schema, room: _Room, character_bytes: int) -> None:
        self._root, self._room, self._character_bytes = root, room, character_bytes
        self._nodes = 0

    def whole(self) -> Part | None:
        return self._part(self._root, (), nested=False)

    def _part(self, node: Any, above: tuple[str, ...], *, nested: bool) -> Part | None:
        """`above` are the references followed so far, `nested` says whether a list is around."""
        self._nodes += 1
        if self._nodes > _NODES:
            raise _TooMany
        if node is False:
            return None
        if not isinstance(node, dict):
            node = {}
        if isinstance(reference := node.get("$ref"), str):
            if above.count(reference) > self._room.nestings:
                return None
            rest = {key: value for key, value in node.items() if key != "$ref"}
            return self._part(_merged(self._target(reference), rest), (*above, reference), nested=nested)
        if isinstance(parts := node.get("allOf"), list):
            rest = {key: value for key, value in node.items() if key != "allOf"}
            for one in parts:
                one = self._target(one["$ref"]) if isinstance(one, dict) and set(one) == {"$ref"} else one
                rest = _merged(rest, one if isinstance(one, dict) else {})
            return self._part(rest, above, nested=nested)
        if said := sorted(_SAID_ELSEWHERE & set(node)):
            raise _Unwritable(f"it has '{said[0]}'")
        if "const" in node or "enum" in node:
            return _literal([node["const"]] if "const" in node else node["enum"])
        for word in ("anyOf", "oneOf"):
            if isinstance(parts := node.get(word), list):
                rest = {key: value for key, value in node.items() if key != word}
                return self._one_of([_merged(rest, one) if isinstance(one, dict) else one for one in parts], above, nested)
        kind = node.get("type") or _kind(node)
        if isinstance(kind, list):
            return self._one_of([{**node, "type": one} for one in kind], above, nested)
        if kind == "object":
            return self._object(node, above, nested)
        if kind == "array":
            return self._array(node, above)
        if kind == "string":
            return self._string(node, nested)
        if kind in ("integer", "number"):
            return _number(node, kind)
        if kind == "boolean":
            return {"type": "boolean"}, 5
        if kind == "null":
            return {"type": "null"}, 4
        if kind is not None:
            raise _Unwritable(f"'{kind}' is no type of JSON")
        scalars: list[Any] = [{"type": name} for name in ("string", "number", "boolean", "null")]
        return self._one_of(scalars if nested else [*scalars, {"type": "array"}], above, nested)

    def _target(self, reference: str) -> Schema:
        found: Any = self._root
        if not reference.startswith("#"):
            raise _Unwritable(f"it refers to '{reference}', which is not in it")
        for step in reference.lstrip("#/").split("/") if reference not in ("#", "#/") else ():
            step = step.replace("~1", "/").replace("~0", "~")
            found = found.get(step) if isinstance(found, dict) else None
        if not isinstance(found, dict):
            raise _Unwritable(f"it refers to '{reference}', which is not in it")
        return found

    def _one_of(self, nodes: list[Any], above: tuple[str, ...], nested: bool) -> Part | None:
        found: list[Part] = []
        failed: _Unwritable | None = None
        for node in nodes:
            try:
                part = self._part(node, above, nested=nested)
            except _Unwritable as error:
                failed = error
                continue
            if part is not None and part not in found:
                found.append(part)
        if not found:
            if failed is not None:
                raise failed
            return None
        widest = max(width for _, width in found)
        return (found[0][0] if len(found) == 1 else {"anyOf": [schema for schema, _ in found]}), widest

    def _object(self, node: Schema, above: tuple[str, ...], nested: bool) -> Part | None:
        named, extra = node.get("properties") or {}, node.get("additionalProperties", True)
        required = list(node.get("required") or ())
        keys = node.get("propertyNames")
        if isinstance(keys, dict) and "$ref" in keys:
            keys = self._target(keys["$ref"])
        if isinstance(keys, dict) and not named:
            if not isinstance(allowed := keys.get("enum", [keys["const"]] if "const" in keys else None), list):
                raise _Unwritable("it says what keys look like")
            named = dict.fromkeys(allowed, extra)
        named = named | {name: extra for name in required if name not in named}
        if not named and extra is not False:
            return self._entries(node, extra, above)
        written: Schema = {}
        width = 2
        for name, inner in named.items():
            if name not in required and not self._room.optional:
                continue
            try:
                part = self._part(inner, above, nested=nested)
            except _Unwritable:
                if name in required:
                    raise
                continue
            if part is None:
                if name in required:
                    return None
                continue
            written[name] = part[0]
            width += _size(name) + part[1] + 4
        asked = [name for name in named if name in required]
        return {"type": "object", "properties": written, "required": asked, "additionalProperties": False}, width

    def _entries(self, node: Schema, extra: Any, above: tuple[str, ...]) -> Part:
        """An object whose keys are the model's."""
        least = node.get("minProperties", 0)
        most = max(least, min(self._room.entries, node.get("maxProperties", self._room.entries)))
        part = self._part(extra, above, nested=True)
        if part is None:
            return {"type": "object", "properties": {}, "additionalProperties": False}, 2
        about = {"type": "object", "patternProperties": {_KEY: part[0]}, "additionalProperties": False}
        bounds = {"maxProperties": most, **({"minProperties": least} if least else {})}
        return {**about, **bounds}, 2 + most * (_KEY_CHARACTERS * _CHARACTER_BYTES + 6 + part[1])

    def _array(self, node: Schema, above: tuple[str, ...]) -> Part | None:
        first = [self._part(one, above, nested=True) for one in node.get("prefixItems") or ()]
        given = [part for part in first if part is not None]
        rest = self._part(node.get("items", True), above, nested=True)
        least = node.get("minItems", 0)
        most = max(least, min(node.get("maxItems", self._room.entries), max(self._room.entries, len(first))))
        if rest is None or len(given) < len(first):
            most = min(most, len(given))
        if least > most:
            return None
        about: Schema = {"type": "array", "minItems": least, "maxItems": most}
        if given:
            about["prefixItems"] = [schema for schema, _ in given]
        about["items"] = rest[0] if rest is not None and most > len(given) else False
        if about["items"] is False and not given:
            del about["items"]
        widths = [width for _, width in given][:most]
        width = sum(widths) + (rest[1] if rest is not None else 0) * max(0, most - len(given))
        return about, 2 + width + 2 * most

    def _string(self, node: Schema, nested: bool) -> Part:
        room = max(4, self._room.characters // 4) if nested else self._room.characters
        least = node.get("minLength", 0)
        most = max(least, min(node.get("maxLength", room), room))
        if isinstance(pattern := node.get("pattern"), str):
            return self._patterned(pattern, least, most)
        if (form := node.get("format")) in _FORMATS:
            return _FORMATS[form]
        if form in _LONG_FORMATS:
            most = max(most, min(40, node.get("maxLength", 40)))
            return {"type": "string", "format": form, "maxLength": most}, 2 + most
        about = {"type": "string", "pattern": _TEXT, "maxLength": most, **({"minLength": least} if least else {})}
        return about, 2 + most * self._character_bytes

    def _patterned(self, pattern: str, least: int, most: int) -> Part:
        """A string of the tool's own pattern, long enough that there is one."""
        most = max(least, min(most, _PATTERN_CHARACTERS))
        while True:
            about = {"type": "string", "pattern": pattern, "minLength": least, "maxLength": most}
            try:
                check_constraint(Constraint("json_schema", about))
            except ConstraintInvalid as error:
                most *= 2
                if most > 4_000 or not re.search("nsatisfiable|Unable to determine", str(error)):
                    raise _Unwritable(str(error)) from error
                continue
            surely = 2 if _PLAIN.fullmatch(pattern) else _ESCAPED_BYTES
            return about, 2 + most * (surely if self._character_bytes > 1 else 1)


def _number(node: Schema, kind: str) -> Part:
    limit = _INTEGER if kind == "integer" else _NUMBER
    about: Schema = {"type": kind}
    for low, high in (("minimum", "maximum"), ("exclusiveMinimum", "exclusiveMaximum")):
        about |= {key: node[key] for key in (low, high) if isinstance(node.get(key), int | float)}
    if not {"minimum", "exclusiveMinimum"} & set(about):
        about["minimum"] = -limit
    if not {"maximum", "exclusiveMaximum"} & set(about):
        about["maximum"] = limit
    if "multipleOf" in node:
        about["multipleOf"] = node["multipleOf"]
    elif kind == "number":
        about["multipleOf"] = _STEP
    return about, 1 + len(str(limit)) + (10 if kind == "number" else 0)


def _literal(values: list[Any]) -> Part | None:
    if any(abs(number) > _EXACT for number in _integers(values)):
        raise _Unwritable(f"it names whole numbers beyond {_EXACT:,}")
    return ({"enum": values}, max(map(_size, values))) if values else None


def _integers(value: Any) -> Iterator[int]:
    if isinstance(value, int):
        yield value
    elif isinstance(value, list | dict):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _integers(one)


def _kind(node: Schema) -> str | None:
    """The type that a schema without one speaks of."""
    for kind, words in (
        ("object", ("properties", "additionalProperties", "required")),
        ("array", ("items", "prefixItems", "minItems", "maxItems")),
        ("string", ("pattern", "format", "minLength", "maxLength")),
        ("number", ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")),
    ):
        if any(word in node for word in words):
            return kind
    return None


_TIGHTER: dict[str, Callable[[Any, Any], Any]] = {
    "properties": lambda one, other: one | other,
    "required": lambda one, other: [*one, *(name for name in other if name not in one)],
    **dict.fromkeys(("minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties"), max),
    **dict.fromkeys(("maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties"), min),
    **dict.fromkeys(("title", "description", "default", "examples", "$defs", "definitions"), lambda one, other: other),
}


def _merged(one: Schema, other: Schema) -> Schema:
    """What fits both."""
    made = dict(one)
    for key, value in other.items():
        if key not in made or made[key] == value:
            made[key] = value
        elif key in _TIGHTER:
            made[key] = _TIGHTER[key](made[key], value)
        else:
            raise _Unwritable(f"it says two things of '{key}'")
    return made


def _size(value: Any) -> int:
    return len(json.dumps(value, ensure_ascii=False).encode(errors="replace"))
