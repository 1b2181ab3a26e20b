"""The application over a known record, with a clock that stands still, in UTC; and waiting until it has come to rest."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from textual.pilot import Pilot
from tui_record import NOW

from agentops import Settings
from tui.app import TerminalApp

ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def utc() -> Iterator[None]:
    """The time zone of the pictures, and colours."""
    before = {name: os.environ.get(name) for name in ("TZ", "NO_COLOR")}
    os.environ["TZ"] = "UTC"
    os.environ.pop("NO_COLOR", None)
    time.tzset()
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        time.tzset()


async def settle(pilot: Pilot[None]) -> None:
    """Waits until what was asked for is on the screen."""
    app = pilot.app
    assert isinstance(app, TerminalApp)
    for _ in range(400):
        await pilot.pause(0.01)
        if app.reader.idle and app.screen.is_mounted:
            await pilot.pause()
            if app.reader.idle:
                return
    raise AssertionError("the screen does not come to rest")


@asynccontextmanager
async def opened(
    settings: Settings, *, size: tuple[int, int] = (100, 30), **about: Any
) -> AsyncIterator[tuple[TerminalApp, Pilot[None]]]:
    """The application, drawn and at rest."""
    with utc():
        app = TerminalApp(settings, **({"now_ns": lambda: NOW} | about))
        async with app.run_test(size=size) as pilot:
            await settle(pilot)
            yield app, pilot


async def press(pilot: Pilot[None], *keys: str) -> None:
    """The keys one after the other, and what comes of them."""
    for key in keys:
        await pilot.press(key)
        if len(key) > 1 or key.isupper():
            await settle(pilot)
    await settle(pilot)


def said(app: TerminalApp, selector: str = "#news") -> str:
    """What a line of the screen says."""
    return str(app.screen.query_one(selector).render())


def drawn(app: TerminalApp) -> str:
    """The screen as text."""
    return "\n".join("".join(segment.text for segment in strip) for strip in app.screen._compositor.render_strips())
