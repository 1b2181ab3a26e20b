"""What calls of models cost, by the prices that the settings name. What a model without one costs is not known."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from agentops.errors import SettingsError
from agentops.records import Usage


@dataclass(frozen=True, slots=True)
class Price:
    """Money per million tokens, in whatever currency the user counts in. `input` is for tokens that no cache had."""

    input: float
    cached: float
    output: float

    def of(self, usage: Usage) -> float:
        told = usage.computed_tokens * self.input + usage.cached_tokens * self.cached + usage.output_tokens * self.output
        return told / 1e6


def read_prices(lines: Iterable[str]) -> Mapping[str, Price]:
    """The setting `cost.prices` (`NAME=2.5/0.25/10`: input, cached input, output) by the models' names.

    Raises:
        SettingsError
    """
    found: dict[str, Price] = {}
    for line in lines:
        name, _, told = line.rpartition("=")
        try:
            numbers = [float(part) for part in told.split("/")]
            if not name or any(not 0 <= number < 1e9 for number in numbers):
                raise ValueError
            found[name.strip()] = Price(*numbers)
        except (ValueError, TypeError):
            raise SettingsError(
                f"cost.prices: {line!r} is no price", hint="write NAME=2.5/0.25/10: input, cached, output"
            ) from None
    return found
