"""The mix of an objective's terms as a task: the weight of each term for each image."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor, nn
from typing_extensions import override

from metavpt.designers.designer import Designer
from metavpt.designers.encoder import ImageEncoder, zero_linear
from metavpt.designers.histograms import histograms
from metavpt.designers.views import MultiCrop, Views, to_float
from metavpt.distributed import collectives
from metavpt.errors import MetaVPTError
from metavpt.objectives.distillation import active_terms


class MixDesigner(Designer):
    """Weights of the terms, w_t = W p_t e^l_t / sum_s p_s e^l_s with the recipe's weights W p_t.

    Their sum W stays; l = 0 is the recipe.

    Args:
        recipe: Makes the views.
        terms: The problem's terms; those of weight 0 stay out.
        encoder: Predicts l from each image. None: one mix for all images.
        kl_weight: Weight of the divergence from the recipe, see `regularizer`.
    """

    def __init__(
        self,
        recipe: MultiCrop,
        terms: Mapping[str, float],
        encoder: ImageEncoder | None = None,
        kl_weight: float = 0.1,
    ) -> None:
        super().__init__(recipe)
        self.terms = active_terms(terms)
        if len(self.terms) < 2:
            raise MetaVPTError(
                f"MixDesigner: there is nothing to mix in problem.terms={dict(terms)}; give two "
                "terms a weight"
            )
        self.encoder, self.kl_weight = encoder, kl_weight
        self.logits = nn.Parameter(torch.zeros(len(self.terms)))
        self.head = zero_linear(encoder.width, len(self.terms), bias=False) if encoder else None

    @override
    def refine(self, views: Views, batch: Any) -> Views:
        images = to_float(batch.images)
        logits = self.logits.expand(len(images), -1)
        if self.encoder is not None and self.head is not None:
            logits = logits + self.head(self.encoder(self.recipe.normalize(images)))
        return views._replace(mix=self._mix(logits.T))

    def randomize(self, views: Views, batch: Any, rng: Generator) -> Views:
        """Draw weights from standard normal l for each image."""
        shape = len(self.terms), len(batch.images)
        logits = collectives.drawn(
            lambda shape: torch.randn(shape, generator=rng), shape, dim=1
        ).to(views.global_crops)
        return views._replace(mix=self._mix(logits))

    def regularizer(self, task: Views) -> Tensor:
        """Compute kl_weight * mean over images of KL(w / W || p), a scalar."""
        mix = _mix_of(task)
        recipe = self._recipe(mix)
        return (
            self.kl_weight
            * ((mix / mix.sum(dim=0)) * (mix.clamp_min(torch.finfo(mix.dtype).tiny) / recipe).log())
            .sum(dim=0)
            .mean()
        )

    def figures(self, batch: Any, task: Views) -> dict[str, np.ndarray]:
        """Show the distribution of each term's weight over images, and the recipe's in grey."""
        mix = _mix_of(task)
        return {
            "mix": histograms(
                {"": dict(zip(self.terms, zip(self._recipe(mix), mix, strict=True), strict=True))}
            )
        }

    def _mix(self, logits: Tensor) -> Tensor:
        """Return the weights, (T, B)."""
        recipe = self._recipe(logits)
        mix = recipe * (logits - logits.detach().amax(dim=0)).exp()
        # Both sums use one kernel, so that their ratio is exactly 1 for l = 0.
        return mix * (recipe.sum(dim=0) / mix.sum(dim=0))

    def _recipe(self, like: Tensor) -> Tensor:
        """Return the recipe's weights for each image, (T, B)."""
        return like.new_tensor(list(self.terms.values()))[:, None].repeat(1, like.shape[1])


def mix_terms(losses: Tensor, recipe: Iterable[float], mix: Tensor | None) -> Tensor:
    """Compute sum_t w_t losses_t of each image, (B,).

    Args:
        losses: (T, B).
        recipe: The recipe's T weights, used if the task has no mix.
        mix: The task's weights, (T, B).
    """
    weights = losses.new_tensor(list(recipe))[:, None] if mix is None else mix.to(losses.dtype)
    if len(weights) != len(losses):
        raise MetaVPTError(
            f"MixDesigner: {len(weights)} weights for {len(losses)} terms; designer.terms must be "
            "the problem's"
        )
    return (weights * losses).sum(dim=0)


def _mix_of(task: Views) -> Tensor:
    if task.mix is None:
        raise MetaVPTError(
            "MixDesigner: the task has no mix; it must come from the designer, not from recipe_task"
        )
    return task.mix
