"""The self-distillation loss of DINO (arXiv 2104.14294).

All functions are pure; the centre moves in `after_step` only. Letters: G teacher (global) views,
V student views, B batch, K prototypes.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from metavpt.distributed import collectives
from metavpt.errors import MetaVPTError, check_known


def dino_loss(
    student_logits: Sequence[Tensor],
    teacher_probs: Tensor,
    temperature: float = 0.1,
    reduction: Literal["mean", "none"] = "mean",
) -> Tensor:
    """Compute DINO's cross-entropy between teacher and student views (DINO, equations 1 to 3).

    The mean over all pairs (teacher view g, student view v != g) of
    -sum_k p_g[k] log softmax(s_v / temperature)[k]. Half precision is summed in float32.

    Args:
        student_logits: V tensors of shape (B, K), the global views first, in the teacher's order.
        teacher_probs: (G, B, K).
        temperature: Of the student.
        reduction: "mean" gives a scalar, "none" the loss of each image, (B,).

    Raises:
        MetaVPTError: Shapes do not fit, or no pair is left.
    """
    _check_views(student_logits, teacher_probs, reduction)
    logits = _at_least_float32(torch.stack(list(student_logits)))  # (V, B, K)
    log_probs = F.log_softmax(logits / temperature, dim=-1)
    cross_entropy = -torch.einsum("gbk,vbk->gvb", teacher_probs.to(log_probs.dtype), log_probs)
    num_globals, num_views = cross_entropy.shape[:2]
    same_view = torch.eye(num_globals, num_views, dtype=torch.bool, device=log_probs.device)
    per_image = cross_entropy.masked_fill(same_view[:, :, None], 0.0).sum(dim=(0, 1)) / (
        num_globals * (num_views - 1)
    )
    return per_image.mean() if reduction == "mean" else per_image


def centered_probs(logits: Tensor, center: Tensor, temperature: float) -> Tensor:
    """Compute the teacher's targets softmax((logits - center) / temperature) (DINO, section 3.1).

    Args:
        logits: (..., K).
        center: (K,). It keeps one prototype from dominating.
        temperature: Of the teacher.
    """
    return F.softmax(_at_least_float32(logits - center) / temperature, dim=-1)


def sinkhorn_probs(logits: Tensor, temperature: float, num_iters: int = 3) -> Tensor:
    """Compute the teacher's targets by Sinkhorn-Knopp, so that prototypes are used equally.

    Normalises exp(logits / temperature) (SwAV, arXiv 2006.09882; DINOv2). Each row of the result
    sums to 1, and the total of each prototype tends to samples / K.

    Args:
        logits: (..., K). All leading dimensions count as samples, those of other processes too.
        temperature: Of the teacher.
        num_iters: Normalisations of prototypes and samples.
    """
    # In logs, since exp of sharp logits overflows.
    log_q = _at_least_float32(logits).flatten(0, -2) / temperature
    for _ in range(num_iters):
        log_q = log_q - collectives.logsumexp(log_q)
        log_q = log_q - log_q.logsumexp(dim=1, keepdim=True)
    return log_q.exp().view(logits.shape)


def center_update(center: Tensor, teacher_logits: Tensor, momentum: float = 0.9) -> Tensor:
    """Return the new centre (K,): an average with the mean of the logits (DINO, equation 4).

    The result is momentum * center + (1 - momentum) * mean of logits (..., K) over all samples.
    """
    batch_mean = _at_least_float32(teacher_logits.detach()).flatten(0, -2).mean(dim=0)
    return torch.lerp(collectives.leave(batch_mean).to(center.dtype), center, momentum)


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _check_views(student_logits: Sequence[Tensor], teacher_probs: Tensor, reduction: str) -> None:
    check_known(reduction, "dino_loss: reduction", "mean", "none")
    if (
        len(student_logits) < 2
        or teacher_probs.ndim != 3
        or len(teacher_probs) > len(student_logits)
    ):
        raise MetaVPTError(
            "dino_loss: needs at least 2 student views and teacher_probs (G, B, K) with G of "
            f"them, got {len(student_logits)} views "
            f"and {tuple(teacher_probs.shape)}"
        )
    for view, logits in enumerate(student_logits):
        if logits.shape != teacher_probs.shape[1:]:
            raise MetaVPTError(
                f"dino_loss: student view {view} is {tuple(logits.shape)}, the teacher's "
                f"{tuple(teacher_probs.shape[1:])}"
            )
