"""What does the command line cost before it does anything? CPU seconds of `agentops --help`, against bare typer.

The peer is the least that a command line built with typer can cost: `python -c "import typer"`. Both run in fresh
interpreters, in turns, so that a busy machine slows both alike; the smallest of the rounds is what the work costs.
Not measured: a cold file cache, and the verbs themselves.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys

OURS = {
    "help": ["-m", "agentops", "--help"],
    "version": ["-m", "agentops", "--version"],
    "run_help": ["-m", "agentops", "run", "--help"],
    "import_agentops": ["-c", "import agentops"],
}
PEER = ["-c", "import typer"]


def cpu_seconds(arguments: list[str]) -> float:
    """User and system time of one run in a fresh interpreter."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="5 rounds instead of 20")
    rounds = 5 if parser.parse_args().quick else 20
    best = dict.fromkeys([*OURS, "peer"], float("inf"))
    for _ in range(rounds):
        for name, arguments in [*OURS.items(), ("peer", PEER)]:
            best[name] = min(best[name], cpu_seconds(arguments))
    rows = [
        {
            "metric": name,
            "ours": round(best[name], 3),
            "peer": "python -c 'import typer'",
            "theirs": round(best["peer"], 3),
            "ratio": round(best["peer"] / best[name], 2),
            "unit": "CPU s",
        }
        for name in OURS
    ]
    print(f"{'':16} {'ours':>8} {'typer':>8} {'ratio':>6}   CPU seconds, best of {rounds}")
    for row in rows:
        print(f"{row['metric']:16} {row['ours']:8.3f} {row['theirs']:8.3f} {row['ratio']:6.2f}")
    machine = {"processor": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
    print(json.dumps({"bench": "startup", "machine": machine, "rows": rows}))


if __name__ == "__main__":
    main()
