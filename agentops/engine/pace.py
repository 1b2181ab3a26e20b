"""How long a step will take, learned from the steps that were: so much by itself, for each made token, for each prompt token.

A least-squares fit that forgets slowly, because a machine has other work at times. It knows nothing of sequences.
"""

from __future__ import annotations

import numpy as np

_FORGETTING = 0.99
_CAUTION = 1e-9
_ENOUGH = 8


class Pace:
    """Seconds of a step of `made` rows of tokens that the model made and `read` rows of prompts."""

    def __init__(self) -> None:
        self._gram = np.eye(3) * _CAUTION
        self._moment = np.zeros(3)
        self._seen = 0
        self._costs: tuple[float, float, float] | None = None

    def learn(self, made: int, read: int, seconds: float) -> None:
        """A step took that long."""
        row = np.array([1.0, made, read])
        self._gram = _FORGETTING * self._gram + np.outer(row, row)
        self._moment = _FORGETTING * self._moment + row * seconds
        self._seen += 1
        self._costs = None

    @property
    def known(self) -> bool:
        """Whether there were steps enough to go by."""
        return self._seen >= _ENOUGH

    def seconds(self, made: int, read: int = 0) -> float:
        """What is to be expected; no part of a step gives time back."""
        base, a_made, a_read = self._fitted()
        return base + a_made * made + a_read * read

    def room(self, made: int, seconds: float) -> int:
        """How many prompt rows fit beside that many made ones into a step of so many seconds."""
        *_, a_read = self._fitted()
        left = seconds - self.seconds(made)
        return int(left / a_read) if a_read > 0 else 1 << 30

    def _fitted(self) -> tuple[float, float, float]:
        if self._costs is None:
            base, made, read = np.linalg.lstsq(self._gram, self._moment, rcond=None)[0]
            self._costs = max(0.0, float(base)), max(0.0, float(made)), max(0.0, float(read))
        return self._costs
