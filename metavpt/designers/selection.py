"""Data selection as a task: how much each unlabelled image counts in the pretraining loss."""

from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor
from typing_extensions import override

from metavpt.designers import figures
from metavpt.designers.choice import balanced
from metavpt.designers.designer import Designer
from metavpt.designers.encoder import ImageEncoder, zero_linear
from metavpt.designers.views import MultiCrop, Views, to_float
from metavpt.distributed import collectives
from metavpt.errors import MetaVPTError

NUM_PICTURES = 6


class SelectionDesigner(Designer):
    """Weights of the images of a batch: B * softmax(network(image) / temperature), mean 1.

    All weights are exactly 1 at first.

    Args:
        recipe: Makes the views.
        encoder: Reads the images.
        temperature: Of the softmax.
        kl_weight: Weight of the divergence from equal weights, see `regularizer`.
    """

    def __init__(
        self,
        recipe: MultiCrop,
        encoder: ImageEncoder,
        temperature: float = 1.0,
        kl_weight: float = 0.1,
    ) -> None:
        super().__init__(recipe)
        if temperature <= 0:
            raise MetaVPTError(
                f"SelectionDesigner: temperature must be positive, got {temperature}"
            )
        self.encoder, self.temperature, self.kl_weight = encoder, temperature, kl_weight
        self.head = zero_linear(encoder.width, 1, bias=False)  # a bias would cancel in the softmax

    @override
    def refine(self, views: Views, batch: Any) -> Views:
        logits = self.head(self.encoder(self.recipe.normalize(to_float(batch.images))))[:, 0]
        return views._replace(weights=balanced(logits / self.temperature))

    def randomize(self, views: Views, batch: Any, rng: Generator) -> Views:
        """Draw weights from standard normal logits."""
        logits = collectives.drawn(
            lambda shape: torch.randn(shape, generator=rng), (len(batch.images),)
        ).to(views.global_crops)
        return views._replace(weights=balanced(logits / self.temperature))

    def regularizer(self, task: Views) -> Tensor:
        """Compute kl_weight * KL(weights / B || uniform) = kl_weight * mean w log w.

        The mean lies between 0 and log B.
        """
        weights = _weights(task)
        return (
            self.kl_weight
            * (weights * weights.clamp_min(torch.finfo(weights.dtype).tiny).log()).mean()
        )

    def figures(self, batch: Any, task: Views) -> dict[str, np.ndarray]:
        """Show the images with the largest weight above those with the smallest, as bars."""
        weights = _weights(task)
        order = weights.argsort(descending=True, stable=True).tolist()
        num_shown = min(NUM_PICTURES, len(order))
        rows = []
        for chosen in (order[:num_shown], order[-num_shown:]):
            rows.append([_labelled(batch.images[i], weights[i]) for i in chosen])
        return {"selection": figures.grid(rows)}


def weigh(losses: Tensor, weights: Tensor | None) -> Tensor:
    """Return weights * losses, both (B,), or the losses if there are no weights."""
    return losses if weights is None else losses * weights.to(losses.dtype)


def _weights(task: Views) -> Tensor:
    if task.weights is None:
        raise MetaVPTError(
            "SelectionDesigner: the task has no weights; it must come from the designer, not "
            "from recipe_task"
        )
    return task.weights


def _labelled(image: Tensor, weight: Tensor) -> np.ndarray:
    """Draw an image on a bar as bright as its weight."""
    photo = figures.photo(image)
    level = int(255 * min(float(weight) / 2, 1.0))
    return np.concatenate(
        [photo, np.full((max(2, len(photo) // 8), photo.shape[1], 3), level, dtype=np.uint8)]
    )
