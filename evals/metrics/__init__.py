"""Metrics: what can be said of a sample, as a score.

A metric never raises for what it is given: a judge that fails, or a reference that is missing, leaves the sample unscored, with
the reason. Which samples are scored, and in what order, is not decided here.
"""

from __future__ import annotations

from typing import Protocol

from agentops.records import Score
from evals.samples import Sample

NO_REFERENCE = "no_reference"
"""Why a sample has no score where the metric needs a reference that it does not have."""


class Unscored(Exception):
    """There is nothing to be scored; the message is the reason."""


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
