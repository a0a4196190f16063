"""Losses that several processes compute together, each on its share of a batch."""

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from metavpt.distributed import collectives
from metavpt.hypergradients.curvature import ComposedLoss
from metavpt.hypergradients.linear_targets import DirectionalDerivative, LinearLoss
from metavpt.hypergradients.mixed_products import Loss
from metavpt.hypergradients.params import Params


def averaged(loss: Loss) -> Loss:
    """The mean of the ranks' losses, as a loss of the same kind."""
    if collectives.size() == 1:
        return loss
    if isinstance(loss, ComposedLoss):
        at = loss.at
        return replace(
            loss,
            outputs=lambda theta: loss.outputs(collectives.enter(theta)),
            criterion=lambda outputs: collectives.leave(loss.criterion(outputs)),
            at=at and (lambda theta: averaged(at(collectives.enter(theta)))),
        )
    return _AveragedLinear(loss) if isinstance(loss, LinearLoss) else _Averaged(loss)


@dataclass(frozen=True)
class _Averaged:
    loss: Any

    def __call__(self, theta: Params) -> Tensor:
        return collectives.leave(self.loss(collectives.enter(theta)))


@dataclass(frozen=True)
class _AveragedLinear(_Averaged):
    """A `LinearLoss` whose targets every rank holds for its own share of the samples."""

    @property
    def targets(self) -> Tensor:
        return self.loss.targets

    def slopes(
        self, theta: Params, w: Params, derivative: DirectionalDerivative, absolute: bool = True
    ) -> Tensor:
        return self.loss.slopes(theta, w, derivative, absolute)
