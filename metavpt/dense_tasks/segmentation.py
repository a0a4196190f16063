"""Semantic segmentation: targets of a head, and mIoU from one confusion matrix over the set."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from metavpt.dense_tasks import colours
from metavpt.dense_tasks.task import DenseTask
from metavpt.errors import MetaVPTError
from metavpt.problem import Directions

IGNORE = 255  # the label of pixels that are neither learned from nor counted
NUM_LEGEND = 24  # classes in the legend of a picture


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
            raise MetaVPTError("segmentation: no pixel of the evaluation set has a label")
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
            f"segmentation: label {int(truth.max())} with num_classes={num_classes}; "
            f"ignored pixels are {IGNORE}"
        )


@dataclass(frozen=True)
class SegmentationTask(DenseTask):
    """One output per class. Feedback is the cross-entropy.

    Args:
        num_classes: C.
        class_names: The names of the classes. Empty: their numbers.
        lr: The peak learning rate of a probe's head that is trained by gradient steps.
    """

    name = "segmentation"
    prefix = "seg"
    num_classes: int
    class_names: Sequence[str] = ()
    lr: float = 5e-4

    def __post_init__(self) -> None:
        if not 2 <= self.num_classes <= IGNORE:
            raise MetaVPTError(
                f"segmentation: num_classes={self.num_classes} must lie in 2..{IGNORE}"
            )

    @property
    def num_outputs(self) -> int:
        """Return C."""
        return self.num_classes

    @property
    def names(self) -> Sequence[str]:
        """Return the names of the classes, or their numbers."""
        return self.class_names or [str(k) for k in range(self.num_classes)]

    @override
    def target(self, batch: Any) -> Tensor:
        return batch.label

    @override
    def encode(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return 1 for the class of a pixel, 0 for the others."""
        label = target.long()
        counted = label != IGNORE
        check_classes(label[counted], self.num_classes)
        onehot = torch.zeros(len(label), self.num_classes, *label.shape[1:], device=label.device)
        onehot.scatter_(1, torch.where(counted, label, 0)[:, None], counted[:, None].float())
        return onehot, counted

    @override
    def predict(self, output: Tensor) -> Tensor:
        """Return the most likely class, (B, H, W) int64."""
        return output.argmax(1)

    @override
    def squared_error(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Sum the Brier scores, without a map for every class."""
        label = target.long()
        counted = label != IGNORE
        own = output.gather(1, label.where(counted, 0)[:, None])[:, 0]
        squares = output.square().sum(dim=1) - 2 * own + 1  # |output - onehot|^2
        return (squares * counted).sum(), counted.sum()

    @override
    def probe_loss(self, prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Sum the cross-entropies."""
        check_classes(target[target != IGNORE], self.num_classes)
        return self.feedback_loss(prediction, target)

    @override
    def feedback_loss(self, prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Sum the cross-entropies, without a look at the labels, which would wait for the GPU."""
        label = target.long()
        total = F.cross_entropy(prediction, label, ignore_index=IGNORE, reduction="sum")
        return total, (label != IGNORE).sum()

    @override
    def metrics(self) -> SegmentationMetrics:
        return SegmentationMetrics(self.num_classes)

    @override
    def trivial(self, targets: Iterable[Tensor]) -> dict[str, Tensor]:
        """Return the most frequent class of the train set."""
        counts = torch.zeros(self.num_classes, dtype=torch.int64)
        for target in targets:
            label = target[target != IGNORE].long()
            check_classes(label, self.num_classes)
            counts += torch.bincount(label, minlength=self.num_classes).cpu()
        return {"majority class": counts.argmax()}

    @override
    def by_class(self, metrics: SegmentationMetrics) -> dict[str, list[tuple[str, float]]]:
        """Return the IoU of each class."""
        return {"iou": list(zip(self.names, metrics.by_class(), strict=True))}

    @override
    def picture(self, values: Tensor, truth: Tensor) -> np.ndarray:
        """Colour the classes."""
        return colours.classes(values, self.num_classes)

    @override
    def legend(self, shown: Sequence[Tensor]) -> list[tuple[np.ndarray, str]]:
        """Name the classes that the maps hold."""
        palette = colours.class_colours(self.num_classes)
        held: list[int] = torch.cat([values.flatten().cpu() for values in shown]).unique().tolist()
        present = [k for k in held if k < self.num_classes][:NUM_LEGEND]
        return [(palette[k], self.names[k]) for k in present]
