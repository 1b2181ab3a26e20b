"""What a terminal is given: tokens for people, and a run as a tree with its waterfall.

`clean` comes before everything that a model, a document, a tool or a user wrote. Nothing here reads files or the record,
and rich is only loaded by what draws.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from agentops.records import Usage
from agentops.text import clean, count, duration, moment, one_line, short_name

if TYPE_CHECKING:
    from rich.text import Text

    from agentops.records import Interrupt
    from agentops.store import RunRow, SpanRow

__all__ = ["clean", "count", "duration", "moment", "one_line"]


def tokens(usage: Usage) -> str:
    """`input/cached/output`, empty when there are none."""
    if not usage.input_tokens and not usage.output_tokens:
        return ""
    return f"{count(usage.input_tokens)}/{count(usage.cached_tokens)}/{count(usage.output_tokens)}"


_MARKS = {"error": "✗", "interrupted": "⏸", "cancelled": "■", "crashed": "✗", "open": "…"}
_COLOURS = {"error": "red", "crashed": "red", "interrupted": "yellow", "cancelled": "yellow", "open": "cyan"}
_KINDS = {"generation": "magenta", "retrieval": "blue", "tool": "green", "workflow": "bold", "agent": "bold"}
STATUS_COLOURS = {
    "done": "green",
    "running": "cyan",
    "waiting": "yellow",
    "cancelled": "yellow",
    "failed": "red",
    "crashed": "red",
}
_TOKEN_CELLS = 16
_TIME_CELLS = 9


@dataclass(frozen=True, slots=True)
class _Line:
    number: int
    lead: str
    span: SpanRow
    usage: Usage


def trace_tree(spans: Sequence[SpanRow], width: int, now_ns: int | None = None) -> Iterator[Text]:
    """A head, and one line a span: its number, the tree, tokens (with those of everything below), time, and its bar.

    Bars share one scale below each workflow span. `now_ns` ends the bars of spans that are still open.
    """
    from rich.text import Text

    width = max(80, width)
    number_cells = len(str(len(spans))) + 1
    bar_cells = max(14, (width - 52) // 3)
    label_cells = width - number_cells - _TOKEN_CELLS - _TIME_CELLS - bar_cells - 4
    head = f"{'':{number_cells}} {'span':{label_cells}} {'in/cached/out':>{_TOKEN_CELLS}} {'time':>{_TIME_CELLS}}"
    yield Text(head, style="dim")
    edges = {root: _edges(group, now_ns) for root, group in _grouped(spans).items()}
    for line in _walk(spans):
        span = line.span
        text = Text(f"{line.number:>{number_cells}} ", style="dim")
        label = Text(line.lead, style="dim", end="")
        label.append_text(_label(span))
        label.truncate(label_cells, overflow="ellipsis", pad=True)
        text.append_text(label)
        text.append(f" {tokens(line.usage):>{_TOKEN_CELLS}} {duration(span.duration_ns):>{_TIME_CELLS}} ")
        start_ns, end_ns = edges[span.root_id]
        colour = _COLOURS.get(span.status) or _KINDS.get(span.kind, "").replace("bold", "") or "white"
        text.append(_bar(span, start_ns, end_ns, bar_cells), style=colour)
        text.rstrip()
        yield text


def _label(span: SpanRow) -> Text:
    from rich.text import Text

    label = Text()
    if mark := _MARKS.get(span.status):
        label.append(f"{mark} ", style=_COLOURS[span.status])
    label.append(one_line(short_name(span.name) if span.kind == "workflow" else span.name, 60), style=_KINDS.get(span.kind, ""))
    if span.kind != "node":
        label.append(f" {span.kind}", style="dim")
    for note in _notes(span):
        label.append(f"  {one_line(note, 100)}", style="red" if note == span.error else "dim")
    return label


def _notes(span: SpanRow) -> Iterator[str]:
    if span.attempt and span.attempt > 1:
        yield f"attempt {span.attempt}"
    if span.prompt_name:
        yield span.prompt_name
    if span.kind == "retrieval" and "hits" in span.attributes:
        yield f"{span.attributes['hits']} hits"
    if route := span.attributes.get("route"):
        yield f"→ {route}"
    if span.status in ("crashed", "cancelled", "interrupted"):
        yield span.status
    if span.error:
        yield span.error


def _grouped(spans: Sequence[SpanRow]) -> dict[str, list[SpanRow]]:
    groups: dict[str, list[SpanRow]] = {}
    for span in spans:
        groups.setdefault(span.root_id, []).append(span)
    return groups


def _edges(group: Sequence[SpanRow], now_ns: int | None) -> tuple[int, int]:
    start_ns = min(span.start_ns for span in group)
    end_ns = max(span.start_ns + (span.duration_ns or 0) for span in group)
    if now_ns is not None and any(span.status == "open" for span in group):
        end_ns = max(end_ns, now_ns)
    return start_ns, max(end_ns, start_ns + 1)


def _bar(span: SpanRow, start_ns: int, end_ns: int, cells: int) -> str:
    scale = cells / (end_ns - start_ns)
    left = min(cells - 1, int((span.start_ns - start_ns) * scale))
    stop_ns = end_ns if span.duration_ns is None else span.start_ns + span.duration_ns
    length = max(1, min(cells - left, round((stop_ns - start_ns) * scale) - left))
    return " " * left + ("┄" if span.duration_ns is None else "━") * length


def _walk(spans: Sequence[SpanRow]) -> Iterator[_Line]:
    """Depth first without recursion: a trace may be deeper than Python's stack. Orphans of a damaged record come last."""
    numbers = {span.id: number for number, span in enumerate(spans, 1)}
    children: dict[str | None, list[SpanRow]] = {}
    for span in spans:
        above = span.parent_id if span.parent_id in numbers and span.parent_id != span.id else None
        children.setdefault(above, []).append(span)
    sums = _sums(spans, children)
    stack = [(span, "", "") for span in reversed(children.get(None, []))]
    while stack:
        span, lead, below = stack.pop()
        yield _Line(numbers[span.id], lead, span, sums[span.id])
        inner = children.get(span.id, [])
        for index, child in reversed(list(enumerate(inner))):
            last = index == len(inner) - 1
            stack.append((child, below + ("└─ " if last else "├─ "), below + ("   " if last else "│  ")))


def _sums(spans: Sequence[SpanRow], children: dict[str | None, list[SpanRow]]) -> dict[str, Usage]:
    order: list[SpanRow] = []
    stack = list(children.get(None, []))
    while stack:
        span = stack.pop()
        order.append(span)
        stack += children.get(span.id, [])
    sums: dict[str, Usage] = {span.id: Usage() for span in spans}
    for span in reversed(order):
        below = sum((sums[child.id] for child in children.get(span.id, [])), Usage())
        sums[span.id] = below + span.usage if span.kind == "generation" else below
    return sums


def interrupt_lines(run_id: str, asked: Interrupt, *, several: bool = False, full: bool = True) -> list[str]:
    """What a run asks a person, cleaned, and the command that answers. `full` shows the whole content."""
    import json

    from agentops.tracer import to_plain

    lines = [f"⏸ {one_line(asked.question, 500)}  ({asked.kind}, {one_line(asked.node, 60)}, id {asked.id})"]
    if asked.content is not None:
        content = to_plain(asked.content)
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False, indent=2)
        lines += [f"    {line}" for line in clean(text).split("\n")] if full else [f"    {one_line(text, 100)}"]
    if full and asked.kind == "question" and asked.schema is not None:
        lines.append(f"    the answer must fit: {one_line(json.dumps(asked.schema), 400)}")
    edited = "--edit FILE" if asked.content is None or isinstance(asked.content, str) else "--edit FILE (of JSON)"
    answer = {"approval": f"--approve | {edited} | --reject", "question": "--answer TEXT", "pause": "--approve"}[asked.kind]
    which = f"--id {asked.id[:8]} " if several else ""
    return [*lines, f"  answer with: agentops resume {run_id} {which}{answer}"]


def run_header(run: RunRow) -> list[Text]:
    """Status, graph, thread, time, tokens and error of a run, a line each."""
    from rich.text import Text

    first = Text("run ", style="dim")
    first.append(run.id, style="bold")
    first.append(f"  {run.status}", style=STATUS_COLOURS.get(run.status, ""))
    usage = run.usage
    spent = f"{usage.computed_tokens:,} computed + {usage.cached_tokens:,} cached = {usage.input_tokens:,} input, "
    rows = [
        ("graph", run.graph),
        ("thread", run.thread_id),
        ("started", f"{moment(run.started_ns)}  took {duration(run.duration_ns)}"),
        ("tokens", spent + f"{usage.output_tokens:,} output"),
    ]
    if usage.trimmed_tokens:
        rows.append(("trimmed", f"{usage.trimmed_tokens:,} tokens were cut from prompts"))
    lines = [first]
    for name, value in rows:
        line = Text(f"{name:8} ", style="dim")
        line.append(clean(value), style="default")
        lines.append(line)
    if run.error:
        lines.append(Text.assemble((f"{'error':8} ", "dim"), (clean(run.error), "red")))
    return lines
