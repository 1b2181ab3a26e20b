"""What an engine counts by itself, step by step, beside what its calls are told: the two must agree.

It knows neither requests nor tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from agentops.records import Timing, Usage

Outcome = Literal["answered", "cancelled", "failed", "expired"]
"""answered: the caller was sent the whole answer.  cancelled: it left before.  failed: it was sent an error, or the engine was
closed.  expired: its time was over."""


@dataclass(frozen=True, slots=True)
class Counters:
    """Since the engine was opened, and now.

    Requests: `taken` into the queue, of which `answered`, `cancelled`, `failed`, `expired`, and the rest `waiting` or `running`;
    `refused` is how many the full queue did not take. `usage` is every token read from the cache, computed and made, counted in
    the step in which that was; `lost` is the part of it that requests without an answer had cost, counted when they ended, so
    that the usages of all answers and `lost` are `usage`. `timing` is the sum over the answered ones. Blocks of `block_tokens`
    positions: those in use (pinned ones among them), those cached for whoever asks, free ones, and the most that were ever in
    use. `peak_memory_bytes` is of the process, on a GPU of what torch has taken there.
    """

    taken: int
    answered: int
    cancelled: int
    failed: int
    expired: int
    refused: int
    waiting: int
    running: int
    usage: Usage
    lost: Usage
    timing: Timing
    steps: int
    step_ms: float
    block_tokens: int
    used_blocks: int
    cached_blocks: int
    free_blocks: int
    pinned_blocks: int
    peak_blocks: int
    peak_memory_bytes: int
    device: str


class Tally:
    """The sums behind `Counters`, written by the engine's thread."""

    def __init__(self) -> None:
        self.taken = self.refused = self.steps = self.peak_blocks = 0
        self.step_ms = 0.0
        self.usage = self.lost = Usage()
        self.timing = Timing()
        self.ended: dict[Outcome, int] = dict.fromkeys(("answered", "cancelled", "failed", "expired"), 0)

    def step(self, usage: Usage, seconds: float, blocks: int) -> None:
        """A step read and computed that; so many blocks were in use."""
        self.steps += 1
        self.step_ms += seconds * 1e3
        self.usage += usage
        self.peak_blocks = max(self.peak_blocks, blocks)

    def end(self, how: Outcome, usage: Usage, timing: Timing) -> None:
        """A request has ended, having cost that."""
        self.ended[how] += 1
        if how == "answered":
            self.timing += timing
        else:
            self.lost += usage
