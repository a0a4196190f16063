"""The loss of I-JEPA (arXiv 2301.08243): features of target blocks are predicted from a context.

Letters: B batch, N patches, M target blocks of T patches, D width.
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from metavpt.errors import MetaVPTError

DISTANCES = {"l2": F.mse_loss, "smooth_l1": F.smooth_l1_loss}


def ijepa_loss(
    predictions: Tensor,
    features: Tensor,
    weights: Tensor | None = None,
    distance: Literal["l2", "smooth_l1"] = "smooth_l1",
    reduction: Literal["mean", "none"] = "mean",
) -> Tensor:
    """Compute the distance of predictions to features over target blocks (I-JEPA, section 3).

    1/M sum_m 1/T sum_{j in block m} d(prediction_mj, feature_mj), weighted within each image.

    Args:
        predictions: (B, M, T, D).
        features: (B, M, T, D), from `normalized_features`.
        weights: (B, M, T); default 1. Their scale does not matter.
        distance: d averages over channels: "l2" is the paper's, "smooth_l1" that of the released
            code.
        reduction: "mean" gives a scalar, "none" the loss of each image, (B,).
    """
    if reduction not in ("mean", "none") or distance not in DISTANCES:
        raise MetaVPTError(
            f"ijepa_loss: distance is {' or '.join(DISTANCES)}, reduction mean or none; got "
            f"{distance!r}, {reduction!r}"
        )
    if predictions.shape != features.shape or predictions.ndim != 4:
        raise MetaVPTError(
            "ijepa_loss: predictions and features must both be (B, M, T, D), got "
            f"{tuple(predictions.shape)} and {tuple(features.shape)}"
        )
    errors = DISTANCES[distance](predictions, features, reduction="none").mean(dim=-1)
    weights = errors.new_ones(errors.shape) if weights is None else weights
    per_image = (weights * errors).sum(dim=(1, 2)) / weights.sum(dim=(1, 2))
    return per_image.mean() if reduction == "mean" else per_image


def normalized_features(features: Tensor) -> Tensor:
    """Apply layer norm over channels, without scale and shift, to the target encoder's features.

    Args:
        features: (B, D, h, w).

    Returns:
        (B, N, D), patches row by row.
    """
    tokens = features.flatten(2).transpose(1, 2)
    return F.layer_norm(tokens, tokens.shape[-1:])
