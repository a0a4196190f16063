"""What self-distillation reads of a backbone: a summary of the image, projected onto prototypes."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metavpt.errors import MetaVPTError
from metavpt.learners.vit import Backbone, Features


class ProjectionHead(nn.Module):
    """cosine(MLP(x), prototype_k): (..., D) -> (..., K), the head of DINO (arXiv 2104.14294, appendix C).

    A 3-layer MLP with GELU into a bottleneck; the bottleneck and each prototype are l2-normalised, so logits lie in [-1, 1].
    """

    def __init__(
        self, width: int, num_prototypes: int = 8192, hidden: int = 2048, bottleneck: int = 256
    ) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        )  # fmt: skip
        self.prototypes = nn.Parameter(torch.empty(num_prototypes, bottleneck))
        nn.init.trunc_normal_(self.prototypes, std=0.02)
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.normalize(self.mlp(x), dim=-1), F.normalize(self.prototypes, dim=-1))


class Learner(nn.Module):
    """Normalised images (B, 3, H, W) -> prototype logits (B, K) of the cls token, or of the mean patch.

    pool: "cls" is DINO's. "mean" trains the patches directly, which a short run for dense prediction needs. hides: whether it has a mask
    token (D,), zero at first, for patches that it is not to see; patch_head: a head for these, None: `head` serves both.
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
        return self.head(self.summary(self.backbone(images)))

    def summary(self, features: Features) -> Tensor:
        """What the head reads of an image, (B, D)."""
        return features.cls if self.pool == "cls" else features.patches.mean(dim=(2, 3))
