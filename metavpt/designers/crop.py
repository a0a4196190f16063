"""Random crops, the only augmentation of MAE (arXiv 2111.06377) and I-JEPA (arXiv 2301.08243)."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from metavpt.distributed import collectives
from metavpt.errors import MetaVPTError
from metavpt.profiling import phase

Range = tuple[float, float]

# Width / height of a crop, log-uniform, as usual since Inception.
ASPECT_RATIO = (3 / 4, 4 / 3)


class RandomCrop(nn.Module):
    """A random resized crop, a flip and the normalisation: images and a seed to (B, 3, size, size).

    The result is a deterministic function of the arguments.

    Args:
        mean: The backbone's normalisation.
        std: The backbone's normalisation.
        size: Pixels.
        scale: The range of the crop's share of the area: 0.2 to 1 in MAE, 0.3 to 1 in I-JEPA.
        flip: The probability of a flip.
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
                "RandomCrop: needs size >= 1, 0 < scale <= 1 in order and flip in [0, 1], got "
                f"{size=}, {scale=}, {flip=}"
            )
        self.mean, self.std, self.size, self.scale, self.flip = (
            tuple(mean),
            tuple(std),
            size,
            (scale[0], scale[1]),
            flip,
        )

    def grid(self, patch_size: int) -> tuple[int, int]:
        """Return the number of patches (h, w) of a crop."""
        return _grid((self.size, self.size), patch_size)

    @phase("augment")
    def forward(self, images: Tensor, seed: int) -> Tensor:
        """Crop images (B, 3, H, W), uint8 or float in [0, 1].

        Raises:
            MetaVPTError: The images have another form.
        """
        images = _as_float(images, type(self).__name__)
        crops = random_crop(images, self.size, self.scale, self.flip, Generator().manual_seed(seed))
        return _normalized(crops, self.mean, self.std)


class WholeFrames(nn.Module):
    """Whole images, resized, flipped with probability `flip` and normalised.

    Frames keep their layout: floor below, ceiling above. A designer that is fitted to labelled
    frames then sees the unlabelled ones as it saw those.

    Args:
        mean: Of the backbone's normalisation.
        std: Of the backbone's normalisation.
        size: (H, W) in pixels.
        flip: Probability of a horizontal flip.
    """

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], size: Sequence[int], flip: float = 0.0
    ) -> None:
        super().__init__()
        if len(size) != 2 or min(size) < 1 or not 0 <= flip <= 1:
            raise MetaVPTError(
                f"WholeFrames: needs size=[H, W] of at least 1 and flip in [0, 1], got {size=}, "
                f"{flip=}"
            )
        self.mean, self.std, self.flip = tuple(mean), tuple(std), flip
        self.size = (int(size[0]), int(size[1]))

    def grid(self, patch_size: int) -> tuple[int, int]:
        """Return the number of patches (h, w) of a frame."""
        return _grid(self.size, patch_size)

    @phase("augment")
    def forward(self, images: Tensor, seed: int) -> Tensor:
        """Make the frames, (B, 3, H, W) of `size`.

        Args:
            images: (B, 3, *, *), uint8, or float in [0, 1].
            seed: Of the flips.
        """
        images = _as_float(images, type(self).__name__)
        if images.shape[-2:] != self.size:
            images = F.interpolate(
                images, self.size, mode="bilinear", antialias=True, align_corners=False
            )
        rng, num = Generator().manual_seed(seed), len(images) * collectives.size()
        flipped = collectives.own(torch.rand(num, generator=rng) < self.flip).to(images.device)
        images = torch.where(flipped[:, None, None, None], images.flip(-1), images)
        return _normalized(images, self.mean, self.std)


def _grid(size: tuple[int, int], patch_size: int) -> tuple[int, int]:
    if size[0] % patch_size or size[1] % patch_size:
        given = size[0] if size[0] == size[1] else list(size)
        raise MetaVPTError(f"recipe.size={given} does not divide into patches of {patch_size}")
    return size[0] // patch_size, size[1] // patch_size


def _as_float(images: Tensor, name: str) -> Tensor:
    if (
        images.ndim != 4
        or images.shape[1] != 3
        or not (images.dtype == torch.uint8 or images.is_floating_point())
    ):
        raise MetaVPTError(
            f"{name}: images must be (B, 3, H, W), uint8 or float, got {tuple(images.shape)} "
            f"{images.dtype}"
        )
    return images / 255 if images.dtype == torch.uint8 else images


def _normalized(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    center, scale = (images.new_tensor(value).view(3, 1, 1) for value in (mean, std))
    return (images - center) / scale


def random_crop(images: Tensor, size: int, scale: Range, flip: float, rng: Generator) -> Tensor:
    """Crop each image at random and flip it with probability `flip`.

    Args:
        images: (B, 3, H, W).
        size: Pixels.
        scale: The range of the crop's share of the area.
        flip: The probability of a flip.
        rng: The source of randomness.

    Returns:
        (B, 3, size, size), by bilinear interpolation.
    """
    drawn = draw_crop(len(images) * collectives.size(), images.shape[-2:], scale, flip, rng)
    return crop(images, size, *(collectives.own(knob).to(images) for knob in drawn))


def draw_crop(
    batch_size: int, image_size: Sequence[int], scale: Range, flip: float, rng: Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Sides (B, 2), position (B, 2) and mirror (B,) of random crops, see `Knobs`.

    Area uniform in `scale`, aspect ratio log-uniform in [3/4, 4/3]; of ten draws the first that
    fits is taken, else the last is cut to fit.
    """
    height, width = image_size
    area = uniform((batch_size, 10), scale, rng) * (height * width)
    ratio = uniform(
        (batch_size, 10), (math.log(ASPECT_RATIO[0]), math.log(ASPECT_RATIO[1])), rng
    ).exp()
    # Shares of the image's sides.
    crop_w, crop_h = (area * ratio).sqrt() / width, (area / ratio).sqrt() / height
    fits = (crop_w <= 1) & (crop_h <= 1)
    fits[:, -1] = True
    chosen = fits.byte().argmax(dim=1, keepdim=True)  # argmax gives the first
    sides = torch.cat([crop_w.gather(1, chosen), crop_h.gather(1, chosen)], dim=1).clamp(max=1)
    position = uniform((batch_size, 2), (-1.0, 1.0), rng)
    mirror = 1 - 2 * (torch.rand(batch_size, generator=rng) < flip).float()
    return sides, position, mirror


def crop(images: Tensor, size: int, sides: Tensor, position: Tensor, mirror: Tensor) -> Tensor:
    """Make the crops that `draw_crop` describes, differentiable in sides and position.

    Args:
        images: (B, 3, H, W).
        size: Pixels.
        sides: See `draw_crop`.
        position: See `draw_crop`.
        mirror: See `draw_crop`.

    Returns:
        (B, 3, size, size), by bilinear interpolation.
    """
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
