"""Semantic segmentation: targets of a head, and mIoU from one confusion matrix over the set."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from metavpt.errors import MetaVPTError
from metavpt.metrics import Directions
from metavpt.probes.features import IGNORE, FeatureSet
from metavpt.probes.heads import LinearHead


class SegmentationMetrics:
    """One confusion matrix (C, C) over the set, with rows for the truth.

    Pixels labelled 255 are ignored. The IoU of a class is TP / (TP + FP + FN).

    - `miou`: the mean IoU of the classes that occur in the truth or in the prediction. A class that
      is predicted but absent from the truth counts 0, as in mmseg, DINOv2 and DINOv3.
    - `miou_present`: the mean IoU of the classes that occur in the truth.
    - `acc`: the pixel accuracy.

    Args:
        num_classes: C.
    """

    directions: ClassVar[Directions] = {
        "miou": "higher",
        "miou_present": "higher",
        "acc": "higher",
    }

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)

    def update(self, prediction: Tensor, label: Tensor) -> None:
        """Add a batch.

        Args:
            prediction: int (B, H, W) in 0..C-1.
            label: int (B, H, W) in 0..C-1, or 255.
        """
        if prediction.shape != label.shape:
            raise MetaVPTError(
                f"SegmentationMetrics: prediction {tuple(prediction.shape)} and label "
                f"{tuple(label.shape)} differ in shape"
            )
        counted = label != IGNORE
        truth, guess = label[counted].long(), prediction[counted].long()
        check_classes(truth, self.num_classes)
        counts = torch.bincount(truth * self.num_classes + guess, minlength=self.num_classes**2)
        self.confusion += counts.reshape(self.num_classes, self.num_classes).cpu()

    def by_class(self) -> list[float]:
        """Return the IoU of each class, NaN for a class that neither truth nor prediction holds."""
        right = self.confusion.diagonal().double()
        return (right / (self.confusion.sum(1) + self.confusion.sum(0) - right)).tolist()

    def compute(self) -> dict[str, float]:
        """Return the metrics by name.

        Raises:
            MetaVPTError: No pixel has a label.
        """
        right, truth, guess = (
            self.confusion.diagonal().double(),
            self.confusion.sum(1),
            self.confusion.sum(0),
        )
        if not truth.any():
            raise MetaVPTError("segmentation probe: no pixel of the evaluation set has a label")
        iou = right / (truth + guess - right)  # NaN for a class that occurs in neither
        return {
            "miou": float(iou.nanmean()),
            "miou_present": float(iou[truth > 0].mean()),
            "acc": float(right.sum() / truth.sum()),
        }


def check_classes(truth: Tensor, num_classes: int) -> None:
    """Check that every label is a class.

    Raises:
        MetaVPTError: A label is neither a class nor ignored.
    """
    if truth.numel() and int(truth.max()) >= num_classes:
        raise MetaVPTError(
            f"segmentation probe: label {int(truth.max())} with num_classes={num_classes}; "
            f"ignored pixels are {IGNORE}"
        )


@dataclass(frozen=True)
class SegmentationTask:
    """One output per class.

    Args:
        num_classes: C.
        lr: The peak learning rate of a head trained by gradient steps.
    """

    num_classes: int
    lr: float = 5e-4

    def __post_init__(self) -> None:
        if not 2 <= self.num_classes <= IGNORE:
            raise MetaVPTError(
                f"segmentation probe: num_classes={self.num_classes} must lie in 2..{IGNORE}"
            )

    @property
    def num_outputs(self) -> int:
        """Return C."""
        return self.num_classes

    def patch_targets(self, batch: FeatureSet) -> tuple[Tensor, Tensor]:
        """Compute the class frequencies of each patch.

        Returns:
            The frequencies (B, C, h, w), and the share of labelled pixels (B, 1, h, w).
        """
        label = batch.label.long()
        counted = label != IGNORE
        check_classes(label[counted], self.num_classes)
        onehot = torch.zeros(len(label), self.num_classes, *label.shape[1:], device=label.device)
        onehot.scatter_(1, torch.where(counted, label, 0)[:, None], counted[:, None].float())
        share = F.adaptive_avg_pool2d(counted[:, None].float(), batch.grid)
        return F.adaptive_avg_pool2d(onehot, batch.grid) / share.clamp_min(1e-9), share

    def activate(self, output: Tensor) -> Tensor:
        """Return the scores unchanged."""
        return output

    def loss(self, prediction: Tensor, batch: FeatureSet) -> Tensor:
        """Compute the mean cross-entropy over the labelled pixels."""
        label = batch.label.long()
        counted = label != IGNORE
        check_classes(label[counted], self.num_classes)
        return F.cross_entropy(
            prediction, label, ignore_index=IGNORE, reduction="sum"
        ) / counted.sum().clamp_min(1)


def predict_label(head: LinearHead, features: Tensor) -> Tensor:
    """Predict the most likely class (B, H, W) int64 from features (B, D, h, w)."""
    return head(features.float()).argmax(1)


@torch.no_grad()
def confusion_of(head: LinearHead, val: FeatureSet) -> SegmentationMetrics:
    """Count the predictions of `head` on a set."""
    metrics = SegmentationMetrics(num_classes=len(head.bias))
    for chunk in val.chunks():
        metrics.update(predict_label(head, chunk.features), chunk.label)
    return metrics


def evaluate_segmentation(head: LinearHead, val: FeatureSet) -> dict[str, float]:
    """Compute the metrics of `SegmentationMetrics`, with the prefix `seg_`."""
    return {f"seg_{name}": value for name, value in confusion_of(head, val).compute().items()}
