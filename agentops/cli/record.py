"""The verbs that read the record: `runs` lists, `show` looks into one. They never write to it by themselves."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from agentops.errors import RecordError, RunNotFound, UsageError
from agentops.records import RunStatus

if TYPE_CHECKING:
    from rich.console import Console

    from agentops.store import RunRow, SpanRow, Store

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_STATUSES = get_args(RunStatus)
_TREE_LINES = 1_000


def register(app: typer.Typer) -> None:
    app.command()(runs)
    app.command()(inbox)
    app.command()(show)


def runs(
    status: Annotated[str | None, typer.Option(help="Only runs of this status: " + ", ".join(_STATUSES) + ".")] = None,
    graph: Annotated[str | None, typer.Option(help="Only runs of this graph, named as it was run.")] = None,
    thread: Annotated[str | None, typer.Option(help="Only runs of this thread.")] = None,
    since: Annotated[str | None, typer.Option(help="Only runs that started since: 30m, 1h, 7d, or 2026-11-01.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=1_000_000, help="At most so many, newest first.")] = 30,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False,
) -> None:
    """List recorded runs, newest first."""
    if status is not None and status not in _STATUSES:
        raise UsageError(f"no run can be '{status}'", hint="one of: " + ", ".join(_STATUSES))
    with _record() as store:
        wanted = _reference(graph) if graph else None
        found = store.runs(status=status, graph=wanted, thread=thread, since_ns=_since(since), limit=limit + 1)  # type: ignore[arg-type]
        asked = store.inputs(found[:limit])
    more = len(found) > limit
    if as_json:
        rows = [{**dataclasses.asdict(run), "input": asked.get(run.id)} for run in found[:limit]]
        print(json.dumps(rows, indent=2))
        return
    if not found:
        print("no runs" if any((status, graph, thread, since)) else 'no runs yet; start with: agentops run rag "a question"')
        return
    _table(found[:limit], {run_id: asked_text(given) for run_id, given in asked.items()})
    if more:
        print(f"... and more: --limit {limit * 4}")


def inbox(
    run: Annotated[str | None, typer.Argument(metavar="[RUN]", help="Show all that one run asks, in full.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False,
) -> None:
    """List what runs wait for, oldest first, and how to answer."""
    from agentops.cli.render import interrupt_lines, moment, one_line
    from agentops.text import short_name

    with _record() as store:
        waiting = [store.run(run)] if run else store.runs(status="waiting", limit=10_000)[::-1]
        asked = {row.id: store.pending(row) for row in waiting}
    if as_json:
        rows = [
            {
                "run": row.id,
                "thread": row.thread_id,
                "graph": row.graph,
                "since_ns": row.ended_ns,
                "interrupts": [dataclasses.asdict(one) for one in asked[row.id]],
            }
            for row in waiting
            if row.status == "waiting"
        ]
        print(json.dumps(rows, indent=2))
        return
    if run and waiting[0].status != "waiting":
        print(f"run {waiting[0].id} is {waiting[0].status}; it waits for nobody")
        return
    if not waiting:
        print("no run waits for an answer")
    for row in waiting:
        since = moment(row.ended_ns) if row.ended_ns else "-"
        print(f"run {row.id}  {one_line(short_name(row.graph), 60)}  thread {row.thread_id}  waits since {since}")
        for one in asked[row.id]:
            print("\n".join(interrupt_lines(row.id, one, several=len(asked[row.id]) > 1, full=bool(run))))
        if not asked[row.id]:
            print(f"  what it asks is not on record; answer with: agentops resume {row.id} --answer TEXT")
        print()


def show(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's id, a unique beginning of it, or the word last.")],
    span: Annotated[
        str | None, typer.Option(help="One span in full: its number in the tree, its id, or a name that only one has.")
    ] = None,
    messages: Annotated[bool, typer.Option(help="What every model call was asked and answered.")] = False,
    documents: Annotated[bool, typer.Option(help="What every search found.")] = False,
    whole: Annotated[bool, typer.Option("--all", help=f"Every span of the tree; else the first {_TREE_LINES:,}.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show a run as a tree, or one of its spans. The tree has tokens, times and a waterfall."""
    from agentops.cli.render import interrupt_lines

    with _record() as store:
        row = store.run(run)
        spans = store.spans(row.id)
        chosen = [_choose(spans, span, row.id)] if span is not None else []
        chosen += [one for one in spans if (messages and one.kind == "generation") or (documents and one.kind == "retrieval")]
        if as_json:
            print(json.dumps(_as_json(store, row, spans, {one.id for one in chosen}), indent=2))
            return
        console = _console()
        if span is None:
            _print_run(console, store, row, spans, whole)
            pending = store.pending(row)
            for asked in pending:
                print("\n".join(interrupt_lines(row.id, asked, several=len(pending) > 1)))
        for one in {one.id: one for one in chosen}.values():
            _print_span(console, store, one, spans.index(one) + 1, row.thread_id)


@contextmanager
def _record() -> Iterator[Store]:
    from agentops.settings import load_settings
    from agentops.store import open_store
    from agentops.tracer.drain import catch_up

    settings = load_settings()
    catch_up(settings)
    with open_store(settings) as store:
        yield store


def _console() -> Console:
    from rich.console import Console

    return Console(markup=False, highlight=False, emoji=False, soft_wrap=True)


def _since(text: str | None) -> int | None:
    if text is None:
        return None
    from agentops.clock import SystemClock

    if found := re.fullmatch(r"(\d{1,6})([smhdw])", text.strip()):
        return SystemClock().now_ns() - int(found[1]) * _UNITS[found[2]] * 1_000_000_000
    try:
        return int(datetime.fromisoformat(text.strip()).astimezone().timestamp() * 1e9)
    except (ValueError, OverflowError, OSError):
        raise UsageError(f"'{text}' is no time", hint="write 30m, 1h, 7d, 2026-11-01 or 2026-11-01T08:30") from None


def _reference(graph: str) -> str:
    """What is on record for a graph that is run under this name here: a file's absolute path, also of one that is gone."""
    from agentops.errors import GraphNotFound
    from agentops.project import locate

    path, _, attribute = graph.partition(":")
    if ".py" in graph or "/" in graph:
        return graph if graph.startswith("python:") else f"{Path(path).expanduser().absolute()}:{attribute or 'graph'}"
    try:
        return locate(graph).reference
    except GraphNotFound:
        return graph


def asked_text(given: Any) -> str:
    """What a run was started with, in one line: its only text where it has one."""
    if isinstance(given, dict):
        messages = given.get("messages")
        if isinstance(messages, list) and messages and isinstance(messages[-1], dict):
            return str(messages[-1].get("content", ""))
        if len(texts := [value for value in given.values() if isinstance(value, str)]) == 1:
            return str(texts[0])
    return given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)


def _table(rows: list[RunRow], asked: dict[str, str]) -> None:
    from rich.text import Text

    from agentops.cli.render import STATUS_COLOURS, duration, moment, one_line, tokens
    from agentops.text import short_name

    console = _console()
    wide = console.width >= 130
    cells = [
        (
            run.id,
            run.status,
            moment(run.started_ns),
            duration(run.duration_ns),
            tokens(run.usage),
            one_line(short_name(run.graph), 40),
            run,
        )
        for run in rows
    ]
    graph_cells = max(5, *(len(row[5]) for row in cells))
    id_cells = max(len(row[0]) for row in cells)
    head = f"{'run':{id_cells}}  {'status':9}  {'started':19}  {'time':>9}  {'in/cached/out':>16}"
    room = console.width - len(head) - graph_cells - 4
    console.print(Text(head + (f"  {'graph':{graph_cells}}  asked" if wide else "  graph"), style="dim"))
    for run_id, status, started, took, used, graph, run in cells:
        line = Text(f"{run_id:{id_cells}}  ")
        line.append(f"{status:9}", style=STATUS_COLOURS.get(status, ""))
        line.append(f"  {started}  {took:>9}  {used:>16}  {graph:{graph_cells}}")
        if wide:
            line.append(f"  {one_line(asked.get(run.id, ''), room)}", style="dim")
        line.rstrip()
        console.print(line)


def _choose(spans: list[SpanRow], wanted: str, run_id: str) -> SpanRow:
    if wanted.isdecimal() and 1 <= int(wanted) <= len(spans):
        return spans[int(wanted) - 1]
    found = [span for span in spans if span.id == wanted] or [
        span for span in spans if span.name == wanted or span.id.startswith((wanted, f"sp_{wanted.upper()}"))
    ]
    if len(found) != 1:
        said = f"{len(found)} spans are meant by" if found else "no span is meant by"
        raise RunNotFound(f"{said} '{wanted}'", hint=f"the numbers are in: agentops show {run_id}")
    return found[0]


def _content(store: Store, name: str | None) -> Any:
    if name is None:
        return None
    try:
        return store.payload(name)
    except RecordError as error:
        return {"$missing": str(error)}


def _as_json(store: Store, run: RunRow, spans: list[SpanRow], full: set[str]) -> dict[str, Any]:
    """Spans with the content of their input and output where that was asked for."""

    def with_content(row: RunRow | SpanRow, wanted: bool) -> dict[str, Any]:
        plain = dataclasses.asdict(row)
        if wanted:
            plain |= {"input": _content(store, row.input_hash), "output": _content(store, row.output_hash)}
        return plain

    balance = store.balance(run.id)
    return {
        "run": with_content(run, True),
        "pinned": run.id in store.pinned(),
        "balance": {**dataclasses.asdict(balance), "balanced": balance.balanced},
        "spans": [with_content(span, span.id in full) for span in spans],
    }


def _print_run(console: Console, store: Store, run: RunRow, spans: list[SpanRow], whole: bool) -> None:
    from rich.text import Text

    from agentops.cli.render import clean, one_line, run_header, trace_tree
    from agentops.clock import SystemClock

    for line in run_header(run):
        console.print(line)
    for name, content in (("input", run.input_hash), ("output", run.output_hash)):
        if content is not None:
            shown = _content(store, content)
            text = shown if isinstance(shown, str) else json.dumps(shown, ensure_ascii=False)
            console.print(Text.assemble((f"{name:8} ", "dim"), one_line(text, max(80, console.width) - 10)))
    root = next((span.attributes for span in spans if "forked_from" in span.attributes), None)
    if root is not None:
        inside = f" of {root['forked_in']}" if "forked_in" in root else ""
        began = f"{root['forked_from']}, after step {root['forked_step']}{inside} (checkpoint {root['forked_at']})"
        console.print(Text.assemble((f"{'fork of':8} ", "dim"), clean(began)))
    if run.id in store.pinned():
        console.print(Text.assemble((f"{'pinned':8} ", "dim"), "stays whatever agentops prune is told"))
    balance = store.balance(run.id)
    told = f"{balance.emitted} spans emitted, {balance.stored} stored, {balance.truncated} payloads truncated"
    if balance.sampled_out:
        told += f", {balance.sampled_out} sampled out"
    if balance.faults:
        told += f", {balance.faults} faults"
    if balance.missing:
        told += f", {balance.missing} contents missing"
    if balance.orphans:
        told += f", {balance.orphans} called from threads of unknown place"
    state = ("balanced", "green") if balance.balanced else ("NOT BALANCED", "bold red")
    console.print(Text.assemble((f"{'balance':8} ", "dim"), told + ": ", state))
    console.print()
    lines = trace_tree(spans, console.width, SystemClock().now_ns() if run.status == "running" else None)
    for line in lines if whole else islice(lines, _TREE_LINES + 1):
        console.print(line)
    if not whole and len(spans) > _TREE_LINES:
        left = f"{len(spans) - _TREE_LINES:,} more spans: all of them with --all, or look through them with: agentops tui"
        console.print(Text(left, style="yellow"))
    console.print()
    console.print(Text(f"one span in full: agentops show {run.id} --span NUMBER", style="dim"))


def _print_span(console: Console, store: Store, span: SpanRow, number: int, thread: str) -> None:
    from rich.text import Text

    from agentops.cli.render import clean, duration, moment

    def row(name: str, value: Any) -> None:
        if value not in (None, "", 0, 0.0):
            console.print(Text.assemble((f"{name:12} ", "dim"), clean(str(value))))

    console.print(Text(f"── {number} · {span.kind} {clean(span.name)} · {span.status} ──", style="bold"))
    row("span", span.id)
    row("parent", span.parent_id)
    row("run", f"{span.run_id}  thread {thread}")
    row("node", span.node)
    row("step", span.step)
    row("task", span.task)
    row("namespace", span.checkpoint_ns)
    row("attempt", span.attempt)
    row("started", moment(span.start_ns))
    row("took", duration(span.duration_ns))
    row("model", span.model)
    row("prompt", span.prompt_name and f"{span.prompt_name}  {span.prompt_version}")
    if span.usage.input_tokens or span.usage.output_tokens:
        usage = span.usage
        computed = f"{usage.computed_tokens:,} computed + {usage.cached_tokens:,} cached = {usage.input_tokens:,} input"
        row("tokens", f"{computed}, {usage.output_tokens:,} output")
    row("trimmed", span.usage.trimmed_tokens)
    timing = {name: value for name, value in dataclasses.asdict(span.timing).items() if value}
    row("timing", ", ".join(f"{name.removesuffix('_ms').replace('_', ' ')} {value:.1f} ms" for name, value in timing.items()))
    for name, value in span.attributes.items():
        if name != "stack":
            row(name, value)
    if span.error:
        console.print(Text.assemble((f"{'error':12} ", "dim"), (clean(span.error), "red")))
    for name, content in (("input", span.input_hash), ("output", span.output_hash)):
        if content is not None:
            _print_content(console, name, _content(store, content))
    if stack := span.attributes.get("stack"):
        console.print(Text("stack", style="dim"))
        console.print(Text(clean(str(stack))))
    console.print()


def _print_content(console: Console, name: str, value: Any) -> None:
    """Messages as a conversation, documents as a list, anything else as indented JSON."""
    from rich.text import Text

    from agentops.cli.render import clean

    said: Any = value.get("messages") if isinstance(value, dict) else None
    rest = {key: item for key, item in value.items() if key != "messages"} if isinstance(value, dict) else None
    if _all_have(said, "role", "content"):
        console.print(Text(name, style="dim"))
        for message in said:
            console.print(Text(f"  {clean(str(message['role']))}:", style="bold"))
            console.print(Text(_indented(message["content"])))
        if not rest:
            return
        value, name = rest, "with"
    if _all_have(value, "text", "source"):
        console.print(Text(f"{name}: {len(value)} documents", style="dim"))
        for rank, hit in enumerate(value, 1):
            score = hit.get("score")
            legs = " ".join(f"{name} {place}" for name in ("vector", "lexical") if (place := _leg(hit.get(name))))
            shown = f"{score:.4f}" if isinstance(score, int | float) else "-"
            console.print(Text(f"  [{rank}] {clean(str(hit['source']))}  {shown}  {legs}".rstrip(), style="bold"))
            console.print(Text(_indented(hit["text"])))
        return
    console.print(Text(name, style="dim"))
    console.print(Text(_indented(value)))


def _leg(found: Any) -> str:
    """`#1 (0.812)`; nothing for what another retriever keeps under a leg's name."""
    match found:
        case {"rank": int(rank), "score": int() | float() as score}:
            return f"#{rank} ({score:.3f})"
    return ""


def _all_have(value: Any, *names: str) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) and set(names) <= set(item) for item in value)


def _indented(value: Any) -> str:
    from agentops.cli.render import clean

    text = value if isinstance(value, str) else json.dumps(value, indent=2, ensure_ascii=False)
    return "\n".join("    " + line for line in clean(text).split("\n"))
