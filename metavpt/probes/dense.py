"""Dense prediction from frozen features: linear heads are fitted anew at every probe."""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from metavpt.errors import MetaVPTError
from metavpt.metrics import Direction
from metavpt.probes.depth import (
    DepthMetrics,
    DepthTask,
    evaluate_depth,
    predict_depth,
    valid_pixels,
)
from metavpt.probes.features import IGNORE, Features, LabelledBatch, extract
from metavpt.probes.heads import Fit, LinearHead, Ridge
from metavpt.probes.segmentation import (
    SegmentationMetrics,
    SegmentationTask,
    check_classes,
    confusion_of,
    predict_label,
)

Batches = Callable[[], Iterable[LabelledBatch]]  # called once a probe: a fresh pass over the set


class Predictions(NamedTuple):
    """Predicted maps at the size of the labels. A map that is not probed is None.

    Attributes:
        depth: (B, H, W), in metres.
        label: (B, H, W) int64.
    """

    depth: Tensor | None
    label: Tensor | None


class DenseProbe:
    """Linear heads fitted on the train set and measured on the validation set.

    `probe(features)` returns `{"ridge/depth_rmse": 0.61, "ridge/seg_miou": 0.34, ...}`. The
    features of each set are computed once for all heads and tasks.

    Args:
        train_batches: Returns one pass over the train set.
        val_batches: Returns one pass over the validation set.
        num_classes: Classes of the label maps. None: no segmentation probe.
        heads: Ways to fit a head, by name. Default: one closed-form `Ridge`.
        depth: What to measure of depth. None: no depth probe; ADE20K, for example, has no depth.
        device: Where features are kept and heads are fitted. None: the device that computes
            features.

    Attributes:
        class_iou: The IoU of each class at the last measurement, by head.

    Raises:
        MetaVPTError: There is nothing to probe.
    """

    def __init__(
        self,
        train_batches: Batches,
        val_batches: Batches,
        num_classes: int | None,
        heads: Mapping[str, Fit] | None = None,
        depth: DepthTask | None = DepthTask(),  # noqa: B008 - frozen
        device: torch.device | str | None = None,
    ) -> None:
        self.train_batches, self.val_batches, self.device = train_batches, val_batches, device
        self.heads = dict(heads) if heads else {"ridge": Ridge()}
        self.depth = depth
        self.segmentation = SegmentationTask(num_classes) if num_classes is not None else None
        if self.depth is None and self.segmentation is None:
            raise MetaVPTError("DenseProbe: nothing to probe; set num_classes or depth")
        self.class_iou: dict[str, list[float]] = {}  # of the last measurement, by head
        self._fitted: dict[str, tuple[LinearHead | None, LinearHead | None]] = {}

    @property
    def directions(self) -> dict[str, Direction]:
        """Return the better direction of each metric."""
        stated: dict[str, Direction] = {}
        if self.depth:
            stated |= {f"depth_{name}": which for name, which in DepthMetrics.directions.items()}
        if self.segmentation:
            segmentation = SegmentationMetrics.directions
            stated |= {f"seg_{name}": which for name, which in segmentation.items()}
        return {f"{head}/{name}": which for head in self.heads for name, which in stated.items()}

    def __call__(self, features: Features) -> dict[str, float]:
        """Fit and measure every head. `predict` uses these heads until the next call."""
        train = extract(features, self.train_batches(), self.device)
        self._fitted = {
            name: (
                fit.fit(self.depth, train) if self.depth else None,
                fit.fit(self.segmentation, train) if self.segmentation else None,
            )
            for name, fit in self.heads.items()
        }
        del train  # two sets of features at a time may not fit
        val = extract(features, self.val_batches(), self.device)
        metrics: dict[str, float] = {}
        self.class_iou.clear()
        for name, (depth, segmentation) in self._fitted.items():
            measured = evaluate_depth(depth, val, self.depth) if depth else {}
            if segmentation:
                counted = confusion_of(segmentation, val)
                measured |= {f"seg_{key}": value for key, value in counted.compute().items()}
                self.class_iou[f"{name}/seg_iou"] = counted.by_class()
            metrics |= {f"{name}/{metric}": value for metric, value in measured.items()}
        return metrics

    @torch.no_grad()
    def trivial_metrics(self) -> dict[str, dict[str, float]]:
        """Score predictions that ignore the image, made from the labels of the train set.

        Returns:
            Name of the predictor to its metrics, under the names that every head has them.
        """
        scores: dict[str, dict[str, float]] = {}
        if self.depth:
            scores |= self._trivial_depth(self.depth)
        if self.segmentation:
            scores["majority class"] = self._majority_class(self.segmentation.num_classes)
        return {
            predictor: {f"{head}/{name}": v for head in self.heads for name, v in metrics.items()}
            for predictor, metrics in scores.items()
        }

    def _trivial_depth(self, task: DepthTask) -> dict[str, dict[str, float]]:
        """Score the mean depth of each pixel, and the mean depth of all."""
        total, count = torch.zeros(()), torch.zeros(())
        for batch in self.train_batches():
            depth = batch.depth.double()
            valid = valid_pixels(depth, task.max_depth)
            total = total + depth.where(valid, 0.0).sum(dim=0)
            count = count + valid.sum(dim=0)
        constant = total.sum() / count.sum()
        image = torch.where(count > 0, total / count.clamp_min(1), constant)  # (H, W)
        guesses = {"mean depth image": image, "constant depth": constant.expand_as(image)}
        metrics = {name: DepthMetrics(task.crop, task.max_depth) for name in guesses}
        for batch in self.val_batches():
            for name, guess in guesses.items():
                metrics[name].update(guess.expand_as(batch.depth), batch.depth)
        return {
            name: {f"depth_{metric}": value for metric, value in one.compute().items()}
            for name, one in metrics.items()
        }

    def _majority_class(self, num_classes: int) -> dict[str, float]:
        """Score the most frequent class of the train set at every pixel."""
        counts = torch.zeros(num_classes, dtype=torch.int64)
        for batch in self.train_batches():
            label = batch.label[batch.label != IGNORE].long()
            check_classes(label, num_classes)
            counts += torch.bincount(label, minlength=num_classes).cpu()
        metrics, majority = SegmentationMetrics(num_classes), int(counts.argmax())
        for batch in self.val_batches():
            metrics.update(torch.full_like(batch.label, majority), batch.label)
        return {f"seg_{name}": value for name, value in metrics.compute().items()}

    @torch.no_grad()
    def predict(self, features: Features, images: Tensor, head: str | None = None) -> Predictions:
        """Predict the maps of a few images, for pictures.

        Args:
            features: The frozen backbone.
            images: uint8 (B, 3, H, W).
            head: The name of a head that the last call fitted. Default: the first one.

        Raises:
            MetaVPTError: The head is not fitted.
        """
        name = head or next(iter(self.heads))
        if name not in self._fitted:
            known = ", ".join(self.heads)
            raise MetaVPTError(
                f"DenseProbe: head {name!r} is not fitted; call the probe first (heads: {known})"
            )
        depth, segmentation = self._fitted[name]
        grid = features(images).to(self.device)
        return Predictions(
            predict_depth(depth, grid, self.depth.max_depth) if depth and self.depth else None,
            predict_label(segmentation, grid) if segmentation else None,
        )
