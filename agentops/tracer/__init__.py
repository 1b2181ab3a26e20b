"""The tracer: records a run while it happens, at the price of one append an event, and never hurts it.

`open_tracer` gives the process its `Tracer`; `Tracer.start_run` gives a `RunTrace` whose `handler` goes into a graph's
callbacks; `TracedEngine` and `TracedRetriever` wrap what nodes call; `span` and `tagged` serve one's own code;
`catch_up` brings the store up to date before it is read; `to_plain` is the form in which values are recorded.
The tracer does not read the record: that is the store's part. Importing it does not load LangGraph or SQL.
"""

from __future__ import annotations

from agentops.tracer.drain import catch_up
from agentops.tracer.meter import Meter
from agentops.tracer.payload import to_plain
from agentops.tracer.recorder import Tracer, open_tracer
from agentops.tracer.trace import Handle, RunTrace, Span, span, tagged
from agentops.tracer.wrappers import TracedEngine, TracedRetriever

__all__ = [
    "Handle",
    "Meter",
    "RunTrace",
    "Span",
    "TracedEngine",
    "TracedRetriever",
    "Tracer",
    "catch_up",
    "open_tracer",
    "span",
    "tagged",
    "to_plain",
]
