"""The predictor of masked encoders: a narrow transformer that predicts the masked patches."""

import torch
from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from metavpt.errors import MetaVPTError
from metavpt.learners.vit import Backbone


class Predictor(nn.Module):
    """Predict groups of masked patches from tokens of visible ones.

    This is I-JEPA's predictor (arXiv 2301.08243) and MAE's decoder (2111.06377): a ViT of `width`
    on the visible tokens and one mask token per predicted patch, with sine-cosine positions. Groups
    of patches (I-JEPA's blocks; MAE has one) are predicted independently.

    Args:
        width_in: Width of the encoder's tokens.
        width_out: Numbers predicted per patch.
        width: A multiple of 4 and of `num_heads`.
        depth: Blocks.
        num_heads: Attention heads.
    """

    def __init__(
        self, width_in: int, width_out: int, width: int = 384, depth: int = 6, num_heads: int = 6
    ) -> None:
        super().__init__()
        if width % 4 or width % num_heads:
            raise MetaVPTError(
                f"Predictor: width={width} must be a multiple of 4 and of num_heads={num_heads}"
            )
        self.embed = nn.Linear(width_in, width)
        self.mask_token = nn.Parameter(torch.empty(width))
        self.blocks = nn.Sequential(*(Block(width, num_heads, qkv_bias=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, width_out)
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(
        self, tokens: Tensor, visible: Tensor, targets: Tensor, grid: tuple[int, int]
    ) -> Tensor:
        """Predict the patches `targets`.

        Args:
            tokens: Of the visible patches, (B, K, D).
            visible: Their indices, (B, K).
            targets: Indices of M groups of T patches, (B, M, T).
            grid: (h, w). Indices count its patches row by row.

        Returns:
            (B, M, T, width_out).
        """
        num_groups, num_asked = targets.shape[1:]
        positions = build_sincos2d_pos_embed(
            list(grid), self.mask_token.numel(), device=tokens.device, dtype=tokens.dtype
        )
        seen = self.embed(tokens) + positions[visible]  # (B, K, W)
        asked = self.mask_token + positions[targets]  # (B, M, T, W)
        x = torch.cat([seen[:, None].expand(-1, num_groups, -1, -1), asked], dim=2)
        x = x.flatten(0, 1)  # (B M, K + T, W)
        return self.out(self.norm(self.blocks(x)[:, -num_asked:])).unflatten(0, (-1, num_groups))


class MaskedLearner(nn.Module):
    """An encoder of the visible patches and a predictor of the masked ones.

    Normalised images (B, 3, H, W) -> predictions (B, M, T, width_out).
    """

    def __init__(self, backbone: Backbone, predictor: Predictor) -> None:
        super().__init__()
        self.backbone, self.predictor = backbone, predictor

    def forward(
        self, images: Tensor, visible: Tensor, targets: Tensor, weight: Tensor | None = None
    ) -> Tensor:
        """Predict the masked patches of images.

        Args:
            images: (B, 3, H, W), normalised.
            visible: Indices of the visible patches.
            targets: Indices of the patches to predict.
            weight: The weight of visible patches in attention. None: all equal.
        """
        features = self.backbone.tail(self.backbone.trunk(images, visible, weight))
        return self.predictor(
            features.patches.flatten(2).transpose(1, 2), visible, targets, self.grid(images)
        )

    def grid(self, images: Tensor) -> tuple[int, int]:
        """Return (h, w), the patches along the sides of the images."""
        height, width = images.shape[-2:]
        return height // self.backbone.patch_size, width // self.backbone.patch_size
