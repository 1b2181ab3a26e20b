"""A span, a question or a case in full: facts, messages as a conversation, documents with their scores, everything else as JSON.

What is shown is made of `Part`s, in the reader's thread; the widget wraps them to its width. A part shows at most 64 KB.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from agentops.errors import AgentOpsError
from agentops.store import ScoreRow, SpanRow, Store
from agentops.text import duration, moment
from tui.text import PREVIEW_BYTES, as_text, cell, flatten, preview, wrapped
from tui.widgets.lines import Lines, Piece

_NAME_CELLS = 14


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a detail: `name` stands before the text, or above it where the text is a `block`. Both are foreign text."""

    name: str
    text: str
    ink: str = "plain"
    block: bool = False
    indent: int = 0


class Detail(Lines):
    """Shows parts, scrolled and wrapped."""

    has_cursor = False

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.parts: Sequence[Part] = ()
        self._lines: list[list[Piece]] = []
        self._wrapped_at = 0

    @property
    def line_count(self) -> int:
        return len(self._lines)

    def show_parts(self, parts: Sequence[Part], *, to_end: bool = False) -> None:
        same = [part.name for part in parts[:3]] == [part.name for part in self.parts[:3]] and parts[:1] == self.parts[:1]
        self.parts = parts
        self._wrap()
        if to_end:
            self.scroll_to(y=self.max_scroll_y, animate=False, force=True)
        elif not same:
            self.scroll_to(y=0, animate=False, force=True)
        self.refresh()

    def on_resize(self) -> None:
        if self.size.width != self._wrapped_at:
            self._wrap()

    def _wrap(self) -> None:
        self._wrapped_at = self.size.width
        width = max(20, self.size.width - 1)
        self._lines = [line for part in self.parts for line in _lines(part, width)]
        self.resized_lines()

    def pieces(self, index: int, width: int) -> Iterable[Piece]:
        return self._lines[index]


def _lines(part: Part, width: int) -> Iterator[list[Piece]]:
    lead = " " * part.indent
    text, cut = preview(part.text)
    if part.block:
        if part.name:
            yield [(lead + flatten(part.name, width), "strong")]
        for line in wrapped(text, width - part.indent - 2) if text else ():
            yield [(f"{lead}  {line}", part.ink)]
    else:
        for place, line in enumerate(wrapped(text, width - _NAME_CELLS - 1)):
            yield [(cell(part.name if place == 0 else "", _NAME_CELLS) + " ", "dim"), (line, part.ink)]
    if cut:
        yield [(f"{lead}  … only the first {PREVIEW_BYTES // 1024} KB are shown", "warn")]


def guarded(name: str, make: Callable[[], Iterable[Part]]) -> list[Part]:
    """The parts that `make` gives; where what is on record makes no sense, one that says so."""
    try:
        return list(make())
    except AgentOpsError:
        raise
    except Exception as error:
        return [Part(name, f"(it cannot be shown: {type(error).__name__}: {str(error)[:300]})", "warn", block=True)]


def span_parts(store: Store, span_id: str) -> list[Part]:
    """All that is on record of a span."""
    span = store.span(span_id)
    parts = guarded(span.kind, lambda: _facts(span))
    scores = [row for row in store.scores(run=span.run_id) if row.span_id in (None, span.id)]
    if span.parent_id is not None:
        scores = [row for row in scores if row.span_id == span.id]
    parts += score_parts(scores)
    for name, held in (("input", span.input_hash), ("output", span.output_hash)):
        if held is not None:
            parts += content_parts(name, content(store, held))
    parts += guarded("more", lambda: _small_print(span))
    if span.prompt_version:
        parts += _prompt(store, span)
    if stack := span.attributes.get("stack"):
        parts.append(Part("stack", str(stack), "dim", block=True))
    return parts


def content(store: Store, name: str) -> Any:
    """What a hash names; where it is gone or damaged, a sentence that says so."""
    try:
        return store.payload(name)
    except (AgentOpsError, RecursionError) as error:
        return f"({error})"


def _facts(span: SpanRow) -> Iterator[Part]:
    yield Part(span.kind, span.name, "strong")
    yield Part("status", span.status, "bad" if span.status in ("error", "crashed") else "good" if span.status == "ok" else "warn")
    if span.error:
        yield Part("error", span.error, "bad")
    yield Part("took", f"{duration(span.duration_ns)}  from {moment(span.start_ns)}")
    usage, timing = span.usage, span.timing
    if usage.input_tokens or usage.output_tokens:
        spent = f"{usage.computed_tokens:,} computed + {usage.cached_tokens:,} cached = {usage.input_tokens:,} input"
        yield Part(
            "tokens",
            f"{spent}, {usage.output_tokens:,} output" + (f", {usage.trimmed_tokens:,} trimmed" if usage.trimmed_tokens else ""),
        )
    waits = {name.removesuffix("_ms").replace("_", " "): value for name, value in asdict(timing).items() if value}
    if waits:
        yield Part("timing", ", ".join(f"{name} {value:.1f} ms" for name, value in waits.items()))
    if timing.decode_ms > 0 and usage.output_tokens:
        yield Part("speed", f"{usage.output_tokens / timing.decode_ms * 1000:.1f} tokens/s")
    if span.model:
        yield Part("model", span.model)
    if span.prompt_name:
        yield Part("prompt", f"{span.prompt_name}  {span.prompt_version}")


def _small_print(span: SpanRow) -> Iterator[Part]:
    yield Part("more", "", block=True)
    for name, value in (
        ("model", span.model),
        ("node", span.node),
        ("step", span.step),
        ("attempt", span.attempt),
        ("span", span.id),
    ):
        if value not in (None, ""):
            yield Part(name, str(value))
    for name, value in span.attributes.items():
        if name not in ("stack", "result"):
            yield Part(name, as_text(value))


def score_parts(rows: Sequence[ScoreRow]) -> Iterator[Part]:
    """A line a score, and its comment below."""
    for row in rows:
        score = row.score
        value = f"{score.value:.3f}" if score.value is not None else f"unscored: {score.reason}"
        by = " ".join(part for part in (score.source, row.author, score.judged) if part)
        yield Part("score", f"{score.name} {value}  ({by})", "live" if score.value is not None else "warn")
        if score.comment:
            yield Part("", score.comment, "dim")


def _prompt(store: Store, span: SpanRow) -> Iterator[Part]:
    try:
        template = store.prompt(str(span.prompt_version)).template
    except AgentOpsError:
        return
    yield Part(f"prompt {span.prompt_name}", template, "dim", block=True)


def content_parts(name: str, value: Any) -> list[Part]:
    """Messages as a conversation, documents as a list, anything else as it is or as JSON."""
    return guarded(name, lambda: _content_parts(name, value))


def _content_parts(name: str, value: Any) -> Iterator[Part]:
    said: Any = value.get("messages") if isinstance(value, Mapping) else None
    if _all_have(said, "role", "content"):
        yield Part(name, f"{len(said)} messages", "dim")
        for message in said:
            yield Part(str(message["role"]), as_text(message["content"]), block=True, indent=2)
        rest = {key: item for key, item in value.items() if key != "messages"}
        if rest:
            yield Part("with", as_text(rest), block=True)
        return
    if _all_have(value, "text", "source"):
        yield Part(name, f"{len(value)} documents", "dim")
        for rank, hit in enumerate(value, 1):
            legs = "  ".join(f"{leg} {place}" for leg in ("vector", "lexical") if (place := _leg(hit.get(leg))))
            score = hit.get("score")
            shown = f"{score:.4f}" if isinstance(score, int | float) else "-"
            yield Part(f"[{rank}] {shown}  {hit['source']}  {legs}", as_text(hit["text"]), block=True, indent=2)
        return
    yield Part(name, as_text(value), block=True)


def _leg(found: Any) -> str:
    match found:
        case {"rank": int(rank), "score": int() | float() as score}:
            return f"#{rank} ({score:.3f})"
    return ""


def _all_have(value: Any, *names: str) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) and set(names) <= set(one) for one in value)
