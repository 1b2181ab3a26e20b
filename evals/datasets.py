"""Datasets: questions with what is expected of their answers, from JSONL and CSV files.

A line of JSONL, or a row of CSV, is a case. A `Dataset` is frozen: its hash follows from what its cases say, and not from
their order, the order of the columns or the form of the file, so that two experiments can tell whether they asked the same.
Turns of one conversation share `thread` and are asked in the order of the file. Nothing here knows the record or runs.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from agentops.errors import UsageError
from agentops.records import ToolCall, content_hash
from agentops.text import one_line
from evals.samples import Reference

CELL_BYTES = 1_000_000
"""A longer value is refused: no model reads it, and it would be copied with every case."""

LINE_BYTES = 8 * CELL_BYTES
ID_CHARACTERS = 200

COLUMNS = {
    "id": "text",
    "question": "text",
    "input": "any",
    "answer": "text",
    "contexts": "texts",
    "trajectory": "calls",
    "schema": "object",
    "pattern": "text",
    "topics": "texts",
    "goal": "text",
    "rubric": "rubric",
    "thread": "text",
    "tags": "texts",
}
"""What a case may say, and the type of it."""

ALIASES = {"reference": "answer", "tool_calls": "trajectory", "user_input": "question", "reference_contexts": "contexts"}

_FORMS = {
    "text": "a text",
    "texts": 'a list of texts, such as ["a", "b"]',
    "calls": 'a list of calls, such as [{"name": "clock", "arguments": {"zone": "Tokyo"}}]',
    "object": "a JSON object",
    "rubric": 'a JSON object with a text for each grade, such as {"1": "wrong", "5": "right"}',
    "any": "a text or a JSON object",
}


_UNSEEN = re.compile("[\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]")


class DatasetError(UsageError):
    """A dataset cannot be used; the message names the file and the line."""


@dataclass(frozen=True, slots=True)
class Case:
    """One row. `input` is what the graph gets: a question, or an object with its fields. `reference` is what is expected.

    `turn` counts, from 0, the cases of its `thread` before it.
    """

    id: str
    input: str | Mapping[str, Any]
    reference: Reference = field(default_factory=Reference)
    thread: str = ""
    turn: int = 0
    tags: tuple[str, ...] = ()

    @property
    def question(self) -> str:
        """The question as a text: of an object its `question`, or all of it as JSON."""
        if isinstance(self.input, str):
            return self.input
        asked = self.input.get("question")
        return asked if isinstance(asked, str) else json.dumps(self.input, ensure_ascii=False, sort_keys=True)

    def plain(self) -> dict[str, Any]:
        """The row as JSON, with what is said and nothing else; `case_of` reads it back."""
        reference = self.reference
        calls = reference.trajectory
        row: dict[str, Any] = {
            "id": self.id,
            ("question" if isinstance(self.input, str) else "input"): self.input,
            "answer": reference.answer,
            "contexts": list(reference.contexts) if reference.contexts is not None else None,
            "trajectory": [{"name": one.name, "arguments": one.arguments} for one in calls] if calls is not None else None,
            "schema": reference.schema,
            "pattern": reference.pattern,
            "topics": list(reference.topics) if reference.topics is not None else None,
            "goal": reference.goal,
            "rubric": reference.rubric,
            "thread": self.thread or None,
            "turn": self.turn or None,
            "tags": list(self.tags) or None,
        }
        return {name: value for name, value in row.items() if value is not None}

    def frozen(self) -> dict[str, Any]:
        """As `plain`, in an order that does not depend on how it was written: what is kept on record."""
        found: dict[str, Any] = json.loads(_dump(self.plain()))
        return found

    @property
    def hash(self) -> str:
        return content_hash(written(self.frozen()))


@dataclass(frozen=True, slots=True)
class Dataset:
    """Cases in the order of the file. `notes` say what a reader should know, such as columns that were not understood."""

    name: str
    cases: tuple[Case, ...]
    notes: tuple[str, ...] = ()

    def frozen(self) -> list[list[str]]:
        """Each case's id and hash, in the order of the ids."""
        return sorted([case.id, case.hash] for case in self.cases)

    @property
    def hash(self) -> str:
        return content_hash(written(self.frozen()))

    def counts(self) -> dict[str, int]:
        """How many cases say something of each column, and how many conversations there are."""
        said = Counter(name for case in self.cases for name in case.plain() if name not in ("id", "turn", "thread"))
        threads = {case.thread for case in self.cases if case.thread}
        return {**{name: said[name] for name in COLUMNS if said[name]}, **({"threads": len(threads)} if threads else {})}


def load_dataset(path: Path | str) -> Dataset:
    """The dataset of a file: CSV where its name ends in `.csv`, else JSONL.

    Raises:
        DatasetError: it cannot be read, is empty, not UTF-8, a column is missing, a value is too long or of another type than
            its column's, or two rows have the same id or say the same. The message has the line.
    """
    path = Path(path)
    name = one_line(path.name, 80)
    try:
        read = _csv if path.suffix.lower() == ".csv" else _jsonl
        with path.open("rb") as file, contextlib.closing(read(file, name)) as rows:
            return _dataset(name, rows)
    except OSError as error:
        raise DatasetError(
            f"{one_line(str(path), 200)} cannot be read: {error.strerror}", hint="name a JSONL or CSV file"
        ) from None


def dataset_of(name: str, rows: Iterable[Mapping[str, Any]]) -> Dataset:
    """The dataset of rows that are at hand; they are held to the same rules, and errors count them as lines from 1.

    Raises:
        DatasetError
    """
    return _dataset(name, enumerate(rows, 1))


def case_of(row: Mapping[str, Any], where: str = "the case") -> Case:
    """The case of a row whose columns are known, as `Case.plain` gives it. Without an id it gets one from what it says.

    Raises:
        DatasetError
    """
    values = {name: _typed(value, COLUMNS[name], where, name) for name, value in row.items() if name in COLUMNS}
    values = {name: value for name, value in values.items() if value is not None}
    if "question" in values and "input" in values:
        raise DatasetError(f'{where} has both "question" and "input"', hint="give one of them")
    given = values.get("question", values.get("input"))
    if given is None or (isinstance(given, str) and not given.strip()) or given == {}:
        wrong = 'an empty "question"' if "question" in row or "input" in row else 'no "question"'
        raise DatasetError(f"{where} has {wrong}", hint='each case needs a "question", or an "input" for the graph')
    key = values.get("id", "")
    if "id" in values and (not key.strip() or len(key) > ID_CHARACTERS or not key.isprintable()):
        raise DatasetError(
            f'{where}: {one_line(key, 40)!r} is no "id"',
            hint=f"use one line of at most {ID_CHARACTERS} characters, or leave it out",
        )
    case = Case(
        id=key,
        input=given,
        reference=Reference(
            answer=values.get("answer"),
            contexts=values.get("contexts"),
            trajectory=values.get("trajectory"),
            schema=values.get("schema"),
            pattern=values.get("pattern"),
            topics=values.get("topics"),
            goal=values.get("goal"),
            rubric=values.get("rubric"),
        ),
        thread=values.get("thread", ""),
        turn=int(row.get("turn") or 0),
        tags=values.get("tags", ()),
    )
    return case if key else replace(case, id="c_" + content_hash(_said(case))[3:15])


def to_jsonl(cases: Iterable[Case]) -> str:
    """A file that `load_dataset` reads to the same cases. Letters of all languages stand as they are; what moves a terminal's
    cursor, turns its writing around or ends a line is escaped."""
    rows = ({name: value for name, value in case.plain().items() if name != "turn"} for case in cases)
    return "".join(_UNSEEN.sub(_escaped, json.dumps(row, ensure_ascii=False)) + "\n" for row in rows)


def _escaped(found: re.Match[str]) -> str:
    return f"\\u{ord(found[0]):04x}"


def is_text(row: Any) -> bool:
    """Whether all its texts are such: one with half of a surrogate pair cannot be written as UTF-8, nor be shown to a model."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def written(value: Any) -> bytes:
    """JSON as the record keeps it, whose hash is its name there."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "backslashreplace")


# --- reading files ---


def _jsonl(file: io.BufferedReader, name: str) -> Generator[tuple[int, Mapping[str, Any]], None, None]:
    number = 0
    while line := file.readline(LINE_BYTES + 1):
        number += 1
        where = f"{name}, line {number}"
        if len(line) > LINE_BYTES:
            raise _too_long(where, "a line", LINE_BYTES)
        text = _decoded(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line, where)
        if not text.strip():
            continue
        try:
            row = json.loads(text, object_pairs_hook=_once)
        except (ValueError, RecursionError) as error:
            hint = "each line is one JSON object; write lists of objects as one object a line, or name a CSV file .csv"
            raise DatasetError(f"{where} is no JSON: {error}", hint=hint) from None
        if not isinstance(row, dict):
            raise DatasetError(f"{where} is {_kind(row)}, not an object", hint='each line is an object: {"question": "..."}')
        yield number, row


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        twice = next(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
        raise ValueError(f'"{one_line(twice, 40)}" is given twice')
    return row


def _csv(file: io.BufferedReader, name: str) -> Generator[tuple[int, Mapping[str, Any]], None, None]:
    def lines() -> Iterator[str]:
        number = 0
        while line := file.readline(LINE_BYTES + 1):
            number += 1
            if len(line) > LINE_BYTES:
                raise _too_long(f"{name}, line {number}", "a line", LINE_BYTES)
            yield _decoded(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line, f"{name}, line {number}")

    reader = csv.reader(lines(), strict=True)
    # The limit of the module, which is the process's, is lower than ours.
    before = csv.field_size_limit(LINE_BYTES)
    try:
        header = [column.strip() for column in next(reader, [])]
        if len(set(header)) < len(header):
            twice = next(column for column, times in Counter(header).items() if times > 1)
            raise DatasetError(f'{name} has two columns "{one_line(twice, 40)}"', hint="name each column once")
        start = reader.line_num + 1
        for cells in reader:
            where = f"{name}, line {start}"
            if cells and len(cells) != len(header):
                wrong = f"{where} has {len(cells)} cells, and the header has {len(header)}"
                raise DatasetError(wrong, hint="put cells with commas or line breaks in double quotes")
            if any(cell.strip() for cell in cells):
                yield start, {column: _cell(cell, column, where) for column, cell in zip(header, cells, strict=True) if cell}
            start = reader.line_num + 1
    except csv.Error as error:
        raise DatasetError(f"{name}, line {reader.line_num} is no CSV: {error}", hint="quote cells with double quotes") from None
    finally:
        csv.field_size_limit(before)


def _cell(cell: str, column: str, where: str) -> Any:
    """A cell's text, or what its JSON says where the column holds more than a text."""
    kind = COLUMNS.get(ALIASES.get(column, column), "text")
    if kind == "text" or (kind == "any" and not cell.lstrip().startswith("{")):
        return cell
    if len(cell.encode(errors="replace")) > CELL_BYTES:
        raise _too_long(where, f'"{column}"', CELL_BYTES)
    try:
        return json.loads(cell)
    except (ValueError, RecursionError):
        raise DatasetError(
            f'{where}: "{column}" is no JSON: {one_line(cell, 60)}', hint=f"in CSV it is written as {_FORMS[kind]}"
        ) from None


def _decoded(line: bytes, where: str) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DatasetError(f"{where} is not UTF-8 (byte {error.start + 1})", hint="save the file as UTF-8") from None


# --- from rows to cases ---


def _dataset(name: str, rows: Iterable[tuple[int, Mapping[str, Any]]]) -> Dataset:
    cases: list[Case] = []
    ids: dict[str, int] = {}
    contents: dict[str, int] = {}
    turns: Counter[str] = Counter()
    ignored: Counter[str] = Counter()
    for number, row in rows:
        where = f"{name}, line {number}"
        if not is_text(row):
            raise DatasetError(f"{where} has half of a surrogate pair", hint="write the whole character, or leave it out")
        known = _known(row, where)
        ignored.update(str(column) for column in row if ALIASES.get(column, column) not in COLUMNS)
        known.pop("turn", None)
        thread = known.get("thread")
        if isinstance(thread, str) and thread:
            known["turn"] = turns[thread]
            turns[thread] += 1
        case = case_of(known, where)
        if case.id in ids:
            same = " and says the same" if "id" not in known else ""
            raise DatasetError(
                f'{where} has the id "{one_line(case.id, 60)}" of line {ids[case.id]}{same}',
                hint="give each case an id of its own, once",
            )
        said = _said(case)
        if said in contents:
            raise DatasetError(
                f"{where} says the same as line {contents[said]}", hint="a case that counts twice is left out once"
            )
        ids[case.id], contents[said] = number, number
        cases.append(case)
    if not cases:
        raise DatasetError(f"{name} has no cases", hint='each line is an object: {"question": "...", "answer": "..."}')
    notes = [f'column "{one_line(column, 40)}" is not used ({count} cases)' for column, count in ignored.most_common(20)]
    return Dataset(name, tuple(cases), tuple(notes))


def _known(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The columns that are used, by their own names. One that is nearly the name of one is a slip of the pen."""
    found: dict[str, Any] = {}
    for column, value in row.items():
        name = ALIASES.get(column, column)
        if name not in COLUMNS:
            near = get_close_matches(str(column).lower(), [*COLUMNS, *ALIASES], n=1, cutoff=0.8)
            if near:
                raise DatasetError(f'{where} has a column "{one_line(str(column), 40)}"', hint=f'did you mean "{near[0]}"?')
            continue
        if name in found and value is not None:
            raise DatasetError(f'{where} has "{name}" under two names', hint=f'"{column}" is another name of "{name}"')
        if value is not None:
            found[name] = value
    if "question" not in found and "input" not in found and "question" not in row and "input" not in row:
        columns = ", ".join(f'"{one_line(str(column), 30)}"' for column in list(row)[:12]) or "none"
        raise DatasetError(
            f'{where} has no "question"',
            hint=f'each case needs a "question", or an "input" for the graph; its columns are {columns}',
        )
    return found


def _typed(value: Any, kind: str, where: str, column: str) -> Any:
    if value is None:
        return None
    size = len(value.encode(errors="replace")) if isinstance(value, str) else len(_dump(value).encode(errors="replace"))
    if size > CELL_BYTES:
        raise _too_long(where, f'"{column}"', CELL_BYTES, size)
    good = {
        "text": lambda: isinstance(value, str),
        "texts": lambda: isinstance(value, list) and all(isinstance(one, str) for one in value),
        "calls": lambda: isinstance(value, list) and all(_is_call(one) for one in value),
        "object": lambda: isinstance(value, dict),
        "rubric": lambda: isinstance(value, dict) and bool(value) and all(isinstance(one, str) for one in value.values()),
        "any": lambda: isinstance(value, str | dict),
    }[kind]()
    if not good:
        raise DatasetError(f'{where}: "{column}" must be {_FORMS[kind]}, not {_kind(value)}')
    if kind == "texts":
        return tuple(value)
    if kind == "calls":
        return tuple(ToolCall(one["name"], dict(one.get("arguments", one.get("args", {}))), "") for one in value)
    return value


def _is_call(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return False
    return isinstance(value.get("arguments", value.get("args", {})), dict)


def _said(case: Case) -> str:
    return _dump({name: value for name, value in case.plain().items() if name not in ("id", "tags")})


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=True, sort_keys=True, separators=(",", ":"))


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "true or false"
    kinds = {str: "a text", int: "a number", float: "a number", list: "this list", dict: "this object", type(None): "nothing"}
    return kinds.get(type(value), type(value).__name__)


def _too_long(where: str, what: str, limit: int, size: int | None = None) -> DatasetError:
    has = f"has {size:,} bytes" if size is not None else "is too long"
    return DatasetError(
        f"{where}: {what} {has}; at most {limit:,} bytes are read", hint="put long texts into a collection: agentops ingest"
    )
