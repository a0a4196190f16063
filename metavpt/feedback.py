"""Downstream feedback on dense labels: light heads on frozen patch features, and the loss that they give the learner."""

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metavpt.errors import MetaVPTError

IGNORE = 255


class LabelledFrames(Protocol):
    """depth (B,H,W) in metres, 0 where unknown; label (B,H,W) int64, 255 where ignored."""

    @property
    def depth(self) -> Tensor: ...

    @property
    def label(self) -> Tensor: ...


class DenseFeedback(nn.Module):
    """L_down = depth_weight * L1(depth in metres, valid pixels) + segmentation_weight * CE(classes), through linear-BN heads.

    `fit` trains the heads on detached features of labelled train batches; `forward` is the loss of features (B,D,h,w) and pure: it
    reads the batch statistics that `fit` has gathered and moves nothing (V-Pretraining, section 3: heads first, then g_down on
    separate batches).
    """

    def __init__(self, width: int, num_classes: int, depth_weight: float = 1.0, segmentation_weight: float = 1.0, lr: float = 1e-2) -> None:
        super().__init__()
        if min(depth_weight, segmentation_weight) < 0 or depth_weight + segmentation_weight == 0:
            raise MetaVPTError(
                f"feedback.depth_weight={depth_weight}, feedback.segmentation_weight={segmentation_weight}: "
                "neither may be negative and one must be positive"
            )
        self.depth_weight, self.segmentation_weight = depth_weight, segmentation_weight
        self.norm = nn.BatchNorm2d(width, affine=False)
        self.depth = nn.Conv2d(width, 1, kernel_size=1)
        self.segmentation = nn.Conv2d(width, num_classes, kernel_size=1)
        nn.init.zeros_(self.depth.weight)
        nn.init.zeros_(self.segmentation.weight)
        self.optimizer = torch.optim.AdamW(self.parameters(), lr=lr)

    def forward(self, features: Tensor, frames: LabelledFrames) -> Tensor:
        statistics = self.norm.running_mean, self.norm.running_var
        return self._loss(F.batch_norm(features, *statistics, eps=self.norm.eps), frames)

    def fit(self, features: Tensor, frames: LabelledFrames) -> float:
        """One AdamW step of the heads on features (B,D,h,w); the loss before it."""
        with torch.enable_grad():
            loss = self._loss(self.norm.train()(features.detach()), frames)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())

    def _loss(self, normalized: Tensor, frames: LabelledFrames) -> Tensor:
        loss = normalized.new_zeros(())
        size = frames.depth.shape[-2:]
        if self.depth_weight:
            metres = F.softplus(upsample(self.depth(normalized), size)[:, 0])
            valid = frames.depth > 0
            loss = loss + self.depth_weight * ((metres - frames.depth).abs() * valid).sum() / valid.sum().clamp_min(1)
        if self.segmentation_weight:
            logits = upsample(self.segmentation(normalized), size)
            labelled = (frames.label != IGNORE).sum().clamp_min(1)
            entropy = F.cross_entropy(logits, frames.label, ignore_index=IGNORE, reduction="sum") / labelled
            loss = loss + self.segmentation_weight * entropy
        return loss

    def get_extra_state(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state)


def upsample(maps: Tensor, size: torch.Size | tuple[int, int]) -> Tensor:
    """Maps (B,C,h,w) at the resolution `size` of the labels, bilinearly."""
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)
