"""Choosing: which of several described options a request is for, by how likely the model finds the request given each.

A small model that is asked to name an option names the first or the last; what it finds likely tells more. What an option
is for may end in example requests, which tell the most:

    Writes a line into the notes, to be remembered for later.

    Examples:
        Note: buy coffee.
        Remember that my seat is 14C.

This module decides nothing by itself; thresholds are its caller's.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from agentops.engine import Engine
from agentops.grounding import QUESTION_CHARACTERS, lifts
from agentops.records import Message
from agentops.retrieval import Embedder

EXAMPLES = 8
"""Example requests of an option that are read; each makes its prompt longer."""

_EXAMPLES = re.compile(r"(?:^|\s)Examples:\s*\n", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Option:
    """How well one option fits a request; `score` is comparable among the options of one request only."""

    name: str
    score: float


def described(text: str) -> tuple[str, list[str]]:
    """What an option is for and its example requests, out of a description that may end in `Examples:` and one a line."""
    what, *rest = _EXAMPLES.split(text, maxsplit=1)
    lines = rest[0].splitlines() if rest else []
    return what.strip(), [line.strip().removeprefix("- ") for line in lines if line.strip()][:EXAMPLES]


async def choose(
    engine: Engine,
    embedder: Embedder,
    request: str,
    options: Mapping[str, str],
    ask: Callable[[str], tuple[Message, ...]],
) -> list[Option]:
    """The options (what each is for, by name) that fit the request, best first. `ask` makes the prompt to which the request
    would be the answer, from what an option is for.

    A score is the sum of three: the cosine of the request's vector with that of what the option is for, the cosine with
    that of its nearest example, and half the mean lift of the request when the model has written the examples before.

    Raises:
        EngineError
    """
    if not options:
        return []
    request = request[-QUESTION_CHARACTERS:]
    about = {name: described(text) for name, text in options.items()}
    texts = {name: [f"{name.replace('_', ' ')}: {what}", *examples] for name, (what, examples) in about.items()}
    vectors = iter(await asyncio.to_thread(embedder.embed, [request, *(text for group in texts.values() for text in group)]))
    wanted = next(vectors)
    near = {name: [float(next(vectors) @ wanted) for _ in group] for name, group in texts.items()}
    gains = await lifts(engine, request, ask(""), [_after(ask(group[0]), group[1:]) for group in texts.values()])
    found = [
        Option(name, near[name][0] + max(near[name][1:], default=near[name][0]) + gain.mean / 2)
        for name, gain in zip(texts, gains, strict=True)
    ]
    return sorted(found, key=lambda option: -option.score)


def _after(prompt: tuple[Message, ...], examples: list[str]) -> tuple[Message, ...]:
    """The prompt as it is asked again by somebody who was given the examples for an answer."""
    return (*(turn for example in examples for turn in (*prompt, Message("assistant", example))), *prompt)
