"""The filter of the list of runs: `status:failed,waiting graph:rag since:2h index`.

Fields come from a closed set; a word without a field must occur in the id, thread, graph, error or input. Quotes hold spaces
together.
"""

from __future__ import annotations

import re
import shlex
from datetime import datetime
from typing import get_args

from agentops.errors import UsageError
from agentops.records import RunStatus
from agentops.store.pages import RunFilter
from agentops.text import clean

LONGEST = 500
FIELDS = ("status", "graph", "thread", "since")
HELP = "status:failed,waiting  graph:rag  thread:th_1  since:2h  words"
STATUSES: tuple[str, ...] = get_args(RunStatus)
_UNITS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 604_800}


def parse(text: str, now_ns: int) -> RunFilter:
    """
    Raises:
        UsageError: an unknown field, status or time, a quote that is not closed, or more than `LONGEST` characters.
    """
    if len(text) > LONGEST:
        raise UsageError(f"the filter has {len(text):,} characters", hint=f"{LONGEST} are the most")
    try:
        words = shlex.split(clean(text), comments=False)
    except ValueError as error:
        raise UsageError(f"the filter cannot be read: {error}", hint=HELP) from error
    found: dict[str, list[str]] = {name: [] for name in FIELDS}
    loose: list[str] = []
    for word in words:
        name, colon, value = word.partition(":")
        if not colon:
            loose.append(word)
        elif name in found and value:
            found[name] += [part for part in value.split(",") if part]
        else:
            said = f"'{name}:' wants a value" if name in found else f"no field is called '{name}'"
            raise UsageError(said, hint=f"fields are: {', '.join(FIELDS)}")
    for status in found["status"]:
        if status not in STATUSES:
            raise UsageError(f"no run can be '{status}'", hint="one of: " + ", ".join(STATUSES))
    since = [_since(value, now_ns) for value in found["since"]]
    return RunFilter(
        tuple(found["status"]), tuple(found["graph"]), tuple(found["thread"]), max(since) if since else None, tuple(loose)
    )


def _since(text: str, now_ns: int) -> int:
    """Within what the record can hold: from 1970 to 2262."""
    if found := re.fullmatch(r"(\d{1,6})([smhdw])", text):
        return max(0, now_ns - int(found[1]) * _UNITS[found[2]] * 1_000_000_000)
    try:
        return max(0, min(2**63 - 1, int(datetime.fromisoformat(text).astimezone().timestamp() * 1e9)))
    except (ValueError, OverflowError, OSError):
        raise UsageError(f"'{text}' is no time", hint="write 30m, 1h, 7d, 2026-11-01 or 2026-11-01T08:30") from None
