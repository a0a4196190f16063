"""Paired statistics against scipy on simulated data, by enumeration, and for too little data."""

import itertools
import math
import warnings

import numpy as np
import pytest
from scipy import stats

from metavpt.compare.paired_statistics import (
    MIN_SEEDS,
    mean_se,
    paired,
    pearson,
    power_law,
    range_coverage,
    smallest_p,
)
from metavpt.errors import MetaVPTError


def simulated(n: int, num: int, seed: int, mean: float = 0.0) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).normal(mean, 1.0, (num, n)))


def against_zero(differences, sign: int = 1):
    return paired(differences, np.zeros(len(differences)), sign)


def covers(interval, value: float = 0.0) -> bool:
    return interval.low <= value <= interval.high


def test_mean_and_standard_error_by_hand():
    assert mean_se([1.0, 2.0, 3.0]) == pytest.approx((2.0, 1 / math.sqrt(3), 3), abs=1e-14)
    assert mean_se([0.4, 0.4, 0.4]).se == 0.0
    assert mean_se([0.4]) == (0.4, None, 1)


def test_differences_are_paired_by_seed():
    found = paired([1.0, 12.0, 100.0], [2.0, 10.0, 101.0], -1)
    assert (found.difference, found.n, found.wins) == (0.0, 3, 2.0)
    assert (found.low, found.high) == (-1.0, 2.0)


@pytest.mark.parametrize("n", [2, 3, 4, 5, 6])
def test_p_is_the_share_of_sign_flips_that_are_as_far_from_zero(n):
    for differences in simulated(n, 4, seed=n, mean=0.5):
        means = [
            abs(np.mean(np.multiply(signs, differences)))
            for signs in itertools.product((1, -1), repeat=n)
        ]
        by_hand = np.mean(np.array(means) >= abs(differences.mean()) - 1e-12)
        assert against_zero(differences).p == pytest.approx(by_hand, abs=1e-14)


@pytest.mark.parametrize(("n", "least"), [(2, 0.5), (3, 0.25), (6, 0.03125)])
def test_the_smallest_p_is_that_of_differences_of_one_sign(n, least):
    assert against_zero(np.arange(1.0, n + 1)).p == smallest_p(n) == least
    assert (
        min(against_zero(differences).p for differences in simulated(n, 40, seed=0, mean=2.0))
        == least
    )


def test_p_is_wilcoxons_where_the_differences_are_their_own_ranks():
    for signs in np.random.default_rng(0).choice([-1.0, 1.0], (5, 10)):
        differences = signs * np.arange(1.0, 11.0)
        assert against_zero(differences).p == pytest.approx(
            stats.wilcoxon(differences, method="exact").pvalue, abs=1e-12
        )


def test_p_is_near_that_of_the_t_test_beyond_the_exact_range():
    (differences,) = simulated(40, 1, seed=3, mean=0.3)
    assert 0.01 < against_zero(differences).p < 0.2
    assert against_zero(differences).p == pytest.approx(
        stats.ttest_1samp(differences, 0.0).pvalue, abs=0.02
    )


def test_p_is_uniform_without_an_effect_and_small_with_one():
    null = [against_zero(differences).p for differences in simulated(10, 300, seed=1)]
    assert stats.kstest(null, "uniform").pvalue > 0.05
    assert np.mean(np.array(null) <= 0.05) == pytest.approx(0.05, abs=0.03)
    assert (
        np.median(
            [against_zero(differences).p for differences in simulated(10, 50, seed=1, mean=1.0)]
        )
        < 0.05
    )


@pytest.mark.parametrize("n", [8, 20])
def test_the_interval_holds_the_truth_95_percent_of_the_time(n):
    covered = np.mean(
        [
            covers(against_zero(differences), 0.7)
            for differences in simulated(n, 500, seed=2, mean=0.7)
        ]
    )
    assert covered == pytest.approx(0.95, abs=0.02)


def test_the_interval_is_as_long_as_that_of_t():
    ratios = []
    for differences in simulated(20, 60, seed=4):
        t = stats.ttest_1samp(differences, 0.0).confidence_interval(0.95)
        found = against_zero(differences)
        ratios.append((found.high - found.low) / (t.high - t.low))
        assert abs(found.low - t.low) < 0.2 * (t.high - t.low)
    assert np.mean(ratios) == pytest.approx(1.0, abs=0.02)


def test_few_seeds_have_their_range_and_its_coverage():
    for n in range(2, MIN_SEEDS + 1):
        (differences,) = simulated(n, 1, seed=n)
        found = against_zero(differences)
        is_range = (found.low, found.high) == pytest.approx(
            (differences.min(), differences.max()), abs=1e-14
        )
        assert is_range == (n < MIN_SEEDS)
    for n in (2, 3):
        covered = np.mean(
            [covers(against_zero(differences)) for differences in simulated(n, 500, seed=5)]
        )
        assert covered == pytest.approx(range_coverage(n), abs=0.05)


@pytest.mark.parametrize("n", [2, 3, 5, 20])
def test_equal_differences_have_an_interval_without_length_and_no_warning(n):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same, moved = paired([0.3] * n, [0.3] * n, -1), paired([0.4] * n, [0.3] * n, -1)
    assert (same.difference, same.low, same.high, same.p, same.wins) == (0.0, 0.0, 0.0, 1.0, n / 2)
    assert (moved.low, moved.high) == pytest.approx((0.1, 0.1), abs=1e-14)
    verdicts = ("unclear", "worse") if n >= MIN_SEEDS else ("too few seeds",) * 2
    assert (same.verdict, moved.verdict) == verdicts


def test_one_seed_has_a_difference_and_nothing_about_its_noise():
    assert paired([1.5], [1.0], -1) == (0.5, None, None, None, 0.0, 1, -1)
    assert paired([1.5], [1.0], -1).verdict == "too few seeds"


def test_without_an_effect_few_rows_are_called_better_or_worse():
    """No verdict below MIN_SEEDS, where the range of differences is often wrong."""
    for n in (2, 3, 4):
        verdicts = [against_zero(differences).verdict for differences in simulated(n, 200, seed=6)]
        assert set(verdicts) == {"too few seeds"}
    verdicts = [against_zero(differences).verdict for differences in simulated(5, 500, seed=6)]
    judged = np.mean([verdict in ("better", "worse") for verdict in verdicts])
    assert 0.02 < judged < 0.11  # 0.07 at 5 seeds; the standard error of the share is 0.011


def test_the_verdict_needs_a_direction_and_an_interval_without_zero():
    up, mixed = [1.0, 1.1, 1.2, 1.3, 1.4], [1.0, -1.0, 0.5, 0.2, -0.4]
    assert [against_zero(up, sign).verdict for sign in (1, -1, 0)] == ["better", "worse", "unclear"]
    assert [against_zero(mixed, sign).verdict for sign in (1, -1, 0)] == ["unclear"] * 3
    assert against_zero(up, 0).wins is None


def test_swapped_sides_mirror():
    a, b = simulated(5, 2, seed=6)
    one, other = paired(a, b, 1), paired(b, a, 1)
    assert (one.difference, one.low, one.high) == pytest.approx(
        (-other.difference, -other.high, -other.low), abs=1e-12
    )
    assert (one.p, one.wins) == (other.p, 5 - other.wins)


def test_same_values_same_numbers_and_no_global_generator_moved():
    (differences,) = simulated(20, 1, seed=7)
    state = np.random.get_state()[1].copy()
    assert against_zero(differences) == against_zero(differences)
    assert (np.random.get_state()[1] == state).all()


@pytest.mark.parametrize(
    ("a", "b"), [([1.0, 2.0], [1.0]), ([], []), ([1.0, math.nan], [1.0, 2.0]), ([1.0], [math.inf])]
)
def test_values_that_cannot_be_paired_are_errors(a, b):
    with pytest.raises(MetaVPTError, match="seed"):
        paired(a, b, 1)


def test_pearson_and_the_slope_of_realised_on_predicted():
    generator = np.random.default_rng(8)
    predicted = generator.normal(size=50) * 1e-4
    realised = 0.6 * predicted + generator.normal(size=50) * 5e-5
    found = pearson(predicted, realised)
    assert found.r == pytest.approx(stats.pearsonr(predicted, realised).statistic, abs=1e-12)
    assert found.slope == pytest.approx(np.polyfit(predicted, realised, 1)[0], abs=1e-9)
    assert pearson([*predicted, math.nan, 1.0], [*realised, 1.0, math.inf]) == found
    assert found.n == 50


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        ([], [], (None, None, 0)),
        ([1.0, 2.0], [1.0, 3.0], (None, None, 2)),
        ([1.0] * 3, [1.0, 2.0, 3.0], (None, None, 3)),
        ([1.0, 2.0, 3.0], [0.1] * 3, (None, 0.0, 3)),
        ([1.0, 2.0, 3.0], [-2.0, -4.0, -6.0], (-1.0, -2.0, 3)),
    ],
)
def test_pearson_where_it_is_not_defined(x, y, expected):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pearson(x, y) == pytest.approx(expected, abs=1e-12)


def test_pearson_needs_pairs():
    with pytest.raises(MetaVPTError, match="pairs"):
        pearson([1.0], [])


def test_a_power_law_is_found_again():
    sizes = [2, 4, 8, 16]
    assert power_law(sizes, [3 * size**1.5 for size in sizes]) == pytest.approx(1.5)
    assert power_law(sizes, [7.0] * 4) == pytest.approx(0.0, abs=1e-12)
    assert power_law([1, 2, 4], [1.0, 2.0, 16.0]) == pytest.approx(
        2.0
    )  # by hand: logs 0, 1, 4 on 0, 1, 2


@pytest.mark.parametrize(
    ("sizes", "values"), [([2, 2], [1.0, 2.0]), ([1, 2], [0.0, 1.0]), ([-1, 2], [1.0, 1.0])]
)
def test_no_power_law_without_two_positive_sizes(sizes, values):
    with pytest.raises(MetaVPTError, match="power_law"):
        power_law(sizes, values)
