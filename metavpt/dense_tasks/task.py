"""What a quantity of every pixel is: its targets, its losses, its metrics."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from metavpt.dense_tasks import colours
from metavpt.problem import Direction, Directions

Value = TypeVar("Value")


class Metrics(Protocol):
    """Metrics accumulated over a set.

    Attributes:
        directions: The better direction of each metric.
    """

    directions: ClassVar[Directions]

    def update(self, prediction: Tensor, target: Tensor, /) -> None:
        """Add a batch of predictions, as `DenseTask.predict` makes them, and targets."""
        ...

    def compute(self) -> dict[str, float]:
        """Return the metrics by name."""
        ...


class DenseTask(ABC):
    """A quantity of every pixel that heads predict from frozen patch features.

    A subclass defines `target`, `encode` and `metrics`. The other methods have defaults, those of
    a regression to `encode` by squared error.

    Attributes:
        name: The name of its feedback. `feedback.<name>_weight` is its weight.
        prefix: How its metrics begin, as in `ridge/<prefix>_rmse`.
        lr: The peak learning rate of a probe's head that is trained by gradient steps.
    """

    name: ClassVar[str]
    prefix: ClassVar[str]
    lr: float = 1e-3

    @property
    @abstractmethod
    def num_outputs(self) -> int:
        """Return C."""

    @abstractmethod
    def target(self, batch: Any) -> Tensor:
        """Read the target off a labelled batch: (B, H, W), or (B, K, H, W).

        For pictures it reads one frame, without B.
        """

    @abstractmethod
    def encode(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return what a linear output regresses to.

        Returns:
            The values (B, C, H, W), 0 where they are unknown, and where they are known, bool
            (B, H, W).
        """

    @abstractmethod
    def metrics(self) -> Metrics:
        """Return an empty accumulator of the metrics."""

    def patch_targets(self, target: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Average the encoded target over the known pixels of each patch.

        Returns:
            The targets (B, C, h, w), and the share of known pixels (B, 1, h, w).
        """
        values, known = self.encode(target)
        share = F.adaptive_avg_pool2d(known[:, None].float(), grid)
        return F.adaptive_avg_pool2d(values, grid) / share.clamp_min(1e-9), share

    def activate(self, output: Tensor) -> Tensor:
        """Map the output (B, C, H, W) of a head that is trained by gradient steps."""
        return output

    def predict(self, output: Tensor) -> Tensor:
        """Map a head's output (B, C, H, W) to a prediction of the shape of the target."""
        return output

    def squared_error(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Sum the squared errors of outputs (B, C, H, W) over the known pixels.

        Returns:
            The sum and the number of known pixels.
        """
        values, known = self.encode(target)
        return ((output - values).square().sum(dim=1) * known).sum(), known.sum()

    def probe_loss(self, prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Sum the loss of a probe's head that is trained by gradient steps.

        Args:
            prediction: What `activate` returns, (B, C, H, W).
            target: As `target` returns it.

        Returns:
            The sum over the known pixels, and their number.
        """
        return self.squared_error(prediction, target)

    def feedback_loss(self, prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Sum the loss of feedback through a head that is trained by gradient steps.

        Arguments and result are those of `probe_loss`.
        """
        return self.probe_loss(prediction, target)

    def trivial(self, targets: Iterable[Tensor]) -> dict[str, Tensor]:
        """Return predictions that ignore the image, by name.

        The default is the mean of each pixel, and the mean of all pixels.

        Args:
            targets: Of the batches of the train set.
        """
        total = count = torch.zeros(())
        for target in targets:
            values, known = self.encode(target.double())
            total = total + values.sum(dim=0)
            count = count + known.sum(dim=0)
        means = torch.stack([channel.sum() for channel in total]) / count.sum()
        constant = means[:, None, None].expand_as(total)
        image = torch.where(count > 0, total / count.clamp_min(1), constant)
        guesses = {f"mean {self.name} image": image, f"constant {self.name}": constant}
        return {name: self.predict(guess[None])[0] for name, guess in guesses.items()}

    def by_class(self, metrics: Any) -> dict[str, list[tuple[str, float]]]:
        """Return the metrics that have a value for each class, by name. The default is none."""
        return {}

    def picture(self, values: Tensor, truth: Tensor) -> np.ndarray:
        """Colour the target or the prediction of one frame, uint8 (H, W, 3).

        The default colours the range of the true values. Three outputs are red, green and blue.

        Args:
            values: What to colour, of the shape of one frame's target.
            truth: The target of the frame.
        """
        encoded, known = self.encode(truth[None])
        found = encoded.movedim(1, -1)[known]
        low, high = (float(found.min()), float(found.max())) if len(found) else (0.0, 1.0)
        if self.num_outputs == 3:
            return colours.rgb(values, low, high)
        return colours.colour(values.reshape(values.shape[-2:]), low, high)

    def legend(self, shown: Sequence[Tensor]) -> list[tuple[np.ndarray, str]]:
        """Return the colours, uint8 (3,), and their meaning in pictures of these maps."""
        return colours.scale(f"least {self.name}", f"most {self.name}")

    @property
    def directions(self) -> dict[str, Direction]:
        """Return the better direction of each metric, by its full name."""
        return self.prefixed(self.metrics().directions)

    def prefixed(self, values: Mapping[str, Value]) -> dict[str, Value]:
        """Name metrics as the probes report them."""
        return {f"{self.prefix}_{name}": value for name, value in values.items()}
