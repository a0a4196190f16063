"""A loss that is linear in the goals which a target designer changes: the designer's update runs no backward pass through the learner."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from metavpt.hypergradients.curvature import ComposedLoss
from metavpt.hypergradients.linear_targets import DirectionalDerivative
from metavpt.hypergradients.params import Params


@dataclass(frozen=True)
class GoalLoss(ComposedLoss):
    """theta -> <targets, cost(outputs(theta))>: a `LinearLoss` that also shows its outputs, as Gauss-Newton wants it. See `goal_loss`."""

    targets: Tensor  # (G + 1,)
    cost: Callable[[Tensor], Tensor]

    def slopes(
        self, theta: Params, w: Params, derivative: DirectionalDerivative, absolute: bool = True
    ) -> Tensor:
        return derivative(lambda theta_s: self.cost(self.outputs(theta_s)), theta, w)


def goal_loss(
    outputs: Callable[[Params], Tensor],
    criterion: Callable[[Tensor, Tensor], Tensor],
    goals: Tensor,
) -> GoalLoss:
    """theta -> criterion(outputs(theta), goals), for a criterion (outputs, goals (G,)) -> scalar that is affine in the goals.

    Its targets are the goals and a 1, for the part of the loss that no goal has a share in.
    """

    def cost(given: Tensor) -> Tensor:
        none = torch.zeros_like(goals.detach())
        slopes, rest = torch.func.grad_and_value(criterion, argnums=1)(given, none)
        return torch.cat([slopes, rest[None]])

    return GoalLoss(
        outputs, lambda given: criterion(given, goals), torch.cat([goals, goals.new_ones(1)]), cost
    )
