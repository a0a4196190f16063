"""Random crops, and the augmentation that is nothing else: the recipe of MAE (arXiv 2111.06377) and I-JEPA (arXiv 2301.08243)."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from metavpt.distributed import collectives
from metavpt.errors import MetaVPTError
from metavpt.profiling.timers import phase

Range = tuple[float, float]

ASPECT_RATIO = (
    3 / 4,
    4 / 3,
)  # width / height of a crop, log-uniform, as everywhere since Inception


class RandomCrop(nn.Module):
    """Images and a seed -> (B, 3, size, size): random resized crop, flip, normalisation. A deterministic function of its arguments.

    mean, std: the backbone's normalisation. size in pixels. scale: shares of the image's area, 0.2 to 1 in MAE, 0.3 to 1
    in I-JEPA. flip: its probability.
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        size: int = 224,
        scale: Range = (0.2, 1.0),
        flip: float = 0.5,
    ) -> None:
        super().__init__()
        if size < 1 or not 0 < scale[0] <= scale[1] <= 1 or not 0 <= flip <= 1:
            raise MetaVPTError(
                f"RandomCrop: needs size >= 1, 0 < scale <= 1 in order and flip in [0, 1], got {size=}, {scale=}, {flip=}"
            )
        self.mean, self.std, self.size, self.scale, self.flip = (
            tuple(mean),
            tuple(std),
            size,
            (scale[0], scale[1]),
            flip,
        )

    @phase("augment")
    def forward(self, images: Tensor, seed: int) -> Tensor:
        """images (B, 3, H, W): uint8, or float in [0, 1]. Raises MetaVPTError for anything else."""
        if (
            images.ndim != 4
            or images.shape[1] != 3
            or not (images.dtype == torch.uint8 or images.is_floating_point())
        ):
            raise MetaVPTError(
                f"RandomCrop: images must be (B, 3, H, W), uint8 or float, got {tuple(images.shape)} {images.dtype}"
            )
        images = images / 255 if images.dtype == torch.uint8 else images
        crops = random_crop(images, self.size, self.scale, self.flip, Generator().manual_seed(seed))
        mean, std = (crops.new_tensor(value).view(3, 1, 1) for value in (self.mean, self.std))
        return (crops - mean) / std


def random_crop(images: Tensor, size: int, scale: Range, flip: float, rng: Generator) -> Tensor:
    """One random resized crop of each image, flipped with probability `flip`: (B, 3, H, W) -> (B, 3, size, size), bilinear."""
    drawn = draw_crop(len(images) * collectives.size(), images.shape[-2:], scale, flip, rng)
    return crop(images, size, *(collectives.own(knob).to(images) for knob in drawn))


def draw_crop(
    batch_size: int, image_size: Sequence[int], scale: Range, flip: float, rng: Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Sides (B, 2), position (B, 2) and mirror (B,) of random crops, see `Knobs`.

    Area uniform in `scale`, aspect ratio log-uniform in [3/4, 4/3]; of ten draws the first that fits is taken, else the last is cut to fit.
    """
    height, width = image_size
    area = uniform((batch_size, 10), scale, rng) * (height * width)
    ratio = uniform(
        (batch_size, 10), (math.log(ASPECT_RATIO[0]), math.log(ASPECT_RATIO[1])), rng
    ).exp()
    crop_w, crop_h = (
        (area * ratio).sqrt() / width,
        (area / ratio).sqrt() / height,
    )  # shares of the image's sides
    fits = (crop_w <= 1) & (crop_h <= 1)
    fits[:, -1] = True
    chosen = fits.byte().argmax(dim=1, keepdim=True)  # argmax gives the first
    sides = torch.cat([crop_w.gather(1, chosen), crop_h.gather(1, chosen)], dim=1).clamp(max=1)
    position = uniform((batch_size, 2), (-1.0, 1.0), rng)
    mirror = 1 - 2 * (torch.rand(batch_size, generator=rng) < flip).float()
    return sides, position, mirror


def crop(images: Tensor, size: int, sides: Tensor, position: Tensor, mirror: Tensor) -> Tensor:
    """The crops that `draw_crop` describes: (B, 3, H, W) -> (B, 3, size, size), bilinear, differentiable in sides and position."""
    centers = (1 - sides) * position  # in grid_sample's coordinates the image is [-1, 1]
    zeros = torch.zeros_like(mirror)
    rows = [
        torch.stack([sides[:, 0] * mirror, zeros, centers[:, 0]], 1),
        torch.stack([zeros, sides[:, 1], centers[:, 1]], 1),
    ]
    grid = F.affine_grid(
        torch.stack(rows, dim=1), [len(images), 3, size, size], align_corners=False
    )
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def uniform(shape: int | tuple[int, ...], bounds: Range, rng: Generator) -> Tensor:
    """Uniform random numbers in [low, high)."""
    low, high = bounds
    return low + (high - low) * torch.rand(shape, generator=rng)
