"""JSON schema: whether a value fits one, and what is wrong where it does not. References out of the schema are not followed."""

from __future__ import annotations

from typing import Any


def violation(schema: dict[str, Any], value: Any) -> str:
    """What keeps `value` from fitting, in one line; empty when it fits. A schema that is none itself is told in the same way."""
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import SchemaError, best_match
    from referencing import Registry
    from referencing.exceptions import Unresolvable

    try:
        Draft202012Validator.check_schema(schema)
        worst = best_match(Draft202012Validator(schema, registry=Registry()).iter_errors(value))
    except (SchemaError, Unresolvable, RecursionError) as error:
        return f"the schema itself is broken: {str(error).splitlines()[0]}"
    if worst is None:
        return ""
    place = ".".join(str(part) for part in worst.absolute_path)
    said = worst.message if len(worst.message) <= 300 else worst.message[:299] + "…"
    return f"{place}: {said}" if place else said
