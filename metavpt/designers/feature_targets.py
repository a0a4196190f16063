"""A target designer for regression on features: which way a student's features should differ from its teacher's.

Letters: B batch, N patches, D width of the features.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn

from metavpt.data.loader import mix
from metavpt.designers.crop import RandomCrop
from metavpt.designers.hiding import hidden_patches
from metavpt.distributed import collectives
from metavpt.errors import MetaVPTError
from metavpt.hypergradients.params import Params


class FeatureTask(NamedTuple):
    """Images, what of them the student does not see, and how the teacher's features are moved before the student tells them."""

    images: Tensor  # (B, 3, H, W), normalised
    hidden: Tensor  # (B, N) bool
    shift: Tensor  # (B, N, D), added; 0 in the recipe
    map: Tensor  # (B, D, D), see `moved`; 0 in the recipe
    gate: Tensor  # (B,)
    phi: Params  # of the network that moves them, see `FeatureNetwork`; empty where none does


class FeatureDesigner(nn.Module):
    """The teacher's own features are the recipe's targets; a subclass moves them.

    recipe     makes the images
    width      D, of the learner's features
    gate       how far: the root mean square of a shift, where features have 1
    hidden     least and greatest share of an image's patches that the student does not see, in blocks
    """

    def __init__(
        self,
        recipe: RandomCrop,
        patch_size: int,
        width: int,
        gate: float = 1.0,
        hidden: tuple[float, float] = (0.3, 0.5),
    ) -> None:
        super().__init__()
        if recipe.size % patch_size:
            raise MetaVPTError(
                f"recipe.size={recipe.size} does not divide into patches of {patch_size}"
            )
        if gate < 0:
            raise MetaVPTError(f"designer.gate={gate} must not be negative")
        if not 0 <= hidden[0] <= hidden[1] < 1:
            raise MetaVPTError(
                f"designer.hidden={list(hidden)} must be two shares of the patches in order, below 1"
            )
        self.recipe, self.width, self.gate, self.hidden = (
            recipe,
            width,
            gate,
            (hidden[0], hidden[1]),
        )
        self.grid = (recipe.size // patch_size, recipe.size // patch_size)

    def recipe_task(self, batch: Any) -> FeatureTask:
        """The teacher's own features. batch: `.images` (B, 3, H, W), see RandomCrop, and `.seed`."""
        images = self.recipe(batch.images, batch.seed)
        seen = hidden_patches(
            len(images) * collectives.size(), self.grid, self.hidden, 1.0, mix(batch.seed, 0)
        )
        shift = images.new_zeros(len(images), math.prod(self.grid), self.width)
        task = FeatureTask(
            images,
            collectives.own(seen).to(images.device),
            shift,
            shift,
            images.new_full((len(images),), self.gate),
            {},
        )
        return with_map(task, images.new_zeros(self.width, self.width))

    def random_tasks(self, batch: Any, num_tasks: int) -> list[FeatureTask]:
        """The same images with maps of standard normal entries, which shift features of any width by about `gate`."""
        task, rng = self.recipe_task(batch), Generator().manual_seed(mix(batch.seed, 1))
        return [
            with_map(task, torch.randn(self.width, self.width, generator=rng))
            for _ in range(num_tasks)
        ]

    def moves(self, task: FeatureTask, states: Tensor, features: Tensor) -> Tensor:
        """Of the task's targets by a network, (B, N, D), from what the teacher's trunk and tail say of the patches, both (B, N, D)."""
        raise NotImplementedError

    def loss(self, lesson: dict[str, Tensor]) -> Tensor:
        """Minus the value of the moves on a lesson, with a trust region: `Problem.taught`, a scalar."""
        raise NotImplementedError

    def regularizer(self, task: FeatureTask) -> Tensor | None:
        """Added to the designer's loss through the task that it made. Default: none."""
        return None


class FeatureTargets(FeatureDesigner):
    """A linear map says how the features of a patch are to be moved: x + gate * saturated(x map), see `moved`.

    The map is all of the designer, whatever the image: a direction of value belongs to what a patch shows, which is what the teacher's
    features say. It is 0 at first, so that targets start as the teacher's, bit for bit.

    weight     of the mean squared shift before saturation, see `regularizer`
    """

    def __init__(
        self, recipe: RandomCrop, patch_size: int, width: int, weight: float = 0.01, **options: Any
    ) -> None:
        super().__init__(recipe, patch_size, width, **options)
        self.weight = weight
        self.map = nn.Parameter(torch.zeros(width, width))

    def forward(self, batch: Any) -> FeatureTask:
        return with_map(self.recipe_task(batch), self.map)

    def loss(self, lesson: dict[str, Tensor]) -> Tensor:
        """-mean <shift, value> + `regularizer`, of features and values (B, N, D): what `Amortized` descends; a scalar."""
        shift = self.gate * saturated(centred(lesson["features"]) @ self.map)
        return -(shift * lesson["values"]).mean() + self._size(self.map)

    def regularizer(self, task: FeatureTask) -> Tensor:
        """weight * |map|^2 / D: the mean squared shift, before saturation, of white features of unit variance; a scalar."""
        return self._size(task.map[0])

    def _size(self, map: Tensor) -> Tensor:
        return self.weight * map.square().sum() / len(map)


def with_map(task: FeatureTask, map: Tensor) -> FeatureTask:
    """`task` with the same map (D, D) for every image."""
    return task._replace(map=map.to(task.images).expand(len(task.images), -1, -1))


def moved(features: Tensor, task: FeatureTask) -> Tensor:
    """features + shift + gate * saturated(centred(features) map), all (B, N, D); unchanged bit for bit where `shift` and `map` are 0."""
    return (
        features + task.shift + task.gate[:, None, None] * saturated(centred(features) @ task.map)
    )


def centred(features: Tensor) -> Tensor:
    """What patches differ in: (B, N, D) minus its mean over the batch. To move all of them alike is worth nothing to any head."""
    return features - collectives.leave(features.mean(dim=(0, 1)))


def saturated(y: Tensor) -> Tensor:
    """y / sqrt(1 + mean y^2), the mean over the batch: the root mean square stays below 1."""
    return y / (1 + collectives.mean(y.square().mean())).sqrt()


def tilted(task: FeatureTask, values: Tensor, gate: float, tau: float) -> FeatureTask:
    """`task` with its targets shifted to those of highest value in closed form, for values A (B, N, D) by target.

    What tells a target t by squares says that features are Gaussian about it. Of all Gaussians of that width, N(t + A / tau, 1) maximises
    <t', A> - tau KL(t' || t) (method.md, section 6), and the share `gate` of it is a shift by gate A / tau, A scaled once per batch to a
    mean square of 1: a KL of 1 / (2 tau^2) for each channel in the mean. tau 0 is the greedy limit: every patch goes as far, by `gate`.
    """
    tiny = torch.finfo(values.dtype).tiny
    squares = values.square()
    if tau == 0:
        return task._replace(
            shift=gate * values / squares.mean(dim=-1, keepdim=True).sqrt().clamp_min(tiny)
        )
    return task._replace(
        shift=gate / tau * values / collectives.leave(squares.mean()).sqrt().clamp_min(tiny)
    )
