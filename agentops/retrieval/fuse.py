"""Reciprocal rank fusion: one ranking out of several, from places alone.

Scores of different ways of searching do not share a scale; places do (Cormack, Clarke and Büttcher, SIGIR 2009).
"""

from __future__ import annotations

from collections.abc import Sequence

from agentops.records import Leg

K = 60
"""The paper's constant: the larger it is, the less the first places stand out."""


def rank(scored: Sequence[tuple[str, float]]) -> dict[str, Leg]:
    """Legs by id from pairs of id and score, in any order. Equal scores are ordered by id, so that every back-end agrees."""
    ordered = sorted(scored, key=lambda pair: (-pair[1], pair[0]))
    return {key: Leg(rank=place, score=score) for place, (key, score) in enumerate(ordered, 1)}


def fuse(*legs: dict[str, Leg]) -> list[tuple[str, float]]:
    """Ids with the sum of 1 / (K + rank) over the legs that found them, best first."""
    total: dict[str, float] = {}
    for leg in legs:
        for key, place in leg.items():
            total[key] = total.get(key, 0.0) + 1.0 / (K + place.rank)
    return sorted(total.items(), key=lambda pair: (-pair[1], pair[0]))
