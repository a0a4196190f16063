"""Two ways to fit a linear head on frozen features, for any dense task.

Both return a `LinearHead`, so a comparison of the two compares fits and not heads.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metavpt.errors import MetaVPTError
from metavpt.learners.annealing import cosine
from metavpt.probes.features import FeatureSet


class HeadTask(Protocol):
    """What a fit needs to know of the quantity that a head predicts, see `DenseTask`."""

    @property
    def num_outputs(self) -> int:
        """Return C."""
        ...

    @property
    def lr(self) -> float:
        """Return the peak learning rate of a head trained by gradient steps."""
        ...

    def patch_targets(self, target: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return the mean target (B, C, h, w) and the known share (B, 1, h, w) of each patch."""
        ...

    def activate(self, output: Tensor) -> Tensor:
        """Map a linear output to a prediction, for a head trained on `probe_loss`."""
        ...

    def probe_loss(self, prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Sum the loss of predictions (B, C, H, W) over the known pixels, and count these."""
        ...


class Fit(Protocol):
    """A way to fit a head."""

    def fit(self, task: HeadTask, train: FeatureSet) -> "LinearHead":
        """Fit a head for `task` on `train`."""
        ...


@dataclass(frozen=True)
class LinearHead:
    """A linear map at every patch, enlarged bilinearly to the size of the labels.

    It maps features (B, D, h, w) to predictions (B, C, H, W).

    Attributes:
        weight: (C, D).
        bias: (C,).
        size: (H, W).
        task: The task whose activation is applied. None: linear.
    """

    weight: Tensor  # (C, D)
    bias: Tensor  # (C,)
    size: tuple[int, int]  # (H, W)
    task: HeadTask | None = None  # whose activation follows; None: linear

    def __call__(self, features: Tensor) -> Tensor:
        """Predict (B, C, H, W) from features (B, D, h, w)."""
        weight, bias = self.weight.to(features), self.bias.to(features)
        output = enlarge(F.conv2d(features, weight[:, :, None, None], bias), self.size)
        return output if self.task is None else self.task.activate(output)


def enlarge(output: Tensor, size: torch.Size | tuple[int, int]) -> Tensor:
    """Interpolate (B, C, h, w) bilinearly to `size`."""
    return F.interpolate(output, tuple(size), mode="bilinear", align_corners=False)


@dataclass(frozen=True)
class Ridge:
    """Ridge regression on patches, in closed form and float64.

    It minimises sum_i s_i |y_i - W z_i - b|^2 + penalty * mean(diag(Z^T S Z)) * |W|^2 over W and b.
    i runs over patches, z_i are standardised features, y_i is the mean target of the patch, and s_i
    is the share of its pixels that is valid. This is least squares over pixels for a prediction
    that is constant on each patch. Constant features get weight 0. b is not penalised.

    Args:
        penalty: The weight of the penalty, positive.
    """

    penalty: float = 1e-3

    def __post_init__(self) -> None:
        if not self.penalty > 0:
            raise MetaVPTError(f"Ridge: penalty={self.penalty} must be positive")

    def fit(self, task: HeadTask, train: FeatureSet) -> LinearHead:
        """Fit the head.

        Raises:
            MetaVPTError: No pixel of `train` is valid.
        """
        weight, bias = self.solve(self._moments(task, train), train.features.shape[1])
        return LinearHead(weight, bias, train.size)

    def solve(self, moments: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Compute the head whose rows have these moments.

        Args:
            moments: sum_i s_i a_i a_i^T for a_i = (x_i, y_i, 1), (D + C + 1, D + C + 1) float64.
            width: D.

        Returns:
            The weight (C, D) and the bias (C,).

        Raises:
            MetaVPTError: No pixel is valid.
        """
        self.check(moments)
        total = moments[-1, -1]
        mean, target_mean = moments[:width, -1] / total, moments[-1, width:-1] / total
        covariance = moments[:width, :width] / total - torch.outer(mean, mean)
        cross = moments[:width, width:-1] / total - torch.outer(mean, target_mean)  # (D, C)
        variance = covariance.diagonal()
        # Rounding leaves a constant feature with a variance of about 1e-16 of its square.
        scale = torch.where(
            variance > 1e-13 * moments.diagonal()[:width] / total, variance, math.inf
        ).sqrt()
        system = covariance / torch.outer(scale, scale)
        system.diagonal().add_(self.penalty * system.diagonal().mean().clamp_min(1 / width))
        weight = (
            torch.cholesky_solve(cross / scale[:, None], torch.linalg.cholesky(system))
            / scale[:, None]
        )
        return weight.T.contiguous(), target_mean - mean @ weight

    def check(self, moments: Tensor) -> None:
        """Raise MetaVPTError if these moments are of no valid pixel."""
        if moments[-1, -1] == 0:
            raise MetaVPTError(
                "Ridge: the labelled set has no valid pixel; check the depth and label maps of "
                "the feedback data"
            )

    def _moments(self, task: HeadTask, train: FeatureSet) -> Tensor:
        size = train.features.shape[1] + task.num_outputs + 1
        moments = torch.zeros(size, size, dtype=torch.float64, device=train.features.device)
        for chunk in train.chunks():
            moments += patch_moments(chunk.features, *task.patch_targets(chunk.target, chunk.grid))
        return moments


def patch_moments(features: Tensor, target: Tensor, share: Tensor) -> Tensor:
    """Compute sum s a a^T over patches, for a = (x, y, 1), as `Ridge.solve` takes it.

    Args:
        features: x, (B, D, h, w).
        target: y, (B, C, h, w).
        share: s, (B, 1, h, w).

    Returns:
        (D + C + 1, D + C + 1) float64.
    """
    ones = torch.ones_like(share, dtype=torch.float64)
    rows = torch.cat([features.double(), target.double(), ones], dim=1)
    rows = rows.movedim(1, -1).flatten(0, 2)
    return rows.T @ (share.double().flatten()[:, None] * rows)


@dataclass(frozen=True)
class LinearBN:
    """Batch norm and a 1x1 convolution, trained by AdamW on the enlarged output.

    The learning rate warms up and decays by a cosine, and gradients are clipped. The batch norm is
    folded into the returned head. Features are frozen and in memory, so there is no augmentation.
    Everything is float32, where the paper uses bf16. Source: V-Pretraining, evaluation.

    Args:
        num_steps: Optimizer steps.
        batch_size: Images per step.
        warmup: The share of the steps that warm up, in [0, 1).
        weight_decay: The weight decay of AdamW.
        clip_norm: The limit on the gradient norm.
        seed: The seed of a private generator. The global random state is unchanged.
    """

    num_steps: int = 20_000
    batch_size: int = 8
    warmup: float = 0.05  # share of the steps: 1,000 of 20,000
    weight_decay: float = 0.05
    clip_norm: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_steps < 1 or self.batch_size < 1:
            raise MetaVPTError(
                f"LinearBN: num_steps={self.num_steps} and batch_size={self.batch_size} must be "
                "at least 1"
            )
        if not 0 <= self.warmup < 1:
            raise MetaVPTError(
                f"LinearBN: warmup={self.warmup} is the share of the steps that warm up, at least "
                "0 and below 1"
            )

    @torch.enable_grad()
    def fit(self, task: HeadTask, train: FeatureSet) -> LinearHead:
        """Train the head."""
        generator = torch.Generator().manual_seed(self.seed)
        width, device = train.features.shape[1], train.features.device
        kernel = 0.01 * torch.randn(task.num_outputs, width, generator=generator).to(device)
        bias = torch.zeros(task.num_outputs, device=device)
        gain, shift = torch.ones(width, device=device), torch.zeros(width, device=device)
        # Running moments of the batch norm.
        mean, variance = torch.zeros(width, device=device), torch.ones(width, device=device)
        weights = [part.requires_grad_() for part in (kernel, bias, gain, shift)]
        optimizer = torch.optim.AdamW(weights, lr=task.lr, weight_decay=self.weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._lr_factor)
        for index in islice(self._shuffled(len(train.features), generator), self.num_steps):
            batch = train.take(index.to(device))
            features = F.batch_norm(
                batch.features.float(), mean, variance, gain, shift, training=True
            )
            output = enlarge(F.conv2d(features, kernel[:, :, None, None], bias), train.size)
            optimizer.zero_grad()
            total, count = task.probe_loss(task.activate(output), batch.target)
            (total / count.clamp_min(1)).backward()
            nn.utils.clip_grad_norm_(weights, self.clip_norm)
            optimizer.step()
            schedule.step()
        gain = gain * (variance + 1e-5).rsqrt()  # 1e-5: the default of F.batch_norm, used above
        return LinearHead(
            (kernel * gain).detach(),
            (bias + kernel @ (shift - gain * mean)).detach(),
            train.size,
            task,
        )

    def _lr_factor(self, step: int) -> float:
        num_warmup = round(self.warmup * self.num_steps)
        if step < num_warmup:
            return (step + 1) / num_warmup
        return cosine(1.0, 0.0, (step - num_warmup) / (self.num_steps - num_warmup))

    def _shuffled(self, num_images: int, generator: torch.Generator) -> Iterator[Tensor]:
        """Iterate over the indices of batches, pass after pass."""
        while True:
            yield from torch.randperm(num_images, generator=generator).split(self.batch_size)
