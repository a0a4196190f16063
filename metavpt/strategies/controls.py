"""Controls: what a learned designer must beat before its gain can be attributed to feedback.

`Learned`, `Tilt` and `Amortized` along a random direction (`random_seed`) and `Functional` with
permuted values (`permute`) are options of these strategies.
"""

from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from metavpt.errors import MetaVPTError, NonFiniteError, check_known
from metavpt.feedback.aggregation import Combination, unpaired
from metavpt.hypergradients import params
from metavpt.hypergradients.mixed_products import differentiate
from metavpt.hypergradients.params import Params
from metavpt.problem import Problem, require, supports
from metavpt.strategies.learned import DesignerOptimizer, MakeOptimizer, feedback_on, inner_loss
from metavpt.strategies.selection import (
    SupportsCandidates,
    SupportsSelection,
    at_least_one,
    best_candidates,
)
from metavpt.strategies.tilted_targets import check_gate
from metavpt.training.schedule import Period
from metavpt.training.strategy import (
    Proposal,
    TrainState,
    designed,
    draw,
    num_labelled,
    num_samples,
    recipe_of,
)


class Stateless:
    """A strategy without state."""

    def state_dict(self) -> dict[str, Any]:
        """Return an empty state."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore nothing."""


class Uniform(Stateless):
    """A random task of the designer's space for every batch."""

    def start(self, problem: Problem) -> None:
        """Check that the problem draws tasks."""
        require(problem, SupportsCandidates, "strategy Uniform")

    def next_task(self, state: TrainState) -> Proposal:
        """Draw a random task of the next batch."""
        problem, batch = require(state.problem, SupportsCandidates, "Uniform"), draw(state)
        with state.budget.timed("task"), torch.no_grad():
            task = problem.candidates(batch, 1)[0]
            return Proposal(task, num_samples(state.problem, batch), {})


class SupportsHardest(Protocol):
    """A problem that makes the hardest task itself, in closed form."""

    def hardest_task(self, batch: Any) -> Any:
        """Make the task of `batch` that weighs each part of the loss by its size."""
        ...


class Hardest(Stateless):
    """The task with the highest pretraining loss (arXiv 2310.03940).

    A problem may make it in closed form, see `SupportsHardest`. Else it is, for each sample, the
    hardest of `num_candidates` random tasks.
    """

    def __init__(self, num_candidates: int = 8) -> None:
        at_least_one(num_candidates=num_candidates)
        self.num_candidates = num_candidates

    def start(self, problem: Problem) -> None:
        """Check that the problem draws and scores tasks."""
        if not supports(problem, SupportsHardest):
            require(problem, SupportsCandidates, "strategy Hardest")
            require(problem, SupportsSelection, "strategy Hardest")

    def next_task(self, state: TrainState) -> Proposal:
        """Make the hardest task of the next batch."""
        batch = draw(state)
        closed: object = state.problem
        if supports(closed, SupportsHardest):
            with state.budget.timed("task"), torch.no_grad():
                return Proposal(closed.hardest_task(batch), num_samples(state.problem, batch), {})
        problem = require(state.problem, SupportsSelection, "Hardest")
        theta = params.detach(params.named(state.problem.learner))

        def loss(task: Any) -> Tensor:
            return problem.per_sample_tail(theta, task)({})

        with state.budget.timed("designer"):
            return best_candidates(state.problem, batch, self.num_candidates, loss)


class Adversarial:
    """The designer is trained to raise the pretraining loss (ADIOS, arXiv 2201.13100); no labels.

    Args:
        optimizer: Makes the designer's optimizer. Default: Adam with a learning rate of 2e-4.
        every: Steps from one update to the next.
        burn_in: Steps before the first update; below 1 the share of the budget
            that they take.
        max_norm: The norm at which the designer's gradient is clipped.
    """

    def __init__(
        self,
        optimizer: MakeOptimizer | None = None,
        every: int = 8,
        burn_in: float = 0,
        max_norm: float = 1.0,
    ) -> None:
        self.period, self.designer = Period(every, burn_in), DesignerOptimizer(optimizer, max_norm)
        self.num_skipped = 0

    @property
    def optimizer(self) -> Optimizer:
        """The designer's optimizer, after `start`."""
        return self.designer.optimizer

    def start(self, problem: Problem) -> None:
        """Make the designer's optimizer."""
        self.designer.start(problem, "strategy Adversarial")

    def next_task(self, state: TrainState) -> Proposal:
        """Update the designer if it is due, then make its task of the next batch."""
        record: dict[str, float] = {}
        if self.period.due(state.budget):
            with state.budget.timed("designer"):
                record = self._update(state)
        return designed(state, draw(state), record)

    def _update(self, state: TrainState) -> dict[str, float]:
        problem = state.problem
        with state.budget.timed("data"):
            batch = next(state.streams.meta)
        theta, phi = params.detach(params.named(problem.learner)), params.named(problem.designer)
        loss = inner_loss(problem, theta, batch)(phi)({})
        by_phi = params.scale(differentiate(loss, (phi,))[0], -1.0)
        try:
            if not params.is_finite(by_phi):
                raise NonFiniteError("the gradient of the pretraining loss is not finite")
            taken = self.designer.step(problem, by_phi, batch)
        except NonFiniteError:
            self.num_skipped += 1
            return {"skipped_updates": float(self.num_skipped)}
        return {"value": float(loss.detach()), **taken}

    def state_dict(self) -> dict[str, Any]:
        """Return the designer's optimizer and the count of skipped updates."""
        return {
            "num_skipped": self.num_skipped,
            "period": self.period.state_dict(),
            "optimizer": self.designer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.num_skipped = state["num_skipped"]
        self.period.load_state_dict(state["period"])
        self.designer.load_state_dict(state["optimizer"])


class LabelsOnly(Stateless):
    """The learner is fine-tuned on the feedback loss alone: no pretraining, no unlabelled data.

    It shows what the labels are worth without the stream. Labels train the learner itself, which
    breaks the bottleneck on purpose. Labelled samples count as the samples of its budget.

    Args:
        combination: How several feedbacks are aggregated. Default: their weighted sum.
    """

    trains_on_labels = True

    def __init__(self, combination: Combination | None = None) -> None:
        self.combination = unpaired(combination)

    def start(self, problem: Problem) -> None:
        """Need nothing."""

    def next_task(self, state: TrainState) -> Proposal:
        """Draw a labelled batch and propose its feedback loss in place of a task."""
        with state.budget.timed("data"):
            labelled = next(state.streams.feedback)
        with state.budget.timed("designer"):
            combined = self.combination(feedback_on(state.problem, labelled))
        count = num_labelled(labelled)
        return Proposal(None, count, combined.record, labelled_loss=combined.outer_loss)


class Direct(Stateless):
    """The feedback loss is added to the learner's own loss: a reference, not task design.

    A labelled batch trains the learner itself, which breaks the bottleneck on purpose. The gain is
    that of supervised training.

    Args:
        weight: Of the feedback loss.
        every: Steps from one labelled batch to the next.
        combination: How several feedbacks are aggregated. Default: their weighted sum.
    """

    trains_on_labels = True

    def __init__(
        self, weight: float = 1.0, every: int = 1, combination: Combination | None = None
    ) -> None:
        if not weight > 0:
            raise MetaVPTError(f"strategy.weight={weight} must be positive")
        self.weight, self.period = weight, Period(every)
        self.combination = unpaired(combination)

    def start(self, problem: Problem) -> None:
        """Need nothing."""

    def next_task(self, state: TrainState) -> Proposal:
        """Make the recipe's task of the next batch and add the feedback loss."""
        proposal = recipe_of(state, draw(state), {})
        if not self.period.due(state.budget):
            return proposal
        with state.budget.timed("designer"):
            with state.budget.timed("data"):
                labelled = next(state.streams.feedback)
            combined = self.combination(feedback_on(state.problem, labelled))

        def loss(theta: Params) -> Tensor:
            return self.weight * combined.outer_loss(theta)

        return proposal._replace(labelled_loss=loss, record=combined.record)


class Softened(Stateless):
    """Next-token targets that are as soft as steered ones and know nothing of the feedback.

    Args:
        kind: "self_distillation" gives the share to the learner's own top-K prediction,
            "smoothing" spreads it evenly over these K tokens.
        gate: The share that is taken from the true token, in [0, 1].
        num_candidates: K.
    """

    def __init__(
        self,
        kind: Literal["self_distillation", "smoothing"] = "self_distillation",
        gate: float = 0.5,
        num_candidates: int = 64,
    ) -> None:
        check_known(kind, "strategy.kind", "self_distillation", "smoothing")
        check_gate(gate)
        from metavpt.objectives.target_task import SoftTargets  # imports transformers

        residual = 1.0 if kind == "self_distillation" else 0.0
        self.targets = SoftTargets(gate, num_candidates, residual=residual)

    def start(self, problem: Problem) -> None:
        """Need nothing."""

    def next_task(self, state: TrainState) -> Proposal:
        """Make the recipe's task of the next batch and soften its targets."""
        proposal = recipe_of(state, draw(state), {})
        if "targets" not in getattr(proposal.task, "_fields", ()):
            raise MetaVPTError(
                f"the recipe's task is a {type(proposal.task).__name__} without targets; "
                "this control is for next-token prediction (TargetTask)"
            )
        return proposal._replace(task=proposal.task._replace(targets=self.targets))
