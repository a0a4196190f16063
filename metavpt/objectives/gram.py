"""Gram anchoring of DINOv3 (arXiv 2508.10104, section 4): patches stay as alike to each other as an earlier teacher found them."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from metavpt.errors import MetaVPTError


def gram_loss(
    student: Tensor, teacher: Tensor, reduction: Literal["mean", "none"] = "mean"
) -> Tensor:
    """|X_S X_S^T - X_G X_G^T|_F^2 / N^2 with the patches l2-normalised (DINOv3, equation 2, divided by its entries as released).

    student: (B, N, D), teacher: (B, N, D'), patch features of the same N patches; the widths may differ. Half precision is summed in
    float32. "mean" gives a scalar, "none" the loss of each image, (B,).
    """
    if reduction not in ("mean", "none"):
        raise MetaVPTError(f"gram_loss: reduction must be 'mean' or 'none', got {reduction!r}")
    if student.ndim != 3 or teacher.ndim != 3 or student.shape[:2] != teacher.shape[:2]:
        raise MetaVPTError(
            f"gram_loss: needs patch features (B, N, D) of the same patches, got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    per_image = (_gram(student) - _gram(teacher)).square().mean(dim=(1, 2))
    return per_image.mean() if reduction == "mean" else per_image


def _gram(features: Tensor) -> Tensor:
    """(B, N, D) -> the cosines of all pairs of patches, (B, N, N)."""
    x = F.normalize(features if features.dtype.itemsize >= 4 else features.float(), dim=-1)
    return x @ x.transpose(1, 2)
