"""The learned designer: hypergradients of the feedback loss train it, one update at a time."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor
from torch.func import functional_call
from torch.optim import Optimizer

from metavpt.distributed import collectives
from metavpt.errors import MetaVPTError, NonFiniteError, UnsolvedError
from metavpt.feedback.aggregation import (
    Combination,
    Combined,
    Feedback,
    Pair,
    WeightedSum,
    unpaired,
)
from metavpt.hypergradients import params, trees
from metavpt.hypergradients.distributed_losses import averaged
from metavpt.hypergradients.estimators import (
    Estimator,
    Hypergradient,
    InnerLoss,
    OneStep,
    OuterLoss,
    downstream,
)
from metavpt.hypergradients.mixed_products import Loss, reached, value_and_gradient
from metavpt.hypergradients.optimizer_updates import Update, from_torch, last_grad_norm
from metavpt.hypergradients.params import Params
from metavpt.learners.teacher import Teacher
from metavpt.problem import Problem, aligned_names, supports
from metavpt.profiling import phase, uncounted
from metavpt.strategies.random_direction import RandomDirection
from metavpt.training.schedule import Period, make_optimizer
from metavpt.training.strategy import Proposal, TrainState, designed, draw, num_samples

MakeOptimizer = Callable[[Iterable[Tensor]], Optimizer]


class SharedTrunk(Protocol):
    """A problem that computes once what does not depend on theta_S, for estimators' sake."""

    def pretrain_tail(self, theta: Params, task: Any) -> Callable[[Params], Tensor]:
        """Return theta_S -> pretraining loss.

        Compute what does not depend on theta_S before the function is returned.
        """
        ...


class TailParameters(Protocol):
    """A problem whose `pretrain_tail` returns a function of more parameters than theta_S."""

    def tail_parameters(self) -> Sequence[str]:
        """Return names that the function may be given, theta_S among them: all but the trunk's."""
        ...


class MeasuresFeedback(Protocol):
    """A problem that measures its feedback as gradients are taken of it.

    Attributes:
        feedback_record: The newest measurements, for the log.
    """

    feedback_record: Mapping[str, float]


class ReadsHeads(Protocol):
    """A problem whose designer reads the directions of the feedback's heads."""

    def describe_heads(self, labelled: Any) -> None:
        """Give the designer the directions of the heads that a labelled batch fits."""
        ...


class Learned:
    """The designer's tasks. Every `every` steps, hypergradients update the designer.

    With a designer learning rate of 0 this is the designer as it started. Where that equals the
    recipe, the run equals `Fixed` bit for bit. An update with a non-finite loss or hypergradient is
    skipped and counted, and so is one whose implicit solve ended no better than x = 0.

    Args:
        estimator: How the hypergradient is estimated. Default: `OneStep()`.
        optimizer: Makes the designer's optimizer. Default: Adam with a learning rate of 2e-4.
        every: Steps from one update to the next.
        burn_in: Steps before the first update; below 1 the share of the budget
            that they take.
        max_norm: The norm at which the designer's gradient is clipped.
        combination: How several feedbacks are aggregated. Default: their weighted sum.
        random_seed: With a seed, replace g_down by a random vector of equal norm. This is the
            control: the designer's updates keep their size and lose the feedback.
        feedback_every: Updates that use one g_down. Above 1 the feedback loss is replaced by
            <g_down, theta>, its linear part where g_down was taken: less noise for less time, where
            a labelled batch is large.
        own_batch: Update on the whole batch that the learner trains on next, instead of one of the
            stream of updates. The learner then trains on the task as the update saw it, before phi
            moved. It is made once, and an EMA teacher is asked about it once, in float32. Where an
            estimator takes several batches, this is the first; the teacher's answers are kept of
            the batch that it reads last.

    Attributes:
        own: The learner's next batch, between an update on it and the learner's step.
    """

    def __init__(
        self,
        estimator: Estimator | None = None,
        optimizer: MakeOptimizer | None = None,
        every: int = 8,
        burn_in: float = 0,
        max_norm: float = 1.0,
        combination: Combination | None = None,
        random_seed: int | None = None,
        feedback_every: int = 1,
        own_batch: bool = False,
    ) -> None:
        if feedback_every < 1:
            raise MetaVPTError(f"strategy.feedback_every={feedback_every} must be at least 1")
        if feedback_every > 1:
            combination = unpaired(combination)
        if own_batch and combination and combination.pairs_batches:
            raise MetaVPTError(
                f"strategy.own_batch=true: {type(combination).__name__} splits a batch, so no "
                "update makes the task of all of it; use WeightedSum or TorchJD"
            )
        self.own_batch = own_batch
        self.own: OwnBatch | None = None
        self.feedback_every = feedback_every
        self._kept: KeptGradient | None = None
        self.period = Period(every, burn_in)
        self.estimator = estimator or OneStep()
        self.combination = combination or WeightedSum()
        self.designer = DesignerOptimizer(optimizer, max_norm)
        self.random = None if random_seed is None else RandomDirection(random_seed)
        self.step = LearnerStep()
        self.num_skipped = self.num_unsolved = 0
        self._solutions: dict[str, Params | None] = {}
        self._warning: str | None = None

    @property
    def optimizer(self) -> Optimizer:
        """The designer's optimizer, after `start`."""
        return self.designer.optimizer

    def start(self, problem: Problem) -> None:
        """Make the designer's optimizer."""
        self.designer.start(problem, f"strategy {type(self).__name__}")

    def next_task(self, state: TrainState) -> Proposal:
        """Update the designer if it is due, and make its task of the next batch."""
        record: dict[str, float] = {}
        num_updates = self.period.num_updates
        if self.period.due(state.budget):
            with state.budget.timed("designer"):
                record = self.update(state)
        own, self.own = self.own, None
        if own is None:
            num_updates = self.period.num_updates
            proposal = designed(state, draw(state), record)
        elif own.task is None:  # the update failed before it made one, and phi has not moved
            proposal = designed(state, own.batch, record)
        else:
            proposal = Proposal(own.task, num_samples(state.problem, own.batch), record)
        steered = None if self.random else num_updates > 0
        warning, self._warning = self._warning, None
        return proposal._replace(steered=steered, warning=warning)

    def update(self, state: TrainState) -> dict[str, float]:
        """Estimate the hypergradient and apply it, or count an update that is skipped."""
        try:
            hypergradient, batch = self.estimate(state)
            return self.apply(state, hypergradient, batch)
        except NonFiniteError:
            self.num_skipped += 1
            self._solutions = {}  # a failed update leaves no solution to start from
            return {"skipped_updates": float(self.num_skipped)}
        except UnsolvedError as error:
            state.budget.charge(grad_evals=error.grad_evals)
            self.num_unsolved += 1
            self._solutions = {}
            if self.num_unsolved == 1:
                self._warning = f"designer update skipped: {error}. unsolved_updates counts them"
            return {"unsolved_updates": float(self.num_unsolved)}

    def estimate(self, state: TrainState) -> tuple[Hypergradient, Any]:
        """Estimate the hypergradient on fresh batches, in the common unit of all estimators.

        Returns:
            The hypergradient, see `Hypergradient.relative`, and one of the unlabelled batches.
        """
        self.own = OwnBatch(draw(state)) if self.own_batch else None
        unlabelled = [self.own.batch] if self.own else []
        with state.budget.timed("data"):
            while len(unlabelled) < self.estimator.num_batches:
                unlabelled.append(next(state.streams.meta))
        feedback, combined = self._feedback(state, unlabelled)
        estimates = {
            name: self._estimate(name, pair, feedback, state.optimizer)
            for name, pair in combined.pairs.items()
        }
        self._solutions = {name: estimate.solution for name, estimate in estimates.items()}
        return combined.mean(estimates), unlabelled[0]

    def _feedback(self, state: TrainState, unlabelled: Sequence[Any]) -> tuple[Feedback, Combined]:
        """Combine the feedbacks of a new labelled batch, or reuse the gradient of the last one."""
        kept = self._kept
        if kept is None or kept.num_uses == self.feedback_every:
            with state.budget.timed("data"):
                labelled = next(state.streams.feedback)
            feedback = feedback_on(state.problem, labelled)
            if supports(reader := cast(object, state.problem), ReadsHeads):
                reader.describe_heads(labelled)
            combined = self.combination(feedback, unlabelled)
            if self.feedback_every == 1:
                return feedback, combined
            loss, g_down = downstream(combined.outer_loss, feedback.aligned)
            kept = KeptGradient(loss, g_down, combined.record, 0)
        self._kept = kept._replace(num_uses=kept.num_uses + 1)
        record = {**kept.record, "feedback_loss": kept.loss}
        pair = Pair(_linear(kept.g_down), unlabelled)
        return feedback_at(state.problem, None), Combined({"feedback": pair}, record=record)

    def apply(
        self, state: TrainState, hypergradient: Hypergradient, batch: Any
    ) -> dict[str, float]:
        """Take one step of the designer's optimizer, and return the record of the update."""
        taken = self.designer.step(state.problem, hypergradient.by_phi, batch)
        self.period.num_updates += 1
        measured = feedback_record(state.problem)
        return {"value": hypergradient.value, **taken, **hypergradient.diagnostics, **measured}

    @phase("product")
    def _estimate(
        self, name: str, pair: Pair, feedback: Feedback, optimizer: Optimizer
    ) -> Hypergradient:
        problem, aligned = feedback.problem, feedback.aligned
        phi = params.named(problem.designer)
        inner = [inner_loss(problem, feedback.theta, batch) for batch in pair.unlabelled]
        if self.own:
            phi = params.clone(phi)  # a task may hold phi, and its step comes after phi moved
            inner[0] = inner_loss(problem, feedback.theta, self.own.batch, self.own.keep)
        outer_loss = pair.outer_loss
        if self.random:
            outer_loss = _linear(self.random.like(downstream(outer_loss, aligned)[1]))
        theta, update = aligned, None
        if self.estimator.needs_update:
            theta, update = self.step(
                problem, feedback.theta, aligned, lambda: inner[0](phi), optimizer
            )
            outer_loss = _through_aligned(outer_loss, aligned)
        with answers_kept(problem, self.estimator.num_batches):
            found = self.estimator(
                inner, outer_loss, theta, phi, update=update, start=self._solutions.get(name)
            )
        live = params.named(problem.learner)
        own = {id(live[name]) for name in aligned}
        return found.relative(
            lambda: (
                last_grad_norm(optimizer, lambda p: id(p) in own)
                or _gradient_norm(inner[0], phi, aligned)  # before the learner's first step
            )
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the designer's optimizer, what solves start from, and the counts."""
        return {
            "num_skipped": self.num_skipped,
            "period": self.period.state_dict(),
            "num_unsolved": self.num_unsolved,
            "optimizer": self.designer.state_dict(),
            "solutions": self._solutions,
            "kept": self._kept and tuple(self._kept),
            "random": self.random.state_dict() if self.random else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.num_skipped, self.num_unsolved = state["num_skipped"], state["num_unsolved"]
        self.period.load_state_dict(state["period"])
        self.designer.load_state_dict(state["optimizer"])
        self._solutions = state["solutions"]
        kept = state.get("kept")  # absent in checkpoints of older versions
        self._kept = KeptGradient(*kept) if kept else None
        if self.random:
            self.random.load_state_dict(state["random"])


class OwnBatch:
    """The batch that the learner trains on next.

    Attributes:
        batch: The batch.
        task: Its task, without a graph. None until an update makes it.
    """

    def __init__(self, batch: Any) -> None:
        self.batch, self.task = batch, None

    def keep(self, task: Any) -> None:
        """Keep the task."""
        self.task = trees.map_tensors(Tensor.detach, task)


class KeptGradient(NamedTuple):
    """The gradient of the feedback loss where it was last taken.

    Attributes:
        loss: The feedback loss there.
        g_down: Its gradient by theta_S.
        record: Measurements of the combination.
        num_uses: Updates that have used it.
    """

    loss: float
    g_down: Params
    record: dict[str, float]
    num_uses: int


class DesignerOptimizer:
    """The designer's optimizer. It adds the regularizer's gradient and clips the sum.

    Args:
        make: Makes the optimizer. Default: Adam with a learning rate of 2e-4.
        max_norm: The norm at which the gradient is clipped.
    """

    def __init__(self, make: MakeOptimizer | None = None, max_norm: float = 1.0) -> None:
        self.make = make or (lambda parameters: torch.optim.Adam(parameters, lr=2e-4))
        self.max_norm = max_norm

    def start(self, problem: Problem, owner: str) -> None:
        """Make the optimizer.

        Raises:
            MetaVPTError: The designer has no trainable parameter.
        """
        parameters = trainable(problem.designer, owner).values()
        self.optimizer = make_optimizer(self.make, parameters, "strategy.optimizer")

    @phase("phi")
    def step(self, problem: Problem, by_phi: Params, batch: Any) -> dict[str, float]:
        """Descend `by_phi` and the regularizer of the task of `batch`.

        Returns:
            The record: the regularizer, and its share of the gradient by norms, in [0, 1].

        Raises:
            NonFiniteError: The regularizer's gradient is not finite. Phi is as it was.
        """
        phi = params.named(problem.designer)
        self.optimizer.zero_grad(set_to_none=True)
        regularizer = problem.regularizer(
            functional_call(problem.designer, collectives.enter(phi), (batch,))
        )
        if regularizer is not None:
            regularizer.backward()
        share = _share([p.grad for p in phi.values() if p.grad is not None], by_phi)
        for name, p in phi.items():
            p.grad = by_phi[name] if p.grad is None else p.grad + by_phi[name]
        norm = torch.nn.utils.clip_grad_norm_(phi.values(), self.max_norm)
        if not torch.isfinite(norm):  # the hypergradient was checked: it is the regularizer
            raise NonFiniteError(
                f"the gradient of the designer's regularizer is not finite (norm {float(norm):.3g})"
            )
        self.optimizer.step()
        value = 0.0 if regularizer is None else float(collectives.leave(regularizer.detach()))
        return {"regularizer": value, "regularizer_share": share}

    def state_dict(self) -> dict[str, Any]:
        """Return the optimizer's state."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.optimizer.load_state_dict(state)


def trainable(designer: torch.nn.Module, owner: str) -> Params:
    """Return the designer's trainable parameters.

    Raises:
        MetaVPTError: There are none. The message begins with `owner`.
    """
    phi = params.named(designer)
    if not phi:
        raise MetaVPTError(
            f"{owner}: the designer {type(designer).__name__} has no trainable parameter; "
            "give the problem a designer, or use strategy=fixed"
        )
    return phi


def tail_loss(problem: Problem, theta: Params, task: Any) -> Callable[[Params], Tensor]:
    """Return theta_S -> pretraining loss of `task`, by the problem's `pretrain_tail` if any."""
    if supports(problem, SharedTrunk):
        return problem.pretrain_tail(theta, task)
    return lambda theta_s: problem.pretrain_loss({**theta, **theta_s}, task)


def inner_loss(
    problem: Problem, theta: Params, batch: Any, keep: Callable[[Any], None] | None = None
) -> InnerLoss:
    """Return phi -> (theta_S -> pretraining loss of the designer's task of `batch`).

    Args:
        problem: The problem.
        theta: All parameters of the learner.
        batch: An unlabelled batch.
        keep: Called with each task.
    """

    def at_phi(phi: Params) -> Loss:
        with phase("task"):
            task = functional_call(problem.designer, collectives.enter(phi), (batch,))
        if keep:
            keep(task)
        return averaged(tail_loss(problem, theta, task))

    return at_phi


def answers_kept(problem: Problem, num_tasks: int) -> AbstractContextManager[None]:
    """Return a block in which a `Teacher` is asked once about each of `num_tasks` tasks.

    An estimator may make them several times: with and without their graphs.
    """
    teacher = getattr(problem, "teacher", None)
    return teacher.keep(num_tasks) if isinstance(teacher, Teacher) else nullcontext()


class LearnerStep:
    """Reads the step that the learner's optimizer is about to take, clipping included.

    It covers theta_S and the other parameters that the pretraining tail depends on, such as a
    projection head (`TailParameters`): their gradients cost no extra pass, they count in the norm
    that the trainer clips by, and they move in an unrolled step. The rest is the trunk. Its
    gradient counts by its norm in the learner's last step, held constant. Where the trunk is
    frozen, or the problem has no `pretrain_tail`, nothing is neglected.
    """

    def __init__(self) -> None:
        self._names: set[str] | None = None  # found at first use

    def __call__(
        self,
        problem: Problem,
        theta: Params,
        aligned: Params,
        make_loss: Callable[[], Loss],
        optimizer: Optimizer,
    ) -> tuple[Params, Update]:
        """Return the parameters of the step, and the step.

        Args:
            problem: The problem that is trained.
            theta: All parameters of the learner.
            aligned: theta_S, a part of `theta`.
            make_loss: Makes the function theta_S -> pretraining loss, of any task.
            optimizer: The learner's.
        """
        if self._names is None:
            with uncounted():  # once in a process, so again in a resumed run
                with torch.no_grad():
                    loss = make_loss()
                candidates = {name: theta[name] for name in _tail_names(problem, theta, aligned)}
                self._names = {*aligned, *reached(loss, candidates)}
        live = params.named(problem.learner)
        held = {name: p for name, p in live.items() if name in self._names}
        return {name: theta[name] for name in held}, from_torch(optimizer, held)


def _tail_names(problem: Problem, theta: Params, aligned: Params) -> Iterable[str]:
    if supports(problem, TailParameters):
        return (name for name in problem.tail_parameters() if name in theta)
    return aligned if supports(problem, SharedTrunk) else theta


def _share(regularizer: list[Tensor], by_phi: Params) -> float:
    """Return |dR| / (|dR| + |by_phi|); 0 where there is no regularizer."""
    if not regularizer:
        return 0.0
    norm = float(torch.nn.utils.get_total_norm(regularizer))
    return norm / (norm + float(params.norm(by_phi))) if norm else 0.0


def _gradient_norm(inner: InnerLoss, phi: Params, theta: Params) -> float:
    with torch.no_grad():
        loss = inner(phi)
    return float(params.norm(value_and_gradient(loss, theta)[1]))


def _through_aligned(outer_loss: OuterLoss, aligned: Params) -> OuterLoss:
    """Return a feedback loss of more parameters than theta_S that depends on theta_S alone."""
    return lambda theta: outer_loss({name: theta[name] for name in aligned})


def feedback_on(problem: Problem, labelled: Any) -> Feedback:
    """Fit the heads, and return the feedback of a labelled batch at the learner's theta."""
    with phase("heads"):
        problem.fit_heads()
    return feedback_at(problem, labelled)


def feedback_at(problem: Problem, labelled: Any) -> Feedback:
    """Return the feedback of a labelled batch at theta, with the heads as they are."""
    theta = params.detach(params.named(problem.learner))
    aligned = {name: theta[name] for name in aligned_names(problem, theta)}
    return Feedback(problem, theta, aligned, labelled)


def feedback_record(problem: Problem) -> dict[str, float]:
    """Return what the problem measured of its feedback, for the log."""
    return dict(problem.feedback_record) if supports(problem, MeasuresFeedback) else {}


def _linear(direction: Params) -> OuterLoss:
    """Return a feedback loss whose gradient is `direction` wherever an estimator takes it."""
    return lambda theta_s: params.dot(direction, theta_s)
