"""Controls: what a learned designer has to beat before its gain can be put down to feedback."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from metavpt.errors import MetaVPTError
from metavpt.feedback.aggregation import Combination, unpaired
from metavpt.hypergradients import params
from metavpt.hypergradients.estimators import Hypergradient, OuterLoss, downstream, finite
from metavpt.hypergradients.mixed_products import differentiate
from metavpt.hypergradients.params import Params
from metavpt.problem import Problem
from metavpt.strategies.learned import Fixed, Learned, Proposal, feedback_on, inner_loss
from metavpt.strategies.selection import best_candidates
from metavpt.training.budget import Budget
from metavpt.training.streams import Streams


class RandomFeedback(Learned):
    """`Learned` with g_down replaced by a random vector of the same norm: the designer moves as much, for nothing."""

    def __init__(self, *args: Any, seed: int = 0, **options: Any) -> None:
        super().__init__(*args, **options)
        self.generator = torch.Generator().manual_seed(seed)

    def outer_loss(self, true: OuterLoss, aligned: Params) -> OuterLoss:
        """Linear, so that its gradient is the same random vector wherever an estimator takes it."""
        _, g_down = downstream(true, aligned)
        noise = params.zip_with(
            lambda g: torch.randn(g.shape, generator=self.generator, dtype=g.dtype).to(g.device),
            g_down,
        )
        direction = params.scale(noise, params.norm(g_down) / params.norm(noise))
        return lambda theta_s: params.dot(direction, theta_s)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.generator.set_state(state["generator"])


class Uniform(Fixed):
    """A random task of the designer's space for every batch: the same kind of task, nothing learned."""

    def next_task(
        self, problem: Problem, streams: Streams, optimizer: Optimizer, budget: Budget
    ) -> Proposal:
        with budget.timed("data"):
            batch = next(streams.pretrain)
        with budget.timed("task"), torch.no_grad():
            return Proposal(problem.candidates(batch, 1)[0], problem.num_samples(batch), {})


class Hardest(Fixed):
    """For each sample the candidate with the highest pretraining loss (Hard View Pretraining, arXiv 2310.03940); no feedback."""

    def __init__(self, num_candidates: int = 8) -> None:
        if num_candidates < 1:
            raise MetaVPTError(f"strategy.num_candidates={num_candidates} must be at least 1")
        self.num_candidates = num_candidates

    def next_task(
        self, problem: Problem, streams: Streams, optimizer: Optimizer, budget: Budget
    ) -> Proposal:
        with budget.timed("data"):
            batch = next(streams.pretrain)
        theta = params.detach(params.named(problem.learner))

        def loss(task: Any) -> Tensor:
            budget.charge(grad_evals=1)
            return problem.per_sample_tail(theta, task)({})

        with budget.timed("designer"):
            return best_candidates(problem, batch, self.num_candidates, loss)


class Adversarial(Learned):
    """Train the designer to raise the pretraining loss, without labels (ADIOS, arXiv 2201.13100)."""

    def __init__(
        self,
        optimizer: Callable[[Iterable[Tensor]], Optimizer] | None = None,
        meta_every: int = 8,
        burn_in: int = 0,
        max_norm: float = 1.0,
    ) -> None:
        super().__init__(
            optimizer=optimizer, meta_every=meta_every, burn_in=burn_in, max_norm=max_norm
        )

    def hypergradient(
        self, problem: Problem, streams: Streams, optimizer: Optimizer, budget: Budget
    ) -> tuple[Hypergradient, Any]:
        with budget.timed("data"):
            batch = next(streams.meta)
        theta, phi = params.detach(params.named(problem.learner)), params.named(problem.designer)
        loss = inner_loss(problem, theta, batch)(phi)({})
        (by_phi,) = differentiate(loss, (phi,))
        return finite(Hypergradient(params.scale(by_phi, -1.0), float(loss.detach()), 1)), batch


class Direct(Fixed):
    """The feedback loss is added to the learner's own loss with `weight`: the reference that breaks the bottleneck on purpose.

    Every `every` steps a labelled batch trains the learner itself. What it gains is supervised training, not task design.
    `combination` says how several feedbacks make one.
    """

    def __init__(
        self, weight: float = 1.0, every: int = 1, combination: Combination | None = None
    ) -> None:
        if not weight > 0 or every < 1:
            raise MetaVPTError(
                f"strategy.weight={weight} must be positive and strategy.every={every} at least 1"
            )
        self.weight, self.every, self.combination = weight, every, unpaired(combination)

    def next_task(
        self, problem: Problem, streams: Streams, optimizer: Optimizer, budget: Budget
    ) -> Proposal:
        proposal = super().next_task(problem, streams, optimizer, budget)
        if budget.steps % self.every:
            return proposal
        with budget.timed("designer"):
            with budget.timed("data"):
                labelled = next(streams.feedback)
            combined = self.combination(feedback_on(problem, labelled))
        budget.charge(grad_evals=1 + combined.grad_evals)
        loss: Callable[[Params], Tensor] = lambda theta: self.weight * combined.outer_loss(theta)  # noqa: E731
        return proposal._replace(labelled_loss=loss, record=combined.record)
