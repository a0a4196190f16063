"""Where the next task comes from: the only place in which a fixed recipe, a control and the learned designer differ."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.func import functional_call
from torch.optim import Optimizer

from metavpt.distributed import collectives
from metavpt.errors import MetaVPTError, NonFiniteError
from metavpt.feedback.aggregation import Combination, Feedback, Pair, WeightedSum
from metavpt.hypergradients import params
from metavpt.hypergradients.distributed_losses import averaged
from metavpt.hypergradients.estimators import (
    Estimator,
    Hypergradient,
    InnerLoss,
    OneStep,
    OuterLoss,
)
from metavpt.hypergradients.mixed_products import Loss
from metavpt.hypergradients.optimizer_updates import from_torch
from metavpt.hypergradients.params import Params
from metavpt.problem import Problem
from metavpt.profiling.timers import phase
from metavpt.training.budget import Budget
from metavpt.training.streams import Streams


class Proposal(NamedTuple):
    """The next task, without a graph; how many unlabelled samples it holds; what the strategy measured on the way, for the log.

    `labelled_loss`, theta -> scalar, is added to the learner's own loss. It breaks the bottleneck between labels and learner, and only the
    control that exists to show what that brings sets it.
    """

    task: Any
    num_samples: int
    record: dict[str, float]
    labelled_loss: Callable[[Params], Tensor] | None = None

    def loss(self, problem: Problem, theta: Params) -> Tensor:
        """What the learner takes a step on."""
        loss = problem.pretrain_loss(theta, self.task)
        return loss if self.labelled_loss is None else loss + self.labelled_loss(theta)


class Strategy(Protocol):
    """`start` once, then `next_task` for every step of the learner. Whatever it spends beside the step itself it charges to the budget."""

    def start(self, problem: Problem) -> None: ...

    def next_task(
        self, problem: Problem, streams: Streams, optimizer: Optimizer, budget: Budget
    ) -> Proposal: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Fixed:
    """The ordinary recipe: no designer, no feedback."""

    def start(self, problem: Problem) -> None:
        pass

    def next_task(
        self, problem: Problem, streams: Streams, optimizer: Optimizer, budget: Budget
    ) -> Proposal:
        with budget.timed("data"):
            batch = next(streams.pretrain)
        with budget.timed("task"), torch.no_grad():
            return Proposal(problem.recipe(batch), problem.num_samples(batch), {})

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class Designed:
    """The designer's tasks, the designer trained every `meta_every` steps, after `burn_in`; a subclass says how.

    With a designer learning rate of 0 this is the designer as it started; where that equals the recipe, the run equals `Fixed` bit for
    bit. An update with a non-finite loss or hypergradient is skipped and counted.
    """

    def __init__(self, meta_every: int, burn_in: int) -> None:
        if meta_every < 1 or burn_in < 0:
            raise MetaVPTError(
                f"strategy: meta_every={meta_every} must be at least 1 and burn_in={burn_in} at least 0"
            )
        self.meta_every, self.burn_in = meta_every, burn_in
        self.num_skipped = 0

    def start(self, problem: Problem) -> None:
        if not params.named(problem.designer):
            raise MetaVPTError(
                f"strategy {type(self).__name__}: the designer {type(problem.designer).__name__} has no trainable parameter; "
                "give the problem a designer, or use strategy=fixed"
            )

    def next_task(
        self, problem: Problem, streams: Streams, optimizer: Optimizer, budget: Budget
    ) -> Proposal:
        record: dict[str, float] = {}
        if self.updates_at(budget.steps):
            with budget.timed("designer"):
                record = self.update_designer(problem, streams, optimizer, budget)
        with budget.timed("data"):
            batch = next(streams.pretrain)
        with budget.timed("task"), torch.no_grad():
            return Proposal(problem.designer(batch), problem.num_samples(batch), record)

    def updates_at(self, step: int) -> bool:
        """Whether the designer is updated before this step."""
        return step >= self.burn_in and step % self.meta_every == 0

    def update_designer(
        self, problem: Problem, streams: Streams, optimizer: Optimizer, budget: Budget
    ) -> dict[str, float]:
        """`attempt_update`, or a count of those that failed."""
        try:
            return self.attempt_update(problem, streams, optimizer, budget)
        except NonFiniteError:
            self.num_skipped += 1
            return {"skipped_updates": float(self.num_skipped)}

    def attempt_update(
        self, problem: Problem, streams: Streams, optimizer: Optimizer, budget: Budget
    ) -> dict[str, float]:
        """One update of phi, charged to the budget, and its record; raises NonFiniteError, with phi as it was, where it cannot be had."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        return {"num_skipped": self.num_skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_skipped = state["num_skipped"]


class Learned(Designed):
    """The designer's tasks, the designer trained by hypergradients of the feedback loss, one step at a time.

    `combination` says how several feedbacks make one.
    """

    def __init__(
        self,
        estimator: Estimator | None = None,
        optimizer: Callable[[Iterable[Tensor]], Optimizer] | None = None,
        meta_every: int = 8,
        burn_in: int = 0,
        max_norm: float = 1.0,
        combination: Combination | None = None,
    ) -> None:
        super().__init__(meta_every, burn_in)
        self.estimator = estimator or OneStep()
        self.make_optimizer = optimizer or (
            lambda parameters: torch.optim.Adam(parameters, lr=2e-4)
        )
        self.max_norm = max_norm
        self.combination = combination or WeightedSum()
        self._solutions: dict[str, Params | None] = {}

    def start(self, problem: Problem) -> None:
        super().start(problem)
        self.optimizer = self.make_optimizer(params.named(problem.designer).values())

    def update_designer(
        self, problem: Problem, streams: Streams, optimizer: Optimizer, budget: Budget
    ) -> dict[str, float]:
        """One step of phi: heads, g_down on labelled batches, the product on unlabelled ones, the regularizer, the designer's optimizer."""
        num_skipped = self.num_skipped
        record = super().update_designer(problem, streams, optimizer, budget)
        if self.num_skipped > num_skipped:
            self._solutions = {}  # what a failed update solved for is no place to start from
        return record

    def attempt_update(
        self, problem: Problem, streams: Streams, optimizer: Optimizer, budget: Budget
    ) -> dict[str, float]:
        hypergradient, batch = self.hypergradient(problem, streams, optimizer, budget)
        budget.charge(grad_evals=hypergradient.grad_evals)
        regularizer = self._descend(problem, hypergradient, batch)
        return {
            "value": hypergradient.value,
            "regularizer": regularizer,
            **hypergradient.diagnostics,
        }

    def hypergradient(
        self, problem: Problem, streams: Streams, optimizer: Optimizer, budget: Budget
    ) -> tuple[Hypergradient, Any]:
        """The estimate and an unlabelled batch that it was made on."""
        with budget.timed("data"):
            unlabelled = [next(streams.meta) for _ in range(self.estimator.num_batches)]
            labelled = next(streams.feedback)
        feedback = feedback_on(problem, labelled)
        combined = self.combination(feedback, unlabelled)
        estimates = {
            name: self._estimate(name, pair, feedback, optimizer)
            for name, pair in combined.pairs.items()
        }
        self._solutions = {name: estimate.solution for name, estimate in estimates.items()}
        return combined.mean(estimates), unlabelled[0]

    @phase("product")
    def _estimate(
        self, name: str, pair: Pair, feedback: Feedback, optimizer: Optimizer
    ) -> Hypergradient:
        problem, aligned = feedback.problem, feedback.aligned
        live = params.named(problem.learner)
        return self.estimator(
            [inner_loss(problem, feedback.theta, batch) for batch in pair.unlabelled],
            self.outer_loss(pair.outer_loss, aligned),
            aligned,
            params.named(problem.designer),
            update=from_torch(optimizer, {name: live[name] for name in aligned})
            if self.estimator.needs_update
            else None,
            start=self._solutions.get(name),
        )

    def outer_loss(self, true: OuterLoss, aligned: Params) -> OuterLoss:
        """What the estimator differentiates in place of `true`, theta_S -> feedback loss, at theta_S = `aligned`: for controls."""
        return true

    @phase("phi")
    def _descend(self, problem: Problem, hypergradient: Hypergradient, batch: Any) -> float:
        phi = params.named(problem.designer)
        self.optimizer.zero_grad(set_to_none=True)
        regularizer = problem.regularizer(
            functional_call(problem.designer, collectives.enter(phi), (batch,))
        )
        if regularizer is not None:
            regularizer.backward()
        for name, p in phi.items():
            p.grad = (
                hypergradient.by_phi[name]
                if p.grad is None
                else p.grad + hypergradient.by_phi[name]
            )
        norm = torch.nn.utils.clip_grad_norm_(phi.values(), self.max_norm)
        if not torch.isfinite(
            norm
        ):  # the hypergradient is finite: it is the regularizer, through what the designer made
            raise NonFiniteError(
                f"the gradient of the designer's regularizer is not finite (norm {float(norm):.3g})"
            )
        self.optimizer.step()
        return 0.0 if regularizer is None else float(collectives.leave(regularizer.detach()))

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "solutions": self._solutions,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.optimizer.load_state_dict(state["optimizer"])
        self._solutions = state["solutions"]


def inner_loss(problem: Problem, theta: Params, batch: Any) -> InnerLoss:
    """phi -> (theta_S -> pretraining loss of the task that the designer with parameters phi makes of `batch`)."""

    def at_phi(phi: Params) -> Loss:
        with phase("task"):
            task = functional_call(problem.designer, collectives.enter(phi), (batch,))
        return averaged(problem.pretrain_tail(theta, task))

    return at_phi


def feedback_on(problem: Problem, labelled: Any) -> Feedback:
    """The feedback of a labelled batch at the learner's theta, once the heads are fitted."""
    with phase("heads"):
        problem.fit_heads()
    theta = params.detach(params.named(problem.learner))
    return Feedback(
        problem, theta, {name: theta[name] for name in aligned_names(problem, theta)}, labelled
    )


def aligned_names(problem: Problem, theta: Params) -> list[str]:
    """The names of theta_S, checked against the learner's."""
    names = list(problem.aligned_parameters())
    unknown = [name for name in names if name not in theta]
    if unknown or not names:
        what = (
            f"names {unknown[0]!r}, which is no parameter of the learner" if unknown else "is empty"
        )
        raise MetaVPTError(
            f"{type(problem).__name__}.aligned_parameters {what}; the learner's begin with {', '.join(list(theta)[:3])}"
        )
    return names
