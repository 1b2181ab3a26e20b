"""Samples from the record: what a run was asked, what it said, what it found and what it called.

It knows the forms in which graphs speak (`question` and `answer`, or `messages`), and no graph. A run is read as it is on
record, with no model and no index; what the record cut for its size is named in the sample's `truncated`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from agentops.errors import RecordError
from agentops.grounding import coverage
from agentops.records import Message, Role, ToolCall, Usage, content_hash
from agentops.store import CaseRow, RunRow, SpanRow, Store
from agentops.text import split_sentences
from evals.datasets import Case, Dataset, case_of
from evals.samples import Context, Reference, Sample

_ROLES: dict[str, Role] = {"system": "system", "user": "user", "assistant": "assistant", "tool": "tool"}


def read_sample(store: Store, run: RunRow, reference: Reference | None = None, case_id: str = "") -> Sample:
    """The sample of a recorded run. One that failed, or waits for a person, is read as far as it came."""
    whole = _Whole(store)
    spans = store.spans(run.id)
    given = whole(run.input_hash, "question")
    output = whole(run.output_hash, "answer", "output", "cited", "messages")
    question, answer = question_in(given), answer_in(output)
    found = list(_contexts(spans, whole))
    calls, results = _calls(spans, whole)
    return Sample(
        question=question,
        answer=answer,
        contexts=tuple(context for context, _ in found),
        cited=_cited(output, answer, found),
        messages=tuple(_messages(output, question, answer, results)),
        tool_calls=calls,
        output=output,
        usage=run.usage,
        spent=_spent(spans),
        latency_ms=_latency_ms(spans),
        reference=reference or Reference(),
        thread_id=run.thread_id,
        run_id=run.id,
        case_id=case_id,
        truncated=frozenset(whole.missed),
    )


def frozen_dataset(store: Store, dataset_hash: str, name: str) -> Dataset:
    """A dataset as an experiment was begun with, its cases in the order of their ids.

    Raises:
        RecordError: it is not on record, or not whole.
    """
    rows = store.whole(dataset_hash)
    return Dataset(name, tuple(case_of(store.whole(key), case_id) for case_id, key in rows))


class Samples:
    """Gives the samples behind cases, for reports: of experiments with their references, of recorded runs without."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._datasets: dict[str, dict[str, Case]] = {}

    def __call__(self, row: CaseRow) -> Sample | None:
        """None where the case has no run.

        Raises:
            RecordError
        """
        if not row.run_id:
            return None
        case = self._cases(row.experiment_id).get(row.case_id) if row.experiment_id else None
        sample = read_sample(self._store, self._store.run(row.run_id), case.reference if case else None, row.case_id)
        return replace(sample, question=case.question) if case and not sample.question else sample

    def _cases(self, experiment_id: str) -> dict[str, Case]:
        if experiment_id not in self._datasets:
            about = self._store.experiment(experiment_id)
            found = frozen_dataset(self._store, about.dataset_hash, about.dataset)
            self._datasets[experiment_id] = {case.id: case for case in found.cases}
        return self._datasets[experiment_id]


class _Whole:
    """Reads payloads, and remembers the fields behind those that are cut or not there."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.missed: set[str] = set()

    def __call__(self, key: str | None, *fields: str) -> Any:
        if key is None:
            return None
        try:
            return self._store.whole(key)
        except RecordError:
            self.missed.update(fields)
        try:
            return self._store.payload(key)
        except RecordError:
            return None


def question_in(given: Any) -> str:
    """What a run was asked: the `question` of its input, the last message of a user, or its only text."""
    if isinstance(given, str):
        return given
    if not isinstance(given, Mapping):
        return ""
    if isinstance(given.get("question"), str):
        return str(given["question"])
    asked = [message.content for message in _plain_messages(given.get("messages")) if message.role == "user"]
    texts = [value for value in given.values() if isinstance(value, str)]
    return asked[-1] if asked else texts[0] if len(texts) == 1 else json.dumps(given, ensure_ascii=False)


def answer_in(output: Any) -> str:
    """What a run said: the `answer` of its output, the last message of the assistant, or its only text."""
    if isinstance(output, str):
        return output
    if not isinstance(output, Mapping):
        return ""
    if isinstance(output.get("answer"), str):
        return str(output["answer"])
    said = [message.content for message in _plain_messages(output.get("messages")) if message.role == "assistant"]
    texts = [value for value in output.values() if isinstance(value, str)]
    return said[-1] if said else texts[0] if len(texts) == 1 else ""


def _plain_messages(messages: Any) -> Iterator[Message]:
    for one in messages if isinstance(messages, list) else ():
        if isinstance(one, Mapping) and (role := _ROLES.get(str(one.get("role")))):
            content = one.get("content")
            parts = content if isinstance(content, list) else [content]
            yield Message(
                role, "".join(str(part.get("text", "")) if isinstance(part, Mapping) else str(part or "") for part in parts)
            )


def _messages(output: Any, question: str, answer: str, results: Sequence[str]) -> Iterator[Message]:
    """The conversation up to the answer. Results of tools stand before it; those of earlier turns are not told again."""
    if isinstance(output, Mapping) and (told := list(_plain_messages(output.get("messages")))):
        yield from told
        return
    history = output.get("history") if isinstance(output, Mapping) else None
    turns = [turn for turn in history if isinstance(turn, Mapping)] if isinstance(history, list) else []
    if turns and turns[-1].get("answer") == answer:
        turns = turns[:-1]
    for turn in turns:
        yield Message("user", str(turn.get("question", "")))
        yield Message("assistant", str(turn.get("answer", "")))
    if question:
        yield Message("user", question)
    for result in results:
        yield Message("tool", result)
    if answer:
        yield Message("assistant", answer)


def _contexts(spans: Sequence[SpanRow], whole: _Whole) -> Iterator[tuple[Context, tuple[str, str]]]:
    """Each document once, with its source and heading: the first of every search, then the second of every search, ..."""
    best: dict[str, tuple[int, int]] = {}
    found: dict[str, tuple[Context, tuple[str, str]]] = {}
    searches = [span for span in spans if span.kind == "retrieval" and span.output_hash]
    for number, span in enumerate(searches):
        hits = whole(span.output_hash, "contexts", "cited")
        for rank, hit in enumerate(hits if isinstance(hits, list) else ()):
            if not isinstance(hit, Mapping) or not isinstance(hit.get("text"), str):
                continue
            about = hit["metadata"] if isinstance(hit.get("metadata"), Mapping) else {}
            source = str(hit.get("source") or about.get("source") or "")
            key = str(hit.get("id") or content_hash(hit["text"].encode("utf-8", "backslashreplace")))
            best[key] = min(best.get(key, (rank, number)), (rank, number))
            place = source, str(about.get("heading") or about.get("title") or "")
            found.setdefault(key, (Context(key, hit["text"], source), place))
    for key in sorted(found, key=lambda one: best[one]):
        yield found[key]


def _cited(output: Any, answer: str, found: Sequence[tuple[Context, tuple[str, str]]]) -> dict[str, int]:
    """The documents that the output's `sources` stand for. A section may have been cut into several: of those the one is meant
    that has most of the words of the sentences which cite it."""
    sources = output.get("sources") if isinstance(output, Mapping) else None
    cited: dict[str, int] = {}
    for one in sources if isinstance(sources, list) else ():
        if not isinstance(one, Mapping) or "n" not in one:
            continue
        number, place = str(one["n"]), (str(one.get("source", "")), str(one.get("heading", "")))
        candidates = [index for index, (_, there) in enumerate(found) if there == place]
        said = _citing(answer, number)
        if candidates:
            cited[number] = max(candidates, key=lambda index: (coverage(said, found[index][0].text) if said else 0.0, -index))
    return cited


def _citing(answer: str, number: str) -> str:
    mark = re.compile(rf"\[(?:\d+\s*,\s*)*{re.escape(number)}(?:\s*,\s*\d+)*\]")
    return " ".join(re.sub(r"\[[\d,\s]+\]", "", part) for part in split_sentences(answer) if mark.search(part))


def _calls(spans: Sequence[SpanRow], whole: _Whole) -> tuple[tuple[ToolCall, ...], list[str]]:
    """The calls in the order in which they were first made, and what came of each. One that was made again, because its run was
    taken up again, counts once."""
    calls: dict[str, tuple[ToolCall, str]] = {}
    for span in spans:
        if span.kind != "tool":
            continue
        asked = whole(span.input_hash, "tool_calls", "messages")
        arguments = dict(asked) if isinstance(asked, Mapping) else {} if asked is None else {"input": asked}
        key = str(span.attributes.get("call") or span.attributes.get("tool_call_id") or span.id)
        made = whole(span.output_hash, "messages")
        said = span.error or (made if isinstance(made, str) else json.dumps(made, ensure_ascii=False))
        calls[key] = ToolCall(span.name, arguments, key), said
    return tuple(call for call, _ in calls.values()), [said for _, said in calls.values()]


def _spent(spans: Sequence[SpanRow]) -> dict[str, Usage]:
    """Usage by the model's name; that of a model which did not tell its name is under ''."""
    found: dict[str, Usage] = {}
    for span in spans:
        if span.usage != Usage():
            name = span.model or ""
            found[name] = found.get(name, Usage()) + span.usage
    return found


def _latency_ms(spans: Sequence[SpanRow]) -> float:
    """The time of all sittings of a run. 0 where one has no end: a process that died did not tell when."""
    times = [span.duration_ns for span in spans if span.kind == "workflow" and span.parent_id is None]
    return 0.0 if None in times else sum(time for time in times if time is not None) / 1e6
