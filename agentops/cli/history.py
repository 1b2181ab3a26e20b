"""`agentops history` and `state`: the checkpoints of a run or a thread, and what one of them holds."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated, Any

import typer

from agentops.cli.run import open_runtime
from agentops.errors import UsageError

Run = Annotated[str | None, typer.Argument(metavar="[RUN]", help="Id of the run, a unique beginning of it, or 'last'.")]
Thread = Annotated[str | None, typer.Option("--thread", "-t", help="All of this thread instead of one run.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def register(app: typer.Typer) -> None:
    app.command("history")(history)
    app.command("state")(state)


def history(run: Run = None, thread: Thread = None, as_json: AsJson = False) -> None:
    """List the checkpoints of a run or a thread, oldest first, those of its subgraphs too: what made them and what comes next."""
    from agentops.cli.render import clean

    with open_runtime({}, quiet=True) as runtime:
        found = runtime.history(run, thread=thread)
    if as_json:
        print(json.dumps([_plain(one, values=False) for one in found], indent=2))
        return
    runs = list(dict.fromkeys(one.run_id for one in found))
    for run_id in runs:
        print(clean(f"run {run_id}"))
        mine = [one for one in found if one.run_id == run_id]
        places = [" / ".join((*one.graph.split("/"), str(one.step))) if one.graph else str(one.step) for one in mine]
        widths = max(map(len, places)), max(len(", ".join(one.by)) for one in mine)
        for one, place in zip(mine, places, strict=True):
            after = ", ".join(one.next) or "-"
            by = ", ".join(one.by)
            print(clean(f"  {one.id}  {place:{widths[0]}}  {one.source:6}  {by:{widths[1]}}  -> {after}"))


def state(
    run: Run = None,
    thread: Thread = None,
    at: Annotated[str | None, typer.Option("--at", help="This checkpoint, of a subgraph too (see: agentops history).")] = None,
    step: Annotated[int | None, typer.Option("--step", help="The checkpoint after this step. Default: the newest.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show the values of the state at a checkpoint."""
    from agentops.cli.render import clean

    if at is not None and step is not None:
        raise UsageError("give one of --at and --step", hint="--at takes any checkpoint, --step one of the graph itself")
    with open_runtime({}, quiet=True) as runtime:
        found = runtime.state(run, thread=thread, at=at, step=step)
    plain = _plain(found, values=True)
    if as_json:
        print(json.dumps(plain, indent=2))
        return
    where = f" in {found.graph}" if found.graph else ""
    print(clean(f"checkpoint {found.id}  step {found.step}{where}  {found.source}  next: {', '.join(found.next) or '-'}"))
    for name, value in plain["values"].items():
        print(clean(f"{name}: {json.dumps(value, ensure_ascii=False, indent=2)}"))


def _plain(snapshot: Any, *, values: bool) -> dict[str, Any]:
    from agentops.tracer import to_plain

    shown = {field.name: getattr(snapshot, field.name) for field in dataclasses.fields(snapshot) if field.name != "values"}
    plain: dict[str, Any] = to_plain(shown | ({"values": snapshot.values} if values else {}))
    return plain
