"""What a run has spent of its budget. It counts and refuses; it does not stop anything by itself."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from agentops.clock import Clock
from agentops.errors import BudgetSpent
from agentops.prices import Price
from agentops.records import Budget, NodeBudget, Usage

_WORDS = {"steps": "steps", "model_calls": "model calls", "tokens": "tokens", "seconds": "seconds", "money": "units of money"}


@dataclass(slots=True)
class _Spent:
    steps: int = 0
    model_calls: int = 0
    tokens: int = 0
    money: float = 0.0


class Meter:
    """Counts one sitting of a run. All methods may be called from any thread. `watch` is called when `seconds_left` changes."""

    def __init__(self, budget: Budget, clock: Clock, prices: Mapping[str, Price] | None = None) -> None:
        self.budget = budget
        self.watch: Callable[[], object] = lambda: None
        self._prices = prices or {}
        self._steps: set[int] = set()
        self._clock = clock
        self._begun_ns = clock.monotonic_ns()
        self._all = _Spent()
        self._of: defaultdict[str, _Spent] = defaultdict(_Spent)
        self._until: dict[str, tuple[str, float]] = {}
        self._late = ""
        self._unpriced = 0
        self._spent: BudgetSpent | None = None
        self._lock = threading.RLock()

    def used(self, usage: Usage, model: str, nodes: Collection[str]) -> None:
        """Notes what a call that has ended cost, in the nodes around it."""
        price = self._prices.get(model)
        with self._lock:
            self._unpriced += price is None
            for one in (self._all, *(self._of[node] for node in nodes)):
                one.tokens += usage.computed_tokens + usage.output_tokens
                one.money += price.of(usage) if price else 0.0

    def admit(self, nodes: Collection[str]) -> None:
        """Counts a model call in the nodes around it. Calls under way are not interrupted: the tokens and the money of as many as
        run side by side may go beyond the budget.

        Raises:
            BudgetSpent
        """
        with self._lock:
            self.check()
            limited: list[tuple[str, _Spent, Budget | NodeBudget]] = [("", self._all, self.budget)]
            limited += [(node, self._of[node], self.budget.nodes[node]) for node in nodes if node in self.budget.nodes]
            for node, spent, limit in limited:
                for budget in ("model_calls", "tokens", "money"):
                    if 0 < getattr(limit, budget) <= getattr(spent, budget):
                        self._refuse(budget, node)
            for one in (self._all, *(self._of[node] for node in nodes)):
                one.model_calls += 1

    def step(self, number: int) -> None:
        """Notes a superstep of the graph itself, by its number in the thread."""
        self._steps.add(number)

    def entered(self, node: str, key: str) -> None:
        """Notes that a node begins; `left` is told the same key.

        Raises:
            BudgetSpent: it has begun as often as it may.
        """
        with self._lock:
            limit, spent = self.budget.nodes.get(node, NodeBudget()), self._of[node]
            if 0 < limit.steps <= spent.steps:
                self._refuse("steps", node)
            spent.steps += 1
            if limit.seconds:
                self._until[key] = node, self._clock.monotonic_ns() + limit.seconds * 1e9
        if limit.seconds:
            self.watch()

    def left(self, key: str) -> None:
        with self._lock:
            limited = self._until.pop(key, None)
            if limited is not None and limited[1] <= self._clock.monotonic_ns():
                self._late = self._late or limited[0]
        if limited is not None:
            self.watch()

    def seconds_left(self) -> float:
        """Until the run's time is over, or that of a node that is at work."""
        with self._lock:
            ends = [self._begun_ns + self.budget.seconds * 1e9, *(until for _, until in self._until.values())]
        return max(0.0, (min(ends) - self._clock.monotonic_ns()) / 1e9)

    def check(self) -> None:
        """
        Raises:
            BudgetSpent: it was refused before; whoever swallowed that does not go on.
        """
        if self._spent is not None:
            raise self._spent
        if self._clock.monotonic_ns() - self._begun_ns > self.budget.seconds * 1e9:
            self._refuse("seconds", "")

    def spent(self, budget: str, node: str = "") -> BudgetSpent:
        """The error that says what is spent and what else was reached. Whose seconds are spent is known here."""
        if budget == "seconds" and not node:
            over = self._clock.monotonic_ns() - self._begun_ns > self.budget.seconds * 1e9
            node = "" if over else self._late or min(self._until.values(), key=lambda one: one[1], default=("", 0.0))[0]
        limit = getattr(self.budget.nodes[node] if node else self.budget, budget)
        seconds = (self._clock.monotonic_ns() - self._begun_ns) / 1e9
        reached = (
            f"{len(self._steps):,} steps, {self._all.model_calls:,} model calls, {self._all.tokens:,} tokens, {seconds:.1f} s"
        )
        if self.budget.money or any(one.money for one in self.budget.nodes.values()):
            reached += f", {self._all.money:.6g} units of money"
            if self._unpriced:
                reached += f" and {self._unpriced:,} model calls of unknown cost"
        flag = "--max-" + budget.replace("_", "-")
        mend = "mend the loop, or resume" if budget == "steps" else "resume"
        whose = f"the {limit:,g} {_WORDS[budget]} of node {node}" if node else f"its {limit:,g} {_WORDS[budget]}"
        where = f"--max-of-node {node}.{budget}=..., or budget.nodes" if node else f"{flag}, or the setting budget.{budget}"
        return BudgetSpent(
            f"the run was stopped, {whose} are spent; reached: {reached}",
            budget=budget,
            node=node,
            hint=f"{mend} it with more: {where}",
        )

    def _refuse(self, budget: str, node: str) -> None:
        self._spent = self.spent(budget, node)
        raise self._spent
