"""Frozen features of whole images, one vector each: what probes beside the dense one read."""

from collections.abc import Callable, Iterable
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from metavpt.data.lazy import Lazy, runs
from metavpt.distributed import collectives
from metavpt.errors import MetaVPTError, NonFiniteError
from metavpt.learners.vit import Features

Describe = Callable[
    [Tensor], Features
]  # images uint8 (B, 3, H, W) of any size -> cls (B, D), patches (B, D, h, w)
Pool = Literal["mean", "cls"]


class Probe(Protocol):
    """A measurement of frozen features under names of its own, such as `knn/accuracy`.

    It may have `directions`, a mapping from its metrics to "lower" or "higher", whichever is
    better; a metric that is not named gets no verdict. It has a `state_dict` where it remembers
    something.
    """

    def __call__(self, describe: Describe, images: Dataset[Tensor]) -> dict[str, float]:
        """`images` are the learner's own unlabelled ones, for probes that bring none."""
        ...


def check_pool(pool: str) -> None:
    """Raise MetaVPTError unless `pool` is known."""
    if pool not in ("mean", "cls"):
        raise MetaVPTError(f"pool={pool!r}: known are mean (of the patches), cls")


@torch.no_grad()
def summarise(describe: Describe, batches: Iterable[Tensor], pool: Pool = "mean") -> Tensor:
    """(N, D) float32: the mean patch, or the cls token, of every image of `batches`, which ranks share out. Raises NonFiniteError."""

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
    """The images at `indices`, uint8 (B, 3, H, W) at a time."""
    return Lazy(lambda which: torch.stack([images[i] for i in which]), runs(indices, batch_size))
