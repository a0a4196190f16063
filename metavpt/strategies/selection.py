"""Greedy selection by first-order value: the baseline that a learned designer has to beat.

The first-order value of sample i is <w, g_i>, its own pretraining gradient along the direction of
the feedback. It needs no per-sample gradient: it is the derivative of the sample's loss along w,
(loss_i(theta + eps w) - loss_i(theta - eps w)) / (2 eps), two forward passes through the tail.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from metavpt.errors import MetaVPTError
from metavpt.feedback.aggregation import Combination
from metavpt.hypergradients import params
from metavpt.hypergradients.directions import Direction
from metavpt.hypergradients.mixed_products import central_difference
from metavpt.hypergradients.params import Params
from metavpt.problem import Problem, require
from metavpt.strategies.feedback_direction import FeedbackDirection
from metavpt.training.strategy import Proposal, TrainState, draw, num_samples, recipe_of


class SupportsCandidates(Protocol):
    """A problem that draws random tasks from its designer's space."""

    def candidates(self, batch: Any, num_candidates: int) -> list[Any]:
        """Draw random tasks of `batch`, by the batch's own randomness."""
        ...


class SupportsSelection(Protocol):
    """A problem whose samples can be scored one by one.

    It may define `pick` too, see `pick_samples`.
    """

    def per_sample_tail(self, theta: Params, task: Any) -> Callable[[Params], Tensor]:
        """Return theta_S -> the pretraining loss of each sample, of shape (B,)."""
        ...


class _ByFirstOrderValue(ABC):
    """What the two greedy strategies share: the feedback direction, renewed by a period.

    A strategy is no dataclass: OmegaConf would take one for a configuration.
    """

    def __init__(
        self,
        every: int,
        burn_in: float,
        direction: Direction | None,
        combination: Combination | None,
    ) -> None:
        self.feedback = FeedbackDirection(
            every, burn_in, direction=direction, combination=combination
        )
        self.period = self.feedback.period

    @abstractmethod
    def start(self, problem: Problem) -> None:
        """Check that the problem has what the strategy needs."""

    @abstractmethod
    def draw(self, state: TrainState) -> Sequence[Any]:
        """Draw the batches to choose from."""

    @abstractmethod
    def choose(
        self, problem: Problem, pool: Sequence[Any], score: Callable[[Any], Tensor]
    ) -> Proposal:
        """Choose by `score`, which maps a task to the values of its samples."""

    def next_task(self, state: TrainState) -> Proposal:
        """Choose the next task. Before the first feedback direction it is the recipe's."""
        pool = self.draw(state)
        with state.budget.timed("designer"):
            record = self.feedback.renew(state)
            w = self.feedback.along(state, pool[0])
            if w is None:
                return recipe_of(state, pool[0], record)._replace(steered=False)
            chosen = self.choose(state.problem, pool, sample_values(state, w))
            return chosen._replace(record={**chosen.record, **record}, steered=True)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the feedback direction."""
        return self.feedback.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.feedback.load_state_dict(state)


class Greedy(_ByFirstOrderValue):
    """For each sample the best of `num_candidates` random tasks, by first-order value.

    Until `burn_in` the learner trains on the recipe. With `Cosine`, the value of a sample is what a
    larger weight of it would do to the cosine of the whole batch.

    Args:
        num_candidates: Random tasks for each batch.
        every: Steps from one feedback gradient to the next.
        burn_in: Steps before the first one; below 1 the share of the budget that they take.
        direction: Maps g_down to the direction of the value. Default: `Dot`.
        combination: How several feedbacks are aggregated. Default: their weighted sum.
    """

    def __init__(
        self,
        num_candidates: int = 8,
        every: int = 8,
        burn_in: float = 0,
        direction: Direction | None = None,
        combination: Combination | None = None,
    ) -> None:
        at_least_one(num_candidates=num_candidates)
        super().__init__(every, burn_in, direction, combination)
        self.num_candidates = num_candidates

    def start(self, problem: Problem) -> None:
        """Check that the problem draws and scores tasks."""
        require(problem, SupportsCandidates, f"strategy {type(self).__name__}")
        require(problem, SupportsSelection, f"strategy {type(self).__name__}")

    def draw(self, state: TrainState) -> Sequence[Any]:
        """Draw one batch."""
        return [draw(state)]

    def choose(
        self, problem: Problem, pool: Sequence[Any], score: Callable[[Any], Tensor]
    ) -> Proposal:
        """Choose a task for each sample of the batch."""
        return best_candidates(problem, pool[0], self.num_candidates, score)


class GreedySelection(_ByFirstOrderValue):
    """The samples of highest first-order value of a pool, under the recipe (LESS, GREATS).

    Args:
        pool_batches: Batches in the pool that each batch is selected from.
        every: Steps from one feedback gradient to the next.
        burn_in: Steps before the first one; below 1 the share of the budget that they take.
        direction: Maps g_down to the direction of the value. Default: `Dot`.
        combination: How several feedbacks are aggregated. Default: their weighted sum.
    """

    def __init__(
        self,
        pool_batches: int = 4,
        every: int = 8,
        burn_in: float = 0,
        direction: Direction | None = None,
        combination: Combination | None = None,
    ) -> None:
        at_least_one(pool_batches=pool_batches)
        super().__init__(every, burn_in, direction, combination)
        self.pool_batches = pool_batches

    def start(self, problem: Problem) -> None:
        """Check that the problem scores samples."""
        require(problem, SupportsSelection, f"strategy {type(self).__name__}")

    def draw(self, state: TrainState) -> Sequence[Any]:
        """Draw the batches of the pool."""
        return [draw(state) for _ in range(self.pool_batches)]

    def choose(
        self, problem: Problem, pool: Sequence[Any], score: Callable[[Any], Tensor]
    ) -> Proposal:
        """Select as many samples as a batch has."""
        return best_samples(problem, pool, score)


def sample_values(state: TrainState, w: Params) -> Callable[[Any], Tensor]:
    """Return task -> the first-order value along `w` of each of its samples, of shape (B,)."""
    problem = require(state.problem, SupportsSelection, "selection")
    theta = params.detach(params.named(state.problem.learner))
    aligned = {name: theta[name] for name in w}

    @torch.no_grad()
    def values(task: Any) -> Tensor:
        losses = problem.per_sample_tail(theta, task)
        slope, scale = central_difference(losses, aligned, w)
        return slope * scale

    return values


@torch.no_grad()
def best_candidates(
    problem: Problem, batch: Any, num_candidates: int, score: Callable[[Any], Tensor]
) -> Proposal:
    """Choose for each sample of `batch` the random task with the highest score."""
    tasks = require(problem, SupportsCandidates, "selection").candidates(batch, num_candidates)
    scores = torch.stack([score(task) for task in tasks])  # (num_candidates, B)
    best, which = scores.max(dim=0)
    task = pick_samples(problem, tasks, which, torch.arange(scores.shape[1], device=which.device))
    record = {"value": float(best.mean()), "mean_candidate_value": float(scores.mean())}
    return Proposal(task, num_samples(problem, batch), record)


@torch.no_grad()
def best_samples(problem: Problem, pool: Sequence[Any], score: Callable[[Any], Tensor]) -> Proposal:
    """Choose from the batches of `pool` the samples with the highest scores, one batch of them."""
    tasks = [problem.recipe(batch) for batch in pool]
    scores = torch.stack([score(task) for task in tasks])  # (pool_batches, B)
    size = scores.shape[1]
    top = scores.flatten().topk(size).indices
    kept = pick_samples(problem, tasks, top // size, top % size)
    # batches of tokens differ in size: count a batch of mean size
    total = sum(num_samples(problem, batch) for batch in pool)
    record = {"value": float(scores.flatten()[top].mean()), "pool_value": float(scores.mean())}
    return Proposal(kept, total // len(pool), record)


def pick_samples(problem: Problem, tasks: Sequence[Any], which: Tensor, sample: Tensor) -> Any:
    """Assemble a task from samples of several tasks.

    Args:
        problem: Its own `pick(tasks, which, sample)` is used if it defines one. By default every
            tensor of a task has the samples in its first dimension.
        tasks: The tasks to take samples from.
        which: Task of the k-th sample, int64 of shape (n,).
        sample: Its place in that task, int64 of shape (n,).
    """
    if pick := getattr(problem, "pick", None):
        return pick(tasks, which, sample)

    def stacked(*parts: Tensor) -> Tensor:
        return torch.stack(parts)[which.to(parts[0].device), sample.to(parts[0].device)]

    return tree_map(stacked, *tasks)


def at_least_one(**values: int) -> None:
    """Raise MetaVPTError for an option of the strategy that is below 1."""
    for name, value in values.items():
        if value < 1:
            raise MetaVPTError(f"strategy.{name}={value} must be at least 1")
