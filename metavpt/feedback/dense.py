"""Feedback on dense labels: light heads on frozen patch features, and their losses."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from metavpt.distributed import collectives
from metavpt.errors import MetaVPTError
from metavpt.feedback.aggregation import weighted_sum
from metavpt.probes.depth import MAX_DEPTH, DepthTask, valid_pixels
from metavpt.probes.features import IGNORE, FeatureSet
from metavpt.probes.heads import LinearHead, Ridge, enlarge
from metavpt.probes.segmentation import SegmentationTask


class LabelledFrames(Protocol):
    """depth (B,H,W) in metres, 0 where unknown; label (B,H,W) int64, 255 where ignored."""

    @property
    def depth(self) -> Tensor:
        """Return the depth maps."""
        ...

    @property
    def label(self) -> Tensor:
        """Return the label maps."""
        ...


class DenseFeedback(nn.Module):
    """Depth and segmentation losses through linear-BN heads.

    L_down = depth_weight * L1(depth in metres, valid pixels) + segmentation_weight * CE(classes).
    `fit` trains the heads on detached features of labelled train batches. `forward` returns the
    losses of features (B, D, h, w) by name, without those of weight 0. It is pure: it reads the
    batch statistics of `fit` and changes nothing (V-Pretraining, section 3: heads first, then
    g_down on separate batches).

    A weight of None is 1 if the set has such labels, and 0 if it has none, which is the case if
    `num_classes` or `max_depth` is None.
    """

    fitted_by_steps = True

    def __init__(
        self,
        width: int,
        num_classes: int | None,
        depth_weight: float | None = None,
        segmentation_weight: float | None = None,
        lr: float = 1e-2,
        max_depth: float | None = MAX_DEPTH,
    ) -> None:
        super().__init__()
        self.weights = feedback_weights(depth_weight, segmentation_weight, max_depth, num_classes)
        self.depth_task = DepthTask(max_depth=max_depth or MAX_DEPTH)
        self.norm = nn.BatchNorm2d(width, affine=False)
        self.depth = nn.Conv2d(width, 1, kernel_size=1)
        self.segmentation = nn.Conv2d(width, num_classes or 1, kernel_size=1)
        nn.init.zeros_(self.depth.weight)
        nn.init.zeros_(self.segmentation.weight)
        self.optimizer = torch.optim.AdamW(self.parameters(), lr=lr)

    def forward(self, features: Tensor, frames: LabelledFrames) -> dict[str, Tensor]:
        """Compute the losses of features (B, D, h, w) by name."""
        statistics = self.norm.running_mean, self.norm.running_var
        return self._losses(F.batch_norm(features, *statistics, eps=self.norm.eps), frames)

    def fit(self, features: Tensor, frames: LabelledFrames) -> float:
        """One AdamW step of the heads on features (B,D,h,w); the loss before it."""
        with torch.enable_grad():
            loss = weighted_sum(
                self._losses(self.norm.train()(features.detach()), frames), self.weights
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())

    def _losses(self, normalized: Tensor, frames: LabelledFrames) -> dict[str, Tensor]:
        losses = {}
        size = frames.depth.shape[-2:]
        if self.weights["depth"]:
            metres = F.softplus(enlarge(self.depth(normalized), size)[:, 0])
            valid = valid_pixels(frames.depth, self.depth_task.max_depth)
            losses["depth"] = (
                (metres - frames.depth.where(valid, 0.0)).abs() * valid
            ).sum() / collectives.mean_count(valid.sum())
        if self.weights["segmentation"]:
            logits = enlarge(self.segmentation(normalized), size)
            labelled = collectives.mean_count((frames.label != IGNORE).sum())
            losses["segmentation"] = (
                F.cross_entropy(logits, frames.label, ignore_index=IGNORE, reduction="sum")
                / labelled
            )
        return losses

    def get_extra_state(self) -> dict[str, Any]:
        """Return the state of the heads' optimizer."""
        return self.optimizer.state_dict()

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore the state of the heads' optimizer."""
        self.optimizer.load_state_dict(state)


class RidgeFeedback(nn.Module):
    """The loss of ridge heads fitted to other frames: the value of a feature after a refit.

    L_down = depth_weight * squared error (m^2, valid pixels)
           + segmentation_weight * squared error to one-hot classes (Brier score).

    The frames of a labelled batch are split into `num_folds` parts. Each is scored with the heads
    that `Ridge`, the head of the probes, fits to the others in closed form. Scored features and,
    through the solve of the normal equations, fitted ones carry the gradient: g_down is the total
    derivative. It does not ask for changes that a refit absorbs: if `penalty` is small, an
    invertible linear map of the features changes neither the predictions nor the loss. A fixed head
    would ask for it. Weights are as in `DenseFeedback`.

    There is no state: `forward` is a pure function of features (B, D, h, w) and labels. It solves
    in float64. The folds are those of the whole batch: each of several processes solves all of
    them, on the features of all.
    """

    fitted_by_steps = False

    def __init__(
        self,
        width: int,
        num_classes: int | None,
        depth_weight: float | None = None,
        segmentation_weight: float | None = None,
        penalty: float = 1e-3,
        num_folds: int = 2,
        max_depth: float | None = MAX_DEPTH,
    ) -> None:
        super().__init__()
        if num_folds < 2:
            raise MetaVPTError(
                f"feedback.num_folds={num_folds}: heads are scored on frames that they were not "
                "fitted to; at least 2"
            )
        self.weights = feedback_weights(depth_weight, segmentation_weight, max_depth, num_classes)
        self.ridge, self.num_folds = Ridge(penalty), num_folds
        self.tasks = dense_tasks(self.weights, max_depth, num_classes)

    def forward(self, features: Tensor, frames: LabelledFrames) -> dict[str, Tensor]:
        """Compute the losses of features (B, D, h, w) by name."""
        features, depth, label = (
            collectives.joined(features),
            collectives.gather(frames.depth),
            collectives.gather(frames.label),
        )
        if len(features) < self.num_folds:
            raise MetaVPTError(
                f"feedback.num_folds={self.num_folds}: a labelled batch of {len(features)} frames "
                "is too small; raise "
                "problem.feedback_batch_size"
            )
        frame = torch.arange(len(features), device=features.device)
        every = FeatureSet(features, depth, label)
        errors = {name: ([], []) for name in self.tasks}
        for part in frame.tensor_split(self.num_folds):
            rest = frame[(frame < part[0]) | (frame > part[-1])]
            for name, task in self.tasks.items():
                head = self.ridge.fit(task, every.take(rest))
                for chunk in every.take(part).chunks():
                    for total, value in zip(
                        errors[name], _squares_again(task, head, chunk), strict=True
                    ):
                        total.append(value)
        return {
            name: torch.stack(squares).sum() / torch.stack(counts).sum().clamp_min(1)
            for name, (squares, counts) in errors.items()
        }


def _squares_again(
    task: DepthTask | SegmentationTask, head: LinearHead, frames: FeatureSet
) -> tuple[Tensor, Tensor]:
    """Compute `_squares` with recomputation in the backward pass.

    Outputs at full size of all frames of a large batch would not fit into memory.
    """

    def squares(weight: Tensor, bias: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        return _squares(
            task, replace(head, weight=weight, bias=bias), frames._replace(features=features)
        )

    return checkpoint(
        squares,
        head.weight,
        head.bias,
        frames.features,
        use_reentrant=False,
        preserve_rng_state=False,
    )


def _squares(
    task: DepthTask | SegmentationTask, head: LinearHead, frames: FeatureSet
) -> tuple[Tensor, Tensor]:
    """The sum of squared errors over the pixels that have a truth, and their number."""
    output = head(frames.features)
    if isinstance(task, DepthTask):
        counted = valid_pixels(frames.depth, task.max_depth)
        squares = (output[:, 0] - frames.depth.where(counted, 0.0)).square()
    else:
        label = frames.label.long()
        counted = label != IGNORE
        own = output.gather(1, label.where(counted, 0)[:, None])[:, 0]
        squares = output.square().sum(dim=1) - 2 * own + 1  # |output - onehot|^2
    return (squares * counted).sum(), counted.sum()


def feedback_weights(
    depth: float | None,
    segmentation: float | None,
    max_depth: float | None,
    num_classes: int | None,
) -> dict[str, float]:
    """The weight of each feedback; None stands for 1 where there are such labels, for 0 elsewhere.

    Raises:
        MetaVPTError: A weight is negative, or all are 0.
    """
    known = {"depth": max_depth is not None, "segmentation": num_classes is not None}
    given = {"depth": depth, "segmentation": segmentation}
    found = {
        name: float(has) if given[name] is None else float(given[name] or 0)
        for name, has in known.items()
    }
    if min(found.values()) < 0 or not any(found.values()):
        raise MetaVPTError(
            f"feedback.depth_weight={depth}, feedback.segmentation_weight={segmentation}: neither "
            "may be negative and one must be positive"
        )
    return found


def dense_tasks(
    weights: Mapping[str, float], max_depth: float | None, num_classes: int | None
) -> dict[str, DepthTask | SegmentationTask]:
    """The tasks that have a weight."""
    found: dict[str, DepthTask | SegmentationTask] = {}
    if weights["depth"]:
        found["depth"] = DepthTask(max_depth=max_depth or MAX_DEPTH)
    if weights["segmentation"]:
        found["segmentation"] = SegmentationTask(num_classes or 0)
    return found
