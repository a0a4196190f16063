"""The hypergradient in function space: what feedback says of the learner's outputs themselves, and not of its parameters.

Functional bilevel optimisation (Petrulionyte, Mairal & Arbel, arXiv 2403.20233). Where the learner is told targets by squares, the best
function for a task is the targets themselves, f* = t_phi, whatever the parameters. Implicit differentiation of L_down(f*) by phi is then
<dL_down/df, dt_phi/dphi>: the Hessian of the inner problem, in function space, is the identity, and there is no linear system to solve. The
value A = -dL_down/df is known on labelled samples alone; a designer fitted to it says what it is on all others.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from metavpt.distributed import collectives
from metavpt.problem import Problem
from metavpt.strategies.learned import Designed, feedback_on
from metavpt.strategies.replay_buffer import Lesson, Lessons
from metavpt.training.budget import Budget
from metavpt.training.streams import Streams


class Functional(Designed):
    """The designer's tasks. Every `meta_every` steps the value of the learner's outputs on a labelled batch becomes a lesson, and the
    designer takes `phi_steps` steps on it, of `lesson_batch_size` samples each, see `Lessons`, `Problem.functional_lesson`.

    A lesson takes a forward pass on labelled samples and no backward pass; it is charged as one gradient evaluation. What feedback asks
    for is not blurred by what a step of the parameters can do for it, and it says as much of a designer in one lesson as labels say at
    all: a few lessons on many labelled samples do, where `Amortized` wants many on few.

    optimizer  of the designer, AdamW with lr 1e-3 and weight decay 0.05 by default
    """

    def __init__(
        self,
        optimizer: Callable[[Iterable[Tensor]], Optimizer] | None = None,
        phi_steps: int = 300,
        lesson_batch_size: int = 16,
        meta_every: int = 50,
        burn_in: int = 0,
        max_norm: float = 1.0,
        anneal: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(meta_every, burn_in)
        make = optimizer or (
            lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.05)
        )
        self.lessons = Lessons(make, phi_steps, 1, max_norm, lesson_batch_size, seed, anneal)

    def start(self, problem: Problem) -> None:
        super().start(problem)
        self.lessons.start(problem)

    def attempt_update(
        self, problem: Problem, streams: Streams, optimizer: Optimizer, budget: Budget
    ) -> dict[str, float]:
        with budget.timed("data"):
            labelled = next(streams.feedback)
        feedback = feedback_on(problem, labelled)
        lesson = self.seen(problem.functional_lesson(feedback.theta, labelled))
        budget.charge(grad_evals=1)
        return self.lessons.learn(problem, lesson)

    def seen(self, lesson: Lesson) -> Lesson:
        """What the designer is taught in place of `lesson`: for controls."""
        return lesson

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "lessons": self.lessons.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.lessons.load_state_dict(state["lessons"])


class RandomFunctional(Functional):
    """`Functional` with the values of one sample taught as those of another, and half of them turned about: as large, as smooth, and worth
    nothing. In another order alone they would still say what is worth having on average, by where a patch stands.
    """

    def seen(self, lesson: Lesson) -> Lesson:
        num, generator = collectives.total(len(lesson["values"])), self.lessons.generator
        values = collectives.gather(lesson["values"])
        order, signs = (
            torch.randperm(num, generator=generator),
            2 * torch.randint(2, (num,), generator=generator) - 1,
        )
        turned = values[order.to(values.device)] * signs.to(values).view(
            -1, *[1] * (values.ndim - 1)
        )
        return {**lesson, "values": turned[collectives.rows(num)]}
