"""The verbs `backup` and `restore`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    app.command()(backup)
    app.command()(restore)


def backup(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The file to write, such as monday.tar.zst.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Copy the record, the checkpoints and the journal into one file, while runs go on."""
    from agentops import backup as backups
    from agentops.cli.progress import counted
    from agentops.clock import SystemClock
    from agentops.settings import load_settings

    with counted("files", quiet=as_json) as tell:
        made = backups.backup(load_settings(), file, now_ns=SystemClock().now_ns(), tell=tell)
    if as_json:
        about = {"file": str(made.file), "threads": made.threads, "segments": made.segments, "bytes": made.size}
        print(json.dumps(about, indent=2))
    else:
        print(f"{made.file}: the record and {made.threads:,} threads in {made.size:,} bytes")


def restore(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What agentops backup has written.")],
    into: Annotated[Path | None, typer.Option(help="The home folder to put it into; paths.home where none is given.")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Move a home that is not empty aside, and keep it.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Put a backup back. Runs that were at work when it was taken are crashed then, and can be resumed."""
    from agentops import backup as backups
    from agentops.cli.render import moment
    from agentops.clock import SystemClock
    from agentops.settings import load_settings

    home = (into or load_settings().paths.home).expanduser().absolute()
    done = backups.restore(file, home, replace=replace, now_ns=SystemClock().now_ns())
    if as_json:
        before = None if done.before is None else str(done.before)
        print(
            json.dumps({"home": str(done.home), "taken_ns": done.taken_ns, "threads": done.threads, "before": before}, indent=2)
        )
        return
    print(f"{done.home}: the record and {done.threads:,} threads of {moment(done.taken_ns)}")
    if done.before is not None:
        print(f"what was there before is in {done.before}")
