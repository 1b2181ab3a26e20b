"""A picture of every screen, compared with the one that is kept; `pytest --snapshot-update` keeps new ones, once looked at."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from textual.pilot import Pilot
from tui_app import press, settle, utc
from tui_record import NOW, small

from agentops import Settings
from tui.app import TerminalApp
from tui.shots import SHOTS, shoot


@pytest.fixture(autouse=True)
def _same_everywhere() -> Iterator[None]:
    with utc():
        yield


@pytest.mark.parametrize(
    ("place", "keys"),
    [
        ("runs", ()),
        ("run/01A", ("end",)),
        ("inbox", ()),
        ("evals", ()),
        ("evals", ("enter",)),
        ("engine", ()),
        ("runs", ("question_mark",)),
        ("inbox", ("e",)),
    ],
    ids=["runs", "run", "inbox", "evals", "cases", "engine", "help", "edit"],
)
def test_a_screen_looks_as_it_did(settings: Settings, snap_compare: Any, place: str, keys: tuple[str, ...]) -> None:
    small(settings)

    async def before(pilot: Pilot[None]) -> None:
        await settle(pilot)
        await press(pilot, *keys)
        await pilot.pause(0.2)
        await settle(pilot)
        # A cursor that blinks would be in every second picture.
        for area in pilot.app.screen.query("TextArea"):
            area.cursor_blink = False  # type: ignore[attr-defined]
        await pilot.pause()

    app = TerminalApp(
        settings, open_at=place, now_ns=lambda: NOW, interval=lambda name, values, threads: (min(values), max(values))
    )
    assert snap_compare(app, run_before=before, terminal_size=(100, 30))


async def test_the_pictures_of_the_documentation_are_drawn(settings: Settings, tmp_path: Path) -> None:
    small(settings)
    written = await shoot(settings, tmp_path / "pictures")
    assert [file.stem for file in written] == list(SHOTS)
    for file, word in zip(written, ("research", "retrieve", "Send", "baseline", "tokens/s"), strict=True):
        assert word in file.read_text(encoding="utf-8"), file
