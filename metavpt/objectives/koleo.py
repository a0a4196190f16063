"""The Kozachenko-Leonenko regulariser (arXiv 1806.03198), a term of DINOv2 and DINOv3.

It spreads features over the sphere.
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from metavpt.errors import MetaVPTError, check_known


def koleo_loss(
    features: Tensor, eps: float = 1e-8, reduction: Literal["mean", "none"] = "mean"
) -> Tensor:
    """Compute -mean_i log min_{j != i} |x_i - x_j| of l2-normalised features (DINOv2, section 4).

    The logarithm is that of sqrt(d^2 + eps^2), so that duplicates have a finite value and
    derivatives of every order. Half precision is summed in float32.

    Args:
        features: (B, D) of one view, B at least 2.
        eps: Distance that duplicates count as.
        reduction: "mean" gives a scalar, "none" the terms, (B,).
    """
    check_known(reduction, "koleo_loss: reduction", "mean", "none")
    if features.ndim != 2 or len(features) < 2:
        raise MetaVPTError(
            f"koleo_loss: features must be (B, D) with at least 2 rows, got {tuple(features.shape)}"
        )
    x = F.normalize(features if features.dtype.itemsize >= 4 else features.float(), dim=-1)
    # -2 is below any cosine, so that no sample is its own neighbour.
    similarity = (x @ x.T).detach().fill_diagonal_(-2.0)
    nearest = x[similarity.argmax(dim=1)]
    per_image = -0.5 * ((x - nearest).square().sum(dim=-1) + eps**2).log()
    return per_image.mean() if reduction == "mean" else per_image
