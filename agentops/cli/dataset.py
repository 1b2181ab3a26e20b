"""`agentops dataset`: checks a file of cases, and makes one from recorded runs."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agentops.cli.record import _record, _reference, _since
from agentops.errors import RunNotFound, UsageError

if TYPE_CHECKING:
    from agentops.store import RunRow, Store
    from evals.datasets import Case
    from evals.report import Bar

_MOST_RUNS = 100_000


def register(app: typer.Typer) -> None:
    verbs = typer.Typer(help="Check datasets, and make them from recorded runs.", no_args_is_help=True, rich_markup_mode=None)
    verbs.command("check")(check)
    verbs.command("from-runs")(from_runs)
    app.add_typer(verbs, name="dataset")


def check(
    file: Annotated[Path, typer.Argument(help="A JSONL or CSV file.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check a dataset: say what is wrong and in which line, or what it has and its hash."""
    from agentops.cli.render import clean
    from evals.datasets import load_dataset
    from evals.metrics.registry import fitting

    found = load_dataset(file)
    metrics = fitting(case.reference for case in found.cases)
    if as_json:
        about = {"name": found.name, "hash": found.hash, "cases": len(found.cases), "columns": found.counts()}
        print(json.dumps({**about, "metrics": list(metrics), "notes": list(found.notes)}, indent=2))
        return
    print(clean(f"{found.name}: {len(found.cases)} cases, hash {found.hash}"))
    for name, count in found.counts().items():
        print(f"  {name:12} {count}")
    for note in found.notes:
        print(clean(f"  note: {note}"))
    print(f"  metrics that fit: {', '.join(metrics)}")


def from_runs(
    runs: Annotated[list[str] | None, typer.Argument(metavar="RUN", help="Recorded runs: ids, or last.")] = None,
    thread: Annotated[str | None, typer.Option("--thread", "-t", help="All runs of this thread.")] = None,
    since: Annotated[str | None, typer.Option(help="Runs recorded since: 30m, 1h, 7d, or 2026-11-01.")] = None,
    graph: Annotated[str | None, typer.Option("--graph", "-g", help="Only runs of this graph.")] = None,
    worse_than: Annotated[
        str | None,
        typer.Option(
            metavar="NAME=NUMBER", help="Only runs whose latest score of this name is worse; their answers are left out."
        ),
    ] = None,
    answers: Annotated[
        bool | None, typer.Option("--answers/--no-answers", help="Whether answers are taken as what is expected.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File to write; it must not be there yet.")] = None,
) -> None:
    """Make cases from recorded runs: what was asked, answered, retrieved and called. Look them over before you trust them."""
    from evals.datasets import dataset_of, to_jsonl

    bar = _bar(worse_than) if worse_than else None
    if not (runs or thread or since or bar):
        raise UsageError("no runs are named", hint="give ids, --thread, --since or --worse-than")
    if output is not None and output.exists():
        raise UsageError(f"{output} is there already", hint="name another file, or remove it")
    made: list[Case] = []
    left: list[str] = []
    with _record() as store:
        chosen = {run.id: run for run in map(store.run, runs or ())}
        if thread or since or (bar and not runs):
            found = store.runs(
                thread=thread, since_ns=_since(since), graph=_reference(graph) if graph else None, limit=_MOST_RUNS
            )
            chosen |= {run.id: run for run in reversed(found)}
        chosen = {key: run for key, run in chosen.items() if bar is None or _is_worse(store, key, bar)}
        if not chosen:
            raise RunNotFound("no recorded run is meant", hint="list them with: agentops runs")
        for run in chosen.values():
            case, why = _case(store, run, answers if answers is not None else bar is None)
            if case is None:
                left.append(f"run {run.id} is left out: {why}")
            else:
                made.append(case)
    cases: list[Case] = []
    said: set[str] = set()
    # A turn of a conversation is one of its thread: the same words elsewhere are another case.
    for case in _threads(made, {run.id: run.thread_id for run in chosen.values()}):
        key = json.dumps({**case.plain(), "id": ""}, sort_keys=True)
        if key in said and not case.thread:
            left.append(f"run {case.id} is left out: it says the same as another")
        else:
            said.add(key)
            cases.append(case)
    for line in left:
        print(line, file=sys.stderr)
    if not cases:
        raise RunNotFound("none of the runs makes a case", hint="see why above")
    text = to_jsonl(cases)
    dataset = dataset_of("cases", map(json.loads, text.splitlines()))
    if output is None:
        print(text, end="")
    else:
        # What could not be written whole is not there.
        partial = output.with_name(f".{output.name}.partial")
        try:
            partial.write_text(text, encoding="utf-8")
            partial.replace(output)
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise UsageError(f"{output} cannot be written: {error.strerror}", hint="name another file") from None
    print(f"{len(dataset.cases)} cases, hash {dataset.hash}" + (f", in {output}" if output else ""), file=sys.stderr)


def _case(store: Store, run: RunRow, answers: bool) -> tuple[Case | None, str]:
    """The case that a run makes, or why it makes none."""
    from evals.datasets import Case, is_text
    from evals.reading import read_sample
    from evals.samples import Reference

    if run.status != "done":
        return None, f"it is {run.status}"
    sample = read_sample(store, run)
    if cut := sample.truncated & {"question", "contexts", "tool_calls", *(("answer",) if answers else ())}:
        return None, f"its {', '.join(sorted(cut))} were cut in the record for their size"
    if not sample.question.strip():
        return None, "nothing was asked in words"
    reference = Reference(
        answer=sample.answer if answers and sample.answer.strip() else None,
        contexts=tuple(context.id for context in sample.contexts) or None,
        trajectory=sample.tool_calls or None,
    )
    given: Any = store.payload(run.input_hash) if run.input_hash else None
    plain = not isinstance(given, dict) or set(given) <= {"question"}
    case = Case(id=run.id, input=sample.question if plain else given, reference=reference)
    return (case, "") if is_text(case.plain()) else (None, "it has half of a surrogate pair")


def _threads(cases: list[Case], threads: dict[str, str]) -> list[Case]:
    """The cases with their threads, where several are of one."""
    from collections import Counter
    from dataclasses import replace

    shared = Counter(threads[case.id] for case in cases)
    return [replace(case, thread=threads[case.id]) if shared[threads[case.id]] > 1 else case for case in cases]


def _bar(text: str) -> Bar:
    from evals.report import parse_bars

    try:
        (bar,) = parse_bars([text])
    except UsageError:
        raise UsageError(f"'{text}' is no bar for a score", hint="write it as: --worse-than faithfulness=.5") from None
    return bar


def _is_worse(store: Store, run_id: str, bar: Bar) -> bool:
    """Of what people score, and of what no metric is called, more is better."""
    from evals.metrics.registry import ENTRIES

    values = [one.score.value for one in store.scores(run=run_id, name=bar.metric) if one.score.value is not None]
    low = bar.metric in ENTRIES and ENTRIES[bar.metric].better == "low"
    return bool(values) and (values[-1] > bar.value if low else values[-1] < bar.value)
