"""What designers of views have in common."""

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from torch import Generator, Tensor, nn

from metavpt.designers.views import MultiCrop, Views


class Designer(nn.Module, ABC):
    """batch -> Views: those of the recipe, changed by a network that starts by changing nothing, bit for bit.

    A batch holds `.images` (B, 3, H, W), see MultiCrop, and the `.seed` of all randomness in what is made of them.
    """

    def __init__(self, recipe: MultiCrop) -> None:
        super().__init__()
        self.recipe = recipe

    def forward(self, batch: Any) -> Views:
        return self.refine(self.recipe_task(batch), batch)

    def recipe_task(self, batch: Any) -> Views:
        """The views of the recipe; no network runs."""
        return self.recipe(batch.images, batch.seed)

    def random_tasks(self, batch: Any, num_tasks: int) -> list[Views]:
        """Tasks drawn at random from all that this designer could make, by the batch's seed."""
        views = self.recipe_task(batch)
        rng = Generator().manual_seed(
            batch.seed ^ 0x6D61736B
        )  # not the numbers that placed the crops
        return [self.randomize(views, batch, rng) for _ in range(num_tasks)]

    @abstractmethod
    def refine(self, views: Views, batch: Any) -> Views:
        """`views` of the batch with this designer's part added. The task carries what `regularizer` reads."""

    @abstractmethod
    def randomize(self, views: Views, batch: Any, rng: Generator) -> Views:
        """As `refine`, with a random choice in the network's place."""

    @abstractmethod
    def regularizer(self, task: Views) -> Tensor:
        """R(phi), a scalar."""

    @abstractmethod
    def figures(self, batch: Any, task: Views) -> dict[str, np.ndarray]:
        """Pictures of `task`, made of `batch` by the whole designer: name -> uint8 (H, W, 3)."""
