"""A metric against the samples that the learner has seen, over the seeds of a row."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from metavpt.compare.paired_statistics import mean_se


class Progress(NamedTuple):
    """Mean over seeds and its standard error, 0 for one seed, at `samples`; (P,) each."""

    samples: np.ndarray
    mean: np.ndarray
    error: np.ndarray

    def thinned(self, num_points: int) -> "Progress":
        """At most `num_points`, each the mean of a stretch of the old ones."""
        blocks = min(num_points, len(self.samples))
        return Progress(
            *(
                np.array([block.mean() for block in np.array_split(values, blocks)])
                for values in self
            )
        )


def progress(seeds: Sequence[Mapping[float, float]]) -> Progress:
    """samples -> value of every seed, joined where any seed was measured; straight lines between, no further than the shortest seed."""
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
    """Where the mean curve first is as good as `target`, straight lines between its points; None where it never is."""
    ahead = sign * (row.mean - target)  # (P,)
    reached = np.flatnonzero(ahead >= 0)
    if not len(reached):
        return None
    after = int(reached[0])
    if after == 0:
        return float(row.samples[0])
    share = -ahead[after - 1] / (ahead[after] - ahead[after - 1])
    return float(row.samples[after - 1] + share * (row.samples[after] - row.samples[after - 1]))
