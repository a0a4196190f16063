"""Masked pretraining with feedback from dense labels: what MAE and I-JEPA share."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils._pytree import tree_map
from typing_extensions import override

from metavpt.dense_tasks import colours
from metavpt.designers import figures
from metavpt.designers.choice import expected_mean
from metavpt.designers.crop import RandomCrop
from metavpt.designers.patches import MaskedImages, PatchDesigner
from metavpt.errors import MetaVPTError
from metavpt.hypergradients import params
from metavpt.hypergradients.curvature import ComposedLoss
from metavpt.hypergradients.params import Params
from metavpt.learners.predictor import MaskedLearner, Predictor
from metavpt.learners.subset import gather_patches
from metavpt.learners.vit import Backbone
from metavpt.strategies.learned import SharedTrunk
from metavpt.strategies.selection import SupportsCandidates, SupportsSelection

from .dense import NUM_PICTURES, DenseProblem


class MaskedDense(DenseProblem, SharedTrunk, SupportsCandidates, SupportsSelection):
    """An encoder sees some patches of an image, and a predictor predicts others.

    The designer chooses the patches. A subclass defines the prediction targets.

    Args:
        target_width: The width of a patch's prediction target.
    """

    learner: MaskedLearner
    designer: PatchDesigner

    def __init__(
        self,
        backbone: Backbone,
        recipe: Callable[..., RandomCrop],
        designer: Callable[[RandomCrop, int], PatchDesigner],
        predictor: Callable[[int, int], Predictor],
        target_width: int,
        **dense: Any,
    ) -> None:
        self.learner = MaskedLearner(backbone, predictor(backbone.width, target_width))
        self.designer = designer(recipe(mean=backbone.mean, std=backbone.std), backbone.patch_size)
        super().__init__(backbone, **dense)

    @abstractmethod
    def patch_targets(self, images: Tensor) -> Tensor:
        """Return the targets (B, N, target_width) of normalised images, without a graph."""

    @abstractmethod
    def loss(self, predictions: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """Compute the loss of each image, (B,).

        Args:
            predictions: (B, M, T, target_width).
            targets: (B, M, T, target_width).
            weights: (B, M, T).
        """

    @override
    def recipe(self, batch: Any) -> MaskedImages:
        return self.designer.recipe_task(batch)

    @override
    def regularizer(self, task: MaskedImages) -> Tensor:
        return self.designer.regularizer(task)

    @override
    def pretrain_loss(self, theta: Params, task: MaskedImages) -> Tensor:
        return self.pretrain_tail(theta, task)({})

    @override
    def pretrain_tail(self, theta: Params, task: MaskedImages) -> Callable[[Params], Tensor]:
        return self._tail(theta, task, "mean")

    @override
    def per_sample_tail(self, theta: Params, task: MaskedImages) -> Callable[[Params], Tensor]:
        return self._tail(theta, task, "none")

    @override
    def candidates(self, batch: Any, num_candidates: int) -> list[MaskedImages]:
        return self.designer.random_tasks(batch, num_candidates)

    def pick(self, tasks: Sequence[MaskedImages], which: Tensor, sample: Tensor) -> MaskedImages:
        """Of the visible patches as many as the task with fewest has."""
        if len({task.targets.shape[1:] for task in tasks}) > 1:
            raise MetaVPTError(
                "samples of batches with blocks of different sizes do not fit into one task: for "
                "greedy_selection set "
                "designer.target_scale and designer.target_aspect to one value each, [0.15, "
                "0.15] and [1.0, 1.0]"
            )
        fewest = min(task.visible.shape[1] for task in tasks)
        cut = [
            task._replace(
                visible=task.visible[:, :fewest], visible_weight=task.visible_weight[:, :fewest]
            )
            for task in tasks
        ]

        def stacked(*parts: Tensor) -> Tensor:
            return torch.stack(parts)[which.to(parts[0].device), sample.to(parts[0].device)]

        return tree_map(stacked, *cut)

    def _tail(
        self, theta: Params, task: MaskedImages, reduction: Literal["mean", "none"]
    ) -> Callable[[Params], Tensor]:
        """Run the trunk once on visible patches and return a function for tail and predictor."""
        backbone, grid = self.backbone, self.learner.grid(task.images)
        with torch.no_grad():
            targets = gather_patches(self.patch_targets(task.images), task.targets)
        seen = (task.images, task.visible, task.visible_weight)
        hidden = functional_call(backbone.trunk, params.subset(theta, "backbone.trunk."), seen)

        def predictions(theta_s: Params) -> Tensor:
            own = {**theta, **theta_s}
            features = functional_call(
                backbone.tail, params.subset(own, "backbone.tail."), (hidden,)
            )
            asked = (features.patches.flatten(2).transpose(1, 2), task.visible, task.targets, grid)
            return functional_call(self.learner.predictor, params.subset(own, "predictor."), asked)

        def criterion(predicted: Tensor) -> Tensor:
            losses = self.loss(predicted, targets, task.target_weight)
            return expected_mean(losses, task.log_prob) if reduction == "mean" else losses

        return ComposedLoss(predictions, criterion)

    @override
    def figures(self) -> dict[str, np.ndarray]:
        return {"masks": self._mask_figure(), **super().figures()}

    @torch.no_grad()
    def _mask_figure(self) -> np.ndarray:
        """Draw an image, the designer's centred logits (-1 blue to 1 red), and visible patches."""
        task = self.designer(next(iter(self.meta_batches(seed=0))))
        size, patch = task.images.shape[-2:], self.backbone.patch_size
        logits = self.designer.logits(task.images)
        logits = logits - logits.mean(dim=1, keepdim=True)
        seen = torch.zeros_like(logits).scatter_(1, task.visible, 1.0)
        rows = []
        for image, *maps in zip(
            task.images[:NUM_PICTURES].cpu() * self.std + self.mean,
            logits.cpu(),
            seen.cpu(),
            strict=False,
        ):
            scores, mask = (
                m.view(size[0] // patch, -1).repeat_interleave(patch, 0).repeat_interleave(patch, 1)
                for m in maps
            )
            rows.append(
                [
                    figures.photo(image),
                    colours.colour(scores, -1.0, 1.0, "coolwarm"),
                    figures.photo(image * mask),
                ]
            )
        columns = ["image", "logits of the designer", "what the encoder sees"]
        legend = colours.scale("-1 about the mean", "+1", "coolwarm")
        return figures.with_legend(figures.titled(figures.grid(rows), columns), legend)
