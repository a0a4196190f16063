"""A designer of one's own: it learns how bright each colour of the views should be."""

import numpy as np
import torch
from torch import nn

from metavpt.designers import figures
from metavpt.designers.designer import Designer


class Tint(Designer):
    """Multiplies each colour channel of all views by 1 + gain. At first every gain is 0.

    Args:
        recipe: Makes the views.
        weight: The weight of the regularizer, the mean square of the gains.
        spread: The standard deviation of random gains.
    """

    def __init__(self, recipe, weight=0.01, spread=0.1):
        super().__init__(recipe)
        self.weight, self.spread = weight, spread
        self.gain = nn.Parameter(torch.zeros(3))

    def refine(self, views, batch):
        return self.tinted(views, self.gain)

    def randomize(self, views, batch, rng):
        return self.tinted(views, self.spread * torch.randn(3, generator=rng))

    def tinted(self, views, gain):
        factor = 1 + gain.to(views.global_crops)[:, None, None]
        return views._replace(
            global_crops=factor * views.global_crops, local_crops=factor * views.local_crops
        )

    def regularizer(self, task):
        return self.weight * self.gain.square().mean()

    def figures(self, batch, task):
        before = self.recipe_task(batch).global_crops[0, :4]
        pairs = zip(before, task.global_crops[0, :4], strict=True)
        rows = [[figures.photo(self.recipe.denormalize(view)) for view in pair] for pair in pairs]
        picture: np.ndarray = figures.titled(figures.grid(rows), ["recipe's view", "tinted view"])
        return {"tint": picture}
