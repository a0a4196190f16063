"""The tilt, learned: a designer that says for any batch what value said of a few, so that most steps need no feedback.

Amortised optimisation (arXiv 2202.00665): the closed form of `Tilt` is solved on one batch in `meta_every`, and a designer fitted to it.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from metavpt.hypergradients.params import Params
from metavpt.problem import Problem
from metavpt.strategies.learned import Proposal
from metavpt.strategies.replay_buffer import Lessons
from metavpt.strategies.tilted_targets import RandomTilt, Tilt
from metavpt.training.budget import Budget


class Amortized(Tilt):
    """The designer's tasks. Every `meta_every` steps the value of the batch's targets along a fresh g_down becomes a lesson, and the
    designer takes `phi_steps` steps on the last `replay` lessons, see `Lessons`.

    <q_phi, A> is linear in the targets q, with A the same closed form that the tilt takes (see `Problem.lesson`, `Problem.taught`). g_down
    is the moving average that `Tilt` keeps.

    optimizer  of the designer, Adam with lr 1e-2 by default
    """

    def __init__(
        self,
        optimizer: Callable[[Iterable[Tensor]], Optimizer] | None = None,
        phi_steps: int = 10,
        replay: int = 8,
        max_norm: float = 1.0,
        **tilt: Any,
    ) -> None:
        super().__init__(**tilt)
        self.lessons = Lessons(
            optimizer or (lambda parameters: torch.optim.Adam(parameters, lr=1e-2)),
            phi_steps,
            replay,
            max_norm,
        )

    def start(self, problem: Problem) -> None:
        self.lessons.start(problem)

    def propose(
        self, problem: Problem, batch: Any, theta: Params, w: Params, budget: Budget
    ) -> Proposal:
        record = {}
        if budget.steps % self.refresh_every == 0:
            record = self.lessons.learn(problem, problem.lesson(theta, batch, w, self.derivative))
        with torch.no_grad():
            return Proposal(problem.designer(batch), problem.num_samples(batch), record)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "lessons": self.lessons.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.lessons.load_state_dict(state["lessons"])


class RandomAmortized(Amortized, RandomTilt):
    """`Amortized` with g_down replaced by a random vector of the same norm, a new one each time."""
