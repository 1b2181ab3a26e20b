"""Choosing: which of several described options a request is for, by how likely the model finds the request given each.

A small model that is asked to name an option names the first or the last; what it finds likely tells more. This module
decides nothing by itself; thresholds are its caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from agentops.engine import Engine
from agentops.grounding import relevance
from agentops.records import Message
from agentops.retrieval import Embedder


@dataclass(frozen=True, slots=True)
class Option:
    """How well one option fits a request; `score` is comparable among the options of one request only."""

    name: str
    score: float


async def choose(
    engine: Engine,
    embedder: Embedder,
    request: str,
    options: Mapping[str, str],
    ask: Callable[[str], tuple[Message, ...]],
) -> list[Option]:
    """The options (what each is for, by name) that fit the request, best first. `ask` makes the prompt to which the request
    would be the answer, from what an option is for.

    Raises:
        EngineError
    """
    names = list(options)
    found = await relevance(engine, embedder, request, [options[name] for name in names], ask, shortlist=len(names))
    return [Option(names[one.index], one.total) for one in found]
