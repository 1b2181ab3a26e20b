"""Which runs keep all their spans, by a rule: a share of all of them, or of those of a graph.

It is decided by the run's id, so that every process decides alike. Only a run that is done can be sampled out: one that
failed, waits, was cancelled or died is what a record is kept for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from agentops.errors import SettingsError
from agentops.settings import Settings
from agentops.text import short_name

_HINT = 'write it as "0.1" for a tenth of all runs, or "GRAPH=0.1" for those of one graph'


@dataclass(frozen=True, slots=True)
class Sampling:
    """The share of runs that is kept whole, by the graph's name or short name, and of all others."""

    share: float = 1.0
    graphs: Mapping[str, float] = field(default_factory=dict)

    def keeps(self, run_id: str, graph: str) -> bool:
        share = self.graphs.get(graph, self.graphs.get(short_name(graph), self.share))
        place = int.from_bytes(hashlib.blake2b(run_id.encode(), digest_size=7).digest())
        return place < share * (1 << 56)


def load_sampling(settings: Settings) -> Sampling:
    """
    Raises:
        SettingsError: `record.sample` has something that is no share, or two for the same.
    """
    shares: dict[str, float] = {}
    for text in settings.record.sample:
        name, _, written = text.rpartition("=")
        try:
            share = float(written)
        except ValueError:
            share = -1.0
        if not 0 <= share <= 1 or (name := name.strip()) in shares:
            raise SettingsError(f"{settings.source('record.sample')}: record.sample has no share in {text[:100]!r}", hint=_HINT)
        shares[name] = share
    return Sampling(shares.pop("", 1.0), shares)
