"""Gram anchoring of DINOv3 (arXiv 2508.10104, section 4).

Patches stay as similar to each other as in an earlier teacher.
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from metavpt.errors import MetaVPTError, check_known


def gram_loss(
    student: Tensor, teacher: Tensor, reduction: Literal["mean", "none"] = "mean"
) -> Tensor:
    """Compute |X_S X_S^T - X_G X_G^T|_F^2 / N^2 with l2-normalised patches.

    DINOv3, equation 2, divided by the number of entries as in the release. Half precision is summed
    in float32.

    Args:
        student: Patch features (B, N, D).
        teacher: Patch features (B, N, D') of the same N patches; the widths may differ.
        reduction: "mean" gives a scalar, "none" the loss of each image, (B,).
    """
    check_known(reduction, "gram_loss: reduction", "mean", "none")
    if student.ndim != 3 or teacher.ndim != 3 or student.shape[:2] != teacher.shape[:2]:
        raise MetaVPTError(
            "gram_loss: needs patch features (B, N, D) of the same patches, got "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    per_image = (_gram(student) - _gram(teacher)).square().mean(dim=(1, 2))
    return per_image.mean() if reduction == "mean" else per_image


def _gram(features: Tensor) -> Tensor:
    """Compute the cosines of all pairs of patches: (B, N, D) -> (B, N, N)."""
    x = F.normalize(features if features.dtype.itemsize >= 4 else features.float(), dim=-1)
    return x @ x.transpose(1, 2)
