"""The one bridge from synchronous callers to our asynchronous inside.

A private event loop runs in a daemon thread; coroutines go there and the caller waits. Context variables travel along,
so a span opened by the caller is the parent of what the coroutine records.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Coroutine, Generator
from typing import Any, TypeVar

T = TypeVar("T")

_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None


def _portal() -> asyncio.AbstractEventLoop:
    global _loop
    with _lock:
        if _loop is None or _loop.is_closed():
            _loop = asyncio.new_event_loop()
            threading.Thread(target=_serve, args=(_loop,), name="agentops-sync", daemon=True).start()
        return _loop


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    while True:
        try:
            return loop.run_forever()
        except (SystemExit, KeyboardInterrupt):
            # asyncio lets these out of the loop when a task raises them; whoever waits for the task gets them too.
            continue


def _forget() -> None:
    global _loop, _lock
    _loop, _lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forget)  # threads, and with them the loop, stay behind in the parent


def run_sync(coroutine: Coroutine[Any, Any, T]) -> T:
    """The coroutine's result, awaited on the private loop.

    KeyboardInterrupt in the waiting thread cancels the coroutine, waits for its clean-up, and is raised again.

    Raises:
        RuntimeError: when called on the private loop itself, where waiting would never end.
    """
    loop = _portal()
    try:
        running = asyncio.get_running_loop()
    except RuntimeError:
        running = None
    if running is loop:
        coroutine.close()
        raise RuntimeError("a synchronous method was called from asynchronous code; await its asynchronous form")
    over = threading.Event()

    async def guarded() -> T:
        try:
            return await coroutine
        finally:
            over.set()

    future = asyncio.run_coroutine_threadsafe(guarded(), loop)
    try:
        return future.result()
    except KeyboardInterrupt:
        future.cancel()
        over.wait()
        raise


def iterate_sync(items: AsyncIterator[T]) -> Generator[T, None, None]:
    """The items of an asynchronous iterator; it is closed when the caller leaves early."""
    end = object()

    async def following() -> T | object:
        return await anext(items, end)

    async def finish() -> None:
        close = getattr(items, "aclose", None)
        if close is not None:
            await close()

    try:
        while (item := run_sync(following())) is not end:
            yield item  # type: ignore[misc]
    finally:
        run_sync(finish())
