"""Is one strategy better than another by more than noise: paired statistics over seeds, by scipy.stats. Same values, same numbers."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from scipy import stats

from metavpt.errors import MetaVPTError

LEVEL = 0.95
NUM_RESAMPLES = 9999  # 2^13 sign flips are fewer, so the test is exact up to 13 seeds
# Below it the interval is the range of the differences, which misses the truth too often (in 50 %
# of cases with 2 seeds, in 25 % with 3) to call a difference better or worse.
MIN_SEEDS = 5

Verdict = Literal["better", "worse", "unclear", "too few seeds"]


class Mean(NamedTuple):
    """Mean of n values and its standard error, None for one value."""

    value: float
    se: float | None
    n: int


class Paired(NamedTuple):
    """a against b on the same n seeds. One seed has a difference and no interval or p-value.

    difference  mean of a - b
    low, high   95 % bootstrap interval of it
    p           two-sided, of the sign-flip permutation test
    wins        seeds in which a is better, a tie counting half; None where nobody said which way is
    good sign        -1 lower is better, +1 higher is better, 0 unknown
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
        """Judge a: "unclear" where the interval holds zero, or nobody said which way is good."""
        if self.n < MIN_SEEDS:
            return "too few seeds"
        if not self.sign or self.low is None or self.high is None or self.low <= 0 <= self.high:
            return "unclear"
        return "better" if self.sign * self.difference > 0 else "worse"


class Correlation(NamedTuple):
    """Pearson r, and the slope of the regression of y on x, of n finite pairs; None where it is not defined."""

    r: float | None
    slope: float | None
    n: int


def mean_se(values: Sequence[float]) -> Mean:
    """Mean and its standard error. Raises MetaVPTError for no value, or one that is not finite."""
    array = _finite(values)
    se = (
        float(stats.sem(array - array[0])) if len(array) > 1 else None
    )  # shifted, so that equal values have an error of exactly zero
    return Mean(float(array.mean()), se, len(array))


def paired(a: Sequence[float], b: Sequence[float], sign: int) -> Paired:
    """a - b with its interval and p-value; a[k] and b[k] are of the same seed.

    The interval is the percentile bootstrap at Hesterberg's expanded level: the plain one is too
    short for few seeds, and BCa is as short and undefined where all differences are equal (an
    interval of length zero here). Coverage of normal differences is 95 % from 8 seeds on; below
    MIN_SEEDS the interval is the range of the differences, see `range_coverage`. Source:
    Hesterberg, "What Teachers Should Know About the Bootstrap", The American Statistician 69
    (2015), expanded percentile interval.
    """
    if len(a) != len(b):
        raise MetaVPTError(
            f"paired: {len(a)} values against {len(b)}; give one of each for every seed"
        )
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
    """The p-value of n differences that all have one sign: no two-sided sign-flip test gives less."""
    return 2 / 2**n


def range_coverage(n: int) -> float:
    """How often the range of n symmetric differences holds their centre: all but the two cases of one sign for all."""
    return 1 - smallest_p(n)


def pearson(x: Sequence[float], y: Sequence[float]) -> Correlation:
    """r of x and y, and the slope of y on x (`x` predicted, `y` realised). Pairs that are not finite are left out.

    Two points lie on a line whatever they are, so fewer than three have neither; a constant x has
    neither, a constant y no r.
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
    """The level at which a percentile interval of n normal values is as long as their t interval."""
    tail = stats.norm.sf(math.sqrt(n / (n - 1)) * stats.t.isf((1 - LEVEL) / 2, n - 1))
    return float(1 - 2 * tail)


def _finite(values: Sequence[float]) -> np.ndarray:
    array = np.asarray(values, dtype=float)
    if not len(array) or not np.isfinite(array).all():
        raise MetaVPTError(
            f"statistics over seeds need finite values, one at least, not {list(values)}; leave "
            "out the seeds that failed"
        )
    return array


def power_law(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The exponent b of values ~ a sizes^b, by least squares on logarithms.

    MetaVPTError for one size alone or a value <= 0.
    """
    if len(set(sizes)) < 2 or min(*sizes, *values) <= 0:
        raise MetaVPTError(
            f"power_law: needs two sizes at least and positive numbers, got {list(sizes)} and "
            f"{list(values)}"
        )
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])
