"""What `agentops run` prints while a run is at work."""

from __future__ import annotations

from collections.abc import Generator

import pytest

from agentops.cli.run import follow
from agentops.records import RunEvent, RunResult, RunStarted, StepEnded, StepStarted, Token, Usage


def begins(span: str, node: str, *path: str) -> RunEvent:
    return StepStarted("run_1", node, 1, path, span)


def says(span: str, text: str) -> RunEvent:
    return Token("run_1", "any", text, span)


def ends(span: str, node: str, detail: str = "") -> RunEvent:
    return StepEnded("run_1", node, 1, "ok", 1000.0, detail, span)


def shown(events: list[RunEvent], capsys: pytest.CaptureFixture[str]) -> list[str]:
    def happening() -> Generator[RunEvent, None, None]:
        yield RunStarted("run_1", "th_1")
        yield from events
        yield RunResult("run_1", "th_1", "done", {"answer": "yes"}, Usage(), 1.0)

    follow(happening())
    return capsys.readouterr().err.splitlines()[: -3 if events else None]


def test_a_step_is_a_line_then_what_is_written_in_it_then_its_time(capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown([begins("a", "write"), says("a", "one "), says("a", "two"), ends("a", "write", "→ critic")], capsys)
    assert lines == ["▸ write", "  one two", "  ✓ 1.0 s  → critic"]


def test_what_is_written_side_by_side_is_shown_in_one_piece_each(capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(
        [
            *(begins("a", "work"), begins("b", "work"), begins("a1", "write", "work"), begins("b1", "write", "work")),
            *(says("a1", "tea "), says("b1", "rice "), says("a1", "is "), says("b1", "is white"), ends("b1", "write")),
            *(begins("b2", "check", "work"), says("a1", "green"), ends("a1", "write"), ends("b2", "check", "→ end")),
            *(ends("b", "work"), ends("a", "work")),
        ],
        capsys,
    )
    assert lines == [
        *("▸ work", "▸ work", "▸ work / write", "▸ work / write", "  tea is green", "  ✓ 1.0 s"),
        *("▸ work / write", "  rice is white", "  ✓ 1.0 s", "✓ work / check  1.0 s  → end", "✓ work  1.0 s", "✓ work  1.0 s"),
    ]


def test_what_was_held_back_goes_on_when_the_floor_is_free(capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(
        [
            *(begins("a", "one"), begins("b", "two"), says("b", "first"), says("a", "held "), ends("b", "two")),
            *(says("a", "back"), ends("a", "one")),
        ],
        capsys,
    )
    assert lines == ["▸ one", "▸ two", "  first", "  ✓ 1.0 s", "▸ one", "  held back", "  ✓ 1.0 s"]


def test_a_terminal_is_given_nothing_to_obey(capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown([begins("a", "no\x1b[2Jde"), says("a", "\x1b]0;title\x07text"), ends("a", "node", "\x1b[31m")], capsys)
    assert lines == ["▸ node", "  text", "  ✓ 1.0 s  "]
