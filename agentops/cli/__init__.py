"""The command line: parses, delegates, and maps errors to exit codes. It holds no logic of its own.

Exit codes: 0 done, 1 failed, 2 the call is off, 130 stopped by its user, 143 told to end and to be resumed. Results go to
standard output, progress and errors to standard error. Every module here offers `register(app)` and imports what is heavy
inside its functions, so that `agentops --help` loads none of torch, langgraph, sqlmodel, textual or ragas.
"""

from __future__ import annotations

import io
import os
import sys

import typer

from agentops.cli import (
    backup,
    dataset,
    demo,
    documents,
    erase,
    evaluate,
    graph,
    history,
    house,
    init,
    metrics,
    models,
    prune,
    record,
    replay,
    run,
    stats,
    terminal,
)
from agentops.errors import AgentOpsError, BudgetSpent

app = typer.Typer(
    name="agentops",
    help="Run LangGraph agents on a GPTQ model in-process, with every step on record.",
    rich_markup_mode=None,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for part in (
    run,
    history,
    graph,
    init,
    record,
    stats,
    metrics,
    prune,
    backup,
    replay,
    erase,
    evaluate,
    dataset,
    documents,
    models,
    house,
    terminal,
    demo,
):
    part.register(app)


def main() -> None:
    """Console script. Our own errors are printed as one line and a hint; anything else is a defect and keeps its traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # What users and models write need not be valid Unicode, nor need the terminal's encoding hold it.
            stream.reconfigure(errors="backslashreplace")
    left_behind = False
    try:
        code = app()
    except AgentOpsError as error:
        from agentops.cli.render import clean

        print(clean(f"error: {error}"), file=sys.stderr)
        if error.hint:
            print(clean(f" hint: {error.hint}"), file=sys.stderr)
        code, left_behind = error.exit_code, isinstance(error, BudgetSpent)
    except SystemExit as ending:
        code = ending.code
    if left_behind or code in (130, 143):
        # A node that blocks its thread cannot be stopped; the interpreter would wait for it, and the run is over.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(code or 0))
    raise SystemExit(code)
