"""Amortised tilting: a network predicts the tilted targets, so that most steps need no feedback.

Amortised optimisation (arXiv 2202.00665). The first-order values of one batch in `every` are
computed along g_down, and a designer is fitted to them.
"""

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from metavpt.feedback.aggregation import Combination
from metavpt.hypergradients import params
from metavpt.hypergradients.directions import Direction
from metavpt.hypergradients.estimators import Implicit
from metavpt.hypergradients.linear_targets import DirectionalDerivative, ForwardMode
from metavpt.hypergradients.params import Params
from metavpt.problem import Problem, require
from metavpt.strategies.feedback_direction import FeedbackDirection
from metavpt.strategies.learned import MakeOptimizer
from metavpt.strategies.replay_buffer import ReplayBuffer
from metavpt.training.strategy import Proposal, TrainState, designed, draw, recipe_of


class SupportsReplay(Protocol):
    """A problem whose designer can be trained on stored first-order values."""

    def replay_batch(
        self, theta: Params, batch: Any, w: Params, derivative: DirectionalDerivative
    ) -> dict[str, Tensor]:
        """Compute the first-order value of each target of an unlabelled batch along `w`.

        Returns:
            Detached tensors, with what `designer_loss` needs besides the values.
        """
        ...

    def designer_loss(self, replay: dict[str, Tensor]) -> Tensor:
        """Compute minus the value of the designer's targets plus its trust-region penalty.

        A scalar that depends on phi alone. The learner is not evaluated.
        """
        ...


class Amortized:
    """The designer's tasks. Every `every` steps the designer is fitted to first-order values.

    <q_phi, A> is linear in the targets q, with the same A that `Tilt` uses in closed form.

    Args:
        optimizer: Makes the designer's optimizer. Default: Adam with a learning rate of 1e-2.
        phi_steps: Steps of the designer after each update of the replay buffer.
        replay: Batches that the replay buffer holds.
        max_norm: The norm at which the designer's gradient is clipped.
        every: Steps from one update of the designer to the next.
        tolerance: Of the feedback gradient, see `FeedbackDirection`.
        implicit: Of the feedback gradient, see `FeedbackDirection`.
        burn_in: Steps of the recipe before the first one; below 1 the share of the budget
            that they take.
        ema: The decay of the moving average of the feedback gradient.
        direction: Maps g_down to w. Default: `Dot`.
        derivative: How targets are differentiated along w. Default: forward mode.
        combination: How several feedbacks are aggregated. Default: their weighted sum.
        random_seed: With a seed, w is a random vector of equal norm, a new one each time.
    """

    def __init__(
        self,
        optimizer: MakeOptimizer | None = None,
        phi_steps: int = 10,
        replay: int = 8,
        max_norm: float = 1.0,
        every: int = 8,
        burn_in: float = 0,
        ema: float = 0.8,
        direction: Direction | None = None,
        derivative: DirectionalDerivative | None = None,
        combination: Combination | None = None,
        random_seed: int | None = None,
        tolerance: float = 0.0,
        implicit: Implicit | None = None,
    ) -> None:
        make = optimizer or (lambda parameters: torch.optim.Adam(parameters, lr=1e-2))
        self.buffer = ReplayBuffer(make, phi_steps, replay, max_norm)
        self.derivative = derivative or ForwardMode()
        self.feedback = FeedbackDirection(
            every, burn_in, ema, direction, combination, random_seed, tolerance, implicit
        )
        self.period = self.feedback.period

    @property
    def optimizer(self) -> Optimizer:
        """The designer's optimizer, after `start`."""
        return self.buffer.optimizer

    def start(self, problem: Problem) -> None:
        """Check the problem and make the designer's optimizer."""
        require(problem, SupportsReplay, f"strategy {type(self).__name__}")
        self.buffer.start(problem, f"strategy {type(self).__name__}")

    def next_task(self, state: TrainState) -> Proposal:
        """Fit the designer if it is due, then make its task of the next batch."""
        batch, record = draw(state), {}
        if self.period.due(state.budget):
            with state.budget.timed("designer"):
                record = self._update(state, batch)
        if self.feedback.g_down is None:
            return recipe_of(state, batch, record)._replace(steered=self.feedback.steers)
        return designed(state, batch, record, self.feedback.steers)

    def _update(self, state: TrainState, batch: Any) -> dict[str, float]:
        problem = require(state.problem, SupportsReplay, "amortization")
        record = self.feedback.renew(state)
        w = self.feedback.along(state, batch)
        if w is None:
            return record
        theta = params.detach(params.named(state.problem.learner))
        replay = problem.replay_batch(theta, batch, w, self.derivative)
        return {**self.buffer.fit(state.problem, problem.designer_loss, replay), **record}

    def state_dict(self) -> dict[str, Any]:
        """Return the feedback direction and the replay buffer."""
        return {"feedback": self.feedback.state_dict(), "buffer": self.buffer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.feedback.load_state_dict(state["feedback"])
        self.buffer.load_state_dict(state["buffer"])
