"""The tracer: records a run while it happens, at the price of one append an event, and never hurts it.

`open_tracer` gives the process its `Tracer`; `Tracer.start_run` gives a `RunTrace` whose `handler` goes into a graph's
callbacks; `TracedEngine` and `TracedRetriever` wrap what nodes call; `span` and `tagged` serve one's own code.
The tracer does not read the record: that is the store's part. Importing it does not load LangGraph or SQL.
"""

from __future__ import annotations

from agentops.tracer.trace import Handle, RunTrace, Span, Tracer, open_tracer, span, tagged
from agentops.tracer.wrappers import TracedEngine, TracedRetriever

__all__ = ["Handle", "RunTrace", "Span", "TracedEngine", "TracedRetriever", "Tracer", "open_tracer", "span", "tagged"]
