"""JSON schema: whether a value fits one, and what is wrong where it does not. References out of the schema are not followed."""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal, InvalidOperation
from functools import cache
from typing import Any

BROKEN = "the schema itself is broken"
"""What `violation` begins with where the schema is at fault and not the value."""


def violation(schema: dict[str, Any], value: Any) -> str:
    """What keeps `value` from fitting, in one line; empty when it fits. A schema that is none itself is told in the same way."""
    from jsonschema.exceptions import SchemaError, best_match
    from referencing.exceptions import Unresolvable

    try:
        worst = best_match(_validator(schema).iter_errors(value))
    except (SchemaError, Unresolvable, RecursionError) as error:
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
    except (SchemaError, Unresolvable, RecursionError):
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

    return extend(Draft202012Validator, {"multipleOf": multiple_of})  # type: ignore[no-untyped-call]
