"""The direction of the feedback: g_down, kept for some steps, as a vector w on theta_S.

A direction that follows the learner's step may also hold the tail's other parameters.
"""

from typing import Any, cast

import torch

from metavpt.errors import MetaVPTError, NonFiniteError, UnsolvedError
from metavpt.feedback.aggregation import Combination, unpaired
from metavpt.hypergradients import params
from metavpt.hypergradients.directions import Direction, Dot
from metavpt.hypergradients.distributed_losses import averaged
from metavpt.hypergradients.estimators import Implicit, downstream
from metavpt.hypergradients.mixed_products import value_and_gradient
from metavpt.hypergradients.params import Params
from metavpt.problem import supports
from metavpt.strategies.learned import (
    LearnerStep,
    ReadsHeads,
    feedback_on,
    feedback_record,
    tail_loss,
)
from metavpt.strategies.random_direction import RandomDirection
from metavpt.training.schedule import Period
from metavpt.training.strategy import TrainState


class FeedbackDirection:
    """g_down, renewed every `every` steps after `burn_in`, and the direction w made of it.

    A renewal that is not finite leaves g_down as it was and is counted.

    Args:
        every: Steps from one renewal to the next.
        burn_in: Steps before the first one; below 1 the share of the budget
            that they take.
        ema: The decay of the moving average of g_down, in [0, 1). With 0 the newest one counts.
        direction: Maps g_down to w. Default: `Dot`. Directions that need g_pre take it from the
            recipe's task of the batch at hand.
        combination: How several feedbacks are aggregated. Default: their weighted sum.
        random_seed: With a seed, w is a random vector of equal norm, a new one for each use.
        implicit: Its solve replaces g_down by w with (H + damping I) w = g_down, once for each
            g_down, with the curvature H of the recipe on the batch at hand: the value of a task
            after the learner has trained to the end, not for one step.
        tolerance: A renewal that is due is left out while |theta_S - theta_S then| <= tolerance
            |theta_S then|, with theta_S then that of the last renewal. With 0 none is left out.
    """

    def __init__(
        self,
        every: int = 8,
        burn_in: float = 0,
        ema: float = 0.0,
        direction: Direction | None = None,
        combination: Combination | None = None,
        random_seed: int | None = None,
        tolerance: float = 0.0,
        implicit: Implicit | None = None,
    ) -> None:
        if not 0 <= ema < 1:
            raise MetaVPTError(f"strategy.ema={ema} must be in [0, 1)")
        if tolerance < 0:
            raise MetaVPTError(f"strategy.tolerance={tolerance} must not be negative")
        if implicit and not isinstance(direction, Dot | None):
            raise MetaVPTError(
                f"strategy.direction={type(direction).__name__} has no effect with "
                "strategy.implicit; leave out one of them"
            )
        self.period, self.ema = Period(every, burn_in), ema
        self.direction, self.combination = direction or Dot(), unpaired(combination)
        self.random = None if random_seed is None else RandomDirection(random_seed)
        self.step, self.implicit = LearnerStep(), implicit
        self.num_skipped = 0
        self.g_down: Params | None = None
        self._solution: Params | None = None  # w of the newest g_down, with `implicit`
        self.tolerance = tolerance
        self._renewed_at: Params | None = None  # theta_S of the last renewal, with a tolerance

    @property
    def steers(self) -> bool | None:
        """Whether there is a g_down; None where w is random, so that no feedback is used."""
        return None if self.random else self.g_down is not None

    def renew(self, state: TrainState) -> dict[str, float]:
        """Take a new g_down if it is due, and return the record of it."""
        if not self.period.due(state.budget):
            return {}
        moved: dict[str, float] = {}
        if self._renewed_at is not None:
            theta = params.detach(params.named(state.problem.learner))
            theta_s = {name: theta[name] for name in self._renewed_at}
            moved = {"drift": params.drift(theta_s, self._renewed_at)}
            if moved["drift"] <= self.tolerance:
                return moved
        with state.budget.timed("data"):
            labelled = next(state.streams.feedback)
        feedback = feedback_on(state.problem, labelled)
        if supports(reader := cast(object, state.problem), ReadsHeads):
            reader.describe_heads(labelled)
        combined = self.combination(feedback)
        try:
            fresh = downstream(combined.outer_loss, feedback.aligned)[1]
        except NonFiniteError:
            self.num_skipped += 1
            return {**combined.record, "skipped_updates": float(self.num_skipped)}
        if self.g_down is None or self.ema == 0:
            self.g_down = fresh
        else:
            kept = params.scale(self.g_down, self.ema)
            self.g_down = params.add(kept, fresh, alpha=1 - self.ema)
        self._solution = None
        self.period.num_updates += 1
        if self.tolerance:
            self._renewed_at = params.clone(feedback.aligned)
        norm = {"g_down_norm": float(params.norm(self.g_down))}
        skipped = {"skipped_updates": float(self.num_skipped)} if self.num_skipped else {}
        return {**combined.record, **moved, **norm, **skipped, **feedback_record(feedback.problem)}

    def along(self, state: TrainState, batch: Any) -> Params | None:
        """Return w at the learner's theta for an unlabelled batch.

        None before the first g_down, and from a solve that ended no better than x = 0 to the next
        g_down. Such solves are counted among the skipped updates.
        """
        if self.g_down is None:
            return None
        problem, live = state.problem, params.named(state.problem.learner)
        theta = params.detach(live)
        g_down, update, g_pre = self.g_down, None, None
        at = {name: theta[name] for name in g_down}
        if self.implicit:
            if self._solution is None:
                with torch.no_grad():
                    loss = averaged(tail_loss(problem, theta, problem.recipe(batch)))
                try:
                    self._solution = self.implicit.solution([loss], g_down, at)[0].x
                except UnsolvedError:  # the recipe until the next g_down, not a solve at each step
                    self.num_skipped += 1
                    self.g_down = self._renewed_at = None
                    return None
            return self.random.like(self._solution) if self.random else self._solution
        if self.direction.needs_g_pre:
            with torch.no_grad():
                loss = averaged(tail_loss(problem, theta, problem.recipe(batch)))
            if self.direction.needs_update:
                at, update = self.step(problem, theta, at, lambda: loss, state.optimizer)
                g_down = {**params.zeros_like(at), **g_down}
            g_pre = value_and_gradient(loss, at)[1]
        w = self.direction(g_down, g_pre, update).w
        return self.random.like(w) if self.random else w

    def state_dict(self) -> dict[str, Any]:
        """Return g_down, the count of skipped renewals and the random state."""
        return {
            "g_down": self.g_down,
            "solution": self._solution,
            "renewed_at": self._renewed_at,
            "num_skipped": self.num_skipped,
            "period": self.period.state_dict(),
            "random": self.random.state_dict() if self.random else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.g_down, self.num_skipped = state["g_down"], state["num_skipped"]
        self._renewed_at, self._solution = state["renewed_at"], state.get("solution")
        self.period.load_state_dict(state["period"])
        if self.random:
            self.random.load_state_dict(state["random"])
