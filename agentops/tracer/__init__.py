"""The tracer: records a run while it happens, at the price of one append an event, and never hurts it.

`open_tracer` gives the process its `Tracer`; `Tracer.start_run` gives a `RunTrace` whose `handler` goes into a graph's
callbacks; `TracedEngine` and `TracedRetriever` wrap what nodes call; `span`, `tagged` and `carried` serve one's own code;
`catch_up` brings the store up to date before it is read; `to_plain` is the form in which values are recorded.
The tracer does not read the record: that is the store's part. Importing it does not load LangGraph or SQL.
"""

from __future__ import annotations

from agentops.tracer.drain import catch_up
from agentops.tracer.effects import Effects, NotedClock
from agentops.tracer.meter import Meter
from agentops.tracer.payload import state_hash, to_plain
from agentops.tracer.recorder import Tracer, open_tracer
from agentops.tracer.trace import Handle, RunTrace, Span, Way, carried, locate, span, tagged, way
from agentops.tracer.wrappers import TracedEmbedder, TracedEngine, TracedRetriever, asked

__all__ = [
    "Effects",
    "Handle",
    "Meter",
    "NotedClock",
    "RunTrace",
    "Span",
    "TracedEmbedder",
    "TracedEngine",
    "TracedRetriever",
    "Tracer",
    "Way",
    "asked",
    "carried",
    "catch_up",
    "locate",
    "open_tracer",
    "span",
    "state_hash",
    "tagged",
    "to_plain",
    "way",
]
