"""What the tests of the screens share: an application over a known record with a clock that stands still, and waiting for it."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from textual.pilot import Pilot
from tui_record import NOW, small

from agentops import Settings
from tui.app import TerminalApp

Opened = Callable[..., Any]


@pytest.fixture(autouse=True)
def _utc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC")
    monkeypatch.delenv("NO_COLOR", raising=False)
    time.tzset()


@pytest.fixture
def record(settings: Settings) -> Settings:
    """Settings with the small record."""
    small(settings)
    return settings


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


@pytest.fixture
def opened() -> Opened:
    """Opens the application: `async with opened(settings, open_at=..., size=...) as (app, pilot)`."""

    @asynccontextmanager
    async def open_app(
        settings: Settings, *, size: tuple[int, int] = (100, 30), **about: Any
    ) -> AsyncIterator[tuple[TerminalApp, Pilot[None]]]:
        app = TerminalApp(settings, now_ns=lambda: NOW, **about)
        async with app.run_test(size=size) as pilot:
            await pilot.pause(0.3)
            await settle(pilot)
            yield app, pilot

    return open_app
