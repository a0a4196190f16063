"""Views of a batch of images: the fixed multi-crop recipe of DINO (arXiv 2104.14294; its released code for the strengths)."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from kornia.color import rgb_to_grayscale
from kornia.enhance import (
    adjust_brightness_accumulative,
    adjust_contrast_with_mean_subtraction,
    adjust_hue,
    adjust_saturation_with_gray_subtraction,
    solarize,
)
from kornia.filters import gaussian_blur2d
from torch import Generator, Tensor, nn

from metavpt.errors import MetaVPTError

Range = tuple[float, float]

_ASPECT_RATIO = (3 / 4, 4 / 3)  # width / height of a crop, log-uniform, as everywhere since Inception


class Views(NamedTuple):
    """A task: normalised views of a batch, and what a mask designer did to them (None: nothing). In masks 1 keeps a pixel, 0 blurs it."""

    global_crops: Tensor  # (2, B, 3, H, W)
    local_crops: Tensor  # (L, B, 3, h, w)
    masks: Tensor | None = None  # (2, B, 1, H, W) in [0, 1], of the global crops
    local_masks: Tensor | None = None  # (L, B, 1, h, w), of the local crops
    excess: Tensor | None = None  # (V, B), how far mask logits lie outside [0, 1]; V = 2, or 2 + L with local masks


class MultiCrop(nn.Module):
    """Images and a seed -> Views: random resized crop, flip, colour jitter, grayscale, blur, solarisation, normalisation, all per image.

    A deterministic function of its arguments, differentiable in float images; it neither reads nor moves the global random state. Random
    numbers are drawn on the CPU, so a seed gives the same views on every device.

    mean, std: the backbone's normalisation. Sides in pixels; scales are shares of the image's area; `jitter` is the strength of brightness,
    contrast, saturation (factors 1 +- s) and hue (turns +- s). `blur_sigma` in pixels. `blur` and `solarize` are the probabilities for
    global view 1, global view 2, local views. No antialiasing: bilinear, so images far larger than the crops should be shrunk before.
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        global_size: int = 224,
        local_size: int = 96,
        num_local: int = 6,
        global_scale: Range = (0.4, 1.0),
        local_scale: Range = (0.05, 0.4),
        flip: float = 0.5,
        jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1),
        jitter_prob: float = 0.8,
        grayscale: float = 0.2,
        blur_sigma: Range = (0.1, 2.0),
        blur: tuple[float, float, float] = (1.0, 0.1, 0.5),
        solarize: tuple[float, float, float] = (0.0, 0.2, 0.0),
    ) -> None:
        super().__init__()
        for name, (low, high) in {"global_scale": global_scale, "local_scale": local_scale}.items():
            if not 0 < low <= high <= 1:
                raise MetaVPTError(f"MultiCrop: {name} must satisfy 0 < low <= high <= 1, got ({low}, {high})")
        if min(global_size, local_size) < 1 or num_local < 0:
            raise MetaVPTError(f"MultiCrop: sizes must be positive, got {global_size=}, {local_size=}, {num_local=}")
        self.mean, self.std = tuple(mean), tuple(std)
        self.global_size, self.local_size, self.num_local = global_size, local_size, num_local
        self.global_scale, self.local_scale, self.flip = global_scale, local_scale, flip
        self.jitter, self.jitter_prob, self.grayscale = jitter, jitter_prob, grayscale
        self.blur_sigma, self.blur, self.solarize = blur_sigma, blur, solarize

    def forward(self, images: Tensor, seed: int) -> Views:
        """images (B, 3, H, W): uint8, or float in [0, 1]. Raises MetaVPTError for anything else."""
        rng = Generator().manual_seed(seed)
        images = _to_float(images)
        first = self._make_views(images, 1, self.global_size, self.global_scale, 0, rng)
        second = self._make_views(images, 1, self.global_size, self.global_scale, 1, rng)
        return Views(torch.cat([first, second]), self._make_views(images, self.num_local, self.local_size, self.local_scale, 2, rng))

    def _make_views(self, images: Tensor, num_views: int, size: int, scale: Range, kind: int, rng: Generator) -> Tensor:
        """`num_views` views (V, B, 3, size, size) of one kind: 0, 1 the global views, 2 local. Augmented in one call, for its overhead."""
        if num_views == 0:
            return images.new_zeros(0, len(images), 3, size, size)
        views = torch.cat([random_crop(images, size, scale, self.flip, rng) for _ in range(num_views)])
        views = _sometimes(self.jitter_prob, self._color_jitter, views, rng)
        views = _sometimes(self.grayscale, _gray, views, rng)
        views = _sometimes(self.blur[kind], self._gaussian_blur, views, rng)
        views = _sometimes(self.solarize[kind], _solarize, views, rng)
        mean, std = (views.new_tensor(value).view(3, 1, 1) for value in (self.mean, self.std))
        return ((views - mean) / std).unflatten(0, (num_views, len(images)))

    def _color_jitter(self, views: Tensor, rng: Generator) -> Tensor:
        """The four adjustments in an order drawn once per call, with a strength drawn for each view."""
        brightness, contrast, saturation, hue = self.jitter
        steps: list[tuple[Callable[[Tensor, Tensor], Tensor], float, float]] = [
            (adjust_brightness_accumulative, 1.0, brightness),
            (adjust_contrast_with_mean_subtraction, 1.0, contrast),
            (adjust_saturation_with_gray_subtraction, 1.0, saturation),
            (adjust_hue, 0.0, 2 * math.pi * hue),
        ]
        for i in torch.randperm(4, generator=rng).tolist():
            adjust, center, strength = steps[i]
            factor = _uniform(len(views), (max(0.0, center - strength) if center else -strength, center + strength), rng)
            if strength:
                views = adjust(views, factor.to(views))
        return views

    def _gaussian_blur(self, views: Tensor, rng: Generator) -> Tensor:
        sigma = _uniform(len(views), self.blur_sigma, rng).to(views)[:, None].expand(-1, 2)
        radius = min(math.ceil(3 * self.blur_sigma[1]), views.shape[-1] - 1)  # reflection reaches no further than the view
        return gaussian_blur2d(views, (2 * radius + 1, 2 * radius + 1), sigma) if radius else views


def random_crop(images: Tensor, size: int, scale: Range, flip: float, rng: Generator) -> Tensor:
    """One random resized crop of each image, flipped with probability `flip`: (B, 3, H, W) -> (B, 3, size, size), bilinear.

    Area uniform in `scale`, aspect ratio log-uniform in [3/4, 4/3]; of ten draws the first that fits is taken, else the last is cut to fit.
    """
    batch, (height, width) = len(images), images.shape[-2:]
    area = _uniform((batch, 10), scale, rng) * (height * width)
    ratio = _uniform((batch, 10), (math.log(_ASPECT_RATIO[0]), math.log(_ASPECT_RATIO[1])), rng).exp()
    crop_w, crop_h = (area * ratio).sqrt() / width, (area / ratio).sqrt() / height  # shares of the image's sides
    fits = (crop_w <= 1) & (crop_h <= 1)
    fits[:, -1] = True
    chosen = fits.byte().argmax(dim=1, keepdim=True)  # argmax gives the first
    sides = torch.cat([crop_w.gather(1, chosen), crop_h.gather(1, chosen)], dim=1).clamp(max=1)  # (B, 2): x, y
    centers = (1 - sides) * _uniform((batch, 2), (-1.0, 1.0), rng)  # in grid_sample's coordinates the image is [-1, 1]
    mirror = 1 - 2 * (torch.rand(batch, generator=rng) < flip).float()
    zeros = torch.zeros(batch)
    rows = [torch.stack([sides[:, 0] * mirror, zeros, centers[:, 0]], 1), torch.stack([zeros, sides[:, 1], centers[:, 1]], 1)]
    grid = F.affine_grid(torch.stack(rows, dim=1).to(images), [batch, 3, size, size], align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def _sometimes(prob: float, transform: Callable[[Tensor, Generator], Tensor], views: Tensor, rng: Generator) -> Tensor:
    """`transform` applied to each view with probability `prob`; the others cost nothing."""
    chosen = (torch.rand(len(views), generator=rng) < prob).nonzero()[:, 0].to(views.device)
    if len(chosen) == len(views):
        return transform(views, rng)
    return views.index_copy(0, chosen, transform(views[chosen], rng)) if len(chosen) else views


def _gray(views: Tensor, _: Generator) -> Tensor:
    return rgb_to_grayscale(views).expand_as(views)


def _solarize(views: Tensor, _: Generator) -> Tensor:
    return solarize(views, 0.5)


def _uniform(shape: int | tuple[int, ...], bounds: Range, rng: Generator) -> Tensor:
    low, high = bounds
    return low + (high - low) * torch.rand(shape, generator=rng)


def _to_float(images: Tensor) -> Tensor:
    if images.ndim != 4 or images.shape[1] != 3:
        raise MetaVPTError(f"MultiCrop: images must be (B, 3, H, W), got {tuple(images.shape)}")
    if images.dtype == torch.uint8:
        return images.float() / 255
    if not images.is_floating_point():
        raise MetaVPTError(f"MultiCrop: images must be uint8, or float in [0, 1], got {images.dtype}")
    return images if images.dtype == torch.float64 else images.float()  # half cannot hold the coordinates of a crop
