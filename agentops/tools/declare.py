"""Declaring a tool: a function's signature and docstring become its name, description and schema, by langchain-core."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any, get_args, get_type_hints, overload

from langchain_core.tools import BaseTool, InjectedToolArg, InjectedToolCallId, StructuredTool
from pydantic import BaseModel
from pydantic.errors import PydanticUserError
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import SchemaError
from pydantic_core.core_schema import DecimalSchema

from agentops.errors import ToolError
from agentops.records import Effect
from agentops.tools.arguments import check
from agentops.tools.running import as_text, contained

_EFFECT = "agentops_effect"
_UNDECLARABLE = (PydanticUserError, SchemaError, TypeError, ValueError, NameError)
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


@overload
def tool(function: Callable[..., Any], /) -> StructuredTool: ...
@overload
def tool(*, effect: Effect = "write", name: str | None = None) -> Callable[[Callable[..., Any]], StructuredTool]: ...
def tool(function: Callable[..., Any] | None = None, /, *, effect: Effect = "write", name: str | None = None) -> Any:
    """Makes a tool of a function, plain or asynchronous. Its docstring says to the model what it does, its `Args:` section
    what each argument is.

    `effect` is what it does outside; a tool that does not say is taken to write, which a person has to approve. A plain
    function runs in a thread of its own; an asynchronous one runs on the event loop and must not block it. What it returns
    is given to the model as text: a string as it is, all else as JSON. An argument typed
    `Annotated[str, InjectedToolCallId]` is the call's id and none of the model's business.

    Raises:
        ToolError: no docstring, an argument without a type or of a type that JSON does not have, or one that only LangGraph's
            ToolNode can fill (`InjectedState`, `ToolRuntime`): a tool finds its run with `langgraph.runtime.get_runtime`.
    """
    if function is None:
        return functools.partial(_declare, effect=effect, name=name)
    return _declare(function, effect=effect, name=name)


def effect_of(declared: BaseTool) -> Effect:
    """What a tool does outside; "write" for one that was not declared here."""
    effect: Effect = (declared.metadata or {}).get(_EFFECT, "write")
    return effect if effect in get_args(Effect) else "write"


def with_effect(declared: BaseTool, effect: Effect, **changes: Any) -> BaseTool:
    """A copy of somebody else's tool, with other fields where `changes` names them. What it says about itself is put away."""
    return declared.model_copy(update={**changes, "metadata": {_EFFECT: effect}})


class _Schema(GenerateJsonSchema):
    """Pydantic lets a decimal be any text, too, and takes only some."""

    def decimal_schema(self, schema: DecimalSchema) -> JsonSchemaValue:
        made = super().decimal_schema(schema)
        return next((one for one in made.get("anyOf", ()) if one.get("type") == "number"), made)


def schema_of(declared: BaseTool) -> dict[str, Any]:
    """JSON schema of the arguments that a model gives: one object, closed unless the tool opens it.

    Raises:
        ToolError: its arguments have no JSON schema.
    """
    try:
        given = declared.tool_call_schema
        if isinstance(given, dict):
            made = given
        else:
            made = given.model_json_schema(schema_generator=_Schema) if issubclass(given, BaseModel) else given.schema()
    except _UNDECLARABLE as error:
        raise _undeclarable(declared.name, error) from error
    about = {key: value for key, value in made.items() if key not in ("title", "description")}
    return {"additionalProperties": False, **about, "type": "object"}


def refuse_unfillable(declared: BaseTool) -> None:
    """
    Raises:
        ToolError: it needs an argument that neither the model nor a toolbox can give.
    """
    function = getattr(declared, "func", None) or getattr(declared, "coroutine", None)
    if function is None:
        function = declared._arun if type(declared)._arun is not BaseTool._arun else declared._run
    try:
        hints = get_type_hints(function, include_extras=True)
    except (NameError, TypeError):
        return
    for argument, parameter in inspect.signature(function).parameters.items():
        if parameter.default is inspect.Parameter.empty and _is_unfillable(hints.get(argument)):
            raise ToolError(
                f"tool '{declared.name}': only LangGraph's ToolNode can fill its argument '{argument}'",
                hint="take the run from langgraph.runtime.get_runtime(Context) in the function instead",
            )


def _is_unfillable(hint: Any) -> bool:
    for mark in (hint, getattr(hint, "__origin__", None), *getattr(hint, "__metadata__", ())):
        kind = mark if isinstance(mark, type) else type(mark)
        # ToolRuntime is known by its name: importing it would load half of LangGraph for a comparison.
        if (issubclass(kind, InjectedToolArg) and not issubclass(kind, InjectedToolCallId)) or kind.__name__ == "ToolRuntime":
            return True
    return False


def _declare(function: Callable[..., Any], *, effect: Effect, name: str | None) -> StructuredTool:
    label = str(name or getattr(function, "__name__", type(function).__name__))
    if not _NAME.fullmatch(label):
        raise ToolError(f"'{label}' is no name for a tool", hint="letters, digits, _ and -, at most 64: @tool(name=...)")
    if effect not in get_args(Effect):
        raise ToolError(f"tool '{label}': there is no effect '{effect}'", hint="none, read or write")
    if not inspect.getdoc(function):
        raise ToolError(f"tool '{label}' has no docstring", hint="say there what it does; the model chooses by it")
    for argument, parameter in inspect.signature(function).parameters.items():
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise ToolError(f"tool '{label}': '{argument}' cannot be given by name", hint="a tool's arguments have names")
        if parameter.annotation is parameter.empty:
            raise ToolError(
                f"tool '{label}': its argument '{argument}' has no type", hint=f"write {argument}: str, or what it is"
            )
    is_async, prepared = inspect.iscoroutinefunction(function), contained(function, as_text)
    try:
        made = StructuredTool.from_function(
            func=None if is_async else prepared,
            coroutine=prepared if is_async else None,
            name=label,
            parse_docstring=True,
            error_on_invalid_docstring=False,
            metadata={_EFFECT: effect},
        )
    except _UNDECLARABLE as error:
        raise _undeclarable(label, error) from error
    refuse_unfillable(made)
    check(label, schema_of(made))
    return made


def _undeclarable(name: str, error: Exception) -> ToolError:
    if isinstance(error, NameError):
        return ToolError(f"tool '{name}': {error}", hint="define its arguments' types at the top of the file, before it")
    said = " ".join(str(error).split())[:300]
    return ToolError(f"tool '{name}': {said}", hint="give every argument a type that JSON has")
