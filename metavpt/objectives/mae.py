"""The loss of masked autoencoders (arXiv 2111.06377): the pixels of masked patches are predicted.

Letters: B batch, N patches, M groups of T masked patches (MAE has one group), p the side of a patch
in pixels.
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from metavpt.errors import MetaVPTError, check_known


def mae_loss(
    predictions: Tensor,
    pixels: Tensor,
    weights: Tensor | None = None,
    reduction: Literal["mean", "none"] = "mean",
) -> Tensor:
    """Compute the mean over masked patches of |prediction - pixels|^2 / (3 p^2) (MAE, section 3).

    Args:
        predictions: (B, M, T, 3 p^2).
        pixels: (B, M, T, 3 p^2), from `normalized_pixels`.
        weights: (B, M, T), within each image; default 1. Their scale does not matter.
        reduction: "mean" gives a scalar, "none" the loss of each image, (B,).
    """
    check_known(reduction, "mae_loss: reduction", "mean", "none")
    if predictions.shape != pixels.shape or predictions.ndim != 4:
        raise MetaVPTError(
            "mae_loss: predictions and pixels must both be (B, M, T, 3 p^2), got "
            f"{tuple(predictions.shape)} and {tuple(pixels.shape)}"
        )
    errors = (predictions - pixels).square().mean(dim=-1)
    weights = errors.new_ones(errors.shape) if weights is None else weights
    per_image = (weights * errors).sum(dim=(1, 2)) / weights.sum(dim=(1, 2))
    return per_image.mean() if reduction == "mean" else per_image


def normalized_pixels(images: Tensor, patch_size: int, eps: float = 1e-6) -> Tensor:
    """Normalise the pixels of each patch: (x - mean) / sqrt(var + eps).

    The variance is the unbiased one, as in the released code.

    Args:
        images: (B, 3, H, W).
        patch_size: p, in pixels.
        eps: Added to the variance.

    Returns:
        (B, N, 3 p^2), patches row by row.
    """
    pixels = F.unfold(images, patch_size, stride=patch_size).transpose(1, 2)
    return (pixels - pixels.mean(dim=-1, keepdim=True)) / (
        pixels.var(dim=-1, keepdim=True) + eps
    ).sqrt()
