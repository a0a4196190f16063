"""Frozen features of a labelled set, computed once and shared by every head and every task."""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from metavpt.distributed import collectives
from metavpt.errors import MetaVPTError, NonFiniteError

IGNORE = 255  # the label of pixels that are neither learned from nor counted

Features = Callable[[Tensor], Tensor]  # images uint8 (B, 3, H, W) -> feature grid (B, D, h, w)


class LabelledBatch(Protocol):
    """A batch of labelled images.

    Attributes:
        image: uint8 (B, 3, H, W).
        depth: float32 (B, H, W) in metres, 0 where unknown.
        label: int64 (B, H, W) in 0..C-1, 255 where ignored.
    """

    @property
    def image(self) -> Tensor:
        """Return the images."""
        ...

    @property
    def depth(self) -> Tensor:
        """Return the depth maps."""
        ...

    @property
    def label(self) -> Tensor:
        """Return the label maps."""
        ...


class FeatureSet(NamedTuple):
    """Features and labels of a set.

    Attributes:
        features: (M, D, h, w).
        depth: float32 (M, H, W), in metres.
        label: uint8 (M, H, W). One byte per pixel keeps large sets in memory.
    """

    features: Tensor
    depth: Tensor
    label: Tensor

    @property
    def grid(self) -> tuple[int, int]:
        """Return (h, w)."""
        return self.features.shape[2], self.features.shape[3]

    def take(self, index: Tensor | slice) -> "FeatureSet":
        """Return a subset."""
        return FeatureSet(*(field[index] for field in self))

    def chunks(self, size: int = 16) -> Iterator["FeatureSet"]:
        """Iterate over the set, `size` images at a time.

        Outputs at full size of all images at once may not fit into memory.
        """
        for start in range(0, len(self.features), size):
            yield self.take(slice(start, start + size))


@torch.no_grad()
def extract(
    features: Features, batches: Iterable[LabelledBatch], device: torch.device | str | None = None
) -> FeatureSet:
    """Compute the features of every image. Ranks share the batches.

    Args:
        features: The frozen backbone.
        batches: Labelled batches with images of one size.
        device: Where the result is kept. None: where the features are computed.

    Raises:
        MetaVPTError: There is no batch, the images differ in size, or a label is not in 0..255.
        NonFiniteError: A feature is NaN or infinite.
    """

    def read(batch: LabelledBatch) -> FeatureSet:
        grid = features(batch.image)
        if (
            batch.label.numel()
            and not 0 <= int(batch.label.min()) <= int(batch.label.max()) <= IGNORE
        ):
            raise MetaVPTError(
                f"probe: labels must lie in 0..{IGNORE}; ignored pixels are {IGNORE}"
            )
        return FeatureSet(
            grid,
            batch.depth.to(grid.device, torch.float32),
            batch.label.to(grid.device, torch.uint8),
        )

    parts = []
    for part in collectives.share_out(read, batches):
        if not torch.isfinite(part.features).all():
            raise NonFiniteError(
                "probe: the features of the learner are not finite; look at the losses before "
                "this step"
            )
        parts.append(FeatureSet(*(field.to(device) for field in part)))
    if not parts:
        raise MetaVPTError("probe: there is no labelled batch to read")
    if (
        len(
            {
                (part.features.shape[1:], part.depth.shape[1:], part.label.shape[1:])
                for part in parts
            }
        )
        > 1
    ):
        raise MetaVPTError(
            "probe: all images of a labelled set must have one size; resize or crop them in the "
            "dataset"
        )
    return FeatureSet(*(torch.cat(field) for field in zip(*parts, strict=True)))
