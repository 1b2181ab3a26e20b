"""Numbers with their uncertainty: intervals, comparisons, agreement and calibration.

Every function is deterministic: what is drawn at random is drawn from its `seed`. numpy and scipy are loaded when something
is computed. Nothing here knows the record, metrics or how numbers are shown.

Values that share a cluster (answers of one conversation) are not independent, and counting them as if they were makes intervals
too narrow. `clusters` names the group of each value; where it is None, or every value has its own, each counts for itself.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

RESAMPLES = 9_999
FEWEST_RESAMPLES = 999
LARGEST_DRAW = 20_000_000
"""Values drawn for one interval or test: with more values than fit, there are fewer resamples, not more time."""

ALL_FLIPS = 16
"""Up to so many clusters all ways to flip signs are tried."""

JACKKNIFE = 2_000
"""Above so many clusters the bootstrap's correction for skewness, whose cost is their square, no longer changes its interval."""

MCNEMAR, PERMUTATION = "exact McNemar", "sign-flip permutation"


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate and where the truth may lie. `value` is None where there is nothing to estimate from, `low` and `high` where
    no interval can be given. `n` values in `clusters` groups that are independent of each other; `method` says how it was
    computed, or begins with "none: " and says why there is none."""

    value: float | None
    low: float | None
    high: float | None
    n: int
    clusters: int
    method: str


@dataclass(frozen=True, slots=True)
class Paired:
    """Two estimates over the same cases. `difference` is second minus first; `p` is the chance of one at least as big, either
    way, if both were alike, by `test`, and None where nothing can be tested. `higher`, `same` and `lower` count the pairs."""

    first: Interval
    second: Interval
    difference: Interval
    p: float | None
    test: str
    higher: int
    same: int
    lower: int


@dataclass(frozen=True, slots=True)
class Bin:
    """Scores from `low` to `high`: `n` of them, their mean `score`, and the `rate` of positive outcomes among them."""

    low: float
    high: float
    n: int
    score: float
    rate: Interval


@dataclass(frozen=True, slots=True)
class Calibration:
    """Scores against outcomes of the same cases. `error` is the expected calibration error: the mean distance of a bin's score
    from its rate, weighed by its size. `brier` is the mean squared distance of a score from its outcome."""

    bins: tuple[Bin, ...]
    error: float
    brier: float
    n: int


def estimate(
    values: Sequence[float],
    clusters: Sequence[Hashable] | None = None,
    *,
    binary: bool = False,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """The mean of `values` with its interval: as a `rate` where what they measure is `binary`, else as a `mean`.

    That all happen to be 0 or 1 does not make them binary: the next one may lie between.
    """
    if binary and _zeros_and_ones(values):
        return rate(values, clusters, level=level)
    return mean(values, clusters, level=level, seed=seed)


def rate(values: Sequence[float], clusters: Sequence[Hashable] | None = None, *, level: float = 0.95) -> Interval:
    """The share of ones among zeros and ones, with Wilson's score interval.

    Clustered values count as fewer: their number is divided by the design effect (how many times the variance between clusters
    is that of independent values), at least one, and the degrees of freedom are those of the clusters (Korn and Graubard 1998,
    for Wilson's interval: Franco et al. 2019). Where all values are alike, each cluster counts as one.
    """
    from scipy.stats import norm, t  # type: ignore[import-untyped]

    sums, counts = _grouped(values, clusters)
    n, groups = len(values), len(counts)
    share = float(sums.sum()) / n if n else None
    if share is None or (why := _too_few(n, groups)):
        return _none(share, n, groups, why if n else "no values")
    size = float(n)
    if groups < n:
        between = float(((sums - share * counts) ** 2).sum()) * groups / (groups - 1) / n**2
        alone = share * (1 - share) / n
        size = n / max(1.0, between / alone) if alone else float(groups)
        size *= float(t.ppf(0.5 + level / 2, n - 1) / t.ppf(0.5 + level / 2, groups - 1)) ** 2
    z2 = float(norm.ppf(0.5 + level / 2)) ** 2
    middle = (share + z2 / (2 * size)) / (1 + z2 / size)
    half = math.sqrt(z2 * (share * (1 - share) / size + z2 / (4 * size**2))) / (1 + z2 / size)
    low, high = min(share, max(0.0, middle - half)), max(share, min(1.0, middle + half))
    return Interval(share, low, high, n, groups, "Wilson" + _clustered(n, groups))


def mean(values: Sequence[float], clusters: Sequence[Hashable] | None = None, *, level: float = 0.95, seed: int = 0) -> Interval:
    """The mean with its bootstrap interval: bias-corrected and accelerated (BCa), over clusters.

    The bootstrap's interval is too narrow for few values; its level is therefore raised to where a normal mean's would be
    right (Hesterberg 2015, section 3.4.2).
    """
    sums, counts = _grouped(values, clusters)
    n, groups = len(values), len(counts)
    average = math.fsum(values) / n if n else None
    if average is None or (why := _too_few(n, groups)):
        return _none(average, n, groups, why if n else "no values")
    averages = sums / counts
    if float(averages.max() - averages.min()) <= 1e-12 * float(abs(averages).max()):
        return _none(average, n, groups, "all values are alike")
    low, high = _bootstrap((sums, counts), _ratio, groups, level, seed)
    return Interval(average, low, high, n, groups, "bootstrap" + _clustered(n, groups))


def paired(
    first: Sequence[float],
    second: Sequence[float],
    clusters: Sequence[Hashable] | None = None,
    *,
    binary: bool = False,
    level: float = 0.95,
    seed: int = 0,
) -> Paired:
    """Compares two measurements of the same cases, which are given in the same order. `binary` is as for `estimate`.

    The difference of two rates has the interval of Bonett and Price (2012), that of means, and of whatever is clustered, the
    bootstrap's; for `p` and `test` see `chance`.

    Raises:
        ValueError: the two are not of one length.
    """
    n = len(first)
    p, test = chance(first, second, clusters, binary=binary, seed=seed)
    differences = [after - before for before, after in zip(first, second, strict=True)]
    higher, lower = sum(one > 0 for one in differences), sum(one < 0 for one in differences)
    shift = _shift(higher, lower, n, level) if test == MCNEMAR else mean(differences, clusters, level=level, seed=seed)
    return Paired(
        first=estimate(first, clusters, binary=binary, level=level, seed=seed),
        second=estimate(second, clusters, binary=binary, level=level, seed=seed),
        difference=shift,
        p=p,
        test=test,
        higher=higher,
        same=n - higher - lower,
        lower=lower,
    )


def chance(
    first: Sequence[float],
    second: Sequence[float],
    clusters: Sequence[Hashable] | None = None,
    *,
    binary: bool = False,
    seed: int = 0,
) -> tuple[float | None, str]:
    """How likely a difference at least as big, either way, would be if both were alike; and by which test.

    Where what is measured is `binary`: McNemar's exact test. Else, and for all that share clusters: a permutation test, which
    flips the signs of the clusters' differences, in all ways where they are few, else at random. McNemar's is the same test,
    with the ways counted. None below two clusters.

    Raises:
        ValueError: the two are not of one length.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} values cannot be paired with {len(second)}")
    n = len(first)
    differences = [after - before for before, after in zip(first, second, strict=True)]
    sums, counts = _grouped(differences, clusters)
    if why := _too_few(n, len(counts)):
        return None, f"none: {why if n else 'no pairs'}"
    if binary and len(counts) == n and _zeros_and_ones((*first, *second)):
        from scipy.stats import binomtest

        changed = sum(one != 0 for one in differences)
        return (float(binomtest(sum(one > 0 for one in differences), changed).pvalue) if changed else 1.0), MCNEMAR
    return _flipped(sums, seed), PERMUTATION + _clustered(n, len(counts))


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """The same p-values after Holm's correction: calling those at most .05 a difference is wrong, for any of them, in at most 5 %
    of cases in which there is none. What is None was not tested, and does not count."""
    order = sorted((p, place) for place, p in enumerate(ps) if p is not None)
    corrected: list[float | None] = [None] * len(ps)
    largest = 0.0
    for rank, (p, place) in enumerate(order):
        largest = max(largest, min(1.0, p * (len(order) - rank)))
        corrected[place] = largest
    return corrected


def agreement(ratings: Sequence[Sequence[float | None]], *, level: float = 0.95, seed: int = 0) -> Interval:
    """Krippendorff's alpha of numbers: 1 is perfect agreement, 0 that of chance, below 0 systematic disagreement. How far two
    are apart is their difference, squared; of zeros and ones that is whether they are the same.

    `ratings` has a row for each rater and in it a value for each unit, None where that rater gave none. Units with fewer than two
    ratings say nothing and are left out. `value` is None where all ratings are the same: nothing could have disagreed. The
    interval is the bootstrap's, over units. Source: Krippendorff, Computing Krippendorff's Alpha-Reliability (2011).

    Raises:
        ValueError: the rows are not of one length.
    """
    import numpy as np

    units = [[value for value in unit if value is not None] for unit in zip(*ratings, strict=True)]
    units = [unit for unit in units if len(unit) > 1]
    rated, n = sum(map(len, units)), len(units)
    values = np.unique(np.array([value for unit in units for value in unit], dtype=np.float64))
    if not units:
        return _none(None, 0, 0, "no unit has two ratings")
    if len(values) == 1:
        return _none(None, rated, n, "all ratings are the same")
    counts = np.zeros((n, len(values)))
    for place, unit in enumerate(units):
        np.add.at(counts[place], np.searchsorted(values, np.array(unit)), 1)
    # Distances are the same from anywhere, and the squares of large numbers have no room for them.
    values = values - values.mean()
    within = _disagreement(counts, values) / (counts.sum(axis=-1) - 1)

    def alpha(weights: Floats) -> Floats:
        """`weights` (..., units) say how often each unit counts."""
        totals = weights @ counts
        expected = _disagreement(totals, values) / np.maximum(totals.sum(axis=-1) - 1, 1)
        with np.errstate(divide="ignore", invalid="ignore"):
            found: Floats = np.where(expected > 0, 1 - weights @ within / expected, 1.0)
        return found

    value = float(alpha(np.ones(n)))
    if n < 2:
        return _none(value, rated, n, "one unit")
    generator = np.random.default_rng(seed)
    drawn = alpha(generator.multinomial(n, np.full(n, 1 / n), size=_resamples(n * len(values))).astype(np.float64))
    tail = (1 - level) / 2
    low, high = (float(bound) for bound in np.quantile(drawn, [tail, 1 - tail]))
    return Interval(value, min(low, value), max(high, value), rated, n, "bootstrap over units")


def calibration(scores: Sequence[float], outcomes: Sequence[float], *, bins: int = 10, level: float = 0.95) -> Calibration:
    """How far scores from 0 to 1 are the rates of what they foretell: of those with about .8, do 80 % turn out well?

    `outcomes` are 0 or 1 and in the order of `scores`. The bins are of equal width; those without scores are left out.

    Raises:
        ValueError: there are none, their numbers differ, or a value is out of its range.
    """
    if not scores or len(scores) != len(outcomes):
        raise ValueError(f"{len(scores)} scores cannot be set against {len(outcomes)} outcomes")
    if not all(0 <= score <= 1 for score in scores) or not all(outcome in (0, 1) for outcome in outcomes):
        raise ValueError("scores are from 0 to 1, and outcomes 0 or 1")
    inside: list[list[int]] = [[] for _ in range(bins)]
    for place, score in enumerate(scores):
        inside[min(bins - 1, int(score * bins))].append(place)
    found = tuple(
        Bin(
            low=number / bins,
            high=(number + 1) / bins,
            n=len(places),
            score=math.fsum(scores[place] for place in places) / len(places),
            rate=rate([outcomes[place] for place in places], level=level),
        )
        for number, places in enumerate(inside)
        if places
    )
    n = len(scores)
    error = math.fsum(one.n * abs(one.score - (one.rate.value or 0.0)) for one in found) / n
    brier = math.fsum((score - outcome) ** 2 for score, outcome in zip(scores, outcomes, strict=True)) / n
    return Calibration(found, error, brier, n)


def _grouped(values: Sequence[float], clusters: Sequence[Hashable] | None) -> tuple[Floats, Floats]:
    """Sum and number of the values of each cluster, in the order in which clusters first come."""
    import numpy as np

    if clusters is None:
        return np.array(values, dtype=np.float64), np.ones(len(values), dtype=np.float64)
    numbers: dict[Hashable, int] = {}
    places = [numbers.setdefault(cluster, len(numbers)) for cluster in clusters]
    if len(places) != len(values):
        raise ValueError(f"{len(values)} values have {len(places)} clusters")
    sums: Floats = np.bincount(places, weights=np.array(values, dtype=np.float64), minlength=len(numbers)).astype(np.float64)
    return sums, np.bincount(places, minlength=len(numbers)).astype(np.float64)


def _ratio(sums: Floats, counts: Floats, axis: int) -> Floats:
    ratio: Floats = sums.sum(axis=axis) / counts.sum(axis=axis)
    return ratio


def _bootstrap(data: tuple[Any, ...], statistic: Any, groups: int, level: float, seed: int) -> tuple[float, float]:
    import warnings

    import numpy as np
    from scipy.stats import bootstrap, norm, t

    wider = float(t.ppf(0.5 + level / 2, groups - 1)) * math.sqrt(groups / (groups - 1))
    wanted = min(1 - 2 * float(norm.sf(wider)), 1 - 1e-9)
    given: dict[str, Any] = {
        "paired": True,
        "vectorized": True,
        "confidence_level": wanted,
        "n_resamples": _resamples(groups),
        "batch": max(1, 2_000_000 // groups),
    }
    for method in ("BCa", "percentile") if groups <= JACKKNIFE else ("percentile",):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # scipy warns where BCa is undefined, and gives NaN
            found = bootstrap(data, statistic, method=method, rng=np.random.default_rng(seed), **given).confidence_interval
        if math.isfinite(found.low) and math.isfinite(found.high):
            break
    return float(found.low), float(found.high)


def _flipped(sums: Floats, seed: int) -> float:
    import numpy as np
    from scipy.stats import permutation_test

    moved = sums[sums != 0]  # the others are the same however they are flipped
    if len(moved) < 2:
        return 1.0  # of one, both ways to flip it are as far
    found = permutation_test(
        (moved,),
        lambda one, axis: one.sum(axis=axis),
        permutation_type="samples",  # of one sample: its signs are flipped
        vectorized=True,
        n_resamples=2**ALL_FLIPS if len(moved) <= ALL_FLIPS else _resamples(len(moved)),
        batch=max(1, 2_000_000 // len(moved)),
        rng=np.random.default_rng(seed),
    )
    return float(found.pvalue)


def _shift(higher: int, lower: int, n: int, level: float) -> Interval:
    """The difference of two rates over the same cases, of which `higher` and `lower` changed (Bonett and Price 2012)."""
    from scipy.stats import norm

    if n < 2:
        return _none((higher - lower) / n if n else None, n, n, "one value" if n else "no values")
    up, down = (higher + 1) / (n + 2), (lower + 1) / (n + 2)
    half = float(norm.ppf(0.5 + level / 2)) * math.sqrt((up + down - (up - down) ** 2) / (n + 2))
    low, high = max(-1.0, up - down - half), min(1.0, up - down + half)
    return Interval((higher - lower) / n, low, high, n, n, "Bonett-Price")


def _disagreement(counts: Floats, values: Floats) -> Floats:
    """Sum of the distances of all ordered pairs, of `counts` (..., values) ratings each."""
    apart: Floats = 2 * (counts.sum(axis=-1) * (counts * values**2).sum(axis=-1) - (counts * values).sum(axis=-1) ** 2)
    return apart


def _zeros_and_ones(values: Sequence[float]) -> bool:
    return all(value in (0, 1) for value in values)


def _resamples(size: int) -> int:
    return max(FEWEST_RESAMPLES, min(RESAMPLES, LARGEST_DRAW // max(1, size)))


def _too_few(n: int, groups: int) -> str:
    if n < 2:
        return "one value"
    return "all values share one cluster" if groups < 2 else ""


def _clustered(n: int, groups: int) -> str:
    return ", clustered" if groups < n else ""


def _none(value: float | None, n: int, groups: int, why: str) -> Interval:
    return Interval(value, None, None, n, groups, f"none: {why}")
