"""Frozen features of a labelled set, computed once and shared by every head and every task.

Letters: M images of the set, B of a batch, D width of a feature, C outputs, H W pixels, h w
patches.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from metavpt.distributed import collectives
from metavpt.errors import MetaVPTError, NonFiniteError

IGNORE = 255  # the label of pixels that are neither learned from nor counted

Features = Callable[[Tensor], Tensor]  # images uint8 (B, 3, H, W) -> feature grid (B, D, h, w)


class LabelledBatch(Protocol):
    """image uint8 (B, 3, H, W); depth float32 (B, H, W) in metres, 0 where unknown; label int64 (B, H, W) in 0..C-1, 255 where ignored."""

    @property
    def image(self) -> Tensor: ...

    @property
    def depth(self) -> Tensor: ...

    @property
    def label(self) -> Tensor: ...


class FeatureSet(NamedTuple):
    """features (M, D, h, w), depth float32 (M, H, W), label uint8 (M, H, W): classes need one byte, a set of frames is large."""

    features: Tensor
    depth: Tensor
    label: Tensor

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w)."""
        return self.features.shape[2], self.features.shape[3]

    def take(self, index: Tensor | slice) -> "FeatureSet":
        return FeatureSet(*(field[index] for field in self))

    def chunks(self, size: int = 16) -> Iterator["FeatureSet"]:
        """The set in order, `size` images at a time: full-size outputs of all images at once would not fit."""
        for start in range(0, len(self.features), size):
            yield self.take(slice(start, start + size))


@torch.no_grad()
def extract(
    features: Features, batches: Iterable[LabelledBatch], device: torch.device | str | None = None
) -> FeatureSet:
    """`features` of every image beside its labels, kept on `device` (None: where the features are computed); ranks share out the batches.

    Raises MetaVPTError for no batch, images of several sizes or labels beyond 0..255;
    NonFiniteError for NaN or infinite features.
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
