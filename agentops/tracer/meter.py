"""What a run has spent of its budget. It counts and refuses; it does not stop anything by itself."""

from __future__ import annotations

import threading

from agentops.clock import Clock
from agentops.errors import BudgetSpent
from agentops.records import Budget, Usage


class Meter:
    """Counts one sitting of a run. All methods may be called from any thread."""

    def __init__(self, budget: Budget, clock: Clock) -> None:
        self.budget = budget
        self._steps: set[int] = set()
        self._clock = clock
        self._begun_ns = clock.monotonic_ns()
        self._calls = 0
        self._tokens = 0
        self._spent: BudgetSpent | None = None
        self._lock = threading.Lock()

    def used(self, usage: Usage) -> None:
        """Notes all that the calls which have ended cost."""
        self._tokens = usage.computed_tokens + usage.output_tokens

    def admit(self) -> None:
        """Counts a model call. Calls under way are not interrupted: the tokens of as many as run side by side may go beyond
        the budget.

        Raises:
            BudgetSpent
        """
        with self._lock:
            self.check()
            if self._calls >= self.budget.model_calls:
                self._refuse("model_calls")
            if self._tokens >= self.budget.tokens:
                self._refuse("tokens")
            self._calls += 1

    def step(self, number: int) -> None:
        """Notes a superstep of the graph itself, by its number in the thread."""
        self._steps.add(number)

    def check(self) -> None:
        """
        Raises:
            BudgetSpent: it was refused before; whoever swallowed that does not go on.
        """
        if self._spent is not None:
            raise self._spent
        if self._clock.monotonic_ns() - self._begun_ns > self.budget.seconds * 1e9:
            self._refuse("seconds")

    def spent(self, budget: str) -> BudgetSpent:
        """The error that says what is spent and what else was reached."""
        limits = {"steps": "steps", "model_calls": "model calls", "tokens": "tokens", "seconds": "seconds"}
        limit = getattr(self.budget, budget)
        seconds = (self._clock.monotonic_ns() - self._begun_ns) / 1e9
        reached = f"{len(self._steps):,} steps, {self._calls:,} model calls, {self._tokens:,} tokens, {seconds:.1f} s"
        flag = "--max-" + budget.replace("_", "-")
        mend = "mend the loop, or resume" if budget == "steps" else "resume"
        return BudgetSpent(
            f"the run was stopped, its {limit:,g} {limits[budget]} are spent; reached: {reached}",
            budget=budget,
            hint=f"{mend} it with more: {flag}, or the setting budget.{budget}",
        )

    def _refuse(self, budget: str) -> None:
        self._spent = self.spent(budget)
        raise self._spent
