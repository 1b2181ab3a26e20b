"""What goes to the terminal: less than Textual writes, and to the same effect, cell by cell."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from tui_emulated import Emulated
from tui_pty import terminal
from tui_record import many

from agentops import Settings
from tui.wire import Wire

WIDTH, HEIGHT = 12, 4

TEXTS = st.text(st.sampled_from("ab ─✓日é\u0301🙂"), min_size=1, max_size=9)
STYLES = st.sampled_from(["", "1", "2", "1;2", "7", "4;31", "31", "48;5;9", "1;38;2;1;2;3;48;2;4;5;6", "38;2;1;2;3", "32;41"])
PIECES = st.tuples(
    st.integers(0, WIDTH - 1), st.integers(0, HEIGHT - 1), st.lists(st.tuples(TEXTS, STYLES), min_size=1, max_size=3)
)


def frame(pieces: list[tuple[int, int, list[tuple[str, str]]]]) -> str:
    """As Textual writes: a place, each piece with all of its style, and the cursor to its place at the end."""
    lines = []
    for x, y, parts in pieces:
        line, room = f"\x1b[{y + 1};{x + 1}H", WIDTH - x
        for text, style in parts:
            while cell_len(text) > room:
                text = text[:-1]
            room -= cell_len(text)
            line += f"\x1b[{style}m{text}\x1b[0m" if style else text
        lines.append(line)
    return "\n".join(lines) + "\x1b[2;3H"


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(st.lists(PIECES, max_size=5), st.sampled_from(["\x1b[?25l", "\x1b[?2026h"])), max_size=6))
def test_the_terminal_shows_the_same(frames: list[str | list[tuple[int, int, list[tuple[str, str]]]]]) -> None:
    whole, thin, wire = Emulated(WIDTH, HEIGHT), Emulated(WIDTH, HEIGHT), Wire()
    wire.forget(WIDTH, HEIGHT)
    for one in frames:
        data = one if isinstance(one, str) else frame(one)
        whole.write(data)
        thin.write(wire.thin(data))
        assert thin.seen == whole.seen
        if not isinstance(one, str):
            assert (thin.x, thin.y) == (whole.x, whole.y)


def test_only_what_differs_is_sent() -> None:
    wire = Wire()
    first = "\x1b[1;1H\x1b[38;2;1;2;3;48;5;9mrun_01A  done\x1b[0m"
    assert wire.thin(first) == first, "nothing is known of the size"
    wire.forget(20, 3)
    assert "run_01A" in wire.thin(first)
    assert wire.thin(first) == ""
    assert wire.thin(first.replace("01A", "02B")) == "\x1b[8D2B\x1b[6C"
    assert wire.thin(first.replace("9m", "8m").replace("01A", "02B")).count("48;5;8") == 1
    wire.forget(20, 3)
    assert "run_01A" in wire.thin(first), "a resized terminal shows anything"


def test_what_is_not_a_frame_goes_through_with_the_plain_pen() -> None:
    wire = Wire()
    wire.forget(20, 3)
    text = "\x1b[1;1H\x1b[31mred\x1b[0m"
    wire.thin(text)
    assert wire.thin("\x1b[?1049l") == "\x1b[m\x1b[?1049l"
    assert "red" in wire.thin(text), "another screen shows something else"
    assert wire.thin("\x1b[?2026h") == "\x1b[?2026h"
    assert wire.thin(text) == ""


@pytest.mark.parametrize(("width", "height", "most"), [(80, 24, 2_048), pytest.param(200, 60, 6_144, marks=pytest.mark.long)])
def test_no_key_sends_more_than_is_promised(
    settings: Settings, environment: dict[str, str], tmp_path: Path, width: int, height: int, most: int
) -> None:
    list(many(settings, 80, 60))
    about = {"AGENTOPS_PATHS_HOME": str(settings.paths.home), "TERM": "xterm-256color", "COLORTERM": "truecolor"}
    command = [sys.executable, "-m", "agentops", "tui", "runs"]
    with terminal(command, dict(os.environ) | environment | about, width, height) as screen:
        screen.read_until("✓ done".encode())
        screen.read(2)
        page_down, page_up = b"\x1b[6~", b"\x1b[5~"
        for key in (b"j", page_down, b"G", page_up, b"g"):
            assert len(screen.send(key, 0.6)) <= most, key
        assert len(screen.send(b"\x0c", 0.6)) > width * height // 4, "drawn anew"
        screen.send(b"\r")
        screen.read(2)
        for key in (b"j", page_down, b"G", page_up):
            assert len(screen.send(key, 0.6)) <= most, key
