"""The loss of data2vec (arXiv 2202.03555): a student predicts its teacher's patch features.

The student does not see all patches. Letters: B batch, N patches, D width.
"""

from typing import Literal

from torch import Tensor

from metavpt.errors import MetaVPTError, check_known


def data2vec_loss(
    predictions: Tensor,
    targets: Tensor,
    reduction: Literal["mean", "none"] = "mean",
    weights: Tensor | None = None,
) -> Tensor:
    """Mean squared error 1/(N D) sum_n |prediction_n - target_n|^2.

    Args:
        predictions: (B, N, D).
        targets: (B, N, D).
        reduction: "mean" over the batch gives a scalar, "none" the loss of each image, (B,).
        weights: Of the squares, (B, N, D) or (B, N, 1), with a mean of 1. None: all are 1.
    """
    check_known(reduction, "data2vec_loss: reduction", "mean", "none")
    if predictions.shape != targets.shape or predictions.ndim != 3:
        raise MetaVPTError(
            "data2vec_loss: predictions and targets must both be (B, N, D), got "
            f"{tuple(predictions.shape)} and {tuple(targets.shape)}"
        )
    squares = (predictions - targets).square()
    squares = squares if weights is None else weights * squares
    return squares.mean() if reduction == "mean" else squares.mean(dim=(1, 2))
