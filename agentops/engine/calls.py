"""What one call wants from its sequences: a `GenerateCall` picks tokens and makes text, a `ScoreCall` weighs choices.

A call takes logits as its sequences are computed and says when it is over. It runs on the worker's thread and knows
neither the scheduler nor who listens.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from collections.abc import Sequence as Tokens
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from agentops.clock import Clock
from agentops.engine.sampler import Logits, Sampler, log_probabilities, log_sum_exp
from agentops.engine.sequence import Sequence
from agentops.engine.tokenizer import Writer
from agentops.records import (
    ChoiceScore,
    Completion,
    Delta,
    FinishReason,
    Footprint,
    Generation,
    ModelInfo,
    ScoreRequest,
    Scores,
    Timing,
    Usage,
)

Event = Delta | Generation | Scores | Exception


class Call:
    """Common to both: the root sequence, the way back to the caller, and when what happened."""

    made = 0
    """Tokens that were made for it so far."""
    trimmed = 0

    def __init__(self, sequence: Sequence, send: Callable[[Event], None], info: ModelInfo, clock: Clock) -> None:
        self.sequence = sequence
        self.send = send
        self.over = False
        self.ended: list[Sequence] = []
        """Sequences that need no more steps while others of the call go on."""
        self.blocks = 0
        """How many it was given."""
        self.shared = False
        """Whether others were at work at the same time."""
        self.deadline: int | None = None
        self.pins, self.pinned = False, 0
        """Whether the blocks of its prompt are to stay, and how many do."""
        self.energy_mj = 0
        self._events: list[Event] = []
        self._info, self._clock = info, clock
        self.arrived = clock.monotonic_ns()
        self.admitted: int | None = None
        self._first: int | None = None
        sequence.owner = self
        for fork in sequence.forks:
            fork.owner = self

    def start(self, energy_mj: int) -> None:
        """The first of its tokens are about to be computed."""
        self.admitted = self._clock.monotonic_ns()
        self.energy_mj = energy_mj
        self.blocks = len({block for part in (self.sequence, *self.sequence.forks) for block in part.table})

    def take(self, sequence: Sequence, first: int, logits: Logits) -> None:
        """Logits (rows, vocabulary) of the sequence's tokens from number `first` on."""
        raise AssertionError("a Call is a GenerateCall or a ScoreCall")

    def deliver(self, footprint: Footprint | None = None) -> None:
        """Sends what `take` had to say; the last of it with the footprint."""
        for event in self._events:
            if footprint is not None and isinstance(event, Generation | Scores):
                event = replace(event, footprint=footprint)
            self.send(event)
        self._events = []

    @property
    def usage(self) -> Usage:
        """What it has cost until now, whether or not it comes to an answer."""
        root = self.sequence
        computed = max(0, min(root.computed, root.inputs) - root.cached)
        cached = root.cached if computed else 0
        computed += sum(max(0, min(fork.computed, fork.inputs) - root.fork_at) for fork in root.forks)
        return Usage(cached + computed, self.made, cached, computed, self.trimmed)

    def _seen(self) -> None:
        if self._first is None:
            self._first = self._clock.monotonic_ns()

    @property
    def timing(self) -> Timing:
        now = self._clock.monotonic_ns()
        admitted = self.admitted or now
        first = self._first or now
        return Timing(
            queue_ms=(admitted - self.arrived) / 1e6,
            prefill_ms=(first - admitted) / 1e6,
            decode_ms=(now - first) / 1e6,
            first_token_ms=(first - self.arrived) / 1e6,
        )


class Draft:
    """One answer while it is made: how its tokens are chosen, and the text that they become."""

    def __init__(self, sampler: Sampler, writer: Writer) -> None:
        self.sampler, self.writer = sampler, writer
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.top_logprobs: list[tuple[tuple[int, float], ...]] = []
        self.reason: FinishReason | None = None

    def add(self, logits: Logits, ends: frozenset[int], limit: int) -> str:
        """Chooses a token and returns the text that has become certain with it; `reason` is set when it was the last."""
        token, logprob, top, complete = self.sampler.choose(logits)
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.top_logprobs.append(top)
        text = ""
        if token in ends:
            self.reason = "stop"
        else:
            text = self.writer.add(token)
            if self.writer.stopped or complete:
                self.reason = "stop"
            elif len(self.tokens) == limit:
                self.reason = "length"
        return text + self.writer.finish() if self.reason else text

    def answer(self) -> Completion:
        top = tuple(self.top_logprobs) if any(self.top_logprobs) else ()
        return Completion(self.writer.text, self.reason or "length", tuple(self.tokens), tuple(self.logprobs), top)


class GenerateCall(Call):
    """Text after a prompt of at least one token, once for each of `drafts`.

    The first goes on in the sequence that computes the prompt, the others fork from it, each in blocks of its own.
    """

    def __init__(
        self,
        prompt: list[int],
        drafts: Tokens[Draft],
        *,
        namespace: Hashable,
        share: Hashable,
        max_tokens: int,
        trimmed: int,
        ends: frozenset[int],
        send: Callable[[Event], None],
        info: ModelInfo,
        clock: Clock,
    ) -> None:
        length = len(prompt)
        forks = tuple(
            Sequence(namespace, list(prompt), length, None, room=max_tokens, decodes=True, private=True, share=share)
            for _ in (drafts[1:] if max_tokens else ())
        )
        sequence = Sequence(
            namespace,
            list(prompt),
            length - 1,
            None,
            room=max_tokens,
            decodes=True,
            forks=forks,
            fork_at=length if forks else 0,
            share=share,
        )
        super().__init__(sequence, send, info, clock)
        self.trimmed, self._max_tokens, self._ends = trimmed, max_tokens, ends
        self._drafts = drafts
        self._draft_of = dict(zip((sequence, *forks), drafts, strict=False))

    def take(self, sequence: Sequence, first: int, logits: Logits) -> None:
        """Chooses the next token from the last row; every draft's first one from the prompt's."""
        self._seen()
        if self._max_tokens == 0:
            self._finish()
            return
        begins = not self._drafts[0].tokens
        parts = (sequence, *sequence.forks) if begins else (sequence,)
        for part in parts:
            draft = self._draft_of[part]
            text = draft.add(logits[-1], self._ends, self._max_tokens)
            self.made += 1
            if text and draft is self._drafts[0]:
                self._events.append(Delta(text))
            if draft.reason is None:
                part.tokens.append(draft.tokens[-1])
            else:
                self.ended.append(part)
        if all(draft.reason for draft in self._drafts):
            self._finish()

    def _finish(self) -> None:
        self.over = True
        first, *others = (draft.answer() for draft in self._drafts)
        self._events.append(
            Generation(
                text=first.text,
                finish_reason=first.finish_reason,
                usage=self.usage,
                timing=self.timing,
                model=self._info.name,
                device=self._info.device,
                tokens=first.tokens,
                logprobs=first.logprobs,
                top_logprobs=first.top_logprobs,
                others=tuple(others),
            )
        )


class ScoreCall(Call):
    """Log-probabilities of choices after a prefix of at least one token.

    The first choice is computed in one go with the prefix; the others fork from the prefix, so that it is computed once.
    A choice's last token is predicted, not read: it is no input and costs nothing, so that choices of one token each
    are scored by the prefix alone.
    """

    def __init__(
        self,
        prefix: list[int],
        choices: Tokens[list[int]],
        request: ScoreRequest,
        *,
        namespace: Hashable,
        share: Hashable,
        send: Callable[[Event], None],
        info: ModelInfo,
        clock: Clock,
    ) -> None:
        self._prefix, self._choices, self._texts = len(prefix), choices, request.choices
        self._logprobs = [np.full(len(choice), np.nan) for choice in choices]
        self._missing = sum(map(len, choices))
        self._choice_of: dict[Sequence, int] = {}
        forks = []
        for number, choice in enumerate(choices[1:], start=1):
            if len(choice) > 1:
                fork = Sequence(namespace, prefix + choice[:-1], len(prefix), None, private=True, share=share)
                self._choice_of[fork] = number
                forks.append(fork)
        root = Sequence(
            namespace, prefix + choices[0][:-1], len(prefix) - 1, None, forks=tuple(forks), fork_at=len(prefix), share=share
        )
        self._choice_of[root] = 0
        super().__init__(root, send, info, clock)

    def take(self, sequence: Sequence, first: int, logits: Logits) -> None:
        """Row by row, the logits at token n say how likely token n + 1 was."""
        if first == self._prefix - 1:
            self._seen()
            openings = logits[0] - log_sum_exp(logits[0])
            for number, choice in enumerate(self._choices):
                self._fill(number, 0, [openings[choice[0]]])
            first, logits = first + 1, logits[1:]
        if len(logits):
            number, at = self._choice_of[sequence], first - self._prefix + 1
            wanted = np.array(self._choices[number][at : at + len(logits)], np.int64)
            self._fill(number, at, log_probabilities(logits, wanted))
        if self._missing == 0:
            self._finish()

    def _fill(self, number: int, at: int, values: Tokens[float] | NDArray[np.float32]) -> None:
        self._logprobs[number][at : at + len(values)] = values
        self._missing -= len(values)

    def _finish(self) -> None:
        self.over = True
        scored = tuple(
            ChoiceScore(text, tuple(map(float, values))) for text, values in zip(self._texts, self._logprobs, strict=True)
        )
        self._events.append(Scores(scored, self.usage, self.timing, self._info.name, self._info.device))
