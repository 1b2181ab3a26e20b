"""The engine: answers requests with a model, keeps its KV cache warm, and counts every token.

`Engine` is the protocol; `LocalEngine` runs a model in this process, `ScriptedEngine` plays answers that a test wrote.
The engine knows nothing of graphs, prompts, retrieval or the record.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Protocol, cast

from agentops.records import Delta, Generation, ModelInfo, Request, ScoreRequest, Scores


class Engine(Protocol):
    """A model back-end. All methods may be called from any event loop, concurrently."""

    @property
    def info(self) -> ModelInfo: ...

    def stream(self, request: Request) -> AsyncIterator[Delta | Generation]:
        """Yields `Delta`s as text is made, then the `Generation`, which is the last item.

        Closing the iterator early cancels the request and frees what it held.

        Raises:
            PromptTooLong, InputTooLarge, ConstraintInvalid, EngineOverloaded, EngineClosed
        """
        ...

    async def score(self, request: ScoreRequest) -> Scores:
        """Log-probability of each choice after the common prefix, which is computed once."""
        ...

    async def close(self) -> None:
        """Ends the engine; waiting requests get `EngineClosed`. Closing twice is harmless."""
        ...


async def generate(engine: Engine, request: Request) -> Generation:
    """The whole answer to one request."""
    # Whatever ends this early, the request must not go on until the stream is collected as garbage.
    async with aclosing(cast("AsyncGenerator[Delta | Generation]", engine.stream(request))) as events:
        async for event in events:
            if isinstance(event, Generation):
                return event
    raise RuntimeError("the engine ended its stream without a Generation")
