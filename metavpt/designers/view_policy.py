"""Policies that decide which patches, or patch features, of the global views are predicted.

They act on the term `features` of the objective. Letters: B batch, N patches of a global view, D
width.
"""

import math
from typing import Any, Literal

import numpy as np
import torch
from torch import Generator, Tensor
from torch.func import functional_call

from metavpt.dense_tasks import colours
from metavpt.designers import figures
from metavpt.designers.designer import Designer
from metavpt.designers.feature_network import OutputNetwork, residual_loss
from metavpt.designers.feature_targets import allocation, per_part
from metavpt.designers.views import MultiCrop, Views
from metavpt.distributed import collectives
from metavpt.errors import MetaVPTError, check_known
from metavpt.hypergradients.params import Params

NUM_PICTURES = 6


class ViewPolicy(Designer):
    """Weights squared errors of features by how much their targets lower the feedback loss.

    As `ResidualNetwork` with a policy, on the global views of self-distillation. The views are the
    recipe's.

    Args:
        recipe: Makes the views.
        surface: "patches", or "features" of patches.
        strength: Of the policy, see `allocation`.
        hidden_width: Of the network.
    """

    directions: Tensor

    def __init__(
        self,
        recipe: MultiCrop,
        surface: Literal["patches", "features"] = "features",
        strength: float = 1.0,
        hidden_width: int = 128,
    ) -> None:
        super().__init__(recipe)
        check_known(surface, "designer.surface", "patches", "features")
        if strength < 0:
            raise MetaVPTError(f"designer.strength={strength} must not be negative")
        self.surface, self.strength, self.hidden_width = surface, strength, hidden_width

    def build(self, width: int, patch_size: int, num_outputs: int) -> None:
        """Make the network.

        Args:
            width: D.
            patch_size: Of the backbone.
            num_outputs: Outputs of the feedback's heads.

        Raises:
            MetaVPTError: There are none.
        """
        if not num_outputs:
            raise MetaVPTError("designer=view_policy needs feedback=cross_fitted")
        self.patch_size = patch_size
        self.network = OutputNetwork(width, self.hidden_width, num_outputs)
        self.register_buffer("directions", torch.zeros(num_outputs, width))

    def refine(self, views: Views, batch: Any) -> Views:
        """Return `views` with the network's parameters and the directions in them."""
        phi: Params = dict(self.network.named_parameters())
        if not torch.is_grad_enabled():  # else the task would follow later steps of phi
            phi = {name: p.detach().clone() for name, p in phi.items()}
        return views._replace(phi={**phi, "directions": self.directions.clone()})

    def randomize(self, views: Views, batch: Any, rng: Generator) -> Views:
        """Return `views` with standard normal scores."""
        (_, num, _, *size), patch = views.global_crops.shape, self.patch_size
        width = self.directions.shape[1] if self.surface == "features" else 1
        scores = collectives.drawn(
            lambda shape: torch.randn(shape, generator=rng),
            (num, 2, size[0] // patch * (size[1] // patch), width),
        )
        return views._replace(feature_scores=scores.transpose(0, 1).to(views.global_crops))

    def hardest_task(self, batch: Any) -> Views:
        """Make the task that counts patches, or features, by their squared error."""
        views = self.recipe_task(batch)
        return views._replace(hardness=views.global_crops.new_ones(views.global_crops.shape[:2]))

    def weights(
        self, task: Views, residual: Tensor, states: Tensor, features: Tensor
    ) -> Tensor | None:
        """Compute the weights of squared errors, (2, B, N, D) or (2, B, N, 1); None: all are 1.

        Args:
            task: The views.
            residual: Teacher minus student, detached, (2, B, N, D).
            states: Of the teacher's trunk, (2, B, N, D).
            features: Of the teacher, normalised, (2, B, N, D).
        """
        if task.phi is None and task.feature_scores is None and task.hardness is None:
            return None
        scores = torch.zeros_like(per_part(residual, self.surface))
        if task.phi is not None:
            phi = dict(task.phi)
            directions = phi.pop("directions").to(residual)
            grid = tuple(side // self.patch_size for side in task.global_crops.shape[-2:])
            seen = (states.flatten(0, 1), features.flatten(0, 1), grid)
            residuals = functional_call(self.network, phi, seen).unflatten(0, residual.shape[:2])
            scores = scores + per_part(residual * (residuals @ directions), self.surface)
        if task.hardness is not None:
            squares = per_part(residual.square(), self.surface)
            scores = scores + task.hardness[..., None, None] * squares
        if task.feature_scores is not None:
            scores = scores + task.feature_scores
        return allocation(scores, self.strength)

    def loss(self, replay: dict[str, Tensor]) -> Tensor:
        """Compute the mean squared error of the predicted residuals over labelled pixels."""
        return residual_loss(self.network, replay)

    def regularizer(self, task: Views) -> None:
        """Return no regularizer: strength alone limits the policy."""

    def figures(
        self, batch: Any, task: Views, weights: Tensor | None = None
    ) -> dict[str, np.ndarray]:
        """Show global views, what the student sees of them, and how much each patch counts.

        Args:
            batch: Of the task.
            task: The views.
            weights: See `weights`.
        """
        shown = self.recipe.denormalize(task.global_crops[0, :NUM_PICTURES]).cpu()
        grid = tuple(side // self.patch_size for side in shown.shape[-2:])

        def pixels(of_patches: Tensor) -> Tensor:
            maps = of_patches[0, :NUM_PICTURES].cpu().unflatten(1, grid)
            return maps.repeat_interleave(self.patch_size, 1).repeat_interleave(self.patch_size, 2)

        none = torch.zeros(2, *task.global_crops.shape[1:2], math.prod(grid))
        seen = shown * ~pixels(none.bool() if task.hidden is None else task.hidden)[:, None]
        counts = pixels(none + 1 if weights is None else weights.mean(dim=-1))
        rows = [
            [figures.photo(view), figures.photo(part), colours.colour(count, 0.0, 2.0)]
            for view, part, count in zip(shown, seen, counts, strict=True)
        ]
        columns = ["global view", "what the student sees", "weight of a patch"]
        picture = figures.titled(figures.grid(rows), columns)
        return {"views": figures.with_legend(picture, colours.scale("0", "2"))}
