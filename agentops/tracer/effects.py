"""What comes to a graph from outside beside models and documents: times, ids, random numbers, and what tools give.

Live effects happen, and are noted on the span that they happen in. A replay puts others in their place, which give what was
noted.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, TypeVar
from uuid import UUID

from agentops.clock import Clock
from agentops.records import ToolCall, ToolResult
from agentops.tracer.trace import Way, locate

if TYPE_CHECKING:
    from langchain_core.callbacks import BaseCallbackHandler
    from langchain_core.tools import BaseTool

T = TypeVar("T", int, float, str)


def repeats(what: str) -> int:
    """How often the node that runs now has asked for the same before, since it began; outside of a run always 0."""
    if (place := locate()) is None:
        return 0
    run, parent, _ = place
    return run.repeats(parent, what)


class Effects:
    """Effects that happen now. `handlers` are told by LangChain what happens in the run, beside the tracer."""

    handlers: Sequence[BaseCallbackHandler] = ()

    def value(self, kind: str, make: Callable[[], T]) -> T:
        """What `make` gives, a number or a text, on record under `kind`."""
        made = make()
        if (place := locate()) is not None:
            run, parent, _ = place
            run.note(parent, kind, made)
        return made

    async def tool(self, call: ToolCall, perform: Callable[[], Awaitable[ToolResult]]) -> ToolResult:
        """What comes of a tool's call. The caller has opened its span."""
        return await perform()

    def server_tools(self) -> Sequence[BaseTool] | None:
        """Tools in place of those that servers offer; None where the servers themselves are asked."""
        return None

    def foreign(self, kind: str, name: str) -> None:
        """Called before a model, a tool, a retriever or the like that a graph has brought itself is called; what it raises stops
        the call."""

    def leaving(self, call: UUID, place: Way) -> None:
        """Called when a node is done or has failed, with its LangChain run id."""

    def random(self) -> float:
        """A random number from 0 up to 1."""
        return self.value("random", random.random)


class NotedClock:
    """A clock whose readings are noted."""

    def __init__(self, clock: Clock, effects: Effects) -> None:
        self._clock = clock
        self._effects = effects

    def now_ns(self) -> int:
        return self._effects.value("now_ns", self._clock.now_ns)

    def monotonic_ns(self) -> int:
        return self._effects.value("monotonic_ns", self._clock.monotonic_ns)
