"""Designers of patch masks: which patches a masked encoder sees and which it has to predict."""

import math
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from typing_extensions import override

from metavpt.data.loader import mix
from metavpt.designers.choice import ESTIMATORS, Estimator, choose, gumbel
from metavpt.designers.crop import RandomCrop
from metavpt.errors import MetaVPTError, check_known


class MaskedImages(NamedTuple):
    """A task: what is seen of images, and what is to be predicted.

    Indices are of patches, row by row; weights are 1 in the recipe.
    """

    images: Tensor  # (B, 3, H, W), normalised
    visible: Tensor  # (B, K) int64
    targets: Tensor  # (B, M, T) int64: M groups, predicted apart from each other
    visible_weight: Tensor  # (B, K), of the tokens of the visible patches
    target_weight: Tensor  # (B, M, T), of the errors
    log_prob: Tensor  # (B,), of the choice; see designers.choice
    logits: Tensor  # (B, C), what the choice was drawn by; zero in the recipe


class PatchDesigner(nn.Module, ABC):
    """Draws a masked task from logits = network(image), one for each patch.

    A subclass defines the task. The draw is Gumbel-top-k with the batch's own noise. If the last
    layer of the network is zero, it is the recipe's draw bit for bit.

    Args:
        recipe: Makes the images.
        patch_size: The patch size of the backbone, in pixels.
        network: Maps (B, 3, H, W) to (B, 1, h, w), which is averaged over patches.
        estimator: How the gradient passes the draw, see `choose`.
        kl_weight: The weight of KL(softmax(logits) || uniform), which keeps the draw random.
    """

    def __init__(
        self,
        recipe: RandomCrop,
        patch_size: int,
        network: nn.Module,
        estimator: Estimator = "relaxed",
        kl_weight: float = 0.01,
    ) -> None:
        super().__init__()
        check_known(estimator, "designer.estimator", *ESTIMATORS)
        self.recipe, self.network, self.kl_weight = recipe, network, kl_weight
        self.estimator: Estimator = estimator
        self.grid = recipe.grid(patch_size)
        self.num_patches = math.prod(self.grid)

    @abstractmethod
    def task(self, images: Tensor, logits: Tensor, seed: int, draw: int) -> MaskedImages:
        """Make the task of `images` from the logits (B, N) of their patches.

        Args:
            images: (B, 3, H, W).
            logits: (B, N).
            seed: The seed of the batch.
            draw: The number of the draw under this seed.
        """

    def forward(self, batch: Any) -> MaskedImages:
        """Make the task of a batch with `.images` (B, 3, H, W) and `.seed`, see `RandomCrop`."""
        images = self.recipe(batch.images, batch.seed)
        return self.task(images, self.logits(images), batch.seed, draw=0)

    def recipe_task(self, batch: Any) -> MaskedImages:
        """Make the task with equal logits. The network does not run."""
        return self.random_tasks(batch, 1)[0]

    def random_tasks(self, batch: Any, num_tasks: int) -> list[MaskedImages]:
        """Make several tasks of the same images with equal logits. The first is the recipe's."""
        images = self.recipe(batch.images, batch.seed)
        uniform = images.new_zeros(len(images), self.num_patches)
        return [self.task(images, uniform, batch.seed, draw) for draw in range(num_tasks)]

    def logits(self, images: Tensor) -> Tensor:
        """(B, N)."""
        return F.adaptive_avg_pool2d(self.network(images), self.grid).flatten(1)

    def regularizer(self, task: MaskedImages) -> Tensor:
        """R = kl_weight * mean_b KL(softmax(logits_b) || uniform), a scalar."""
        uniform = torch.zeros_like(task.logits).log_softmax(dim=1)
        return self.kl_weight * F.kl_div(
            uniform, task.logits.log_softmax(dim=1), reduction="batchmean", log_target=True
        )


class PatchMasks(PatchDesigner):
    """MAE's masks (arXiv 2111.06377): the share `hidden` is masked, the logits choose the rest."""

    def __init__(
        self,
        recipe: RandomCrop,
        patch_size: int,
        network: nn.Module,
        hidden: float = 0.75,
        **options: Any,
    ) -> None:
        super().__init__(recipe, patch_size, network, **options)
        self.num_visible = round((1 - hidden) * self.num_patches)
        if not 0 < self.num_visible < self.num_patches:
            raise MetaVPTError(
                f"designer.hidden={hidden} of {self.num_patches} patches leaves nothing to see, "
                "or nothing to predict"
            )

    @override
    def task(self, images: Tensor, logits: Tensor, seed: int, draw: int) -> MaskedImages:
        noise = gumbel(tuple(logits.shape), generator(seed, draw)).to(logits)
        choice = choose(logits, noise, self.num_visible, self.estimator)
        targets, weight = choice.rest[:, None], choice.rest_weight[:, None]  # one group
        return MaskedImages(
            images, choice.chosen, targets, choice.chosen_weight, weight, choice.log_prob, logits
        )


class PatchScores(nn.Module):
    """Embeds patches and mixes them with their neighbours. The output is zero at first.

    It maps (B, 3, H, W) to (B, 1, H / patch_size, W / patch_size).
    """

    def __init__(self, patch_size: int = 16, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, patch_size, stride=patch_size)
        self.mix = nn.Conv2d(width, width, kernel_size=3, padding=1)
        # A bias, equal for all patches, would change nothing.
        self.out = nn.Conv2d(width, 1, kernel_size=1, bias=False)
        nn.init.zeros_(self.out.weight)

    def forward(self, images: Tensor) -> Tensor:
        """Compute scores (B, 1, h, w) of images (B, 3, H, W)."""
        return self.out(F.silu(self.mix(F.silu(self.embed(images)))))


def generator(seed: int, draw: int) -> Generator:
    """The numbers of a draw; others than those that placed the crops of the batch."""
    return Generator().manual_seed(mix(seed, draw))
