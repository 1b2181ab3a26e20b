"""Running one tool: for so long and no longer, to a text of so many bytes and no more, and without taking the process along.

A thread cannot be stopped: a plain function that took too long is left behind in a daemon thread, which keeps no process
from ending. Policies, people and the record are not known here.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import json
import threading
from collections.abc import Callable, Coroutine, Mapping
from copy import deepcopy
from dataclasses import fields, is_dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from pathlib import PurePath
from typing import Any
from uuid import UUID

from langchain_core.messages import ToolMessage
from langchain_core.messages.tool import ToolOutputMixin
from langchain_core.runnables import RunnableConfig
from langchain_core.tools import BaseTool
from pydantic import BaseModel

from agentops.errors import ToolError
from agentops.records import ToolCall
from agentops.settings import ToolSettings

_GRACE_S = 1.0
"""How long a tool that was cancelled may take to clean up."""
_ERROR_BYTES = 1_000


async def run(tool: BaseTool, call: ToolCall, limits: ToolSettings) -> str:
    """What the tool says, as text of `limits.result_bytes` at most.

    Raises:
        ToolError: it took too long, says itself that it failed, or gave something that is no text.
        Exception: whatever the tool raised; never SystemExit or a cancellation that nobody asked for.
    """
    # Langchain writes the call's id into what it is given.
    asked = {"name": call.name, "args": deepcopy(call.arguments), "id": call.id, "type": "tool_call"}
    # The caller has opened the tool's span; the tracer opens none of its own for calls that carry the mark.
    config: RunnableConfig = {"metadata": {"agentops_tool": call.id}}
    if not _is_async(tool):
        work = _in_thread(lambda: _words(tool.invoke(asked, config), limits.result_bytes))
    else:
        if coroutine := getattr(tool, "coroutine", None):
            tool = tool.model_copy(update={"coroutine": contained(coroutine)})
        work = _awaited(tool, asked, config, limits.result_bytes)
    return await _in_time(work, limits.timeout_s)


def said(error: BaseException) -> str:
    """An error in one piece of text, not too long."""
    try:
        text = str(error)
    except Exception:
        text = ""
    return f"{type(error).__name__}: {_cut(text, _ERROR_BYTES)}" if text else type(error).__name__


def contained(function: Callable[..., Any], result: Callable[[Any], Any] = lambda value: value) -> Callable[..., Any]:
    """The function, which may then call `sys.exit` as it likes: asyncio lets that out of the loop and ends all that runs.
    `result` is put over what it returns."""
    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def awaited(*args: Any, **kwargs: Any) -> Any:
            try:
                return result(await function(*args, **kwargs))
            except SystemExit as error:
                raise _ordinary(error) from error

        return awaited

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        try:
            return result(function(*args, **kwargs))
        except SystemExit as error:
            raise _ordinary(error) from error

    return called


def as_text(value: Any) -> Any:
    """A tool's result as a model reads it: text as it is, all else as JSON. A `ToolMessage` stays one.

    Raises:
        ToolError: it is neither.
    """
    if isinstance(value, str | ToolOutputMixin):
        return value
    if inspect.iscoroutine(value):
        value.close()
    try:
        return json.dumps(value, ensure_ascii=False, default=_plain)
    except (TypeError, ValueError, RecursionError) as error:
        why = str(error).splitlines()[0]
        raise ToolError(f"it returned a {type(value).__name__}, which is neither text nor JSON: {why}") from error


def _plain(value: Any) -> Any:
    """What JSON has no form for, in one that it has. Never what could go on for ever, as iterators may."""
    if isinstance(value, BaseModel):
        return value.model_dump()
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, set | frozenset):
        # In an order that does not differ from process to process.
        return sorted(value, key=str)
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, Decimal | UUID | PurePath | timedelta):
        return str(value)
    if isinstance(value, bytes):
        return value.decode()
    raise TypeError(f"there is no JSON for a {type(value).__name__}")


def _is_async(tool: BaseTool) -> bool:
    if hasattr(tool, "coroutine"):
        return tool.coroutine is not None
    return type(tool)._arun is not BaseTool._arun


async def _awaited(tool: BaseTool, asked: dict[str, Any], config: RunnableConfig, limit_bytes: int) -> str:
    return _words(await tool.ainvoke(asked, config), limit_bytes)


async def _in_time(work: Coroutine[Any, Any, str], limit_s: float) -> str:
    task = asyncio.create_task(work)
    # One that goes on after it was given up has nobody to hear how it ends.
    task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
    try:
        await asyncio.wait({task}, timeout=limit_s)
    finally:
        if not (over := task.done()):
            task.cancel()
            await asyncio.wait({task}, timeout=_GRACE_S)
    if not over:
        raise ToolError(f"it took longer than {limit_s:g} s and was given up")
    if task.cancelled():
        raise ToolError("it cancelled itself")
    return task.result()


async def _in_thread(work: Callable[[], str]) -> str:
    loop = asyncio.get_running_loop()
    done: asyncio.Future[str] = loop.create_future()
    context = contextvars.copy_context()

    def settle(result: str, error: BaseException | None) -> None:
        if done.done():
            return
        if error is None:
            done.set_result(result)
        else:
            done.set_exception(_ordinary(error))

    def go() -> None:
        result, raised = "", None
        try:
            result = context.run(work)
        except BaseException as error:
            raised = error
        try:
            loop.call_soon_threadsafe(settle, result, raised)
        except RuntimeError:
            return  # the loop is gone, and with it whoever waited

    threading.Thread(target=go, name="agentops-tool", daemon=True).start()
    return await done


def _ordinary(error: BaseException) -> Exception:
    if isinstance(error, Exception) and not isinstance(error, StopIteration):
        return error
    told = f"it called sys.exit({error.code!r})" if isinstance(error, SystemExit) else f"it raised {type(error).__name__}"
    made = RuntimeError(told)
    made.__cause__ = error
    return made


def _words(message: Any, limit_bytes: int) -> str:
    if not isinstance(message, ToolMessage):
        raise ToolError(f"it returned a {type(message).__name__}, which only LangGraph's ToolNode can use")
    content = message.content
    text = content if isinstance(content, str) else "\n".join(_block(block) for block in content)
    if message.status == "error":
        raise ToolError(_cut(text, _ERROR_BYTES))
    return _cut(text, limit_bytes)


def _block(block: Any) -> str:
    if isinstance(block, str):
        return block
    if block.get("type") == "text":
        return str(block.get("text", ""))
    return f"[{block.get('type', 'something')} {block.get('mime_type', '')}: not shown]".replace(" :", ":")


def _cut(text: str, limit_bytes: int) -> str:
    raw = text.encode(errors="replace")
    if len(raw) <= limit_bytes:
        return raw.decode()
    return raw[:limit_bytes].decode(errors="ignore") + f" [... {len(raw) - limit_bytes:,} more bytes were left out]"
