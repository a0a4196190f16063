"""Features of an image that is larger than the backbone was made for, from overlapping windows."""

import math
from dataclasses import dataclass

from torch import Tensor

from metavpt.errors import MetaVPTError
from metavpt.probes.features import Features


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
