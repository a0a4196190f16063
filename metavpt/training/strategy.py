"""The interface between the training loop and a strategy: `TrainState` in, `Proposal` out.

`SteeredSteps` and `LearnerPasses` count what the proposals of a run did and what they cost.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from metavpt.distributed import collectives
from metavpt.errors import MetaVPTError
from metavpt.hypergradients import params
from metavpt.hypergradients.params import Params
from metavpt.problem import Problem, supports
from metavpt.profiling import PassCounter
from metavpt.training.budget import Budget
from metavpt.training.streams import Streams


@dataclass(frozen=True)
class TrainState:
    """The parts of a run that a strategy sees.

    Attributes:
        problem: The problem that is trained.
        streams: The unlabelled and labelled batches.
        optimizer: The learner's optimizer. Strategies read it and never write it.
        budget: The budget. Passes through the learner are counted as they run.
    """

    problem: Problem
    streams: Streams
    optimizer: Optimizer
    budget: Budget


class Proposal(NamedTuple):
    """The next task of the learner.

    Attributes:
        task: The task, without a graph. None: the learner trains on `labelled_loss` only.
        num_samples: Unlabelled samples in the task.
        record: Measurements for the log.
        labelled_loss: A loss of theta that is added to the pretraining loss. It trains the learner
            on labels, so only a strategy that declares it (`TrainsOnLabels`) may set it.
        steered: Whether feedback shaped the task. None: the strategy does not use feedback for
            tasks.
        warning: A line for the user, or None.
    """

    task: Any
    num_samples: int
    record: dict[str, float]
    labelled_loss: Callable[[Params], Tensor] | None = None
    steered: bool | None = None
    warning: str | None = None

    def loss(self, problem: Problem, theta: Params) -> Tensor:
        """Compute the loss that the learner takes a step on."""
        if self.labelled_loss is None:
            return problem.pretrain_loss(theta, self.task)
        if self.task is None:
            return self.labelled_loss(theta)
        return problem.pretrain_loss(theta, self.task) + self.labelled_loss(theta)


class Strategy(Protocol):
    """Chooses the next task. The trainer calls `start` once and `next_task` before every step."""

    def start(self, problem: Problem) -> None:
        """Prepare for a run, and check that `problem` has what the strategy needs."""
        ...

    def next_task(self, state: TrainState) -> Proposal:
        """Return the next task."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        ...


class TrainsOnLabels(Protocol):
    """A strategy that may train the learner on labels, as a control that breaks the bottleneck."""

    @property
    def trains_on_labels(self) -> bool:
        """Return whether a `labelled_loss` of its proposals is intended."""
        ...


class CountsSamples(Protocol):
    """A problem that counts the samples of a batch itself, for example in tokens."""

    def num_samples(self, batch: Any) -> int:
        """Count the samples of an unlabelled batch."""
        ...


def num_samples(problem: Problem, batch: Any) -> int:
    """Count the samples of an unlabelled batch. Default: the length of its first tensor.

    Raises:
        MetaVPTError: The batch holds no tensor.
    """
    if supports(problem, CountsSamples):
        return problem.num_samples(batch)
    return _length(batch, f"batch of {type(problem).__name__}")


def num_labelled(batch: Any) -> int:
    """Count the samples of a labelled batch, or of all batches in a mapping by name."""
    parts: list[Any] = [batch]
    if isinstance(batch, Mapping) and not any(isinstance(v, Tensor) for v in batch.values()):
        parts = list(batch.values())
    return sum(_length(part, "labelled batch") for part in parts)


def draw(state: TrainState) -> Any:
    """Return the next unlabelled batch."""
    with state.budget.timed("data"):
        return next(state.streams.pretrain)


def _length(batch: Any, what: str) -> int:
    tensors = (leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim)
    tensor = next(tensors, None)
    if tensor is None:
        raise MetaVPTError(
            f"the {what} holds no tensor, so its samples cannot be counted; "
            "define num_samples(batch)"
        )
    return len(tensor)


def recipe_of(state: TrainState, batch: Any, record: dict[str, float]) -> Proposal:
    """Make the task of the baseline recipe, without a graph."""
    with state.budget.timed("task"), torch.no_grad():
        task = state.problem.recipe(batch)
        return Proposal(task, num_samples(state.problem, batch), record)


def designed(
    state: TrainState, batch: Any, record: dict[str, float], steered: bool | None = None
) -> Proposal:
    """Make the designer's task, without a graph."""
    with state.budget.timed("task"), torch.no_grad():
        task = state.problem.designer(batch)
        return Proposal(task, num_samples(state.problem, batch), record, steered=steered)


class SteeredSteps:
    """Counts over a run.

    Attributes:
        steered: Steps on a task that feedback shaped. None: no step has been steered so far.
        labelled: Steps with a loss on labels.
    """

    def __init__(self) -> None:
        self.steered: int | None = None
        self.labelled = 0

    def count(self, proposal: Proposal) -> None:
        """Count one step."""
        if proposal.steered is not None:
            self.steered = (self.steered or 0) + proposal.steered
        self.labelled += proposal.labelled_loss is not None

    def warning(self, num_steps: int) -> str | None:
        """Return a warning if no step of a steered run was steered."""
        if self.steered != 0:
            return None
        return (
            f"none of the {num_steps} steps was steered, so this run equals one without feedback; "
            "lower strategy.burn_in, raise the budget, or look for skipped updates in the log"
        )

    def record(self) -> dict[str, int]:
        """Return the counts for the log, without those that do not apply."""
        steered = {} if self.steered is None else {"steered_steps": self.steered}
        return steered | ({"labelled_steps": self.labelled} if self.labelled else {})

    def state_dict(self) -> dict[str, Any]:
        """Return the counts."""
        return {"steered": self.steered, "labelled": self.labelled}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.steered, self.labelled = state["steered"], state["labelled"]


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
