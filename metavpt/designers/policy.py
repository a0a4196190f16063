"""An augmentation policy: how strongly each view of each image is augmented."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor, nn
from typing_extensions import override

from metavpt.designers.crop import ASPECT_RATIO, Range
from metavpt.designers.designer import Designer, clamp_to_unit
from metavpt.designers.encoder import ImageEncoder, zero_linear
from metavpt.designers.histograms import histograms
from metavpt.designers.views import Knobs, MultiCrop, Views, jitter_range, to_float
from metavpt.distributed import collectives
from metavpt.errors import MetaVPTError

COLOURS = ("brightness", "contrast", "saturation", "hue")
WARPED = ("scale", "log_aspect", "x", "y", *COLOURS, "blur_sigma")  # a shift and a log scale each
BLENDED = ("grayscale", "solarize")  # a shift each
NUM_SETTINGS = 2 * len(WARPED) + len(BLENDED)
FIGURE_DRAWS = 16  # of each view, for smooth histograms


class PolicyDesigner(Designer):
    """Moves the recipe's random draws by `warp`, with a shift and a scale per parameter and view.

    The samples are reparameterised: the batch's seed draws what the recipe draws, and every
    augmentation parameter is a smooth monotone function of its draw, within bounds. With all
    settings 0 it is the identity, bit for bit. Grayscale and solarisation become blends: the
    recipe's 0 or 1 plus a shift, clamped to [0, 1]. Flips, and which views are jittered and
    blurred, stay the recipe's.

    Args:
        recipe: Draws the augmentations.
        encoder: Predicts the settings from each image. None: one set of settings for all images.
        scale: Bounds of the crop's share of the image's area.
        aspect: Bounds of width / height.
        jitter: Bounds of the strengths, as in MultiCrop. All bounds must hold the recipe's ranges;
            position and blur_sigma stay within the recipe's.
        reach: Settings lie in [-reach, reach].
        kl_weight: See `regularizer`.
    """

    def __init__(
        self,
        recipe: MultiCrop,
        encoder: ImageEncoder | None = None,
        scale: Range = (0.03, 1.0),
        aspect: Range = (0.5, 2.0),
        jitter: Sequence[float] = (0.8, 0.8, 0.4, 0.2),
        reach: float = 1.0,
        kl_weight: float = 0.01,
    ) -> None:
        super().__init__(recipe)
        self.encoder, self.reach, self.kl_weight = encoder, reach, kl_weight
        self.num_views = 2 + recipe.num_local
        self.settings = nn.Parameter(torch.zeros(self.num_views * NUM_SETTINGS))
        self.head = zero_linear(encoder.width, len(self.settings), bias=False) if encoder else None
        colours = {
            name: jitter_range(i, strength)
            for i, (name, strength) in enumerate(zip(COLOURS, jitter, strict=True))
        }
        self.bounds: dict[str, Range] = {
            "scale": scale, "log_aspect": (math.log(aspect[0]), math.log(aspect[1])),
            "x": (-1.0, 1.0), "y": (-1.0, 1.0),
            **colours, "blur_sigma": recipe.blur_sigma,
        }  # fmt: skip
        _check_bounds(self.bounds, recipe)

    @override
    def forward(self, batch: Any) -> Views:
        images = to_float(batch.images)
        raw = self.settings.expand(len(images), -1)
        if self.encoder is not None and self.head is not None:
            raw = raw + self.head(self.encoder(self.recipe.normalize(images)))
        policy = self.reach * raw.unflatten(1, (self.num_views, NUM_SETTINGS)).tanh().transpose(
            0, 1
        )
        return self._act(images, batch.seed, policy)

    def refine(self, views: Views, batch: Any) -> Views:
        """Raise MetaVPTError: a policy makes views and cannot refine those of another stage."""
        raise MetaVPTError(
            "PolicyDesigner makes views from images and cannot refine others: it must be the "
            "first of designer.stages"
        )

    def randomize(self, views: Views, batch: Any, rng: Generator) -> Views:
        """Draw settings uniform in [-reach, reach] for each view of each image."""
        images = to_float(batch.images)
        shape = self.num_views, len(images), NUM_SETTINGS
        uniform = collectives.drawn(
            lambda shape: torch.rand(shape, generator=rng), shape, dim=1
        ).to(images)
        return self._act(images, batch.seed, self.reach * (2 * uniform - 1))

    def regularizer(self, task: Views) -> Tensor:
        """Compute kl_weight times the mean over views and images of the parameters' summed KL.

        The divergence of a parameter is KL(N(a, e^2b) || N(0, 1)) for shift a and log scale b. If
        the recipe draws the parameter uniformly over its whole bounds, it is the divergence of the
        policy from the recipe, since warping is one to one. If the bounds are wider, the supports
        differ and the true divergence is infinite; then the same expression is a trust region.
        """
        if task.policy is None:
            raise MetaVPTError(
                "PolicyDesigner.regularizer: the task has no policy; it must come from the "
                "designer, not from recipe_task"
            )
        shift, log_scale, blend = _split(task.policy)
        divergence = ((shift.square() + (2 * log_scale).exp() - 1) / 2 - log_scale).sum(
            -1
        ) + blend.square().sum(-1) / 2
        return self.kl_weight * divergence.mean()

    def figures(self, batch: Any, task: Views) -> dict[str, np.ndarray]:
        """Plot the distribution of each parameter over many draws, the recipe's in grey."""
        if task.policy is None:
            raise MetaVPTError(
                "PolicyDesigner.figures: the task has no policy; it must come from the designer, "
                "not from recipe_task"
            )
        images = to_float(batch.images)
        draws = [self.recipe.draw(images, batch.seed + k) for k in range(FIGURE_DRAWS)]
        moved = [self.turn(knobs, task.policy, images) for knobs in draws]
        kinds = {"global 1": 0, "global 2": 1} | ({"local": 2} if self.recipe.num_local else {})
        rows = {}
        for name, kind in kinds.items():
            was, now = (
                _pooled([knob_values(knobs[kind], images) for knobs in drawn])
                for drawn in (draws, moved)
            )
            rows[name] = {knob: (was[knob], now[knob]) for knob in was if now[knob].numel()}
        return {"policy": histograms(rows)}

    def turn(self, knobs: Sequence[Knobs], policy: Tensor, images: Tensor) -> list[Knobs]:
        """The recipe's knobs for each kind of view, moved by the settings policy (V, B, P)."""
        by_kind = policy.split([1, 1, self.recipe.num_local] if self.recipe.num_local else [1, 1])
        return [
            self._turn(drawn, settings.flatten(0, 1), images)
            for drawn, settings in zip(knobs, by_kind, strict=True)
        ]

    def _act(self, images: Tensor, seed: int, policy: Tensor) -> Views:
        knobs = self.turn(self.recipe.draw(images, seed), policy, images)
        return self.recipe.render(images, knobs)._replace(policy=policy)

    def _turn(self, knobs: Knobs, settings: Tensor, images: Tensor) -> Knobs:
        """Settings (N, P)."""
        shift, log_scale, blend = _split(settings)
        was = knob_values(knobs, images)

        def move(name: str, rows: Tensor | slice = slice(None)) -> Tensor:
            k = WARPED.index(name)
            return warp(was[name], shift[rows, k], log_scale[rows, k], self.bounds[name])

        # As factors, which are exactly 1 where nothing moves: the sides are the recipe's, not made
        # again from area and aspect.
        grow = (move("scale") / was["scale"]).sqrt()
        stretch = ((move("log_aspect") - was["log_aspect"]) / 2).exp()
        gray, solarized = (clamp_to_unit(was[name] + blend[:, k]) for k, name in enumerate(BLENDED))
        return knobs._replace(
            sides=(knobs.sides * torch.stack([grow * stretch, grow / stretch], dim=1)).clamp(max=1),
            position=torch.stack([move("x"), move("y")], dim=1),
            factors=torch.stack([move(name, knobs.jittered) for name in COLOURS]),
            sigma=move("blur_sigma", knobs.blurred),
            gray_amount=gray,
            solarize_amount=solarized,
        )


def warp(x: Tensor, shift: Tensor, log_scale: Tensor, bounds: Range) -> Tensor:
    """Move x within its bounds. The result is monotone in x.

    The standard normal quantile z of (x - low) / (high - low) becomes e^log_scale * z + shift.
    Written as x plus a difference, so that a shift and log scale of 0 keep x bit for bit.
    """
    low, high = bounds
    if high <= low:
        return x
    z = torch.special.ndtri(((x - low) / (high - low)).clamp(1e-6, 1 - 1e-6))
    return x + (high - low) * (
        torch.special.ndtr(log_scale.exp() * z + shift) - torch.special.ndtr(z)
    )


def knob_values(knobs: Knobs, images: Tensor) -> dict[str, Tensor]:
    """Return the parameters of one kind of view by name, in the units of the bounds.

    Each is (N,), or has one value for each row that is jittered or blurred.
    """
    height, width = images.shape[-2:]
    x, y = knobs.sides.unbind(dim=1)

    def amount(soft: Tensor | None, rows: Tensor) -> Tensor:
        return torch.zeros_like(x).index_fill(0, rows, 1.0) if soft is None else soft

    return {
        "scale": x * y,
        "log_aspect": (x * width / (y * height)).log(),
        "x": knobs.position[:, 0],
        "y": knobs.position[:, 1],
        **dict(zip(COLOURS, knobs.factors, strict=True)),
        "blur_sigma": knobs.sigma,
        "grayscale": amount(knobs.gray_amount, knobs.gray),
        "solarize": amount(knobs.solarize_amount, knobs.solarized),
    }


def _split(settings: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Settings (..., P) -> shifts and log scales of WARPED, shifts of BLENDED."""
    shift, log_scale, blend = settings.split([len(WARPED), len(WARPED), len(BLENDED)], dim=-1)
    return shift, log_scale, blend


def _pooled(draws: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([draw[name] for draw in draws]) for name in draws[0]}


def _check_bounds(bounds: Mapping[str, Range], recipe: MultiCrop) -> None:
    aspect = (math.log(ASPECT_RATIO[0]), math.log(ASPECT_RATIO[1]))
    needed = {"scale": recipe.global_scale, "log_aspect": aspect}
    needed |= {name: jitter_range(i, recipe.jitter[i]) for i, name in enumerate(COLOURS)}
    if recipe.num_local:
        needed["scale"] = (
            min(recipe.global_scale[0], recipe.local_scale[0]),
            max(recipe.global_scale[1], recipe.local_scale[1]),
        )
    for name, (low, high) in needed.items():
        if not bounds[name][0] <= low <= high <= bounds[name][1]:
            raise MetaVPTError(
                f"PolicyDesigner: the bounds of {name} are {bounds[name]}, but the recipe draws "
                f"from ({low:.4g}, {high:.4g}); widen them"
            )
