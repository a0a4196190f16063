"""The patch loss of iBOT (arXiv 2111.07832), a term of DINOv2 and DINOv3.

The student predicts the prototypes of masked patches. Letters: B batch, N patches, K prototypes.
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from metavpt.errors import MetaVPTError, check_known


def ibot_loss(
    student_logits: Tensor,
    teacher_probs: Tensor,
    hidden: Tensor,
    temperature: float = 0.1,
    reduction: Literal["mean", "none"] = "mean",
) -> Tensor:
    """Compute the cross-entropy of masked patches, averaged over images (iBOT, equation 2).

    -sum_i hidden_i sum_k p_i[k] log softmax(s_i / temperature)[k] / sum_i hidden_i. Half precision
    is summed in float32.

    Args:
        student_logits: (B, N, K).
        teacher_probs: (B, N, K), from `centered_probs` or `sinkhorn_probs`. The teacher sees all
            patches.
        hidden: (B, N): 1 or True where the student saw a mask token; values in between are weights.
            An image without masked patches counts as 0.
        temperature: Of the student.
        reduction: "mean" gives a scalar, "none" the loss of each image, (B,).
    """
    check_known(reduction, "ibot_loss: reduction", "mean", "none")
    if (
        student_logits.ndim != 3
        or student_logits.shape != teacher_probs.shape
        or hidden.shape != student_logits.shape[:2]
    ):
        raise MetaVPTError(
            "ibot_loss: needs student_logits and teacher_probs (B, N, K) and hidden (B, N), got "
            f"{tuple(student_logits.shape)}, {tuple(teacher_probs.shape)} and {tuple(hidden.shape)}"
        )
    logits = student_logits if student_logits.dtype.itemsize >= 4 else student_logits.float()
    log_probs = F.log_softmax(logits / temperature, dim=-1)
    cross_entropy = -(teacher_probs.to(log_probs.dtype) * log_probs).sum(dim=-1)  # (B, N)
    weights = hidden.to(log_probs.dtype)
    total = weights.sum(dim=1)
    per_image = (weights * cross_entropy).sum(dim=1) / total.where(total > 0, 1.0)
    return per_image.mean() if reduction == "mean" else per_image
