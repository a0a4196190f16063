"""The projection head of self-distillation: image summaries and patches onto prototypes."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metavpt.errors import MetaVPTError
from metavpt.learners.vit import Backbone, Features


class ProjectionHead(nn.Module):
    """The head of DINO (arXiv 2104.14294, appendix C): (..., D) -> cosines to K prototypes.

    A 3-layer MLP with GELU ends in a bottleneck. Bottleneck and prototypes are l2-normalised, so
    logits lie in [-1, 1].
    """

    def __init__(
        self, width: int, num_prototypes: int = 8192, hidden: int = 2048, bottleneck: int = 256
    ) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(),
            nn.Linear(hidden, bottleneck)
        )  # fmt: skip
        self.prototypes = nn.Parameter(torch.empty(num_prototypes, bottleneck))
        nn.init.trunc_normal_(self.prototypes, std=0.02)
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits (..., K) of features (..., D)."""
        return F.linear(F.normalize(self.mlp(x), dim=-1), F.normalize(self.prototypes, dim=-1))


class Learner(nn.Module):
    """Normalised images (B, 3, H, W) -> prototype logits (B, K).

    Args:
        backbone: The backbone.
        head: Maps the summary of an image to logits.
        pool: "cls" projects the cls token, as DINO does. "mean" projects the mean patch, which
            trains patches directly, as a short run for dense prediction needs.
        hides: Whether there is a mask token (D,), zero at first, for masked patches.
        patch_head: The head for masked patches. None: `head`.
    """

    def __init__(
        self,
        backbone: Backbone,
        head: nn.Module,
        pool: Literal["cls", "mean"] = "cls",
        hides: bool = False,
        patch_head: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if pool not in ("cls", "mean"):
            raise MetaVPTError(f"Learner: pool must be 'cls' or 'mean', got {pool!r}")
        self.backbone, self.head, self.pool = backbone, head, pool
        self.mask_token = nn.Parameter(torch.zeros(backbone.width)) if hides else None
        self.patch_head = patch_head

    def forward(self, images: Tensor) -> Tensor:
        """Compute prototype logits (B, K) of normalised images."""
        return self.head(self.summary(self.backbone(images)))

    def summary(self, features: Features) -> Tensor:
        """Return what the head projects, (B, D)."""
        return features.cls if self.pool == "cls" else features.patches.mean(dim=(2, 3))
