"""Frozen features of whole images, one vector each, for probes other than the dense one."""

from collections.abc import Callable, Iterable
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from metavpt.data.lazy import Lazy, runs
from metavpt.distributed import collectives
from metavpt.errors import MetaVPTError, NonFiniteError
from metavpt.learners.vit import Features

# Images uint8 (B, 3, H, W) of any size -> cls (B, D), patches (B, D, h, w).
Describe = Callable[[Tensor], Features]
Pool = Literal["mean", "cls"]


class Probe(Protocol):
    """A measurement of frozen features, with metric names of its own, such as `knn/accuracy`.

    It may have `directions`, which maps its metrics to "lower" or "higher", whichever is better. A
    metric without a direction gets no verdict. A probe with state has a `state_dict`.
    """

    def __call__(self, describe: Describe, images: Dataset[Tensor]) -> dict[str, float]:
        """Return the metrics by name.

        Args:
            describe: The frozen backbone.
            images: The learner's own unlabelled images, for probes without images of their own.
        """
        ...


def check_pool(pool: str) -> None:
    """Raise MetaVPTError unless `pool` is known."""
    if pool not in ("mean", "cls"):
        raise MetaVPTError(f"pool={pool!r}: known are mean (of the patches), cls")


@torch.no_grad()
def summarise(describe: Describe, batches: Iterable[Tensor], pool: Pool = "mean") -> Tensor:
    """Compute one vector per image, (N, D) float32. Ranks share the batches.

    Args:
        describe: The frozen backbone.
        batches: Images, uint8 (B, 3, H, W) each.
        pool: "mean" of the patches, or the "cls" token.

    Raises:
        NonFiniteError: A feature is NaN or infinite.
    """

    def summary(images: Tensor) -> Tensor:
        features = describe(images)
        return (features.cls if pool == "cls" else features.patches.mean(dim=(2, 3))).float()

    summaries = torch.cat(list(collectives.share_out(summary, batches)))
    if not torch.isfinite(summaries).all():
        raise NonFiniteError(
            "probe: the features of the learner are not finite; look at the losses before this step"
        )
    return summaries


def stack(images: Dataset[Tensor], indices: list[int], batch_size: int) -> Iterable[Tensor]:
    """Return the images at `indices` in batches, uint8 (B, 3, H, W)."""
    return Lazy(lambda which: torch.stack([images[i] for i in which]), runs(indices, batch_size))
