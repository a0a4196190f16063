"""A lower bound on the cost of a strategy: its forward and backward passes times their seconds.

    learner     pretraining loss of a task and its derivative by theta: a plain step
    learner_own the same after an update on the learner's own batch, see `Learned.own_batch`
    design      the designer's task of a batch, without a graph
    heads       fitting of the feedback heads
    g_down      feedback loss and its derivative by theta_S
    inner       task, teacher and trunk of a meta batch, with the graph to phi; `inner_free` without
    inner_again task and trunk once more, with the graph: the teacher's answer is known
    tail        from there to the pretraining loss; `tail_back` is its derivative by theta_S
    phi_back    from the loss back to phi: one tail, trunk and designer
    slopes      the costs of a `LinearLoss` differentiated along w
    score       the loss of each sample of a random task, with the trunk; `score_tail` without

Elementwise work (optimizers, EMA, arithmetic on parameters), data and augmentation are not counted.
A backward pass through activations alone costs as much as a forward pass and counts as one.
"""

import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import cached_property
from typing import Any

import torch

from metavpt.hypergradients import params
from metavpt.hypergradients.curvature import Hessian
from metavpt.hypergradients.estimators import Estimator, Implicit, OneStep, Unrolled, downstream
from metavpt.hypergradients.linear_targets import LinearProduct
from metavpt.hypergradients.mixed_products import DifferenceProduct, ExactProduct, Product
from metavpt.problem import require
from metavpt.profiling import Clock
from metavpt.strategies.fixed import Fixed
from metavpt.strategies.learned import Learned, OwnBatch, answers_kept, feedback_on, inner_loss
from metavpt.strategies.selection import Greedy, GreedySelection, SupportsSelection
from metavpt.training.strategy import Strategy
from metavpt.training.streams import Streams

Passes = Mapping[str, float]
OUTSIDE = frozenset({"data", "augment"})  # phases that are no pass of either network
REPEATS = 3


def of_product(product: Product, by_phi: bool = True, by_theta: bool = False) -> Passes | None:
    """Count the passes of one product on one batch, after the inner loss was made."""
    if isinstance(product, LinearProduct):
        return (
            of_product(product.general, by_phi, by_theta)
            if by_theta
            else {"slopes": 1, "phi_back": 1}
        )
    if isinstance(product, DifferenceProduct):
        # Both ends forward and backward; by phi alone the second end's way back meets no weight, by
        # both it is part of phi_back.
        passes = {
            (1, 0): {"tail": 3},
            (0, 1): {"tail": 2, "tail_back": 2},
            (1, 1): {"tail": 1, "tail_back": 2},
        }
    elif isinstance(product, ExactProduct):
        # The gradient, forward and backward, and back through both.
        passes = {
            (1, 0): {"tail": 1, "tail_back": 2},
            (0, 1): {"tail": 1, "tail_back": 4},
            (1, 1): {"tail": 1, "tail_back": 4},
        }
    else:
        return None
    return {**passes[by_phi, by_theta], **({"phi_back": 1} if by_phi else {})}


def of_update(estimator: Estimator, curvature_products: float = 0.0) -> Passes | None:
    """Count the passes of one designer update with heads and g_down; None if unknown.

    `curvature_products` is the number of products in a linear solve.
    """
    if isinstance(estimator, OneStep):
        needs_g_pre = {"tail": 1, "tail_back": 1} if estimator.direction.needs_g_pre else {}
        return _sum(
            (1, {"heads": 1, "g_down": 1}),
            (estimator.num_batches, {"inner": 1}, needs_g_pre, of_product(estimator.product)),
        )
    if isinstance(estimator, Implicit) and isinstance(estimator.curvature, Hessian):
        curvature = of_product(estimator.product, by_phi=False, by_theta=True)
        count = estimator.num_batches
        one = {"inner_free": 1, "inner_again": 1}
        return _sum(
            (1, {"heads": 1, "g_down": 1}),
            (count, one, of_product(estimator.product)),
            (count * curvature_products, curvature),
        )
    if isinstance(estimator, Unrolled):
        steps, kept = estimator.num_steps, min(estimator.kept_graphs, estimator.num_steps)
        back, first = of_product(estimator.product, by_theta=True), of_product(estimator.product)
        return _sum(
            (1, {"heads": 1, "g_down": 1}),
            (steps - kept, {"inner_free": 1, "inner_again": 1}),
            (kept, {"inner": 1}),
            (steps, {"tail": 1, "tail_back": 1}),
            (steps - 1, back),
            (1, first),
        )
    return None


def of_step(strategy: Strategy, curvature_products: float = 0.0) -> Passes | None:
    """Count the passes of a step, with a share of the update; None if the strategy is unknown."""
    if isinstance(strategy, GreedySelection):
        pool = strategy.pool_batches
        return _sum(
            (1, {"learner": 1, "score": pool, "score_tail": pool}),
            (1 / strategy.period.every, {"heads": 1, "g_down": 1}),
        )
    if isinstance(strategy, Greedy):
        scored = {"score": strategy.num_candidates, "score_tail": strategy.num_candidates}
        return _sum(
            (1, {"learner": 1}, scored), (1 / strategy.period.every, {"heads": 1, "g_down": 1})
        )
    if isinstance(strategy, Learned):
        after_update = {"learner_own": 1} if strategy.own_batch else {"learner": 1, "design": 1}
        share = 1 / strategy.period.every
        update = of_update(strategy.estimator, curvature_products)
        if update:  # g_down may be kept for several updates, and the heads with it
            kept = {name: update[name] / strategy.feedback_every for name in ("heads", "g_down")}
            update = {**update, **kept}
        return _sum(
            (1 - share, {"learner": 1, "design": 1}),
            (share, after_update, update),
        )
    return {"learner": 1} if type(strategy) is Fixed else None


def seconds(passes: Passes, each: Callable[[str], float]) -> float:
    """Return the seconds of `passes` if each takes as long as it does alone."""
    return sum(count * each(name) for name, count in passes.items() if count)


class Stopwatch:
    """Measure the seconds of one pass alone: the median of a few, on the next batches of `streams`.

    It fits feedback heads and draws from the streams, and leaves learner and designer as they are.
    `now` is as in `Clock`.
    """

    def __init__(
        self,
        problem: Any,
        strategy: Strategy,
        streams: Streams,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.problem, self.strategy, self.streams, self.now = problem, strategy, streams, now
        self._known: dict[str, float] = {}

    def __call__(self, name: str) -> float:
        """Return the median seconds of the pass `name`, measured at the first call."""
        if name not in self._known:
            prepare, run = getattr(self, f"_{name}")()
            run(prepare())
            self._known[name] = statistics.median(
                self._once(run, prepare()) for _ in range(REPEATS)
            )
        return self._known[name]

    def _once(self, run: Callable[[Any], Any], prepared: Any) -> float:
        clock = Clock(self.now, by_path=True)
        with clock.listen("pass"):
            run(prepared)
        return sum(
            spent for path, spent in clock.seconds.items() if path.rpartition("/")[2] not in OUTSIDE
        )

    @cached_property
    def _feedback(self) -> Any:
        return feedback_on(self.problem, next(self.streams.feedback))

    @cached_property
    def _batch(self) -> Any:
        return next(self.streams.pretrain)

    @property
    def _is_own(self) -> bool:
        return isinstance(self.strategy, Learned) and self.strategy.own_batch

    @cached_property
    def _meta(self) -> Any:
        batch = self._batch if self._is_own else next(self.streams.meta)
        return inner_loss(self.problem, self._feedback.theta, batch)

    @cached_property
    def _phi(self) -> params.Params:
        return params.named(self.problem.designer)

    @property
    def _theta(self) -> params.Params:
        return params.leaves(self._feedback.aligned)

    def _learner(self) -> Any:
        make = self.problem.designer if isinstance(self.strategy, Learned) else self.problem.recipe
        # a new task each time, of which no teacher knows the answer
        return torch.no_grad()(lambda: make(self._batch)), self._step

    def _learner_own(self) -> Any:
        def prepare() -> Any:
            own = OwnBatch(self._batch)
            inner_loss(self.problem, self._feedback.theta, own.batch, own.keep)(self._phi)
            return own.task

        return prepare, self._step

    def _step(self, task: Any) -> Any:
        theta = params.named(self.problem.learner)
        loss = self.problem.pretrain_loss(theta, task)
        return torch.autograd.grad(loss, list(theta.values()), materialize_grads=True)

    def _design(self) -> Any:
        return lambda: None, torch.no_grad()(lambda _: self.problem.designer(self._batch))

    def _heads(self) -> Any:
        return lambda: None, lambda _: self.problem.fit_heads()

    def _g_down(self) -> Any:
        return lambda: None, lambda _: downstream(self._feedback.loss, self._feedback.aligned)

    def _inner(self) -> Any:
        return lambda: None, lambda _: self._meta(self._phi)

    def _inner_free(self) -> Any:
        return lambda: None, torch.no_grad()(lambda _: self._meta(self._phi))

    def _inner_again(self) -> Any:
        kept = ExitStack()

        def prepare() -> None:
            kept.enter_context(answers_kept(self.problem, 1))
            with torch.no_grad():
                self._meta(self._phi)

        def run(_: Any) -> None:
            with kept:
                self._meta(self._phi)

        return prepare, run

    def _tail(self) -> Any:
        return lambda: self._meta(self._phi), lambda loss: loss(self._theta)

    def _tail_back(self) -> Any:
        def prepare() -> Any:
            with torch.no_grad():
                loss = self._meta(self._phi)
            theta = self._theta
            return loss(theta), list(theta.values())

        return prepare, lambda made: torch.autograd.grad(*made, materialize_grads=True)

    def _phi_back(self) -> Any:
        return lambda: self._meta(self._phi)(self._theta), lambda loss: torch.autograd.grad(
            loss, list(self._phi.values())
        )

    def _slopes(self) -> Any:
        product: Any = getattr(self.strategy, "estimator", None)
        derivative, absolute = product.product.derivative, product.product.absolute
        w = downstream(self._feedback.loss, self._feedback.aligned)[1]
        return lambda: self._meta(self._phi), lambda loss: loss.slopes(
            self._feedback.aligned, w, derivative, absolute
        )

    @torch.no_grad()
    def _scored(self, task: Any) -> Any:
        problem = require(self.problem, SupportsSelection, "scoring")
        return problem.per_sample_tail(self._feedback.theta, task)

    def _recipe(self) -> Any:
        return self.problem.recipe(self._batch)

    def _score(self) -> Any:
        return self._recipe, torch.no_grad()(
            lambda task: self._scored(task)(self._feedback.aligned)
        )

    def _score_tail(self) -> Any:
        return lambda: self._scored(self._recipe()), torch.no_grad()(
            lambda losses: losses(self._feedback.aligned)
        )


def _sum(*groups: Any) -> Passes | None:
    """Add groups of a count and what it counts; None if a part is unknown."""
    total: Counter[str] = Counter()
    for times, *parts in groups:
        for part in parts:
            if part is None:
                return None
            for name, count in part.items():
                total[name] += times * count
    return {name: count for name, count in total.items() if count}
