"""Text of models, documents and people reaches the terminal as text: in every widget, and byte by byte on a real one."""

from __future__ import annotations

import re
import sys
import unicodedata
from pathlib import Path

import pytest
from rich.cells import cell_len
from textual.widgets import TextArea
from tui_app import drawn, opened, press, settle
from tui_pty import terminal
from tui_record import FORBIDDEN, HOSTILE, HOSTILE_TEXT, hostile

from agentops import Settings
from tui.screens.dialogs import Confirm, JobScreen, Write
from tui.text import PREVIEW_BYTES, as_text, cell, flatten, preview, wrapped
from tui.widgets.detail import Detail

# The shape of the mouse pointer, which Textual sets by itself.
POINTER = re.compile(rb"\x1b\]22;[a-z-]+\x07")
BAD = {"Cc", "Cf", "Cs", "Zl", "Zp"}


def unsafe(text: str) -> list[str]:
    return [repr(mark) for mark in text if unicodedata.category(mark) in BAD and mark not in "\n\t"]


def test_the_search_finds_what_is_unsafe_and_the_corpus_has_it() -> None:
    raw = HOSTILE_TEXT.encode("utf-8", "replace")
    assert all(found in raw for found in FORBIDDEN if found not in (b"\x9b2J", b"\x9d52"))
    assert len(unsafe(HOSTILE_TEXT)) > 30


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_no_way_to_the_screen_lets_it_through(text: str) -> None:
    for width in (1, 2, 7, 40):
        shown = cell(text, width)
        assert not unsafe(shown)
        assert cell_len(shown) == width
        assert "\n" not in shown
        for line in wrapped(preview(text)[0], width):
            assert not unsafe(line)
            assert cell_len(line) <= max(8, width)
    assert not unsafe(flatten(text))
    assert not unsafe(preview(as_text({"a": [text]}))[0])


def test_a_preview_is_cut_at_its_size_and_wraps_to_no_word_lost() -> None:
    long, cut = preview("wörd " * 40_000)
    assert cut
    assert PREVIEW_BYTES - 8 <= len(long.encode()) <= PREVIEW_BYTES
    assert preview("short") == ("short", False)
    text = "the quick 狐 jumps over " * 20 + "x" * 300
    assert "".join("".join(wrapped(text, 30)).split()) == "".join(text.split())


class Hostile:
    """Stands for a verb that says hostile things."""

    def __init__(self, settings: Settings, words: list[str], *, given: str = "") -> None:
        self.words, self.code, self.text = tuple(words), None, HOSTILE_TEXT
        self.line = "agentops " + HOSTILE_TEXT

    def poll(self) -> bool:
        return True

    def leave(self) -> None:
        pass


@pytest.mark.parametrize("size", [(150, 40)], ids=str)
async def test_every_screen_shows_it_as_text(settings: Settings, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]) -> None:
    monkeypatch.setattr("tui.app.Job", Hostile)
    hostile(settings)
    seen: list[str] = []

    async with opened(settings, size=size) as (app, pilot):

        async def look(*keys: str) -> None:
            await press(pilot, *keys)
            await pilot.pause(0.1)
            await settle(pilot)
            text = drawn(app)
            assert not unsafe(text)
            seen.append(text)

        await look()
        await look("enter")
        for _ in range(3):
            await look("down")
            app.screen.query_one(Detail).action_jump(-1)
        await look("d")
        await look("escape", "2")
        await look("e")
        assert isinstance(app.screen, Write)
        assert not unsafe(app.screen.query_one(TextArea).text)
        await look("escape", "a")
        assert isinstance(app.screen, JobScreen)
        await look("escape", "3")
        await look("enter")
        await look("escape", "4")
        app.tell(HOSTILE_TEXT)
        await look()
        app.push_screen(Confirm(HOSTILE_TEXT))
        await look()
        assert app.return_code is None
        assert app.title == "agentops"
    assert all("pwned" in text for text in seen[:5]), "the corpus was not shown"


KEYS = (
    "\r",
    "\x1b[B",
    "\x1b[B",
    "\x1b[B",
    "d",
    "d",
    "\x1b",
    "2",
    "e",
    "\x1b",
    "3",
    "\r",
    "\x1b",
    "4",
    "1",
    "/",
    "pwned",
    "\r",
    "?",
    "\x1b",
)


def test_no_byte_of_it_reaches_a_real_terminal(settings: Settings, environment: dict[str, str]) -> None:
    hostile(settings)
    environment = environment | {"AGENTOPS_PATHS_HOME": str(settings.paths.home)}
    with terminal([sys.executable, "-m", "agentops", "tui", "runs"], environment) as screen:
        screen.read_until(b"pwned")
        for key in KEYS:
            screen.send(key.encode(), 1.5)
        drawn_bytes = POINTER.sub(b"", bytes(screen.output))
        screen.send(b"q", 5.0)
        assert screen.process.wait(10) == 0
        written = POINTER.sub(b"", bytes(screen.output))
    assert written.count(b"pwned") > 10, "the corpus was not shown"
    found = [mark for mark in FORBIDDEN if mark in written]
    assert not found
    # Nothing but Textual's own: colours, the cursor, modes.
    assert b"\x1b]" not in drawn_bytes
    assert b"[@click=app.quit]click" in drawn_bytes


def test_the_same_search_sees_a_program_that_lets_it_through(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "said.txt").write_bytes(HOSTILE_TEXT.encode("utf-8", "replace"))
    with terminal(["cat", str(tmp_path / "said.txt")], environment) as screen:
        screen.read(5.0)
        written = bytes(screen.output)
    assert sum(mark in written for mark in FORBIDDEN) > 15
