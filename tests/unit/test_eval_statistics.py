"""Intervals, comparisons, agreement and calibration: against published values, against scipy, and against simulated truth."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from scipy.stats import binom, binomtest
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss

from evals import statistics
from evals.statistics import agreement, calibration, chance, estimate, holm, mean, paired, rate

ROUNDS = 2_000
ALPHA = 0.05


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer resamples, for what is done thousands of times."""
    monkeypatch.setattr(statistics, "RESAMPLES", 499)
    monkeypatch.setattr(statistics, "FEWEST_RESAMPLES", 499)
    monkeypatch.setattr(statistics, "ALL_FLIPS", 8)


def bits(ones: int, n: int) -> list[float]:
    return [1.0] * ones + [0.0] * (n - ones)


@pytest.mark.parametrize(
    ("ones", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_agrees_with_the_table_of_newcombe_1998(ones: int, n: int, low: float, high: float) -> None:
    found = rate(bits(ones, n))
    assert (found.value, found.n, found.clusters, found.method) == (ones / n, n, n, "Wilson")
    assert found.low == pytest.approx(low, abs=5e-5)
    assert found.high == pytest.approx(high, abs=5e-5)


@given(st.integers(2, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.sampled_from([0.8, 0.95, 0.99]))
@hypothesis_settings(max_examples=50, deadline=None)
def test_wilson_is_scipys(counted: tuple[int, int], level: float) -> None:
    ones, n = counted
    found, peer = rate(bits(ones, n), level=level), binomtest(ones, n).proportion_ci(level, method="wilson")
    assert (found.low, found.high) == pytest.approx((peer.low, peer.high), abs=1e-12)


@pytest.mark.parametrize(
    ("values", "clusters", "value", "why"),
    [
        ([], None, None, "no values"),
        ([1.0], None, 1.0, "one value"),
        ([0.3], None, 0.3, "one value"),
        ([0.3, 0.4, 0.5], ["t", "t", "t"], 0.4, "all values share one cluster"),
        ([0.0, 1.0], ["t", "t"], 0.5, "all values share one cluster"),
        ([0.1] * 7, None, 0.1, "all values are alike"),
    ],
)
def test_where_there_is_no_interval_that_is_said(
    values: list[float], clusters: list[str] | None, value: float | None, why: str
) -> None:
    found = estimate(values, clusters)
    assert found.value == (pytest.approx(value) if value is not None else None)
    assert (found.low, found.high, found.method, found.n) == (None, None, f"none: {why}", len(values))


def test_an_estimate_is_a_rate_where_its_values_are_binary_and_not_where_they_look_so() -> None:
    assert estimate([0, 1, 1], binary=True).method == "Wilson"
    assert estimate([0, 1, 1]).method == "bootstrap"
    assert estimate([0, 1, 0.5], binary=True).method == "bootstrap"
    assert estimate([0, 1, 0, 1], "aabb", binary=True).method == "Wilson, clustered"
    assert estimate([0, 1, 0, 1], "aabb").method == "none: all values are alike"


@given(st.lists(st.integers(0, 20), min_size=2, max_size=40), st.integers(1, 4))
@hypothesis_settings(max_examples=40, deadline=None)
def test_an_interval_holds_its_value_and_lies_among_the_values(numbers: list[int], every: int) -> None:
    values = [number / 20 for number in numbers]
    found = estimate(values, [place // every for place in range(len(values))], binary=True)
    if found.low is not None and found.value is not None and found.high is not None:
        assert min(values) - 1e-9 <= found.low or found.method.startswith("Wilson")
        assert found.low <= found.value + 1e-9
        assert found.high >= found.value - 1e-9
    assert found.value == pytest.approx(sum(values) / len(values))


def test_the_seed_decides_and_clusters_of_one_change_nothing() -> None:
    values = np.random.default_rng(1).random(30).tolist()
    assert mean(values, seed=3) == mean(values, seed=3) == mean(values, list(range(30)), seed=3)
    assert mean(values, seed=3) != mean(values, seed=4)
    more = [value + 0.03 * (place % 3) for place, value in enumerate(values)]
    assert paired(values, more, seed=3) == paired(values, more, seed=3)
    assert agreement([values, more], seed=3) == agreement([values, more], seed=3)


def test_thousands_of_values_take_no_minutes() -> None:
    values = np.random.default_rng(1).random(20_000)
    found = mean(values.tolist())
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=half / 10)


def faithful(generator: np.random.Generator, n: int) -> np.ndarray:
    """As a judge scores claims: most answers are wholly right, the others anything between."""
    return np.where(generator.random(n) < 0.6, 1.0, generator.beta(3, 2, n))


def grouped(generator: np.random.Generator, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores of threads of one to six answers, that are alike within a thread; their mean is 2/3."""
    sizes = generator.integers(1, 7, groups)
    level = np.repeat(generator.beta(4, 2, groups), sizes)
    return generator.beta(6 * level, 6 * (1 - level)), np.repeat(np.arange(groups), sizes)


def covered(draw: Callable[[np.random.Generator], statistics.Interval], truth: float, rounds: int) -> float:
    hits = 0
    for seed in range(rounds):
        found = draw(np.random.default_rng(seed))
        assert found.low is not None
        assert found.high is not None
        hits += found.low <= truth <= found.high
    return hits / rounds


def check_coverage(rounds: int) -> None:
    truth = 0.6 + 0.4 * 3 / 5
    assert covered(lambda generator: mean(faithful(generator, 20).tolist()), truth, rounds) >= 0.94
    assert covered(lambda generator: mean(faithful(generator, 50).tolist()), truth, rounds) >= 0.94

    def rated(generator: np.random.Generator, *, naive: bool) -> statistics.Interval:
        values, threads = grouped(generator, 20)
        ones = (generator.random(len(values)) < values).astype(float)
        return rate(ones.tolist(), None if naive else threads.tolist())

    def averaged(generator: np.random.Generator, *, naive: bool) -> statistics.Interval:
        values, threads = grouped(generator, 20)
        return mean(values.tolist(), None if naive else threads.tolist())

    for draw in (rated, averaged):
        clustered = covered(lambda generator, draw=draw: draw(generator, naive=False), 2 / 3, rounds)  # type: ignore[misc]
        naive = covered(lambda generator, draw=draw: draw(generator, naive=True), 2 / 3, rounds)  # type: ignore[misc]
        print(draw.__name__, clustered, naive)
        assert clustered >= 0.925
        assert naive < clustered - 0.02


@pytest.mark.usefixtures("quick")
def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    check_coverage(400)


@pytest.mark.long
def test_intervals_hold_the_truth_as_often_as_they_say_over_many_rounds() -> None:
    check_coverage(ROUNDS)


def test_mcnemar_and_its_interval_agree_with_the_worked_example_of_fagerland_2014() -> None:
    """Airway hyper-responsiveness of 21 children before and after stem cell transplantation: 1, 1, 7, 12."""
    before = bits(2, 21)
    after = [1.0, 0.0, *bits(7, 19)]
    found = paired(before, after, binary=True)
    assert (found.higher, found.lower, found.same) == (7, 1, 13)
    assert found.test == "exact McNemar"
    assert found.p == pytest.approx(0.0703, abs=5e-5)
    assert found.difference.value == pytest.approx(6 / 21)
    assert (found.difference.low, found.difference.high) == pytest.approx((0.013, 0.508), abs=5e-4)
    assert found.difference.method == "Bonett-Price"


DARWIN = [49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48]
"""Differences of crossed and self-fertilised maize, in eighths of an inch."""


def test_the_permutation_test_agrees_with_fishers_of_darwins_maize() -> None:
    p, test = chance([0.0] * 15, [float(one) for one in DARWIN])
    assert test == "sign-flip permutation"
    assert p == pytest.approx(1726 / 32768, abs=1e-12)


def test_mcnemar_is_the_permutation_test_of_zeros_and_ones() -> None:
    before, after = bits(9, 14), [0.0] * 2 + [1.0] * 12
    p, test = chance(before, after, binary=True)
    shifted, other = chance([value + 0.5 for value in before], [value + 0.5 for value in after])
    assert (test, other) == ("exact McNemar", "sign-flip permutation")
    assert p == pytest.approx(shifted)


@pytest.mark.parametrize(
    ("first", "second", "p", "test"),
    [
        ([], [], None, "none: no pairs"),
        ([1.0], [0.0], None, "none: one value"),
        ([0.2, 0.4], [0.2, 0.4], 1.0, "sign-flip permutation"),
    ],
)
def test_little_or_no_difference_is_no_error(first: list[float], second: list[float], p: float | None, test: str) -> None:
    found = paired(first, second)
    assert (found.p, found.test) == (p, test)
    assert found.same == (len(first) if first == second else 0)


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("share", [1, 2], ids=["cases", "threads"])
def test_however_few_have_changed_there_is_a_chance(share: int, binary: bool) -> None:
    threads = [place // share for place in range(8 * share)]
    for moved, p in ((0, 1.0), (1, 1.0), (2, 0.5)):
        after = [float(place // share < moved) for place in range(8 * share)]
        found = paired([0.0] * len(after), after, threads, binary=binary)
        assert found.p == pytest.approx(p)
        assert found.higher == moved * share
    alone = paired([0.5, 0.5, 0.5], [0.5, 0.9, 0.5])
    assert (alone.p, alone.test) == (1.0, "sign-flip permutation")


def test_what_is_not_paired_is_refused() -> None:
    with pytest.raises(ValueError, match="2 values cannot be paired with 1"):
        paired([0.1, 0.2], [0.1])
    with pytest.raises(ValueError, match="2 values have 1 clusters"):
        mean([0.1, 0.2], ["a"])


def alike(generator: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Two runs of one system on the same cases: what a case is like they share, the rest is chance."""
    case = generator.beta(2, 1, n)
    return generator.binomial(4, case) / 4, generator.binomial(4, case) / 4


def check_no_difference(rounds: int) -> None:
    names = ("rates", "means", "other means", "after Holm", "threads", "threads as if cases")
    ps: dict[str, list[float]] = {name: [] for name in names}
    for seed in range(rounds):
        generator = np.random.default_rng(seed)
        first, second = alike(generator, 30)
        others = alike(generator, 30)
        rates = ((first >= 0.75).astype(float), (second >= 0.75).astype(float))
        three = [
            chance(one.tolist(), other.tolist(), binary=one is rates[0])[0] for one, other in (rates, (first, second), others)
        ]
        # what one run makes of the start of a thread decides the rest of it
        moved = (np.repeat(generator.normal(0, 1, 20), 4) + generator.normal(0, 0.5, 80)).tolist()
        threads = chance([0.0] * 80, moved, [place // 4 for place in range(80)])[0]
        corrected = min(p for p in holm(three) if p is not None)
        found = [*three, corrected, threads, *([chance([0.0] * 80, moved)[0]] if seed < rounds // 5 else [])]
        for name, p in zip(names, found, strict=False):
            assert p is not None
            ps[name].append(p)
    shares = {name: sum(p <= ALPHA for p in values) / len(values) for name, values in ps.items()}
    print(shares)
    assert shares.pop("threads as if cases") > 0.15, "counting cases instead of threads would find much"
    assert shares["means"] >= 0.03, "the test is not just blind"
    assert shares["after Holm"] <= ALPHA, "of three metrics, two of which go together"
    assert max(shares.values()) <= binom.ppf(0.999, rounds, ALPHA) / rounds


@pytest.mark.usefixtures("quick")
def test_where_there_is_no_difference_at_most_one_in_twenty_is_found() -> None:
    check_no_difference(ROUNDS)


@pytest.mark.long
@pytest.mark.usefixtures("quick")
def test_where_there_is_no_difference_at_most_one_in_twenty_is_found_over_many_rounds() -> None:
    check_no_difference(5 * ROUNDS)


def test_a_difference_is_found_and_holm_keeps_the_order() -> None:
    generator = np.random.default_rng(0)
    first = generator.beta(2, 2, 60)
    found = paired(first.tolist(), np.clip(first + generator.normal(0.1, 0.1, 60), 0, 1).tolist())
    assert found.p is not None
    assert found.p < 0.001
    assert found.difference.low is not None
    assert 0 < found.difference.low < 0.1 < (found.difference.high or 0) < 0.2


def test_holm_agrees_with_the_values_that_r_gives() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([None, 0.6, 0.5]) == [None, 1.0, 1.0]
    assert holm([]) == []


N = None
KRIPPENDORFF = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, N, N, N],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, N, 3],
    [N, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, N],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, N],
]
"""Four observers, twelve units: section C of Computing Krippendorff's Alpha-Reliability (2011)."""


def test_alpha_agrees_with_krippendorffs_own_example() -> None:
    found = agreement(KRIPPENDORFF)
    assert found.value == pytest.approx(0.849, abs=5e-4)
    assert (found.n, found.clusters) == (40, 11)
    assert found.low is not None
    assert found.high is not None
    assert found.low < 0.6 < 0.849 < found.high <= 1


def test_alpha_is_the_same_wherever_the_ratings_lie() -> None:
    far = [[None if one is None else one + 1e9 for one in row] for row in KRIPPENDORFF]
    assert agreement(far).value == pytest.approx(agreement(KRIPPENDORFF).value, abs=1e-6)


def test_alpha_agrees_with_krippendorffs_binary_example() -> None:
    """Two observers, ten units: section A of the same paper."""
    first, second = [0, 1, 0, 0, 0, 0, 0, 0, 1, 0], [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]
    assert agreement([first, second]).value == pytest.approx(0.095, abs=5e-4)


def test_alpha_at_its_ends() -> None:
    ratings = [0.1, 0.5, 0.9, 0.3]
    assert agreement([ratings, ratings]).value == 1
    opposed = agreement([[0, 1, 0, 1], [1, 0, 1, 0]]).value
    assert opposed is not None
    assert opposed < -0.5
    for rows, why in (
        ([[1, 1, 1], [1, 1, 1]], "all ratings are the same"),
        ([[1, N], [N, 1]], "no unit has two ratings"),
        ([], "no unit has two ratings"),
    ):
        found = agreement(rows)
        assert (found.value, found.low, found.method) == (None, None, f"none: {why}")
    single = agreement([[1, N], [0, 1]])
    assert single.value is not None
    assert (single.low, single.method) == (None, "none: one unit")
    with pytest.raises(ValueError, match="zip"):
        agreement([[1, 2], [1]])


def test_alpha_over_many_cases_with_scores_that_all_differ() -> None:
    generator = np.random.default_rng(0)
    truth = generator.random(400)
    judge = truth + generator.normal(0, 0.1, 400)
    found = agreement([truth.tolist(), judge.tolist()])
    assert found.value is not None
    assert found.value > 0.8


def test_calibration_by_hand() -> None:
    found = calibration([0.05, 0.15, 0.95, 1.0, 0.92, 0.91], [0, 1, 1, 1, 1, 0])
    assert [(one.low, one.n) for one in found.bins] == [(0.0, 1), (0.1, 1), (0.9, 4)]
    assert found.bins[-1].rate.value == 0.75
    assert found.bins[0].rate.low is None
    assert found.error == pytest.approx((0.05 + 0.85 + 4 * abs(3.78 / 4 - 0.75)) / 6)


def test_calibration_agrees_with_scikit_learn() -> None:
    generator = np.random.default_rng(2)
    scores = generator.random(300)
    outcomes = (generator.random(300) < scores**2).astype(int)
    found = calibration(scores.tolist(), outcomes.tolist())
    rates, means = calibration_curve(outcomes, scores, n_bins=10)
    assert [one.rate.value for one in found.bins] == pytest.approx(rates.tolist())
    assert [one.score for one in found.bins] == pytest.approx(means.tolist())
    assert found.brier == pytest.approx(brier_score_loss(outcomes, scores))
    assert found.error == pytest.approx(1 / 6, abs=0.06), "the mean of p - p squared"


@pytest.mark.parametrize(("scores", "outcomes"), [([], []), ([0.5], []), ([1.5], [1]), ([0.5], [0.5])])
def test_what_cannot_be_calibrated_is_refused(scores: list[float], outcomes: list[float]) -> None:
    with pytest.raises(ValueError, match=r"scores|outcomes"):
        calibration(scores, outcomes)


def test_nothing_heavy_is_loaded_before_something_is_computed() -> None:
    probe = "import sys, evals.statistics, evals.report; assert not {'numpy', 'scipy', 'rich', 'sqlalchemy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", probe], check=True)
