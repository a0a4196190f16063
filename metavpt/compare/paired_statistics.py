"""Paired statistics over seeds, by scipy.stats. Equal values give equal numbers."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from scipy import stats

from metavpt.errors import MetaVPTError

LEVEL = 0.95
NUM_RESAMPLES = 9999  # 2^13 sign flips are fewer, so the test is exact up to 13 seeds
# Below this number the interval is the range of the differences. It misses the truth in 50 % of
# cases with 2 seeds and in 25 % with 3, too often for a verdict.
MIN_SEEDS = 5

Verdict = Literal["better", "worse", "unclear", "too few seeds"]


class Mean(NamedTuple):
    """The mean of n values.

    Attributes:
        value: The mean.
        se: Its standard error. None for one value.
        n: The number of values.
    """

    value: float
    se: float | None
    n: int


class Paired(NamedTuple):
    """a against b on the same n seeds. One seed gives a difference without interval and p-value.

    Attributes:
        difference: The mean of a - b.
        low: The lower end of its 95 % bootstrap interval.
        high: The upper end.
        p: The two-sided p-value of the sign-flip permutation test.
        wins: The number of seeds in which a is better; a tie counts half. None: no stated
            direction.
        n: The number of seeds.
        sign: +1 if higher is better, -1 if lower, 0 if not stated.
    """

    difference: float
    low: float | None
    high: float | None
    p: float | None
    wins: float | None
    n: int
    sign: int

    @property
    def verdict(self) -> Verdict:
        """Judge a. "unclear": the interval contains zero, or no direction is stated."""
        if self.n < MIN_SEEDS:
            return "too few seeds"
        if not self.sign or self.low is None or self.high is None or self.low <= 0 <= self.high:
            return "unclear"
        return "better" if self.sign * self.difference > 0 else "worse"


class Correlation(NamedTuple):
    """Pearson's r and the slope of the regression of y on x, over n finite pairs.

    None where it is not defined.
    """

    r: float | None
    slope: float | None
    n: int


def mean_se(values: Sequence[float]) -> Mean:
    """Compute the mean and its standard error.

    Raises:
        MetaVPTError: There is no value, or one is not finite.
    """
    array = _finite(values)
    # Shifted, so that equal values have an error of exactly zero.
    se = float(stats.sem(array - array[0])) if len(array) > 1 else None
    return Mean(float(array.mean()), se, len(array))


def paired(a: Sequence[float], b: Sequence[float], sign: int) -> Paired:
    """Compute a - b with its interval and p-value.

    The interval is the percentile bootstrap at Hesterberg's expanded level. The plain one is too
    short for few seeds. BCa is as short, and undefined if all differences are equal (the interval
    then has length zero here). The coverage for normal differences is 95 % from 8 seeds on. Below
    MIN_SEEDS the interval is the range of the differences, see `range_coverage`. Source:
    Hesterberg, "What Teachers Should Know About the Bootstrap", The American Statistician 69
    (2015), expanded percentile interval.

    Args:
        a: One value per seed.
        b: The values of the same seeds.
        sign: +1 if higher is better, -1 if lower, 0 if not stated.

    Raises:
        MetaVPTError: The lengths differ, or a value is not finite.
    """
    if len(a) != len(b):
        raise MetaVPTError(f"paired: {len(a)} values against {len(b)}; give one of each per seed")
    differences = _finite(a) - _finite(b)
    n = len(differences)
    wins = float((sign * differences > 0).sum() + 0.5 * (differences == 0).sum()) if sign else None
    if n == 1:
        return Paired(float(differences[0]), None, None, None, wins, n, sign)
    bootstrap = stats.bootstrap(
        (differences,),
        np.mean,
        method="percentile",
        confidence_level=_expanded(n),
        n_resamples=NUM_RESAMPLES,
        rng=np.random.default_rng(0),
    )
    flips = stats.permutation_test(
        (differences,),
        np.mean,
        permutation_type="samples",
        n_resamples=NUM_RESAMPLES,
        rng=np.random.default_rng(0),
    )
    low, high = (float(end) for end in bootstrap.confidence_interval)
    return Paired(float(differences.mean()), low, high, float(flips.pvalue), wins, n, sign)


def smallest_p(n: int) -> float:
    """Return the p-value of n differences of one sign, the smallest that the test can give."""
    return 2 / 2**n


def range_coverage(n: int) -> float:
    """Return how often the range of n symmetric differences contains their centre.

    It does not if all differences have the same sign.
    """
    return 1 - smallest_p(n)


def pearson(x: Sequence[float], y: Sequence[float]) -> Correlation:
    """Compute r of x and y, and the slope of y on x. Pairs that are not finite are dropped.

    Fewer than three points define neither, since any two lie on a line. A constant x defines
    neither, and a constant y no r.

    Args:
        x: For example the predicted changes.
        y: For example the realised changes.

    Raises:
        MetaVPTError: The lengths differ.
    """
    if len(x) != len(y):
        raise MetaVPTError(f"pearson: {len(x)} values against {len(y)}; give pairs")
    pairs = [(p, q) for p, q in zip(x, y, strict=True) if math.isfinite(p) and math.isfinite(q)]
    if len(pairs) < 3 or len({p for p, _ in pairs}) == 1:
        return Correlation(None, None, len(pairs))
    slope, _, r, _, _ = np.asarray(stats.linregress(*np.array(pairs).T), dtype=float)
    return Correlation(
        None if len({q for _, q in pairs}) == 1 else float(r), float(slope), len(pairs)
    )


def _expanded(n: int) -> float:
    """Return the level at which the percentile interval is as long as the t interval.

    This holds for the mean of n normal values.
    """
    tail = stats.norm.sf(math.sqrt(n / (n - 1)) * stats.t.isf((1 - LEVEL) / 2, n - 1))
    return float(1 - 2 * tail)


def _finite(values: Sequence[float]) -> np.ndarray:
    array = np.asarray(values, dtype=float)
    if not len(array) or not np.isfinite(array).all():
        raise MetaVPTError(
            f"statistics over seeds need at least one value, all finite, not {list(values)}; "
            "drop the seeds that failed"
        )
    return array


def power_law(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Fit the exponent b of values ~ a sizes^b by least squares on logarithms.

    Raises:
        MetaVPTError: There is only one size, or a value is not positive.
    """
    if len(set(sizes)) < 2 or min(*sizes, *values) <= 0:
        raise MetaVPTError(
            f"power_law: needs at least two sizes and positive numbers, got {list(sizes)} and "
            f"{list(values)}"
        )
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])
