"""Declaring a tool: a function's signature and docstring become its name, description and schema, by langchain-core."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import threading
from collections.abc import Callable
from typing import Any, overload

from langchain_core.tools import BaseTool, StructuredTool

from agentops.errors import ToolError
from agentops.records import Effect

_EFFECT = "agentops_effect"


@overload
def tool(function: Callable[..., Any], /) -> StructuredTool: ...
@overload
def tool(*, effect: Effect = "write", name: str | None = None) -> Callable[[Callable[..., Any]], StructuredTool]: ...
def tool(function: Callable[..., Any] | None = None, /, *, effect: Effect = "write", name: str | None = None) -> Any:
    """Makes a tool of a function, plain or asynchronous. Its docstring says to the model what it does, its `Args:` section
    what each argument is.

    `effect` is what it does outside; a tool that does not say is taken to write, which a person has to approve.

    Raises:
        ToolError: no docstring, or an argument without a type.
    """
    if function is None:
        return functools.partial(_declare, effect=effect, name=name)
    return _declare(function, effect=effect, name=name)


def effect_of(declared: BaseTool) -> Effect:
    """What a tool does outside; "write" for one that was not declared here."""
    effect: Effect = (declared.metadata or {}).get(_EFFECT, "write")
    return effect


def _declare(function: Callable[..., Any], *, effect: Effect, name: str | None) -> StructuredTool:
    label = name or function.__name__
    if not inspect.getdoc(function):
        raise ToolError(f"tool '{label}' has no docstring", hint="say there what it does; the model chooses by it")
    is_async = inspect.iscoroutinefunction(function)
    try:
        return StructuredTool.from_function(
            func=None if is_async else function,
            coroutine=function if is_async else _in_thread(function),
            name=label,
            parse_docstring=True,
            error_on_invalid_docstring=False,
            metadata={_EFFECT: effect},
        )
    except (TypeError, ValueError, NameError) as error:
        raise ToolError(f"tool '{label}': {error}", hint="give every argument a type that JSON has") from error


def _in_thread(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as a coroutine. Its thread is a daemon: one that hangs must not keep the process from ending."""

    @functools.wraps(function)
    async def run(*args: Any, **kwargs: Any) -> Any:
        loop, done = asyncio.get_running_loop(), asyncio.get_running_loop().create_future()
        context = contextvars.copy_context()

        def work() -> None:
            try:
                result, error = context.run(function, *args, **kwargs), None
            except BaseException as raised:
                result, error = None, raised
            try:
                loop.call_soon_threadsafe(settle, result, error)
            except RuntimeError:
                return  # the loop is gone, and with it whoever waited

        def settle(result: Any, error: BaseException | None) -> None:
            if done.done():
                return
            if error is None:
                done.set_result(result)
            elif isinstance(error, StopIteration):
                done.set_exception(RuntimeError("StopIteration"))
            else:
                done.set_exception(error)

        threading.Thread(target=work, name=f"tool {function.__name__}", daemon=True).start()
        return await done

    return run
