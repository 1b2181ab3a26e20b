"""JSON schema: whether a value fits one, and what is wrong where it does not. References out of the schema are not followed.

Patterns are those of Rust's `regex`: matched in time linear to the text, so that no pattern hangs; in return there is no
look-around and no back reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from decimal import Decimal, InvalidOperation
from functools import cache, lru_cache
from typing import Any

BROKEN = "the schema itself is broken"
"""What `violation` begins with where the schema is at fault and not the value."""


class PatternInvalid(ValueError):
    """A pattern that cannot be used, and why."""


@lru_cache(256)
def matcher(pattern: str) -> Callable[[str], bool]:
    """Tells of a text whether it has a match of the pattern, anywhere where that is not anchored.

    Raises:
        PatternInvalid
    """
    from pydantic_core import SchemaError, SchemaValidator, core_schema

    try:
        return SchemaValidator(core_schema.str_schema(pattern=pattern, regex_engine="rust-regex")).isinstance_python
    except SchemaError as error:
        why = " ".join(str(error).partition("SchemaError: ")[2].split()) or str(error)
        raise PatternInvalid(f"the pattern cannot be used: {why}"[:500]) from error


def violation(schema: dict[str, Any], value: Any) -> str:
    """What keeps `value` from fitting, in one line; empty when it fits. A schema that is none itself is told in the same way."""
    from jsonschema.exceptions import SchemaError, best_match
    from referencing.exceptions import Unresolvable

    try:
        worst = best_match(_validator(schema).iter_errors(value))
    except (SchemaError, Unresolvable, RecursionError, PatternInvalid) as error:
        return f"{BROKEN}: {str(error).splitlines()[0]}"
    if worst is None:
        return ""
    place = ".".join(str(part) for part in worst.absolute_path)
    said = worst.message if len(worst.message) <= 300 else worst.message[:299] + "…"
    return f"{place}: {said}" if place else said


def repeats(schema: dict[str, Any], value: Any) -> Iterator[list[Any]]:
    """The lists inside `value` that have an item twice and may not."""
    from jsonschema.exceptions import SchemaError
    from referencing.exceptions import Unresolvable

    try:
        errors = [error for error in _flat(_validator(schema).iter_errors(value)) if error.validator == "uniqueItems"]
    except (SchemaError, Unresolvable, RecursionError, PatternInvalid):
        return
    for error in errors:
        yield error.instance


def _flat(errors: Any) -> Iterator[Any]:
    for error in errors:
        yield error
        yield from _flat(error.context or ())


def _validator(schema: dict[str, Any]) -> Any:
    from referencing import Registry

    kind = _kind()
    kind.check_schema(schema)
    return kind(schema, registry=Registry())


@cache
def _kind() -> Any:
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import ValidationError
    from jsonschema.validators import extend

    def multiple_of(validator: Any, step: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
        """In decimals as they are written: 0.07 is seven times 0.01, which binary fractions deny."""
        if isinstance(instance, bool) or not isinstance(instance, int | float):
            return
        try:
            rest = Decimal(str(instance)) % Decimal(str(step))
        except (InvalidOperation, ZeroDivisionError):
            rest = Decimal(1)
        if rest:
            yield ValidationError(f"{instance!r} is not a multiple of {step}")

    def pattern(validator: Any, wanted: str, instance: Any, schema: Any) -> Iterator[ValidationError]:
        if isinstance(instance, str) and not matcher(wanted)(instance):
            yield ValidationError(f"{instance!r} does not match {wanted!r}")

    def pattern_properties(validator: Any, wanted: dict[str, Any], instance: Any, schema: Any) -> Iterator[ValidationError]:
        for key, item in instance.items() if isinstance(instance, dict) else ():
            for one, inner in wanted.items():
                if matcher(one)(key):
                    yield from validator.descend(item, inner, path=key, schema_path=one)

    def additional_properties(validator: Any, inner: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
        if not isinstance(instance, dict):
            return
        named, patterns = schema.get("properties", {}), [matcher(one) for one in schema.get("patternProperties", {})]
        extra = [key for key in instance if key not in named and not any(matches(key) for matches in patterns)]
        if inner is False and extra:
            verb = "was" if len(extra) == 1 else "were"
            yield ValidationError(f"Additional properties are not allowed ({', '.join(map(repr, extra))} {verb} unexpected)")
        elif isinstance(inner, dict):
            for key in extra:
                yield from validator.descend(instance[key], inner, path=key)

    own = {
        "multipleOf": multiple_of,
        "pattern": pattern,
        "patternProperties": pattern_properties,
        "additionalProperties": additional_properties,
    }
    return extend(Draft202012Validator, own)  # type: ignore[no-untyped-call]
