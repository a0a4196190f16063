"""The tilt, learned: a designer that says for any batch what value said of a few, so that most steps need no feedback.

Amortised optimisation (arXiv 2202.00665): the closed form of `Tilt` is solved on one batch in `meta_every`, and a designer fitted to it.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from metavpt import params, ranks
from metavpt.budget import Budget
from metavpt.clock import phase
from metavpt.errors import MetaVPTError
from metavpt.params import Params
from metavpt.problem import Problem
from metavpt.strategies import Proposal
from metavpt.tilt import RandomTilt, Tilt


class Amortized(Tilt):
    """The designer's tasks. Every `meta_every` steps the value of the batch's targets along a fresh g_down becomes a lesson, and the
    designer takes `phi_steps` steps on the last `replay` lessons.

    A lesson holds what the learner has to say, so that these steps cost no pass through it: <q_phi, A> is linear in the targets q, with A
    the same closed form that the tilt takes (see `Problem.lesson`, `Problem.taught`). g_down is the moving average that `Tilt` keeps, and
    averaging goes on in the designer: what A says by chance of one batch it does not say of eight.

    optimizer  of the designer, Adam with lr 1e-2 by default
    max_norm   at which the designer's gradient is clipped
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
        if phi_steps < 1 or replay < 1:
            raise MetaVPTError(f"strategy: phi_steps={phi_steps} and replay={replay} must be at least 1")
        self.make_optimizer = optimizer or (lambda parameters: torch.optim.Adam(parameters, lr=1e-2))
        self.phi_steps, self.replay, self.max_norm = phi_steps, replay, max_norm
        self.lessons: list[dict[str, Tensor]] = []

    def start(self, problem: Problem) -> None:
        phi = params.named(problem.designer)
        if not phi:
            raise MetaVPTError(f"strategy=amortized: the designer {type(problem.designer).__name__} has no trainable parameter")
        self.optimizer = self.make_optimizer(phi.values())

    def propose(self, problem: Problem, batch: Any, theta: Params, w: Params, budget: Budget) -> Proposal:
        record = {}
        if budget.steps % self.refresh_every == 0:
            record = self._learn(problem, problem.lesson(theta, batch, w, self.derivative))
        with torch.no_grad():
            return Proposal(problem.designer(batch), problem.num_samples(batch), record)

    @phase("phi")
    def _learn(self, problem: Problem, lesson: dict[str, Tensor]) -> dict[str, float]:
        """Newest first; the record is of the first step, which has not seen the newest lesson."""
        finite = all(torch.isfinite(part).all() for part in lesson.values() if part.is_floating_point())
        if ranks.any_of(None if finite else True):
            self.num_skipped += 1
            return {"skipped_updates": float(self.num_skipped)}
        self.lessons = [lesson, *self.lessons][: self.replay]
        phi, record = params.named(problem.designer), {}
        for k in range(self.phi_steps):
            loss = problem.taught(self.lessons[k % len(self.lessons)])
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            for p in phi.values():
                p.grad = None if p.grad is None else ranks.leave(p.grad)
            torch.nn.utils.clip_grad_norm_(phi.values(), self.max_norm)
            self.optimizer.step()
            record = record or {"value": -float(loss.detach())}
        return record

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "optimizer": self.optimizer.state_dict(), "lessons": ranks.every(self.lessons)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.optimizer.load_state_dict(state["optimizer"])
        held: list[list[dict[str, Tensor]]] = state["lessons"]  # of every rank
        whole = [{name: torch.cat([lesson[name] for lesson in lessons]) for name in lessons[0]} for lessons in zip(*held, strict=True)]
        self.lessons = held[ranks.rank()] if len(held) == ranks.size() else whole


class RandomAmortized(Amortized, RandomTilt):
    """`Amortized` with g_down replaced by a random vector of the same norm, a new one each time."""
