"""The base class of view designers, and a clamp that lets them leave the recipe."""

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor, nn

from metavpt.designers.views import MultiCrop, Views


class Designer(nn.Module, ABC):
    """batch -> Views: those of the recipe, refined by a network that at first changes nothing.

    A batch holds `.images` (B, 3, H, W), see MultiCrop, and the `.seed` of all its randomness.
    """

    def __init__(self, recipe: MultiCrop) -> None:
        super().__init__()
        self.recipe = recipe

    def forward(self, batch: Any) -> Views:
        """Make the views of a batch with `.images` and `.seed`."""
        return self.refine(self.recipe_task(batch), batch)

    def recipe_task(self, batch: Any) -> Views:
        """Make the views of the recipe; no network runs."""
        return self.recipe(batch.images, batch.seed)

    def random_tasks(self, batch: Any, num_tasks: int) -> list[Views]:
        """Draw random tasks from this designer's space, by the batch's seed."""
        views = self.recipe_task(batch)
        # Not the random numbers that placed the crops.
        rng = Generator().manual_seed(batch.seed ^ 0x6D61736B)
        return [self.randomize(views, batch, rng) for _ in range(num_tasks)]

    @abstractmethod
    def refine(self, views: Views, batch: Any) -> Views:
        """Return `views` with this designer's part. The task carries what `regularizer` reads."""

    @abstractmethod
    def randomize(self, views: Views, batch: Any, rng: Generator) -> Views:
        """Return `views` with a random choice in place of the network's."""

    @abstractmethod
    def regularizer(self, task: Views) -> Tensor | None:
        """Compute R(phi), a scalar. None: there is none."""

    @abstractmethod
    def figures(self, batch: Any, task: Views) -> dict[str, np.ndarray]:
        """Draw `task`, which the whole designer made of `batch`: name -> uint8 (H, W, 3)."""


def clamp_to_unit(x: Tensor) -> Tensor:
    """Return min(max(x, 0), 1), with derivative 1 on [0, 1] including the edges, and 0 outside.

    `torch.clamp` differs between versions in whether it passes a gradient at the edge (2.14 does
    not). A new designer starts there, and without a gradient it could not leave the recipe.
    """
    return torch.where((x >= 0.0) & (x <= 1.0), x, x.detach().clamp(0.0, 1.0))
