"""What frozen features are worth for dense prediction: linear heads for depth and segmentation, fitted afresh at every probe."""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from metavpt.errors import MetaVPTError
from metavpt.metrics import Direction
from metavpt.probes.depth import DepthMetrics, DepthTask, evaluate_depth, predict_depth
from metavpt.probes.features import Features, LabelledBatch, extract
from metavpt.probes.heads import Fit, LinearHead, Ridge
from metavpt.probes.segmentation import (
    SegmentationMetrics,
    SegmentationTask,
    evaluate_segmentation,
    predict_label,
)

Batches = Callable[[], Iterable[LabelledBatch]]  # called once a probe: a fresh pass over the set


class Predictions(NamedTuple):
    """depth (B, H, W) in metres and label (B, H, W) int64, at the size of the labelled maps; None for what is not probed."""

    depth: Tensor | None
    label: Tensor | None


class DenseProbe:
    """`probe(features) -> {"ridge/depth_rmse": 0.61, "ridge/seg_miou": 0.34, ...}`: heads fitted on train, measured on val.

    num_classes   classes of the label maps; None: no segmentation probe
    heads         name to way of fitting; one closed-form Ridge unless told
    depth         False: no depth probe (ADE20K has no depth)
    device        where cached features live and heads are fitted; None: where the features are computed

    Features of either set are computed once and serve all heads and tasks.
    """

    def __init__(
        self,
        train_batches: Batches,
        val_batches: Batches,
        num_classes: int | None,
        heads: Mapping[str, Fit] | None = None,
        depth: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        self.train_batches, self.val_batches, self.device = train_batches, val_batches, device
        self.heads = dict(heads) if heads else {"ridge": Ridge()}
        self.depth = DepthTask() if depth else None
        self.segmentation = SegmentationTask(num_classes) if num_classes is not None else None
        if self.depth is None and self.segmentation is None:
            raise MetaVPTError("DenseProbe: nothing to probe; set num_classes or depth=True")
        self._fitted: dict[str, tuple[LinearHead | None, LinearHead | None]] = {}

    @property
    def directions(self) -> dict[str, Direction]:
        """Metric to the direction in which it is better."""
        stated: dict[str, Direction] = {}
        if self.depth:
            stated |= {f"depth_{name}": which for name, which in DepthMetrics.directions.items()}
        if self.segmentation:
            segmentation = SegmentationMetrics.directions
            stated |= {f"seg_{name}": which for name, which in segmentation.items()}
        return {f"{head}/{name}": which for head in self.heads for name, which in stated.items()}

    def __call__(self, features: Features) -> dict[str, float]:
        """Fits and measures every head; the fitted heads serve `predict` until the next call."""
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
        for name, (depth, segmentation) in self._fitted.items():
            measured = evaluate_depth(depth, val) if depth else {}
            measured |= evaluate_segmentation(segmentation, val) if segmentation else {}
            metrics |= {f"{name}/{metric}": value for metric, value in measured.items()}
        return metrics

    @torch.no_grad()
    def predict(self, features: Features, images: Tensor, head: str | None = None) -> Predictions:
        """Pictures for a few images uint8 (B, 3, H, W), by `head` (the first one unless told) as the last probe fitted it."""
        name = head or next(iter(self.heads))
        if name not in self._fitted:
            raise MetaVPTError(
                f"DenseProbe: head {name!r} is not fitted; call the probe first (heads: {', '.join(self.heads)})"
            )
        depth, segmentation = self._fitted[name]
        grid = features(images).to(self.device)
        return Predictions(
            predict_depth(depth, grid) if depth else None,
            predict_label(segmentation, grid) if segmentation else None,
        )
