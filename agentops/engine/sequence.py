"""A sequence: tokens, how far they are computed, and the blocks that hold their keys and values.

It knows neither text nor tensors, and not who asked for it.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

from agentops.engine.blocks import Node


@dataclass(eq=False, slots=True)
class Sequence:
    """Work for the scheduler.

    tokens: known tokens; a decoding sequence grows by one a step, by `room` at most.
    wanted_from: logits are wanted for this token and all after it.
    decodes: whether it goes on after its tokens are computed.
    owner: whoever gets the logits.
    inputs: how many tokens it began with; those after them were made by the model.
    private: its blocks are not offered to others.
    share: whose it is: sequences of different shares take turns, those of one stand in line.
    priority: who has more is admitted and read first, whatever its share.
    turn: when it was last in a step.
    forks, fork_at: private sequences that share the first `fork_at` tokens of this one and start when those are computed.
    """

    namespace: Hashable
    tokens: list[int]
    wanted_from: int
    owner: Any
    room: int = 0
    decodes: bool = False
    private: bool = False
    forks: tuple[Sequence, ...] = ()
    fork_at: int = 0
    share: Hashable = ""
    priority: int = 0

    table: list[int] = field(default_factory=list)
    computed: int = 0
    cached: int = 0
    published: int = 0
    node: Node = None
    copy_from: int | None = None
    over: bool = False
    inputs: int = 0
    turn: int = 0

    def __post_init__(self) -> None:
        self.inputs = len(self.tokens)

    @property
    def pending(self) -> int:
        """Tokens that are known and not computed."""
        return len(self.tokens) - self.computed


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens start..start+count-1 of a sequence, to be computed in the coming step."""

    sequence: Sequence
    start: int
    count: int

    @property
    def wanted(self) -> range:
        """The token numbers whose logits are wanted."""
        return range(max(self.start, self.sequence.wanted_from), self.start + self.count)
