"""Designers for regression on features: moved targets, and which patches or features are asked for.

Letters: B batch, N patches, D width of the features.
"""

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Generator, Tensor, nn
from typing_extensions import override

from metavpt.data.loader import mix
from metavpt.designers.crop import RandomCrop, WholeFrames
from metavpt.designers.hiding import hidden_patches, scattered_patches
from metavpt.distributed import collectives
from metavpt.errors import MetaVPTError, check_known
from metavpt.hypergradients.params import Params

SMALL = 1e-3  # a size of scores below which a policy is linear in them, so that it starts smoothly


class FeatureTask(NamedTuple):
    """Images, the patches hidden from the student, and what the designer wants of the features.

    Attributes:
        images: Normalised, (B, 3, H, W).
        hidden: Patches that the student does not see, bool (B, N).
        shift: Moves that the designer wants, (B, N, D); 0 in the recipe.
        map: Moves as a linear map of the features, (B, D, D), see `moved`; 0 in the recipe.
        gate: Scale of the moves, (B,).
        scores: Added to the scores of a policy, (B, N, D) or (B, N, 1); 0 in the recipe.
        hardness: Weight of the squared residual in the scores of a policy, (B,); 0 in the recipe.
        phi: Of the network that predicts moves, see `FeatureNetwork`; empty where there is none.
    """

    images: Tensor
    hidden: Tensor
    shift: Tensor
    map: Tensor
    gate: Tensor
    scores: Tensor
    hardness: Tensor
    phi: Params


class FeatureDesigner(nn.Module):
    """Predicts how features should move, and applies it to targets or to a masking policy.

    A subclass predicts A (B, N, D), the moves. Of the recipe they are 0, and then the loss is the
    recipe's bit for bit.

    - `surface="targets"`: the targets are moved by A.
    - `surface="patches"`: the targets stay the teacher's. Each patch counts in the loss by how far
      its target pulls the student's feature along A: the score (t - s) . A.
    - `surface="features"`: the same for each feature of each patch, with the score (t - s) A.

    A policy decides only which of the teacher's answers are asked for, see `allocation`.

    Args:
        recipe: Makes the images.
        patch_size: Of the backbone.
        width: D.
        num_outputs: Outputs of the feedback's heads, for designers that predict their residuals.
        gate: Root mean square of a move, where features have 1.
        hidden: Least and greatest share of an image's patches that the student does not see.
        layout: How hidden patches are drawn: in blocks (BEiT), or each alone.
        surface: What acts on the loss.
        strength: Of a policy, see `allocation`.
    """

    def __init__(
        self,
        recipe: RandomCrop | WholeFrames,
        patch_size: int,
        width: int,
        num_outputs: int = 0,
        gate: float = 1.0,
        hidden: tuple[float, float] = (0.3, 0.5),
        layout: Literal["blocks", "patches"] = "blocks",
        surface: Literal["targets", "patches", "features"] = "targets",
        strength: float = 1.0,
    ) -> None:
        super().__init__()
        if gate < 0:
            raise MetaVPTError(f"designer.gate={gate} must not be negative")
        if not 0 <= hidden[0] <= hidden[1] < 1:
            raise MetaVPTError(
                f"designer.hidden={list(hidden)} must be two ascending shares below 1"
            )
        if strength < 0:
            raise MetaVPTError(f"designer.strength={strength} must not be negative")
        check_known(layout, "designer.layout", "blocks", "patches")
        check_known(surface, "designer.surface", "targets", "patches", "features")
        self.recipe, self.width, self.gate = recipe, width, gate
        self.hidden, self.layout = (hidden[0], hidden[1]), layout
        self.surface, self.strength, self.num_outputs = surface, strength, num_outputs
        self.grid = recipe.grid(patch_size)

    def recipe_task(self, batch: Any) -> FeatureTask:
        """Make the task of the recipe.

        Args:
            batch: `.images` (B, 3, H, W), see RandomCrop, and `.seed`.
        """
        images = self.recipe(batch.images, batch.seed)
        num, seed = len(images) * collectives.size(), mix(batch.seed, 0)
        if self.layout == "blocks":
            seen = hidden_patches(num, self.grid, self.hidden, 1.0, seed)
        else:
            seen = scattered_patches(num, math.prod(self.grid), self.hidden, seed)
        shift = images.new_zeros(len(images), math.prod(self.grid), self.width)
        zeros = images.new_zeros(len(images))
        task = FeatureTask(
            images,
            collectives.own(seen).to(images.device),
            shift,
            shift,
            zeros + self.gate,
            zeros[:, None, None],
            zeros,
            {},
        )
        return with_map(task, images.new_zeros(self.width, self.width))

    def random_tasks(self, batch: Any, num_tasks: int) -> list[FeatureTask]:
        """Make random tasks of the same images.

        Targets are moved by maps of standard normal entries, which move features of any width by
        about `gate`. A policy has standard normal scores: random patches, or random features.
        """
        task, rng = self.recipe_task(batch), Generator().manual_seed(mix(batch.seed, 1))
        if self.surface == "targets":
            return [
                with_map(task, torch.randn(self.width, self.width, generator=rng))
                for _ in range(num_tasks)
            ]
        shape = (*task.shift.shape[:2], self.width if self.surface == "features" else 1)
        whole = (shape[0] * collectives.size(), *shape[1:])
        drawn = [torch.randn(whole, generator=rng) for _ in range(num_tasks)]
        return [task._replace(scores=collectives.own(own).to(task.shift)) for own in drawn]

    def hardest_task(self, batch: Any) -> FeatureTask:
        """Make the task of a policy that counts patches, or features, by their squared error."""
        if self.surface == "targets":
            raise MetaVPTError("designer.surface=targets has no hardest patches; set patches")
        task = self.recipe_task(batch)
        return task._replace(hardness=torch.ones_like(task.hardness))

    def weights(self, task: FeatureTask, residual: Tensor, moves: Tensor) -> Tensor | None:
        """Compute the weights in the loss, (B, N, D) or (B, N, 1); None: all count alike.

        Args:
            task: The task.
            residual: t - s of the student as it is, detached, (B, N, D).
            moves: A, (B, N, D).
        """
        if self.surface == "targets":
            return None
        scores = residual * moves + task.hardness[:, None, None] * residual.square()
        return allocation(per_part(scores, self.surface) + task.scores, self.strength)

    def moves(self, task: FeatureTask, states: Tensor, features: Tensor) -> Tensor:
        """Predict the moves A (B, N, D) by a network.

        Args:
            task: Holds the network's parameters.
            states: Of the teacher's trunk, (B, N, D).
            features: Of the teacher, normalised, (B, N, D).
        """
        raise NotImplementedError

    def loss(self, replay: dict[str, Tensor]) -> Tensor:
        """Compute the loss of the predicted moves on stored values, see `ReplayBuffer`."""
        raise NotImplementedError

    def regularizer(self, task: FeatureTask) -> Tensor | None:
        """Added to the designer's loss through the task that it made. Default: none."""
        return None


class FeatureTargets(FeatureDesigner):
    """Moves the features of a patch by a linear map: x + gate * saturated(x map), see `moved`.

    The map is the whole designer and does not depend on the image: a direction of value belongs to
    the content of a patch, which the teacher's features describe. It starts at 0, so targets start
    as the teacher's features bit for bit.

    Args:
        recipe: Makes the images.
        patch_size: The patch size of the backbone, in pixels.
        width: D.
        weight: The weight of the mean squared shift before saturation, see `regularizer`.
        options: See `FeatureDesigner`.
    """

    def __init__(
        self,
        recipe: RandomCrop | WholeFrames,
        patch_size: int,
        width: int,
        weight: float = 0.01,
        **options: Any,
    ) -> None:
        super().__init__(recipe, patch_size, width, **options)
        self.weight = weight
        self.map = nn.Parameter(torch.zeros(width, width))

    @override
    def forward(self, batch: Any) -> FeatureTask:
        return with_map(self.recipe_task(batch), self.map)

    def loss(self, replay: dict[str, Tensor]) -> Tensor:
        """Compute -mean <shift, value> + `regularizer`, the loss that `Amortized` descends."""
        shift = self.gate * saturated(centred(replay["features"]) @ self.map)
        return -(shift * replay["values"]).mean() + self._size(self.map)

    def regularizer(self, task: FeatureTask) -> Tensor:
        """Compute weight * |map|^2 / D, the mean squared shift of white features, unsaturated."""
        return self._size(task.map[0])

    def _size(self, map: Tensor) -> Tensor:
        return self.weight * map.square().sum() / len(map)


def per_part(scores: Tensor, surface: str) -> Tensor:
    """Compute the scores (..., N, D) of features, or their mean (..., N, 1) per patch."""
    return scores.mean(dim=-1, keepdim=True) if surface == "patches" else scores


def allocation(scores: Tensor, strength: float) -> Tensor:
    """Share the loss out by scores: weights (1 + strength * scores / |scores|)_+, with a mean of 1.

    Up to the scale of the strength, these are the weights of greatest mean score within a
    chi-squared ball around the recipe's, in which all weights are 1.

    Args:
        scores: Any shape; |scores| is their root mean square over the batch.
        strength: 0 gives the recipe. With 1 a score of minus |scores| counts no more.
    """
    size = (collectives.mean(scores.square().mean()) + SMALL**2).sqrt()
    weights = (1 + strength * scores / size).clamp_min(0)
    return weights / collectives.mean(weights.mean()).clamp_min(SMALL)


def with_map(task: FeatureTask, map: Tensor) -> FeatureTask:
    """`task` with the same map (D, D) for every image."""
    return task._replace(map=map.to(task.images).expand(len(task.images), -1, -1))


def moved(features: Tensor, task: FeatureTask) -> Tensor:
    """Compute features + shift + gate * saturated(centred(features) map), all (B, N, D).

    It returns the features bit for bit if `shift` and `map` are 0.
    """
    return (
        features + task.shift + task.gate[:, None, None] * saturated(centred(features) @ task.map)
    )


def centred(features: Tensor) -> Tensor:
    """Subtract the mean over the batch and the patches from (B, N, D).

    A common move of all features has no value for a head with a bias.
    """
    return features - collectives.leave(features.mean(dim=(0, 1)))


def saturated(y: Tensor) -> Tensor:
    """Compute y / sqrt(1 + mean y^2), whose root mean square over the batch is below 1."""
    return y / (1 + collectives.mean(y.square().mean())).sqrt()


def tilted(task: FeatureTask, values: Tensor, gate: float, tau: float) -> FeatureTask:
    """Shift the targets of `task` to those of the highest value, in closed form.

    Regression on a target t by squares models features as Gaussian about t. Of all Gaussians of
    that width, N(t + A / tau, 1) maximises <t', A> - tau KL(t' || t) (method.md, section 6). The
    share `gate` of it is a shift by gate A / tau, with A scaled once per batch to mean square 1.
    This is a mean KL of 1 / (2 tau^2) per channel. tau 0 is the greedy limit: every patch moves
    equally far, by `gate`.

    Args:
        task: The task.
        values: A (B, N, D), by target.
        gate: The share.
        tau: The temperature of the tilt.
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
