"""Passes that a strategy spends on the learner, in units of the learner's own step."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from metavpt.distributed import collectives
from metavpt.errors import MetaVPTError
from metavpt.hypergradients import params
from metavpt.hypergradients.params import Params
from metavpt.problem import Problem
from metavpt.profiling import PassCounter
from metavpt.training.strategy import Proposal


class LearnerPasses:
    """Counts a strategy's passes in units of the learner's own step.

    One unit is a forward and a backward pass of the batch that the learner trains on. So a forward
    pass of as many samples counts as a third. Everything counts: heads fitted on the learner's
    features, g_down, products, scores and the replay buffer.

    Args:
        problem: The problem whose learner is counted.
        measuring: The context in which the learner's own step is measured.
    """

    def __init__(
        self,
        problem: Problem,
        measuring: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.problem, self.measuring = problem, measuring
        self.counter = PassCounter(problem.learner)
        self.unit: float | None = None  # work of the learner's own step
        self.labelled = 0.0  # work of a labelled loss in addition to the pretraining loss

    def spent(self, proposal: Proposal) -> float:
        """Return what the strategy spent since the last call, in units.

        Args:
            proposal: Its proposal. The first one with a cost is passed through the learner once, to
                measure the unit.
        """
        work = collectives.first(self._taken())
        if proposal.task is not None and (loss := proposal.labelled_loss) is not None:
            self.labelled = self.labelled or self._work_of_step(loss)
            work += self.labelled
        return work / (self._measured(proposal) or math.inf) if work else 0.0

    def require_layers(self, proposal: Proposal) -> None:
        """Check that passes can be counted, so that the pretraining loss calls modules.

        Raises:
            MetaVPTError: The loss reads the learner's parameters directly.
        """
        if not self._measured(proposal):
            raise MetaVPTError(
                "budget.grad_evals: the pretraining loss runs no layer of the learner, so its "
                "passes cannot be counted; call the learner by torch.func.functional_call, or "
                "limit budget.steps, samples or seconds"
            )

    def _measured(self, proposal: Proposal) -> float:
        if self.unit is None:
            has_task = proposal.task is not None
            own = proposal._replace(labelled_loss=None) if has_task else proposal
            self.unit = self._work_of_step(lambda theta: own.loss(self.problem, theta))
        return self.unit

    @torch.no_grad()
    def _work_of_step(self, loss: Callable[[Params], Tensor]) -> float:
        """Return the work of a forward and a backward pass, measured on a forward pass."""
        spent = self._taken()
        with self.measuring(), self.counter.on():
            loss(params.detach(params.named(self.problem.learner)))
        work, self.counter.work = self._taken(), spent
        return collectives.first(3 * work)

    def _taken(self) -> float:
        work, self.counter.work = self.counter.work, 0.0
        return work

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to count in the same units."""
        return {"unit": self.unit, "labelled": self.labelled}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.unit, self.labelled = state["unit"], state["labelled"]
