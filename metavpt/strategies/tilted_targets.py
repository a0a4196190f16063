"""Targets tilted by first-order value, in closed form: no designer and nothing learned."""

from typing import Any, Protocol

from metavpt.errors import MetaVPTError
from metavpt.feedback.aggregation import Combination
from metavpt.hypergradients import params
from metavpt.hypergradients.directions import Direction
from metavpt.hypergradients.estimators import Implicit
from metavpt.hypergradients.linear_targets import DirectionalDerivative, ForwardMode
from metavpt.hypergradients.params import Params
from metavpt.problem import Problem, require
from metavpt.strategies.feedback_direction import FeedbackDirection
from metavpt.strategies.selection import at_least_one
from metavpt.training.strategy import Proposal, TrainState, draw, recipe_of


class SupportsTilting(Protocol):
    """A problem whose targets can be moved towards higher first-order value."""

    def tilt(
        self,
        theta: Params,
        task: Any,
        w: Params,
        gate: float,
        tau: float,
        num_candidates: int,
        derivative: DirectionalDerivative,
    ) -> Any:
        """Return `task` with the share `gate` of its targets tilted along `w`, see `Tilt`."""
        ...


class Tilt:
    """The recipe's targets, tilted towards the candidates of highest first-order value.

    This is the best target within a KL divergence of the recipe's (exponential tilting). See
    `target_task.Tilted` for next tokens and `prototypes.tilted` for the teacher's prototypes. The
    value is taken at the parameters of the step itself and costs forward passes through the tail.

    Args:
        gate: The share alpha that is taken from the recipe's target, in [0, 1].
        tau: The temperature. The mean KL divergence from the tilted distribution is about
            1 / (2 tau^2). With 0 the best candidate takes all (greedy).
        num_candidates: Candidates per target.
        every: Steps from one feedback gradient to the next.
        tolerance: Of the feedback gradient, see `FeedbackDirection`.
        implicit: Of the feedback gradient, see `FeedbackDirection`.
        burn_in: Steps before the first one; below 1 the share of the budget
            that they take.
        ema: The decay of the moving average of the feedback gradient.
        direction: Maps g_down to w. Default: `Dot`.
        derivative: How candidates are differentiated along w. Default: forward mode.
        combination: How several feedbacks are aggregated. Default: their weighted sum.
        random_seed: With a seed, w is a random vector of equal norm. This is the control: targets
            are as soft and know nothing of the feedback.
    """

    def __init__(
        self,
        gate: float = 0.5,
        tau: float = 1.0,
        num_candidates: int = 64,
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
        check_gate(gate)
        at_least_one(num_candidates=num_candidates)
        if tau < 0:
            raise MetaVPTError(f"strategy.tau={tau} must not be negative")
        self.gate, self.tau, self.num_candidates = gate, tau, num_candidates
        self.derivative = derivative or ForwardMode()
        self.feedback = FeedbackDirection(
            every, burn_in, ema, direction, combination, random_seed, tolerance, implicit
        )
        self.period = self.feedback.period

    def start(self, problem: Problem) -> None:
        """Check that the problem has targets to tilt."""
        require(problem, SupportsTilting, f"strategy {type(self).__name__}")

    def next_task(self, state: TrainState) -> Proposal:
        """Make the recipe's task of the next batch and tilt its targets."""
        batch = draw(state)
        with state.budget.timed("designer"):
            record = self.feedback.renew(state)
            w = self.feedback.along(state, batch)
        plain = recipe_of(state, batch, record)._replace(steered=self.feedback.steers)
        if w is None:
            return plain
        problem = require(state.problem, SupportsTilting, "tilting")
        theta = params.detach(params.named(state.problem.learner))
        with state.budget.timed("designer"):
            task = problem.tilt(
                theta, plain.task, w, self.gate, self.tau, self.num_candidates, self.derivative
            )
        return plain._replace(task=task)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the feedback direction."""
        return self.feedback.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.feedback.load_state_dict(state)


def check_gate(gate: float) -> None:
    """Raise MetaVPTError for a gate outside [0, 1]."""
    if not 0 <= gate <= 1:
        raise MetaVPTError(f"strategy.gate={gate} must be in [0, 1]")
