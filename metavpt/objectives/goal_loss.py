"""A loss that is linear in the goals that a target designer changes.

The designer's update then needs no backward pass through the learner.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from metavpt.hypergradients.curvature import ComposedLoss
from metavpt.hypergradients.linear_targets import DirectionalDerivative
from metavpt.hypergradients.params import Params


@dataclass(frozen=True)
class GoalLoss(ComposedLoss):
    """A `LinearLoss` that also exposes its outputs, for Gauss-Newton products. See `goal_loss`."""

    targets: Tensor  # (G + 1,)
    cost: Callable[[Tensor], Tensor]

    def slopes(
        self, theta: Params, w: Params, derivative: DirectionalDerivative, absolute: bool = True
    ) -> Tensor:
        """Compute the derivative of the costs along w, (G + 1,)."""
        return derivative(lambda theta_s: self.cost(self.outputs(theta_s)), theta, w)


def goal_loss(
    outputs: Callable[[Params], Tensor],
    criterion: Callable[[Tensor, Tensor], Tensor],
    goals: Tensor,
) -> GoalLoss:
    """Build theta -> criterion(outputs(theta), goals) with costs that are linear in the goals.

    Args:
        outputs: theta -> the learner's outputs.
        criterion: (outputs, goals) -> scalar, affine in the goals up to a term that depends on the
            goals alone, as the square of the goals in a squared error. `slopes` omits that term: it
            has no derivative by theta.
        goals: (G,), may hold a graph to phi.

    Returns:
        A loss whose targets are the goals and a 1, for the part of the loss without goals.
    """

    def cost(given: Tensor) -> Tensor:
        none = torch.zeros_like(goals.detach())
        slopes, rest = torch.func.grad_and_value(criterion, argnums=1)(given, none)
        return torch.cat([slopes, rest[None]])

    return GoalLoss(
        outputs, lambda given: criterion(given, goals), torch.cat([goals, goals.new_ones(1)]), cost
    )
