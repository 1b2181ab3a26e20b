"""Prices of models' tokens, from the setting `cost.prices`, and what usage costs by them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from agentops.errors import SettingsError
from agentops.records import Usage
from agentops.settings import Settings

_HINT = 'write it as "MODEL=INPUT/CACHED/OUTPUT" or "MODEL=INPUT/OUTPUT", money per million tokens, such as "gpt-x=2.5/0.25/10"'


@dataclass(frozen=True, slots=True)
class Price:
    """Money per million tokens: read and computed, read from a cache, written."""

    input: float
    cached: float
    output: float

    def of(self, usage: Usage) -> float:
        spent = usage.computed_tokens * self.input + usage.cached_tokens * self.cached + usage.output_tokens * self.output
        return spent / 1e6


def load_prices(settings: Settings) -> Mapping[str, Price]:
    """The prices by the model's name, as it is on record.

    Raises:
        SettingsError: one cannot be read, or a model has two.
    """
    found: dict[str, Price] = {}
    for text in settings.cost.prices:
        name, equals, written = text.rpartition("=")
        name = name.strip()
        try:
            amounts = [float(one) for one in written.split("/")]
        except ValueError:
            amounts = []
        sound = len(amounts) in (2, 3) and all(math.isfinite(one) and one >= 0 for one in amounts)
        if not equals or not name or not sound:
            raise SettingsError(f"{settings.source('cost.prices')}: cost.prices has no price in {text[:100]!r}", hint=_HINT)
        if name in found:
            raise SettingsError(f"{settings.source('cost.prices')}: cost.prices has two prices of {name[:100]!r}", hint=_HINT)
        # Without a price of their own, cached tokens cost what the others do.
        found[name] = Price(amounts[0], amounts[-2], amounts[-1])
    return found
