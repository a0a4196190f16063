"""Views of a batch of images: the multi-crop recipe of DINO (arXiv 2104.14294).

The strengths are those of the released code.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
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
from torch.utils._pytree import tree_map_only

from metavpt.data.loader import mix
from metavpt.designers.crop import Range, crop, draw_crop, uniform
from metavpt.designers.hiding import hidden_patches
from metavpt.distributed import collectives
from metavpt.errors import MetaVPTError
from metavpt.hypergradients.params import Params
from metavpt.profiling import phase

_ADJUSTMENTS: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    adjust_brightness_accumulative,
    adjust_contrast_with_mean_subtraction,
    adjust_saturation_with_gray_subtraction,
    adjust_hue,
)


class Views(NamedTuple):
    """A task: normalised views of a batch, and what designers did to them (None: nothing).

    In masks 1 keeps a pixel and 0 blurs it.
    """

    global_crops: Tensor  # (2, B, 3, H, W)
    local_crops: Tensor  # (L, B, 3, h, w)
    masks: Tensor | None = None  # (2, B, 1, H, W) in [0, 1], of the global crops
    local_masks: Tensor | None = None  # (L, B, 1, h, w), of the local crops
    excess: Tensor | None = (
        None  # (V, B), how far mask logits lie outside [0, 1]; V = 2, or 2 + L with local masks
    )
    policy: Tensor | None = (
        None  # (2 + L, B, P), the settings of `policy.PolicyDesigner` for each view
    )
    weights: Tensor | None = None  # (B,), of the images in the loss, mean 1
    scores: Tensor | None = (
        None  # (2, B, K), what `prototypes.reshape` adds to the log of the teacher's probabilities
    )
    gates: Tensor | None = None  # (2, B) in [-1, 1], and how much of that it takes over
    support: int | None = None  # on how many of the most probable prototypes
    patch_scores: Tensor | None = (
        None  # (2, B, N, K), and (2, B, N): the same for each patch of the global crops
    )
    patch_gates: Tensor | None = None
    hidden: Tensor | None = (
        None  # (2, B, N) bool, the patches of the global crops that the student does not see
    )
    mix: Tensor | None = None  # (T, B), weights of the terms of the objective, see `mixer`
    phi: Params | None = None  # of the network that moves features, see `feature_policy`
    # (2, B, N, D) or (2, B, N, 1), added to the scores of a policy of features or patches
    feature_scores: Tensor | None = None
    hardness: Tensor | None = None  # (2, B), weight of the squared residual in these scores


class Knobs(NamedTuple):
    """The augmentation parameters of N = V * B views of one kind, view after view.

    Rows index the views that a transform applies to. An amount of None is 1 on these rows, 0
    elsewhere.
    """

    sides: Tensor  # (N, 2), x and y: the crop's shares of the image's sides
    # (N, 2), x and y in [-1, 1]: where the crop lies between the two ends that it can reach
    position: Tensor
    mirror: Tensor  # (N,), 1, or -1 for a flipped view
    jittered: Tensor  # (J,) rows
    order: list[int]  # of the four adjustments
    factors: Tensor  # (4, J): brightness, contrast, saturation, hue
    gray: Tensor  # rows
    blurred: Tensor  # (S,) rows
    sigma: Tensor  # (S,) in pixels
    solarized: Tensor  # rows
    batch_size: int  # B
    gray_amount: Tensor | None = None  # (N,) in [0, 1]
    solarize_amount: Tensor | None = None  # (N,) in [0, 1]
    hidden: Tensor | None = None  # (N, patches) bool, of the global views

    def to(self, images: Tensor) -> "Knobs":
        """Move to the device of `images`, numbers in their dtype."""
        return tree_map_only(
            Tensor,
            lambda knob: knob.to(images) if knob.is_floating_point() else knob.to(images.device),
            self,
        )

    def of_rank(self) -> "Knobs":
        """Return the parameters of this process's images, from those of the global batch."""
        if collectives.size() == 1:
            return self
        views = torch.arange(len(self.sides)).view(-1, self.batch_size)[
            :, collectives.rows(self.batch_size)
        ]
        own = views.flatten()
        place = torch.full((len(self.sides),), -1).index_copy(0, own, torch.arange(len(own)))
        jittered, gray, blurred, solarized = (
            place[rows] for rows in (self.jittered, self.gray, self.blurred, self.solarized)
        )
        return Knobs(
            self.sides[own], self.position[own], self.mirror[own], jittered[jittered >= 0],
            self.order, self.factors[:, jittered >= 0],
            gray[gray >= 0], blurred[blurred >= 0], self.sigma[blurred >= 0],
            solarized[solarized >= 0], views.shape[1],
            hidden=None if self.hidden is None else self.hidden[own],
        )  # fmt: skip


def pick_views(tasks: Sequence[Views], which: Tensor, sample: Tensor) -> Views:
    """Return the views whose k-th image is sample[k] of tasks[which[k]]; both int64 (n,)."""

    def pick(parts: Sequence[Any]) -> Any:
        if not isinstance(parts[0], Tensor):
            return parts[0]
        stacked = torch.stack(list(parts))
        return (
            stacked[which, sample]
            if stacked.ndim == 2
            else stacked[which, :, sample].transpose(0, 1)
        )

    return Views(*(pick(parts) for parts in zip(*tasks, strict=True)))


class MultiCrop(nn.Module):
    """Images and a seed -> Views.

    Per image: random resized crop, flip, colour jitter, grayscale, blur, solarisation,
    normalisation. A deterministic function of its arguments, differentiable in float images. It
    neither reads nor changes the global random state. Random numbers are drawn on the CPU, so a
    seed gives equal views on every device. Crops are bilinear without antialiasing: shrink images
    far larger than the crops first.

    Args:
        mean, std: The backbone's normalisation.
        global_size, local_size: Sides in pixels.
        num_local: Local views per image.
        global_scale, local_scale: Shares of the image's area.
        flip: Probability of a horizontal flip.
        jitter: Strengths of brightness, contrast, saturation (factors 1 +- s) and hue (turns +- s).
        jitter_prob, grayscale: Probabilities.
        blur_sigma: Range in pixels.
        blur, solarize: Probabilities for global view 1, global view 2 and local views.
        patch_size: With it, blocks of patches of the global views are masked for the student
            (iBOT), see `hidden_patches`. The crops are the same with and without.
        hidden_share: Range of the share of masked patches.
        hidden_prob: Probability that a view is masked.
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
        patch_size: int | None = None,
        hidden_share: Range = (0.1, 0.5),
        hidden_prob: float = 0.5,
    ) -> None:
        super().__init__()
        for name, (low, high) in {"global_scale": global_scale, "local_scale": local_scale}.items():
            if not 0 < low <= high <= 1:
                raise MetaVPTError(
                    f"MultiCrop: {name} must satisfy 0 < low <= high <= 1, got ({low}, {high})"
                )
        if min(global_size, local_size) < 1 or num_local < 0:
            raise MetaVPTError(
                f"MultiCrop: sizes must be positive, got {global_size=}, {local_size=}, "
                f"{num_local=}"
            )
        if patch_size is not None and (
            global_size % patch_size or not 0 <= hidden_share[0] <= hidden_share[1] < 1
        ):
            raise MetaVPTError(
                f"MultiCrop: {global_size=} must divide into patches of {patch_size}, "
                f"{hidden_share=} lie in [0, 1)"
            )
        self.mean, self.std = tuple(mean), tuple(std)
        self.global_size, self.local_size, self.num_local = global_size, local_size, num_local
        self.global_scale, self.local_scale, self.flip = global_scale, local_scale, flip
        self.jitter, self.jitter_prob, self.grayscale = jitter, jitter_prob, grayscale
        self.blur_sigma, self.blur, self.solarize = blur_sigma, blur, solarize
        self.patch_size, self.hidden_share, self.hidden_prob = patch_size, hidden_share, hidden_prob

    @phase("augment")
    def forward(self, images: Tensor, seed: int) -> Views:
        """Make the views.

        Args:
            images: (B, 3, H, W), uint8, or float in [0, 1].
            seed: Of all random draws.

        Raises:
            MetaVPTError: The images have another shape or type.
        """
        images = to_float(images)
        return self.render(images, self.draw(images, seed))

    def draw(self, images: Tensor, seed: int) -> list[Knobs]:
        """Draw the parameters of global view 1, global view 2 and the local views.

        Only the shape of `images` counts.
        """
        rng = Generator().manual_seed(seed)
        whole = len(images) * collectives.size()
        knobs = [
            self._draw(whole, images.shape[-2:], kind, rng)
            for kind in range(3 if self.num_local else 2)
        ]
        first, second = (
            of_kind._replace(hidden=self._hide(whole, mix(seed, kind)))
            for kind, of_kind in enumerate(knobs[:2])
        )
        return [of_kind.of_rank().to(images) for of_kind in (first, second, *knobs[2:])]

    def render(self, images: Tensor, knobs: Sequence[Knobs]) -> Views:
        """Make the views that `knobs` describe, differentiable in images and float parameters."""
        first, second, *local = (
            self._render(images, of_kind, kind) for kind, of_kind in enumerate(knobs)
        )
        none = images.new_zeros(0, len(images), 3, self.local_size, self.local_size)
        hidden = [of_kind.hidden for of_kind in knobs[:2] if of_kind.hidden is not None]
        return Views(
            torch.cat([first, second]),
            local[0] if local else none,
            hidden=torch.stack(hidden) if hidden else None,
        )

    def normalize(self, images: Tensor) -> Tensor:
        """Normalise images in [0, 1], (..., 3, H, W), as the backbone does."""
        mean, std = (images.new_tensor(value).view(3, 1, 1) for value in (self.mean, self.std))
        return (images - mean) / std

    def denormalize(self, views: Tensor) -> Tensor:
        """Invert `normalize`."""
        mean, std = (views.new_tensor(value).view(3, 1, 1) for value in (self.mean, self.std))
        return views * std + mean

    def _draw(self, batch_size: int, image_size: Sequence[int], kind: int, rng: Generator) -> Knobs:
        num_views, scale = (
            (self.num_local, self.local_scale) if kind == 2 else (1, self.global_scale)
        )
        crops = [draw_crop(batch_size, image_size, scale, self.flip, rng) for _ in range(num_views)]
        sides, position, mirror = (torch.cat(parts) for parts in zip(*crops, strict=True))
        num_rows = len(sides)
        jittered = _choose(num_rows, self.jitter_prob, rng)
        order, factors = self._draw_jitter(len(jittered), rng)
        gray = _choose(num_rows, self.grayscale, rng)
        blurred = _choose(num_rows, self.blur[kind], rng)
        sigma = uniform(len(blurred), self.blur_sigma, rng)
        solarized = _choose(num_rows, self.solarize[kind], rng)
        return Knobs(
            sides,
            position,
            mirror,
            jittered,
            order,
            factors,
            gray,
            blurred,
            sigma,
            solarized,
            batch_size,
        )

    def _hide(self, batch_size: int, seed: int) -> Tensor | None:
        if self.patch_size is None:
            return None
        side = self.global_size // self.patch_size
        return hidden_patches(batch_size, (side, side), self.hidden_share, self.hidden_prob, seed)

    def _render(self, images: Tensor, knobs: Knobs, kind: int) -> Tensor:
        """Make the views of one kind, (V, B, 3, size, size)."""
        size, batch_size = self.local_size if kind == 2 else self.global_size, len(images)
        crops = zip(
            *(knob.split(batch_size) for knob in (knobs.sides, knobs.position, knobs.mirror)),
            strict=True,
        )
        views = torch.cat([crop(images, size, *where) for where in crops])
        views = _at(
            knobs.jittered, lambda chosen: self._jitter(chosen, knobs.order, knobs.factors), views
        )
        views = _blend(knobs.gray, knobs.gray_amount, _grayscale, views)
        views = _at(knobs.blurred, lambda chosen: self._gaussian_blur(chosen, knobs.sigma), views)
        views = _blend(knobs.solarized, knobs.solarize_amount, _solarize, views)
        return self.normalize(views).unflatten(0, (-1, batch_size))

    def _draw_jitter(self, num_rows: int, rng: Generator) -> tuple[list[int], Tensor]:
        """Draw the order of the four adjustments, shared by all rows, and factors (4, num_rows)."""
        order = torch.randperm(4, generator=rng).tolist() if num_rows else [0, 1, 2, 3]
        factors = torch.empty(4, num_rows)
        for i in order:
            factors[i] = uniform(num_rows, jitter_range(i, self.jitter[i]), rng)
        return order, factors

    def _jitter(self, views: Tensor, order: Sequence[int], factors: Tensor) -> Tensor:
        for i in order:
            if self.jitter[i]:
                views = _ADJUSTMENTS[i](views, factors[i])
        return views

    def _gaussian_blur(self, views: Tensor, sigma: Tensor) -> Tensor:
        # Reflection reaches no further than the view.
        radius = min(math.ceil(3 * self.blur_sigma[1]), views.shape[-1] - 1)
        return (
            gaussian_blur2d(views, (2 * radius + 1, 2 * radius + 1), sigma[:, None].expand(-1, 2))
            if radius
            else views
        )


def jitter_range(adjustment: int, strength: float) -> Range:
    """Return the range of an adjustment's factor at `strength`, or of the hue angle in radians."""
    if adjustment == 3:
        return -2 * math.pi * strength, 2 * math.pi * strength
    return max(0.0, 1.0 - strength), 1.0 + strength


def _choose(num_rows: int, prob: float, rng: Generator) -> Tensor:
    """Choose each row with probability `prob`; return the chosen rows."""
    return (torch.rand(num_rows, generator=rng) < prob).nonzero()[:, 0]


def _at(rows: Tensor, transform: Callable[[Tensor], Tensor], views: Tensor) -> Tensor:
    """Apply `transform` to these rows of `views`; other rows cost nothing."""
    if len(rows) == len(views):
        return transform(views)
    return views.index_copy(0, rows, transform(views[rows])) if len(rows) else views


def _blend(
    rows: Tensor, amount: Tensor | None, transform: Callable[[Tensor], Tensor], views: Tensor
) -> Tensor:
    """Compute (1 - amount) * view + amount * transform(view).

    An amount of None is 1 at `rows` and 0 elsewhere.
    """
    if amount is None:
        return _at(rows, transform, views)
    others = (
        torch.ones(len(views), dtype=torch.bool, device=views.device)
        .index_fill(0, rows, False)
        .nonzero()[:, 0]
    )

    def mix(chosen: Tensor, part: Tensor) -> Tensor:
        return torch.lerp(
            chosen, transform(chosen), amount[part].view(-1, 1, 1, 1).to(chosen.dtype)
        )

    # Apart, although one call would do: what kernels make of a view may differ in its last bit with
    # the views that it is batched with.
    views = _at(rows, lambda chosen: mix(chosen, rows), views)
    return _at(others, lambda chosen: mix(chosen, others), views)


def _grayscale(views: Tensor) -> Tensor:
    return rgb_to_grayscale(views).expand_as(views)


def _solarize(views: Tensor) -> Tensor:
    return solarize(views, 0.5)


def to_float(images: Tensor) -> Tensor:
    """Convert images (B, 3, H, W) to float in [0, 1].

    Raises:
        MetaVPTError: The images have another shape or type.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise MetaVPTError(f"MultiCrop: images must be (B, 3, H, W), got {tuple(images.shape)}")
    if images.dtype == torch.uint8:
        return images.float() / 255
    if not images.is_floating_point():
        raise MetaVPTError(
            f"MultiCrop: images must be uint8, or float in [0, 1], got {images.dtype}"
        )
    # Half precision cannot hold the coordinates of a crop.
    return images if images.dtype == torch.float64 else images.float()
