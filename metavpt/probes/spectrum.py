"""Collapse and drift of features: effective rank, and similarity to the features of step 0."""

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import Dataset

from metavpt.errors import MetaVPTError
from metavpt.probes.summaries import Describe, Pool, check_pool, stack, summarise
from metavpt.problem import Directions


def rankme(features: Tensor) -> float:
    """Compute the effective rank of features (N, D), from 1 to about min(N, D).

    exp(-sum_k p_k log p_k) with p_k = sigma_k / sum sigma + 1e-7. The features are not centred.
    Source: RankMe (arXiv 2210.02885, equations 1 and 2).
    """
    sigma = torch.linalg.svdvals(features.double())
    p = sigma / sigma.sum() + 1e-7
    return float((-(p * p.log()).sum()).exp())


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Compute the linear centred kernel alignment of features (N, D) and (N, E) of the same images.

    |Y^T X|^2 / (|X^T X| |Y^T Y|) in Frobenius norms, for centred X and Y. It is 1 if they agree up
    to rotation and scale, and NaN if either is constant. Source: arXiv 1905.00414, section 3.
    """
    x, y = (z.double() - z.double().mean(dim=0) for z in (x, y))
    return float((y.T @ x).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm()))


class Spectrum:
    """Rank and drift of features: `{"rank/rankme": 71.2, "cka/step0": 0.93}`.

    The images are the learner's own unlabelled ones.

    `cka/step0` compares with the features of the first measurement, before any training (a warm
    start included). They are part of a checkpoint.

    Args:
        num_images: Number of images, spread evenly over the set. It bounds the rank, so take more
            than the width of the features.
        pool: "mean" of the patches, or the "cls" token.
        batch_size: Images per forward pass.

    Raises:
        MetaVPTError: `num_images` is below 2, or `pool` is unknown.
    """

    directions: ClassVar[Directions] = {"rank/rankme": "higher"}

    def __init__(self, num_images: int = 512, pool: Pool = "mean", batch_size: int = 64) -> None:
        check_pool(pool)
        if num_images < 2:
            raise MetaVPTError(f"Spectrum: num_images={num_images} must be at least 2")
        self.num_images, self.batch_size = num_images, batch_size
        self.pool: Pool = pool
        self.first: Tensor | None = None

    def __call__(self, describe: Describe, images: Dataset[Tensor]) -> dict[str, float]:
        """Return rank and similarity on the learner's unlabelled `images`."""
        total: int = len(images)  # type: ignore[arg-type]
        count = min(self.num_images, total)
        features = summarise(
            describe,
            stack(images, [i * total // count for i in range(count)], self.batch_size),
            self.pool,
        ).cpu()
        if self.first is None:
            self.first = features
        return {"rank/rankme": rankme(features), "cka/step0": linear_cka(features, self.first)}

    def state_dict(self) -> dict[str, Any]:
        """Return the features of the first measurement."""
        return {"first": self.first}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.first = state["first"]
