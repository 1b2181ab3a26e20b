"""Metrics: what can be said of a sample, as a score.

A metric never raises for what it is given: a judge that fails, or a reference that is missing, leaves the sample unscored, with
the reason. Which samples are scored, and in what order, is not decided here.
"""

from __future__ import annotations

import json
from typing import Any, Protocol

from agentops.records import Score
from evals.samples import Sample

NO_REFERENCE = "no_reference"
"""Why a sample has no score where the metric needs a reference that it does not have."""


class Unscored(Exception):
    """There is nothing to be scored; the message is the reason."""


def in_one_form(value: Any) -> str:
    """Arguments of a tool as JSON that is the same for equal ones: keys are sorted, and a whole number has no decimal point."""
    return json.dumps(_whole(value), sort_keys=True, ensure_ascii=False, default=str)


def _whole(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _whole(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_whole(one) for one in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


class Metric(Protocol):
    """`version` changes with what decides a score, a prompt or fitted weights among it; `low` and `high` are its bounds, and
    `better` says which end of them is good."""

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> str: ...

    @property
    def low(self) -> float: ...

    @property
    def high(self) -> float: ...

    @property
    def better(self) -> str:
        """ "high" or "low"."""

    async def score(self, sample: Sample) -> Score: ...
