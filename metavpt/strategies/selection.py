"""Greedy gradient-alignment selection: what to compare a learned designer with.

The value of sample i of a task is <w, g_i>, its own pretraining gradient along the feedback direction. It needs no per-sample
gradient: it is the derivative of the sample's loss along w, (loss_i(theta + eps w) - loss_i(theta - eps w)) / (2 eps), two forward
passes through the tail.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from metavpt.errors import MetaVPTError, NonFiniteError
from metavpt.feedback.aggregation import Combination, unpaired
from metavpt.hypergradients import params
from metavpt.hypergradients.directions import Direction, Dot
from metavpt.hypergradients.distributed_losses import averaged
from metavpt.hypergradients.estimators import downstream
from metavpt.hypergradients.mixed_products import central_difference, value_and_gradient
from metavpt.hypergradients.optimizer_updates import from_torch
from metavpt.problem import Problem
from metavpt.strategies.learned import Fixed, Proposal, feedback_on
from metavpt.training.budget import Budget
from metavpt.training.streams import Streams


class Greedy(Fixed):
    """For each image the best of `num_candidates` random tasks of the designer's space, by first-order value. Nothing is learned.

    The feedback direction is refreshed every `refresh_every` steps, and `combination` says how several feedbacks make one; until `burn_in`
    the ordinary recipe is trained on. Directions that need g_pre take it from the ordinary recipe's task of the batch at hand. With
    `Cosine`, a sample is valued by what weighing it more would do to the cosine of the whole batch. All that it costs is charged to the
    budget.
    """

    def __init__(
        self,
        num_candidates: int = 8,
        direction: Direction | None = None,
        refresh_every: int = 8,
        burn_in: int = 0,
        combination: Combination | None = None,
    ) -> None:
        _at_least_one(num_candidates=num_candidates, refresh_every=refresh_every)
        self.num_candidates, self.direction = num_candidates, direction or Dot()
        self.refresh_every, self.burn_in, self.combination = (
            refresh_every,
            burn_in,
            unpaired(combination),
        )
        self.num_skipped = 0
        self._g_down: params.Params | None = None

    def next_task(
        self, problem: Problem, streams: Streams, optimizer: Optimizer, budget: Budget
    ) -> Proposal:
        with budget.timed("data"):
            batch = self.draw(problem, streams)
        record: dict[str, float] = {}
        with budget.timed("designer"):
            if budget.steps >= self.burn_in and budget.steps % self.refresh_every == 0:
                self._g_down, record = self._refresh(problem, streams, budget)
            if self._g_down is None:
                return self.without_feedback(problem, batch)
            theta = params.detach(params.named(problem.learner))
            aligned = {name: theta[name] for name in self._g_down}
            w = self._direction(problem, batch, theta, aligned, optimizer, budget)
            proposal = self.propose(problem, batch, theta, w, budget)
            return proposal._replace(record={**proposal.record, **record})

    def draw(self, problem: Problem, streams: Streams) -> Any:
        """The unlabelled batch to choose for."""
        return next(streams.pretrain)

    def without_feedback(self, problem: Problem, batch: Any) -> Proposal:
        """What is trained on before the first feedback."""
        with torch.no_grad():
            return Proposal(problem.recipe(batch), problem.num_samples(batch), {})

    def propose(
        self, problem: Problem, batch: Any, theta: params.Params, w: params.Params, budget: Budget
    ) -> Proposal:
        """The proposal for `batch`, given the direction w along which loss is worth having, on theta_S."""
        return self.select(problem, batch, self._score(problem, theta, w, budget))

    def select(self, problem: Problem, batch: Any, score: Callable[[Any], Tensor]) -> Proposal:
        """The proposal for `batch`, given task -> value of each of its samples, (B,)."""
        return best_candidates(problem, batch, self.num_candidates, score)

    def _refresh(
        self, problem: Problem, streams: Streams, budget: Budget
    ) -> tuple[params.Params | None, dict[str, float]]:
        with budget.timed("data"):
            labelled = next(streams.feedback)
        feedback = feedback_on(problem, labelled)
        combined = self.combination(feedback)
        budget.charge(grad_evals=1 + combined.grad_evals)
        try:
            return downstream(combined.outer_loss, feedback.aligned)[1], combined.record
        except NonFiniteError:
            self.num_skipped += 1
            return None, {**combined.record, "skipped_updates": float(self.num_skipped)}

    def _score(
        self, problem: Problem, theta: params.Params, w: params.Params, budget: Budget
    ) -> Callable[[Any], Tensor]:
        aligned = {name: theta[name] for name in w}

        @torch.no_grad()
        def score(task: Any) -> Tensor:
            budget.charge(grad_evals=1)
            losses = problem.per_sample_tail(theta, task)
            slope, scale = central_difference(losses, aligned, w)
            return slope * scale

        return score

    def _direction(
        self,
        problem: Problem,
        batch: Any,
        theta: params.Params,
        aligned: params.Params,
        optimizer: Optimizer,
        budget: Budget,
    ) -> params.Params:
        g_down = self._g_down or {}
        g_pre = None
        if self.direction.needs_g_pre:
            with torch.no_grad():
                loss = problem.pretrain_tail(theta, problem.recipe(self._reference_batch(batch)))
            budget.charge(grad_evals=1)
            g_pre = value_and_gradient(averaged(loss), aligned)[1]
        live = params.named(problem.learner)
        update = (
            from_torch(optimizer, {name: live[name] for name in aligned})
            if self.direction.needs_update
            else None
        )
        return self.direction(g_down, g_pre, update).w

    def _reference_batch(self, batch: Any) -> Any:
        """The batch that g_pre is taken on, of what `draw` gave."""
        return batch

    def state_dict(self) -> dict[str, Any]:
        return {"g_down": self._g_down, "num_skipped": self.num_skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._g_down, self.num_skipped = state["g_down"], state["num_skipped"]


class GreedySelection(Greedy):
    """The most valuable samples of a pool of `pool_batches` batches, under the ordinary recipe: data selection as LESS and GREATS do."""

    def __init__(
        self,
        pool_batches: int = 4,
        direction: Direction | None = None,
        refresh_every: int = 8,
        burn_in: int = 0,
        combination: Combination | None = None,
    ) -> None:
        super().__init__(1, direction, refresh_every, burn_in, combination)
        _at_least_one(pool_batches=pool_batches)
        self.pool_batches = pool_batches

    def draw(self, problem: Problem, streams: Streams) -> list[Any]:
        return [next(streams.pretrain) for _ in range(self.pool_batches)]

    def without_feedback(self, problem: Problem, batch: list[Any]) -> Proposal:
        return super().without_feedback(problem, batch[0])

    @torch.no_grad()
    def select(
        self, problem: Problem, batch: list[Any], score: Callable[[Any], Tensor]
    ) -> Proposal:
        tasks = [problem.recipe(part) for part in batch]
        scores = torch.stack([score(task) for task in tasks])  # (pool_batches, B)
        size = scores.shape[1]
        top = scores.flatten().topk(size).indices
        kept = problem.pick(tasks, top // size, top % size)
        num_samples = sum(map(problem.num_samples, batch)) // len(
            batch
        )  # tokens, where rows of the pool differ, as in a batch on average
        return Proposal(
            kept,
            num_samples,
            {"value": float(scores.flatten()[top].mean()), "pool_value": float(scores.mean())},
        )

    def _reference_batch(self, batch: list[Any]) -> Any:
        return batch[0]


@torch.no_grad()
def best_candidates(
    problem: Problem, batch: Any, num_candidates: int, score: Callable[[Any], Tensor]
) -> Proposal:
    """For each sample of `batch` the candidate task with the highest score."""
    tasks = problem.candidates(batch, num_candidates)
    scores = torch.stack([score(task) for task in tasks])  # (num_candidates, B)
    best, which = scores.max(dim=0)
    task = problem.pick(tasks, which, torch.arange(scores.shape[1], device=which.device))
    return Proposal(
        task,
        problem.num_samples(batch),
        {"value": float(best.mean()), "mean_candidate_value": float(scores.mean())},
    )


def _at_least_one(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise MetaVPTError(f"strategy.{name}={value} must be at least 1")
