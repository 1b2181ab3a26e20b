"""What the screens remember from one time to the next, in `tui.json` in the home folder. One that cannot be read is none."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import asdict, dataclass, fields
from typing import Any

from agentops.errors import UsageError
from agentops.settings import Settings
from agentops.store.pages import SORTS
from agentops.text import clean
from tui.actions import SECTIONS
from tui.query import LONGEST, parse

FILE = "tui.json"


@dataclass(slots=True)
class State:
    theme: str = "textual-dark"
    section: str = "runs"
    filter: str = ""
    sort: str = "started"
    descending: bool = True
    follow: bool = False


def load_state(settings: Settings) -> State:
    """What was saved; of values that make no sense, the default."""
    state = State()
    try:
        found: Any = json.loads((settings.paths.home / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return state
    if isinstance(found, dict):
        for spec in fields(State):
            if type(value := found.get(spec.name)) is type(getattr(state, spec.name)):
                setattr(state, spec.name, clean(value[:LONGEST]) if isinstance(value, str) else value)
    state.section = state.section if state.section in SECTIONS else "runs"
    state.sort = state.sort if state.sort in SORTS else "started"
    try:
        parse(state.filter, 0)
    except UsageError:
        state.filter = ""
    return state


def save_state(settings: Settings, state: State) -> None:
    """Written whole or not at all; where it cannot be, nothing is remembered."""
    with contextlib.suppress(OSError):
        place = settings.paths.home / FILE
        new = place.with_suffix(f".{os.getpid()}.new")
        new.write_text(json.dumps(asdict(state), indent=2), encoding="utf-8")
        new.replace(place)
