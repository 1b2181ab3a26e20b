"""The verb `stats`: what runs, nodes, models and prompts took, in time, errors, tokens and money."""

from __future__ import annotations

import csv
import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agentops.errors import UsageError

if TYPE_CHECKING:
    from agentops.prices import Price
    from agentops.store.stats import Group, Grouping

_NAMES = {"graph": ("graph",), "node": ("graph", "node"), "model": ("model",), "prompt": ("prompt", "version")}
_UNITS = {"graph": "runs", "node": "times", "model": "calls", "prompt": "calls"}


def register(app: typer.Typer) -> None:
    app.command()(stats)


def stats(
    since: Annotated[str | None, typer.Option(help="Only runs that started since: 30m, 1h, 7d, or 2026-11-01.")] = None,
    by: Annotated[
        list[str] | None, typer.Option(help="graph, node, model or prompt; may be repeated. All where none is.")
    ] = None,
    graph: Annotated[str | None, typer.Option(help="Only runs of this graph, named as it was run.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object with a list for each.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print comma-separated lines.")] = False,
) -> None:
    """Show times, errors, tokens and cost by graph, node, model and prompt version."""
    from agentops.cli.record import _record, _reference, _since
    from agentops.prices import load_prices
    from agentops.settings import load_settings

    wanted: list[Grouping] = []
    for name in by or _NAMES:
        if name not in _NAMES:
            raise UsageError(f"there are no numbers by '{name}'", hint="one of: " + ", ".join(_NAMES))
        wanted.append(name)  # type: ignore[arg-type]
    if as_json and as_csv:
        raise UsageError("both --json and --csv were given", hint="take one of them")
    prices = load_prices(load_settings())
    began = _since(since)
    with _record() as store:
        from agentops.store.stats import groups

        of = _reference(graph) if graph else None
        found = {one: groups(store, one, since_ns=began, graph=of) for one in wanted}
    rows = {one: [_row(one, group, prices) for group in listed] for one, listed in found.items()}
    if as_json:
        print(json.dumps(rows, indent=2))
    elif as_csv:
        _print_csv(rows)
    else:
        _print_tables(rows, any(row["cost"] is not None for listed in rows.values() for row in listed))


def _row(by: Grouping, group: Group, prices: dict[str, Price] | Any) -> dict[str, Any]:
    usage = group.tokens
    known = [prices[model].of(spent) for model, spent in group.usage.items() if model in prices]
    return {
        **dict(zip(_NAMES[by], group.key, strict=True)),
        "count": group.count,
        "errors": group.errors,
        "p50_ms": None if group.p50_ns is None else group.p50_ns / 1e6,
        "p95_ms": None if group.p95_ns is None else group.p95_ns / 1e6,
        "input_tokens": usage.input_tokens,
        "cached_tokens": usage.cached_tokens,
        "output_tokens": usage.output_tokens,
        # Where one model has no price, the sum of the others would look like all of it.
        "cost": sum(known) if known and len(known) == len(group.usage) else None,
    }


def _print_csv(rows: dict[Any, list[dict[str, Any]]]) -> None:
    names = ["by", "name", "part", *(name for name in _row_names() if name not in ("by", "name", "part"))]
    writer = csv.DictWriter(sys.stdout, names, lineterminator="\n")
    writer.writeheader()
    for by, listed in rows.items():
        for row in listed:
            keys = [row[name] for name in _NAMES[by]]
            values = {name: row[name] for name in _row_names()}
            writer.writerow({"by": by, "name": keys[0], "part": keys[1] if len(keys) > 1 else "", **values})


def _row_names() -> tuple[str, ...]:
    return ("count", "errors", "p50_ms", "p95_ms", "input_tokens", "cached_tokens", "output_tokens", "cost")


def _print_tables(rows: dict[Any, list[dict[str, Any]]], priced: bool) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from agentops.text import count, duration, one_line, short_name

    console = Console(markup=False, highlight=False, emoji=False)
    if not any(rows.values()):
        print("nothing on record")
        return
    for by, listed in rows.items():
        if not listed:
            continue
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for place, name in enumerate(_NAMES[by]):
            table.add_column(name, style="bold" if place == 0 else "", overflow="fold")
        for name in (_UNITS[by], "errors", "p50", "p95", "input", "cached", "output", *(["cost"] if priced else [])):
            table.add_column(name, justify="right", no_wrap=True)
        for row in listed:
            keys = [one_line(short_name(row[name]) if name == "graph" else row[name], 48) or "-" for name in _NAMES[by]]
            table.add_row(
                *keys,
                f"{row['count']:,}",
                f"{row['errors'] / row['count']:.1%}" if row["errors"] else "0",
                *(duration(None if row[name] is None else int(row[name] * 1e6)) for name in ("p50_ms", "p95_ms")),
                count(row["input_tokens"]),
                f"{row['cached_tokens'] / row['input_tokens']:.0%}" if row["input_tokens"] else "-",
                count(row["output_tokens"]),
                *([f"{row['cost']:,.4f}" if row["cost"] is not None else "-"] if priced else []),
            )
        console.print(table)
