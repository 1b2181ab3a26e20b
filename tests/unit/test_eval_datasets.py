"""Datasets: what is read, what is refused and where, and that the hash follows from what is said alone."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from agentops.records import ToolCall
from evals.datasets import CELL_BYTES, Case, Dataset, DatasetError, case_of, dataset_of, load_dataset, to_jsonl
from evals.samples import Reference

FULL: dict[str, Any] = {
    "id": "a",
    "question": "How hot is green tea brewed?",
    "answer": "At 80 degrees.",
    "contexts": ["tea.md"],
    "trajectory": [{"name": "search", "arguments": {"query": "tea", "k": 2}}],
    "schema": {"type": "object", "required": ["x", "a"]},
    "pattern": "80",
    "topics": ["tea"],
    "goal": "to know",
    "rubric": {"1": "wrong", "5": "right"},
    "thread": "t",
    "tags": ["hot"],
}


def put(folder: Path, text: str | bytes, name: str = "cases.jsonl") -> Path:
    file = folder / name
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def refused(folder: Path, text: str | bytes, match: str, name: str = "cases.jsonl") -> str:
    with pytest.raises(DatasetError, match=match) as error:
        load_dataset(put(folder, text, name))
    assert error.value.exit_code == 2
    return error.value.hint


def test_every_column_is_read(tmp_path: Path) -> None:
    (case,) = load_dataset(put(tmp_path, json.dumps(FULL))).cases
    assert case == Case(
        id="a",
        input="How hot is green tea brewed?",
        reference=Reference(
            answer="At 80 degrees.",
            contexts=("tea.md",),
            trajectory=(ToolCall("search", {"query": "tea", "k": 2}, ""),),
            schema={"type": "object", "required": ["x", "a"]},
            pattern="80",
            topics=("tea",),
            goal="to know",
            rubric={"1": "wrong", "5": "right"},
        ),
        thread="t",
        tags=("hot",),
    )
    assert case_of(case.plain()) == case == case_of(case.frozen())
    assert load_dataset(put(tmp_path, to_jsonl([case]))).cases == (case,)


def test_csv_says_the_same_and_its_lists_are_json(tmp_path: Path) -> None:
    file = tmp_path / "cases.csv"
    with file.open("w", newline="", encoding="utf-8-sig") as out:
        writer = csv.writer(out)
        writer.writerow(list(reversed(FULL)))
        writer.writerow([one if isinstance(one, str) else json.dumps(one) for one in reversed(FULL.values())])
    assert load_dataset(file).cases == load_dataset(put(tmp_path, json.dumps(FULL))).cases
    assert load_dataset(file).hash == load_dataset(put(tmp_path, json.dumps(FULL))).hash


def test_the_hash_is_that_of_what_is_said(tmp_path: Path) -> None:
    rows = [{"question": "a?", "schema": {"x": 1, "y": 2}}, {"question": "b?", "answer": "b"}]
    first = dataset_of("d", rows)
    swapped = "\n\n".join(
        ['{ "answer" : "b",  "question": "\\u0062?" }', '{"schema": {"y": 2, "x": 1}, "question": "a?", "goal": null}']
    )
    assert load_dataset(put(tmp_path, "\ufeff" + swapped + "\r\n")).hash == first.hash
    assert [case.id for case in first.cases] == [case.id for case in reversed(load_dataset(tmp_path / "cases.jsonl").cases)]
    assert dataset_of("d", [*rows[:1], {**rows[1], "answer": "c"}]).hash != first.hash
    assert dataset_of("d", rows[:1]).hash != first.hash


def test_other_names_of_columns_and_an_input_for_the_graph(tmp_path: Path) -> None:
    given = {"input": {"question": "q?", "k": 3}, "reference": "r", "tool_calls": [{"name": "f", "args": {"x": 1}}]}
    (case,) = dataset_of("d", [given]).cases
    assert case.input == {"question": "q?", "k": 3}
    assert case.question == "q?"
    assert case.reference == Reference(answer="r", trajectory=(ToolCall("f", {"x": 1}, ""),))
    (from_csv,) = load_dataset(put(tmp_path, 'input\n"{""question"": ""q?"", ""k"": 3}"\n', "cases.csv")).cases
    assert from_csv.input == case.input
    assert load_dataset(put(tmp_path, "input\nwhat?\n", "cases.csv")).cases[0].input == "what?"


def test_turns_of_a_thread_may_repeat_and_keep_their_order() -> None:
    rows = [{"question": "yes", "thread": "t"}, {"question": "more", "thread": "t"}, {"question": "yes", "thread": "t"}]
    cases = dataset_of("d", rows).cases
    assert [case.turn for case in cases] == [0, 1, 2]
    assert len({case.id for case in cases}) == 3
    swapped = dataset_of("d", [rows[1], rows[0], rows[2]])
    assert swapped.hash != Dataset("d", cases).hash


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "cases.jsonl has no cases"),
        ("\n  \n", "cases.jsonl has no cases"),
        ('{"question": "a?"}\n{"answer": "b"}', 'line 2 has no "question"'),
        ('{"question": " "}', 'line 1 has an empty "question"'),
        ('{"question": null}', 'line 1 has no "question"'),
        ('{"question": "a", "input": "a"}', 'both "question" and "input"'),
        ('{"question": "a?"}\nnot json', "line 2 is no JSON"),
        ('[{"question": "a?"}]', "line 1 is this list, not an object"),
        ('{"question": "a?", "question": "b?"}', '"question" is given twice'),
        ('{"question": 5}', '"question" must be a text, not a number'),
        ('{"question": "a?", "contexts": "tea.md"}', '"contexts" must be a list of texts.*not a text'),
        ('{"question": "a?", "contexts": [1]}', '"contexts" must be a list of texts.*not this list'),
        ('{"question": "a?", "trajectory": [{"name": "f", "arguments": 1}]}', '"trajectory" must be a list of calls'),
        ('{"question": "a?", "schema": true}', '"schema" must be a JSON object, not true or false'),
        ('{"question": "a?", "rubric": {}}', '"rubric" must be a JSON object with a text for each grade'),
        ('{"question": "a?", "anwser": "b"}', 'a column "anwser"'),
        ('{"question": "a?", "answer": "b", "reference": "c"}', '"answer" under two names'),
        ('{"question": "a?", "id": ""}', 'is no "id"'),
        ('{"question": "a?", "id": "x\\ny"}', 'is no "id"'),
        ('{"id": "x", "question": "a?"}\n\n{"id": "x", "question": "b?"}', 'line 3 has the id "x" of line 1'),
        ('{"id": "x", "question": "a?"}\n{"id": "y", "question": "a?"}', "line 2 says the same as line 1"),
        ('{"question": "a?"}\n{"question": "a?"}', "line 2 has the id .* of line 1 and says the same"),
        (b'{"question": "a?"}\n{"question": "\xe9"}', r"line 2 is not UTF-8 \(byte 15\)"),
        ("[" * 100_000, "line 1 is no JSON"),
    ],
)
def test_what_cannot_be_used_is_refused_with_its_line(tmp_path: Path, text: str | bytes, match: str) -> None:
    refused(tmp_path, text, match)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "has no cases"),
        ("question,answer\n", "has no cases"),
        ("questoin\na?\n", 'a column "questoin"'),
        ("answer\nb\n", 'line 2 has no "question"'),
        ("question,answer\na?\n", "line 2 has 1 cells, and the header has 2"),
        ("question,answer\na?,b,c\n", "line 2 has 3 cells, and the header has 2"),
        ("question,question\na?,b\n", 'two columns "question"'),
        ('question\n"two\nlines"\n"open', "is no CSV"),
        ("question,contexts\na?,tea.md\n", 'line 2: "contexts" is no JSON: tea.md'),
        ("question,answer\n,b\n", 'line 2 has no "question"|line 2 has an empty "question"'),
        (b"question\na?\n\xff\xfe\n", "line 3 is not UTF-8"),
    ],
)
def test_csv_that_cannot_be_used_is_refused_with_its_line(tmp_path: Path, text: str | bytes, match: str) -> None:
    refused(tmp_path, text, match, "cases.csv")


def test_a_cell_of_ten_megabytes_is_refused_and_one_below_the_limit_is_read(tmp_path: Path) -> None:
    huge = "x" * 10_000_000
    for name, text in (
        ("cases.jsonl", json.dumps({"question": "a?"}) + "\n" + json.dumps({"question": "b?", "answer": huge})),
        ("cases.csv", f"question,answer\na?,b\nb?,{huge}\n"),
    ):
        assert "agentops ingest" in refused(tmp_path, text, "line [23]: a line is too long", name)
    size = CELL_BYTES + 1
    refused(tmp_path, json.dumps({"question": "a?", "answer": "x" * size}), f'"answer" has {size:,} bytes')
    refused(tmp_path, f"question,answer\na?,{'x' * size}\n", f'"answer" has {size:,} bytes', "cases.csv")
    big = "y" * (CELL_BYTES - 10)
    assert load_dataset(put(tmp_path, f"question,answer\na?,{big}\n", "cases.csv")).cases[0].reference.answer == big
    assert csv.field_size_limit() == 131_072


@pytest.mark.parametrize(
    "row",
    [
        {"question": "a \ud83d"},
        {"question": "a", "thread": "\ud83d"},
        {"question": "a", "contexts": ["\ud83d"]},
        {"input": {"\ud83d": 1}},
    ],
)
def test_half_of_a_surrogate_pair_is_refused_with_its_line(tmp_path: Path, row: dict[str, Any]) -> None:
    with pytest.raises(DatasetError, match="d, line 2 has half of a surrogate pair"):
        dataset_of("d", [{"question": "fine"}, row])
    refused(tmp_path, '{"question": "fine"}\n' + json.dumps(row), "line 2 has half of a surrogate pair")
    refused(tmp_path, 'question,contexts\na,"[""\\ud83d""]"\n', "line 2 has half of a surrogate pair", "cases.csv")


def test_columns_that_are_not_used_are_named_and_counted(tmp_path: Path) -> None:
    found = load_dataset(put(tmp_path, '{"question": "a?", "difficulty": 3}\n{"question": "b?", "answer": "b"}'))
    assert found.notes == ('column "difficulty" is not used (1 cases)',)
    assert found.counts() == {"question": 2, "answer": 1}


def test_a_file_that_is_not_there_is_a_wrong_use(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="cannot be read: No such file"):
        load_dataset(tmp_path / "none.jsonl")
