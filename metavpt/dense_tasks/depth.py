"""Depth in metres: targets of a head, and RMSE, AbsRel and delta1 as usual on NYUv2."""

from collections.abc import Sequence
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

MIN_DEPTH, MAX_DEPTH = 1e-3, 10.0  # metres


def valid_pixels(depth: Tensor, max_depth: float = MAX_DEPTH) -> Tensor:
    """Mark the pixels with a usable true depth.

    Eigen's protocol drops pixels that are not strictly between 1e-3 m and 10 m. NaN is dropped too.
    """
    return (depth > MIN_DEPTH) & (depth < max_depth)


def clip(depth: Tensor, max_depth: float = MAX_DEPTH) -> Tensor:
    """Clamp predicted depth to [1e-3, max_depth] m. NaN stays NaN."""
    return depth.clamp(MIN_DEPTH, max_depth)


def eigen_crop(height: int, width: int) -> tuple[slice, slice]:
    """Return the rows and columns of Eigen's crop, scaled to the frame and rounded outwards.

    The crop is 45:471, 41:601 of 480 x 640 pixels, so 22:236, 20:301 at 240 x 320.
    """
    rows = slice(45 * height // 480, -(-471 * height // 480))
    return rows, slice(41 * width // 640, -(-601 * width // 640))


class DepthMetrics:
    """Depth errors by Eigen's protocol, accumulated over the set in float64.

    Predictions are clipped to [1e-3, max_depth] m. Pixels without a valid truth (see
    `valid_pixels`) and pixels outside Eigen's crop are dropped. One non-finite prediction makes
    every metric NaN.

    - `rmse`: sqrt(mean (p - t)^2) over all pixels of the set, in metres.
    - `abs_rel`: mean |p - t| / t over all pixels.
    - `delta1`: the share of pixels with max(p/t, t/p) < 1.25.
    - `rmse_per_image`, `abs_rel_per_image`, `delta1_per_image`: the mean over images of each
      image's own value, as DINOv2 and DINOv3 report it.

    Args:
        crop: Whether to use Eigen's crop.
        max_depth: The limit of valid depth, in metres.
    """

    directions: ClassVar[Directions] = {
        "rmse": "lower",
        "abs_rel": "lower",
        "delta1": "higher",
        "rmse_per_image": "lower",
        "abs_rel_per_image": "lower",
        "delta1_per_image": "higher",
    }

    def __init__(self, crop: bool = True, max_depth: float = MAX_DEPTH) -> None:
        self.crop, self.max_depth = crop, max_depth
        self.num_pixels = self.num_images = 0
        self.squares = self.relative = self.close = 0.0
        self.image_rmse = self.image_abs_rel = self.image_delta1 = 0.0

    def update(self, prediction: Tensor, depth: Tensor) -> None:
        """Add a batch of predicted and true depth, each (B, H, W) in metres."""
        if prediction.shape != depth.shape:
            raise MetaVPTError(
                f"DepthMetrics: prediction {tuple(prediction.shape)} and depth "
                f"{tuple(depth.shape)} differ in shape"
            )
        rows, columns = (
            eigen_crop(depth.shape[-2], depth.shape[-1])
            if self.crop
            else (slice(None), slice(None))
        )
        for p, t in zip(prediction[:, rows, columns], depth[:, rows, columns], strict=True):
            valid = valid_pixels(t, self.max_depth)
            if valid.any():
                self._add(p[valid].double(), t[valid].double())

    def _add(self, p: Tensor, t: Tensor) -> None:
        """Add the valid pixels of one image, (N,) each."""
        # Clipping would hide an infinite prediction, and NaN < 1.25 counts as a miss.
        p = clip(p, self.max_depth) if torch.isfinite(p).all() else torch.full_like(p, torch.nan)
        ratio = torch.maximum(p / t, t / p)
        squares = float((p - t).square().sum())
        relative = float(((p - t).abs() / t).sum())
        close = float(torch.where(ratio.isnan(), torch.nan, (ratio < 1.25).double()).sum())
        self.num_pixels += len(t)
        self.num_images += 1
        self.squares += squares
        self.relative += relative
        self.close += close
        self.image_rmse += (squares / len(t)) ** 0.5
        self.image_abs_rel += relative / len(t)
        self.image_delta1 += close / len(t)

    def compute(self) -> dict[str, float]:
        """Return the metrics by name.

        Raises:
            MetaVPTError: No pixel had a valid truth.
        """
        if self.num_pixels == 0:
            raise MetaVPTError(
                "depth probe: no pixel of the evaluation set has a valid depth, "
                f"between {MIN_DEPTH:g} and {self.max_depth:g} m"
            )
        return {
            "rmse": (self.squares / self.num_pixels) ** 0.5,
            "abs_rel": self.relative / self.num_pixels,
            "delta1": self.close / self.num_pixels,
            "rmse_per_image": self.image_rmse / self.num_images,
            "abs_rel_per_image": self.image_abs_rel / self.num_images,
            "delta1_per_image": self.image_delta1 / self.num_images,
        }


@dataclass(frozen=True)
class DepthTask(DenseTask):
    """One output in metres. Fits and metrics drop the same pixels (`valid_pixels`).

    Feedback is the mean absolute error, as in V-Pretraining.

    Args:
        lr: The peak learning rate of a probe's head that is trained by gradient steps.
        max_depth: The limit of valid depth, in metres. Predictions end there.
        crop: Whether metrics use Eigen's crop.
    """

    name = "depth"
    prefix = "depth"
    lr: float = 1e-3
    max_depth: float = MAX_DEPTH
    crop: bool = True

    @property
    def num_outputs(self) -> int:
        """Return 1."""
        return 1

    @override
    def target(self, batch: Any) -> Tensor:
        return batch.depth

    @override
    def encode(self, target: Tensor) -> tuple[Tensor, Tensor]:
        valid = valid_pixels(target, self.max_depth)
        return torch.where(valid, target, 0.0)[:, None], valid

    @override
    def activate(self, output: Tensor) -> Tensor:
        """Map an output to a positive depth by softplus."""
        return F.softplus(output)

    @override
    def predict(self, output: Tensor) -> Tensor:
        """Clamp to [1e-3, max_depth] m."""
        return clip(output[:, 0], self.max_depth)

    @override
    def probe_loss(self, prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Sum the squared errors."""
        valid = valid_pixels(target, self.max_depth)
        return (prediction[:, 0][valid] - target[valid]).square().sum(), valid.sum()

    @override
    def feedback_loss(self, prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Sum the absolute errors."""
        depth, valid = self.encode(target)
        return ((prediction - depth).abs()[:, 0] * valid).sum(), valid.sum()

    @override
    def metrics(self) -> DepthMetrics:
        return DepthMetrics(self.crop, self.max_depth)

    @override
    def legend(self, shown: Sequence[Tensor]) -> list[tuple[np.ndarray, str]]:
        return colours.scale("nearest in the frame", "farthest")
