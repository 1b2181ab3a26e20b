"""`agentops replay` and `diff`: proves a recorded run the same without a model, and lays two runs side by side."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agentops.errors import UsageError

if TYPE_CHECKING:
    from agentops.diff import Difference, Pair
    from agentops.replay import Replayed


def register(app: typer.Typer) -> None:
    app.command("replay")(replay)
    app.command("diff")(diff)


def replay(
    run: Annotated[
        str | None, typer.Argument(metavar="[RUN]", help="A run's id, a unique beginning of it, or the word last.")
    ] = None,
    thread: Annotated[str | None, typer.Option("--thread", "-t", help="Replay all runs of this thread.")] = None,
    graph: Annotated[
        str | None, typer.Option("--graph", "-g", help="Another graph in place of the recorded one: where does it diverge?")
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="A folder of prompts in place of the graph's.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a run.")] = False,
) -> None:
    """Run a recorded run again without a model. Everything from outside comes from the record; exit code 1 where it is not the
    same, with the first place where it diverges."""
    if (run is None) == (thread is None):
        raise UsageError("name a run or a thread, not both and not neither", hint="agentops replay last")
    from agentops.replay import replay as replayed
    from agentops.settings import load_settings

    if prompts is not None and not prompts.is_dir():
        raise UsageError(f"there is no folder {prompts}", hint="--prompts names a folder of .md files")
    same = True
    for found in replayed(load_settings(), run=run, thread=thread, graph=graph, prompts=prompts):
        same = same and found.same
        if as_json:
            print(json.dumps({**asdict(found), "same": found.same}))
        else:
            _show(found)
    if not same:
        raise typer.Exit(1)


def _show(found: Replayed) -> None:
    from agentops.cli.render import clean
    from agentops.text import short_name

    wrong = [each for each in found.supersteps if each.recorded != each.replayed]
    places = Counter(each.graph for each in found.supersteps)
    inner = ", ".join(f"{name} {times}" for name, times in places.items() if name)
    answered = ", ".join(f"{times} {_words(kind, times)}" for kind, times in sorted(found.answered.items()))
    steps = f"{places['']} supersteps" + (f" (inside: {inner})" if inner else "")
    ended = found.recorded_status
    if found.replayed_status != ended and not found.ended_early:
        ended = f"recorded {ended}, replayed {found.replayed_status}"
    print(clean(f"{'=' if found.same else '≠'} run {found.run_id}  {short_name(found.graph)}  {ended}"))
    hashes = "the same state after each" if not wrong else f"another state after {len(wrong)} of {len(found.supersteps)}"
    print(clean(f"  {steps}: {hashes}"))
    print(f"  output: {'the same' if found.output_same else 'another'}")
    print(f"  0 calls of a model, an index, a tool or a clock; from the record: {answered or 'nothing was needed'}")
    if found.ended_early:
        print(clean(f"  it ends where the record ends: {found.ended_early}"))
    if found.difference is not None:
        for line in difference_lines(found.difference, "recorded", "new"):
            print(f"  {line}")


def _words(kind: str, times: int) -> str:
    names = {"noted": "time, id or random number", "embedding": "embedding", "tool": "tool result", "memory": "store operation"}
    name = names.get(kind, kind)
    return name if times == 1 else "times, ids and random numbers" if kind == "noted" else f"{name}s"


def difference_lines(found: Difference, one: str, two: str) -> list[str]:
    """Where two runs differ first, for the terminal, cleaned."""
    from agentops.cli.render import clean, one_line

    def shown(value: Any) -> str:
        return one_line(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), 400)

    what = " ".join(part for part in (found.kind, found.name) if part and found.kind != "node")
    place = f"node {found.node}" if found.node else "the graph itself"
    width = max(len(one), len(two))
    return [
        clean(f"first difference: {place}, {f'{what}, ' if what else ''}{found.field}"),
        f"  {one:{width}}  {shown(found.one)}",
        f"  {two:{width}}  {shown(found.two)}",
    ]


def diff(
    one: Annotated[str, typer.Argument(metavar="A", help="A run's id, a unique beginning of it, or the word last.")],
    two: Annotated[str, typer.Argument(metavar="B", help="Another run.")],
    all_spans: Annotated[bool, typer.Option("--all", help="Show the spans that are the same, too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Lay two runs side by side, span by span. Exit code 1 where they are not the same."""
    from agentops.diff import Side, aligned, first_difference
    from agentops.settings import load_settings
    from agentops.store import open_store
    from agentops.tracer.drain import catch_up

    settings = load_settings()
    catch_up(settings, wait=True)
    with open_store(settings) as store:
        rows = [store.run(each) for each in (one, two)]
        sides = [Side(store, row.id) for row in rows]
        pairs = aligned(*sides)
        first = first_difference(*sides)
    if as_json:
        print(json.dumps({"runs": [row.id for row in rows], "same": first is None, "spans": [_as_json(pair) for pair in pairs]}))
    else:
        for pair in pairs:
            if all_spans or pair.differences or pair.one is None or pair.two is None:
                print(_line(pair))
        counts = Counter(_mark(pair) for pair in pairs)
        print(f"\n{counts['=']} spans the same, {counts['~']} changed, {counts['-']} only in A, {counts['+']} only in B")
        if first is not None:
            print("\n".join(difference_lines(first, "A", "B")))
    if first is not None:
        raise typer.Exit(1)


def _mark(pair: Pair) -> str:
    return "+" if pair.one is None else "-" if pair.two is None else "~" if pair.differences else "="


def _line(pair: Pair) -> str:
    from agentops.cli.render import clean, duration, one_line, tokens

    span = pair.one or pair.two
    assert span is not None
    sides = [f"{duration(each.duration_ns)} {tokens(each.usage)}".strip() if each else "" for each in (pair.one, pair.two)]
    changed = ", ".join(each.field for each in pair.differences)
    kind = "" if span.kind == "node" else f" {span.kind}"
    label = one_line(f"{'  ' * pair.depth}{span.name}{kind}", 60)
    lead = "  " * pair.depth
    return clean(f"{_mark(pair)} {lead}{label:{max(1, 44 - len(lead))}} {sides[0]:>22}  {sides[1]:>22}  {changed}").rstrip()


def _as_json(pair: Pair) -> dict[str, Any]:
    span = pair.one or pair.two
    assert span is not None
    return {
        "mark": _mark(pair),
        "depth": pair.depth,
        "kind": span.kind,
        "name": span.name,
        "a": pair.one.id if pair.one else None,
        "b": pair.two.id if pair.two else None,
        "differences": [asdict(each) for each in pair.differences],
    }
