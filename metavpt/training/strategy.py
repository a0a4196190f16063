"""The interface between the training loop and a strategy: `TrainState` in, `Proposal` out."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from metavpt.errors import MetaVPTError
from metavpt.hypergradients.params import Params
from metavpt.problem import Problem, supports
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
