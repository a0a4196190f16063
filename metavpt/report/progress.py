"""A metric against the samples that the learner has seen, over the seeds of a row."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from metavpt.compare.paired_statistics import mean_se


class Progress(NamedTuple):
    """The mean over seeds and its standard error (0 for one seed).

    Attributes:
        samples: (P,).
        mean: (P,).
        error: (P,).
    """

    samples: np.ndarray
    mean: np.ndarray
    error: np.ndarray

    def thinned(self, num_points: int) -> "Progress":
        """Average blocks of points, to at most `num_points`."""
        blocks = min(num_points, len(self.samples))
        return Progress(
            *(
                np.array([block.mean() for block in np.array_split(values, blocks)])
                for values in self
            )
        )


def progress(seeds: Sequence[Mapping[float, float]]) -> Progress:
    """Average the courses of several seeds, each linearly interpolated between its points.

    Args:
        seeds: For each seed, values by samples. The result ends where the shortest seed ends.
    """
    last = min(max(seed) for seed in seeds)
    samples = sorted({at for seed in seeds for at in seed if at <= last})
    values = np.stack(
        [np.interp(samples, sorted(seed), [seed[at] for at in sorted(seed)]) for seed in seeds]
    )  # (seeds, P)
    means = [mean_se(column) for column in values.T.tolist()]
    return Progress(
        np.array(samples),
        np.array([mean.value for mean in means]),
        np.array([mean.se or 0.0 for mean in means]),
    )


def samples_to_reach(row: Progress, target: float, sign: int) -> float | None:
    """Return the samples at which the mean curve first is as good as `target`. None: never.

    Args:
        row: The curve, linearly interpolated between its points.
        target: The value to reach.
        sign: +1 if higher is better, -1 if lower.
    """
    ahead = sign * (row.mean - target)  # (P,)
    reached = np.flatnonzero(ahead >= 0)
    if not len(reached):
        return None
    after = int(reached[0])
    if after == 0:
        return float(row.samples[0])
    share = -ahead[after - 1] / (ahead[after] - ahead[after - 1])
    return float(row.samples[after - 1] + share * (row.samples[after] - row.samples[after - 1]))
