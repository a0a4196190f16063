"""Frozen features of a labelled set, computed once and shared by every head and every task."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from metavpt.dense_tasks.segmentation import IGNORE
from metavpt.dense_tasks.task import DenseTask
from metavpt.distributed import collectives
from metavpt.errors import MetaVPTError, NonFiniteError

Features = Callable[[Tensor], Tensor]  # images uint8 (B, 3, H, W) -> feature grid (B, D, h, w)


class LabelledBatch(Protocol):
    """A batch of labelled images, with what the tasks read beside them."""

    @property
    def image(self) -> Tensor:
        """Return the images, uint8 (B, 3, H, W)."""
        ...


class FeatureSet(NamedTuple):
    """Features of a set and the target of a task.

    Attributes:
        features: (M, D, h, w).
        target: (M, H, W) or (M, K, H, W). Whole numbers, such as classes, take one byte each.
    """

    features: Tensor
    target: Tensor

    @property
    def grid(self) -> tuple[int, int]:
        """Return (h, w)."""
        return self.features.shape[2], self.features.shape[3]

    @property
    def size(self) -> tuple[int, int]:
        """Return (H, W)."""
        return self.target.shape[-2], self.target.shape[-1]

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
    features: Features,
    batches: Iterable[LabelledBatch],
    tasks: Sequence[DenseTask],
    device: torch.device | str | None = None,
) -> dict[str, FeatureSet]:
    """Compute the features of every image, and the target of each task. Ranks share the batches.

    Args:
        features: The frozen backbone.
        batches: Labelled batches with images of one size.
        tasks: What to keep the targets of.
        device: Where the result is kept. None: where the features are computed.

    Returns:
        A set for each task by its name. They share the features.

    Raises:
        MetaVPTError: There is no batch, the images differ in size, or a label is not in 0..255.
        NonFiniteError: A feature is NaN or infinite.
    """

    def read(batch: LabelledBatch) -> list[Tensor]:
        grid = features(batch.image)
        return [grid, *(_compact(task.target(batch)).to(grid.device) for task in tasks)]

    parts: list[list[Tensor]] = []
    for part in collectives.share_out(read, batches):
        if not torch.isfinite(part[0]).all():
            raise NonFiniteError(
                "probe: the features of the learner are not finite; look at the losses before "
                "this step"
            )
        parts.append([tensor.to(device) for tensor in part])
    if not parts:
        raise MetaVPTError("probe: there is no labelled batch to read")
    if len({tuple(tensor.shape[1:] for tensor in part) for part in parts}) > 1:
        raise MetaVPTError(
            "probe: all images of a labelled set must have one size; resize or crop them in the "
            "dataset"
        )
    grid, *targets = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return {task.name: FeatureSet(grid, t) for task, t in zip(tasks, targets, strict=True)}


@dataclass(frozen=True)
class SlidingWindow:
    """Features (B, D, H/p, W/p) of images (B, 3, H, W), averaged over overlapping windows.

    Windows are two thirds of their size apart, rounded down to whole patches. A window is never
    larger than the image. A linear head on these features returns the mean of the scores of the
    windows that contain a patch. This is the sliding inference of mmsegmentation (512 and 341),
    except that scores are averaged before they are enlarged.

    Args:
        features: The backbone, for images of any size that its patches divide.
        size: (H, W) of a window, in pixels.
        patch_size: p, in pixels.

    Raises:
        MetaVPTError: The patches do not divide the window.
    """

    features: Features
    size: tuple[int, int]
    patch_size: int

    def __post_init__(self) -> None:
        if any(side < self.patch_size or side % self.patch_size for side in self.size):
            raise MetaVPTError(
                f"probe_window={self.size[0]}x{self.size[1]}: patches of {self.patch_size} pixels "
                "must divide it"
            )

    def __call__(self, images: Tensor) -> Tensor:
        """Compute the features of images (B, 3, H, W)."""
        p = self.patch_size
        grid = (images.shape[-2] // p, images.shape[-1] // p)
        height, width = (
            min(side // p, length) for side, length in zip(self.size, grid, strict=True)
        )
        places = [(top, left) for top in starts(grid[0], height) for left in starts(grid[1], width)]
        seen = [
            self.features(images[..., p * top : p * (top + height), p * left : p * (left + width)])
            for top, left in places
        ]
        total, count = seen[0].new_zeros(*seen[0].shape[:2], *grid), seen[0].new_zeros(grid)
        for (top, left), features in zip(places, seen, strict=True):
            total[..., top : top + height, left : left + width] += features
            count[top : top + height, left : left + width] += 1
        return total / count


def starts(length: int, window: int) -> list[int]:
    """Return where windows begin, in patches. The last window ends at the edge."""
    step = max(1, 2 * window // 3)
    return [min(k * step, length - window) for k in range(1 + math.ceil((length - window) / step))]


def _compact(target: Tensor) -> Tensor:
    """Keep whole numbers in one byte each, so that large sets fit into memory."""
    if target.is_floating_point():
        return target.float()
    if target.numel() and not 0 <= int(target.min()) <= int(target.max()) <= IGNORE:
        raise MetaVPTError(f"probe: labels must lie in 0..{IGNORE}; ignored pixels are {IGNORE}")
    return target.to(torch.uint8)
