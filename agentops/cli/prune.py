"""The verbs `prune`, which takes runs out of the record by a rule, `pin` and `unpin`, which say what stays."""

from __future__ import annotations

import dataclasses
import json
import sys
from datetime import timedelta
from typing import Annotated

import typer

from agentops.errors import UsageError

_DAY_NS = int(timedelta(days=1).total_seconds()) * 10**9


def register(app: typer.Typer) -> None:
    app.command()(prune)
    app.command()(pin)
    app.command()(unpin)


def prune(
    keep_last: Annotated[int | None, typer.Option(min=0, help="Only the so many newest runs stay.")] = None,
    keep_days: Annotated[float | None, typer.Option(min=0.0, help="Only runs that began in the last so many days stay.")] = None,
    graph: Annotated[str | None, typer.Option(help="Only among the runs of this graph, named as it was run.")] = None,
    experiments: Annotated[bool, typer.Option("--experiments", help="Also runs of experiments; their results stay.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Take old runs out of the record, with all that is theirs. Without a rule: by record.keep_runs and record.keep_days."""
    from agentops import retention
    from agentops.cli.progress import counted
    from agentops.cli.record import _reference
    from agentops.cli.render import clean, moment, one_line
    from agentops.clock import SystemClock
    from agentops.settings import load_settings
    from agentops.sync import run_sync
    from agentops.text import short_name

    settings, now_ns = load_settings(), SystemClock().now_ns()
    if keep_last is None and keep_days is None:
        keep_last, keep_days = settings.record.keep_runs or None, settings.record.keep_days or None
    if keep_last is None and keep_days is None and not settings.record.sample:
        raise UsageError(
            "there is no rule of what stays", hint="give --keep-last or --keep-days, or set record.keep_runs or record.keep_days"
        )
    rule = retention.Rule(
        runs=keep_last,
        since_ns=None if keep_days is None else now_ns - int(keep_days * _DAY_NS),
        graph=_reference(graph) if graph else None,
        experiments=experiments,
    )
    chosen = retention.plan(settings, rule, now_ns=now_ns)
    report = {
        "dry_run": dry_run,
        "runs": [run.id for run in chosen.runs],
        "stay": chosen.stay,
        "sampled_out": list(chosen.thinned),
        "spared": {
            "unfinished": chosen.unfinished,
            "in_experiments": chosen.in_experiments,
            "recent": chosen.recent,
            "pinned": chosen.pinned,
        },
    }
    if not as_json:
        for run in chosen.runs[:20] if dry_run else ():
            print(f"{run.id}  {moment(run.started_ns)}  {run.status:9}  {one_line(short_name(run.graph), 40)}")
        if dry_run and len(chosen.runs) > 20:
            print(f"... and {len(chosen.runs) - 20:,} more")
        spared = [
            f"{count:,} {why}"
            for count, why in (
                (chosen.unfinished, "not at their end"),
                (chosen.in_experiments, "of experiments"),
                (chosen.pinned, "pinned"),
                (chosen.recent, f"ended in the last {retention.RECENT_S // 60} minutes"),
            )
            if count
        ]
        said = f"{len(chosen.runs):,} runs go, {chosen.stay:,} stay" + (f" (spared: {', '.join(spared)})" if spared else "")
        print(said, file=sys.stdout if dry_run else sys.stderr)
        if chosen.thinned:
            said = f"of {len(chosen.thinned):,} runs that were sampled out, the spans go"
            print(said, file=sys.stdout if dry_run else sys.stderr)
    if dry_run or not (chosen.runs or chosen.thinned):
        if as_json:
            print(json.dumps(report, indent=2))
        return
    if not yes:
        if not sys.stdin.isatty():
            raise UsageError("nobody can be asked whether they may go", hint="give --yes, or look first with --dry-run")
        typer.confirm(f"take {len(chosen.runs):,} runs out of the record?", abort=True, err=True)
    with counted("runs", quiet=as_json) as tell:
        done = run_sync(retention.prune(settings, chosen, tell=tell))
    removed = done.removed
    if as_json:
        counts = {name: value for name, value in dataclasses.asdict(removed).items() if name != "threads"}
        print(json.dumps({**report, "removed": {**counts, "threads": done.threads}, "busy": done.busy}, indent=2))
        return
    print(
        f"gone: {removed.runs:,} runs, {removed.spans:,} spans, {removed.contents:,} contents"
        f" ({removed.content_bytes / 1e6:.1f} MB), {removed.scores:,} scores, checkpoints of {done.threads:,} threads"
    )
    if done.busy:
        print(f"in use, still there: {clean(', '.join(done.busy[:5]))}{', ...' if len(done.busy) > 5 else ''}")


_RUN = Annotated[str, typer.Argument(metavar="RUN", help="A run's id, a unique beginning of it, or the word last.")]
_JSON = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def pin(run: _RUN, as_json: _JSON = False) -> None:
    """Let a run stay, whatever the rule of agentops prune says."""
    _pinned(run, True, as_json)


def unpin(run: _RUN, as_json: _JSON = False) -> None:
    """Let a pinned run go when the rule says so."""
    _pinned(run, False, as_json)


def _pinned(run: str, stays: bool, as_json: bool) -> None:
    from agentops.cli.record import _record
    from agentops.clock import SystemClock
    from agentops.settings import load_settings
    from agentops.store import open_writer

    with _record() as store:
        found = store.run(run).id
    with open_writer(load_settings()) as writer:
        if stays:
            writer.pin(found, SystemClock().now_ns())
        else:
            writer.unpin(found)
    print(json.dumps({"run": found, "pinned": stays}) if as_json else f"{found}: {'pinned' if stays else 'not pinned'}")
