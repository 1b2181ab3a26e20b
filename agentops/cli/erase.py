"""`agentops erase`: takes a person's threads out of everything that is kept."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Annotated

import typer

from agentops.errors import UsageError


def register(app: typer.Typer) -> None:
    app.command("erase")(erase)


def erase(
    user: Annotated[str | None, typer.Option(help="Every thread in which a run was labelled with this user.")] = None,
    thread: Annotated[str | None, typer.Option("--thread", "-t", help="This thread.")] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be erased.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Erase a user's threads, or one thread, from the record, the journal, the checkpoints and the caches for good."""
    from agentops.cli.render import clean
    from agentops.erasing import erase as take_out
    from agentops.erasing import finish
    from agentops.settings import load_settings

    if (user is None) == (thread is None):
        raise UsageError("give a user or a thread", hint="agentops erase --user NAME, or agentops erase --thread THREAD")
    settings = load_settings()
    if not dry_run and finish(settings):
        print("what an erase that was broken off had left is gone", file=sys.stderr)
    meant = take_out(settings, user=user, thread=thread, dry_run=True)
    whose = f"user '{user}'" if user is not None else f"thread '{thread}'"
    what = f"{len(meant.threads):,} threads with {meant.runs:,} runs of {whose}"
    if not dry_run:
        if not yes:
            if not sys.stdin.isatty():
                raise UsageError(f"erasing {what} needs a yes", hint="say it with --yes, or look first with --dry-run")
            typer.confirm(clean(f"Erase {what} for good?"), abort=True, err=True)
        meant = take_out(settings, user=user, thread=thread)
    if as_json:
        print(json.dumps({**dataclasses.asdict(meant), "dry_run": dry_run}, indent=2))
        return
    if dry_run:
        print(clean(f"would erase {what}, up to {meant.contents:,} contents and {meant.files:,} files:"))
        for one in meant.threads:
            print(clean(f"  {one}"))
        return
    print(
        clean(
            f"erased {what}: {meant.spans:,} spans, {meant.scores:,} scores, {meant.contents:,} contents, {meant.files:,} files"
        )
    )
    if meant.shared:
        print(f"{meant.shared:,} contents stay, because runs of others have the same")
    for line in meant.left:
        print(clean(line), file=sys.stderr)
