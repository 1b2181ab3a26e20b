"""What reaches a terminal: nothing that it would obey, and a trace that lines up at any width."""

from __future__ import annotations

import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from agentops.cli.render import clean, count, duration, one_line, tokens, trace_tree
from agentops.records import SpanKind, SpanStatus, Timing, Usage
from agentops.store import SpanRow

HOSTILE = [
    ("\x1b[31mred\x1b[0m", "red"),
    ("\x1b]0;owned\x07title", "title"),
    ("\x1b]52;c;ZXZpbA==\x1b\\clip", "clip"),
    ("\x9b31mc1\x9b0m", "c1"),
    ("\x9d0;owned\x9cosc", "osc"),
    ("\x1bP+q544e\x1b\\dcs", "dcs"),
    ("\x1b_apc\x1b\\x", "x"),
    ("\x1b]8;;http://example.com\x07link\x1b]8;;\x07", "link"),
    ("\x1bc reset", " reset"),
    ("\x1b(0charset", "charset"),
    ("a\rb\x08c\x00d\x7fe", "abcde"),
    ("user\u202egnp.exe\u202c", "usergnp.exe"),
    ("a\u2066b\u2069c\u200ed\u061ce", "abcde"),
    ("tag\U000e0041s", "tags"),
    ("line\u2028end\ufeff", "lineend"),
    ("bad \udc80", "bad \ufffd"),
    ("\x1b[", ""),
    ("\x1b]0;never ends", "0;never ends"),
    ("kept\n\tthis: äß 字 👩‍👩‍👧 [bold]no markup[/bold]", "kept\n\tthis: äß 字 👩‍👩‍👧 [bold]no markup[/bold]"),
]


@pytest.mark.parametrize(("text", "shown"), HOSTILE)
def test_hostile_text_is_cleaned(text: str, shown: str) -> None:
    assert clean(text) == shown


@given(st.text(st.characters() | st.sampled_from("\x1b[]\x9b\x9d;mP\\\x07\u202e0")))
def test_no_control_character_survives(text: str) -> None:
    for character in clean(text):
        assert character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cs")
        assert unicodedata.bidirectional(character) not in ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
    assert clean(clean(text)) == clean(text)


def test_numbers_for_people() -> None:
    assert [duration(ns) for ns in (9_960_000, 999_600_000, 59_996_000_000)] == ["10 ms", "1.00 s", "1 m 00 s"]
    assert [duration(ns) for ns in (None, 400_000, 340_000_000, 1_240_000_000, 125_000_000_000, 11_220_000_000_000)] == [
        "-",
        "0.4 ms",
        "340 ms",
        "1.24 s",
        "2 m 05 s",
        "3 h 07 m",
    ]
    assert [count(number) for number in (0, 9_999, 12_345, 4_500_000)] == ["0", "9999", "12.3k", "4.5M"]
    assert tokens(Usage(812, 35, 640, 172)) == "812/640/35"
    assert tokens(Usage()) == ""
    assert one_line("a\n b\x1b[1m  " + "c" * 50, 10) == "a b ccccc…"


def row(
    number: int, parent: int | None, name: str, kind: SpanKind = "node", status: SpanStatus = "ok", **more: object
) -> SpanRow:
    base: dict[str, object] = {
        "id": f"sp_{number}", "run_id": "run_1", "root_id": "sp_1", "parent_id": parent and f"sp_{parent}", "seq": number,
        "kind": kind, "name": name, "status": status, "start_ns": number * 100, "duration_ns": 1000 - number * 100,
        "node": name, "step": 1, "task": None, "checkpoint_ns": None, "attempt": 1, "input_hash": None, "output_hash": None,
        "error": None, "model": None, "prompt_name": None, "prompt_version": None, "usage": Usage(), "timing": Timing(),
        "attributes": {},
    }  # fmt: skip
    return SpanRow(**{**base, **more})  # type: ignore[arg-type]


SPANS = [
    row(1, None, "rag", "workflow", start_ns=0, duration_ns=1000),
    row(2, 1, "retrieve", start_ns=0, duration_ns=250),
    row(3, 2, "search", "retrieval", start_ns=0, duration_ns=250, attributes={"hits": 8}),
    row(4, 1, "write", start_ns=250, duration_ns=500, attempt=2, attributes={"route": "critic"}),
    row(5, 4, "generate", "generation", start_ns=250, duration_ns=500, prompt_name="write", usage=Usage(800, 40, 600, 200)),
    row(6, 1, "critic\x1b[31m", status="error", start_ns=750, duration_ns=250, error="ValueError: \x1b]0;x\x07no"),
    row(7, 6, "generate", "generation", "crashed", start_ns=800, duration_ns=None, usage=Usage(100, 5, 0, 100)),
]


def test_a_trace_is_a_tree_with_tokens_times_and_bars_in_one_view() -> None:
    lines = [line.plain for line in trace_tree(SPANS, 100)]
    assert [re.split(r"(?<=[a-z])  ", line)[0].strip() for line in lines[1:]] == [
        "1 rag workflow",
        "2 ├─ retrieve",
        "3 │  └─ search retrieval",
        "4 ├─ write",
        "5 │  └─ generate generation",
        "6 └─ ✗ critic",
        "7    └─ ✗ generate generation",
    ]
    assert "900/600/45" in lines[1], "a parent shows the sum of what is below it"
    assert "800/600/40" in lines[4]
    assert "800/600/40" in lines[5]
    assert "attempt 2  → critic" in lines[4]
    assert "8 hits" in lines[3]
    assert "ValueError: no" in lines[6]
    bars = [line[100 - 16 :] for line in lines[1:]]
    cells = (100 - 52) // 3
    assert bars[0] == "━" * cells
    assert bars[1] == "━" * (cells // 4)
    assert bars[3] == " " * (cells // 4) + "━" * (cells // 2)
    assert bars[6] == " " * 12 + "┄" * 4, "what did not end is drawn to the end"


@pytest.mark.parametrize("width", [10, 80, 81, 120, 250])
def test_columns_line_up_at_any_width_and_with_wide_characters(width: int) -> None:
    spans = [*SPANS, row(8, 1, "字" * 60, start_ns=0, duration_ns=10)]
    lines = [line.plain for line in trace_tree(spans, width)]
    assert all(cell_len(line) <= max(80, width) for line in lines)
    assert len({cell_len(line[: line.index("s ━")]) for line in lines[1:] if "s ━" in line}) == 1


def test_damaged_trees_are_shown_too() -> None:
    orphan, own_parent = row(2, 9, "orphan"), row(3, 3, "loop")
    lines = [line.plain for line in trace_tree([row(1, None, "rag", "workflow"), orphan, own_parent], 80)]
    assert len(lines) == 4
    deep = [row(number, number - 1 or None, "n") for number in range(1, 1_500)]
    assert len(list(trace_tree(deep, 80))) == 1_500
    assert len(list(trace_tree([], 80))) == 1
