"""Estimates through the learner's real step, clipping and moments included; and implicit solves."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from metavpt.check import copies
from metavpt.check.derivatives import JUMPS, Reference, differences
from metavpt.check.finding import Finding
from metavpt.check.first_order import WARM_UP, MakeOptimizer, copy_state, restore, step
from metavpt.check.scene import NUM_BATCHES, Scene, cosine
from metavpt.errors import MetaVPTError, UnsolvedError
from metavpt.hypergradients import params
from metavpt.hypergradients.curvature import ComposedLoss, at_step
from metavpt.hypergradients.directions import AdamAware
from metavpt.hypergradients.estimators import (
    Estimator,
    Hypergradient,
    Implicit,
    InnerLoss,
    OneStep,
    Unrolled,
    downstream,
)
from metavpt.hypergradients.mixed_products import (
    DifferenceProduct,
    ExactProduct,
    Loss,
    Product,
    value_and_gradient,
)
from metavpt.hypergradients.optimizer_updates import Update, from_torch
from metavpt.hypergradients.params import Params
from metavpt.strategies.learned import LearnerStep, tail_loss

DIFFERENCE_ERROR = 1e-3  # relative: the difference product has an error of its own
TRUSTED = 0.9  # cosine of what a strategy takes with the derivative by all of theta
SOLVED = 0.5  # residual


@dataclass(frozen=True)
class Learning:
    """A learner on its way: a scene, and the optimizer that has taken a few clipped steps.

    Attributes:
        scene: On a twin of its own, whose parameters the optimizer holds.
        optimizer: The learner's.
        clip_norm: The norm at which gradients are clipped, over all of theta.
        norm: Of the last gradient, before it was clipped.
    """

    scene: Scene
    optimizer: Optimizer
    clip_norm: float
    norm: float

    @classmethod
    def of(cls, scene: Scene, make_optimizer: MakeOptimizer, clip_norm: float) -> "Learning":
        """Train a twin for a few steps, so that all moments count."""
        problem = copies.twin(scene.problem)
        live = params.named(problem.learner)
        scene = replace(scene, problem=problem, theta=params.detach(live))  # views: it moves along
        optimizer = make_optimizer(list(live.values()))
        norm = 0.0
        for k in range(WARM_UP):
            gradient = value_and_gradient(_whole(scene, k)(scene.phi), scene.theta)[1]
            norm = step(optimizer, live, gradient, clip_norm)
            for group in optimizer.param_groups:  # as the trainer leaves them
                group["max_grad_norm"] = clip_norm
                norms = {id(live[name]): float(g.norm()) for name, g in gradient.items()}
                group["grad_norms"] = [norms[id(p)] for p in group["params"]]
        return cls(scene, optimizer, clip_norm, norm)

    @property
    def live(self) -> Params:
        """The parameters that the optimizer holds."""
        return params.named(self.scene.problem.learner)

    def after(self, phi: Params, num_steps: int) -> Params:
        """Step on the tasks of `phi` by torch.optim, undo it, and return theta after the steps."""
        live, state = self.live, copy_state(self.optimizer)
        start = params.clone(live)
        for k in range(num_steps):
            with torch.no_grad():
                loss = _whole(self.scene, k)(phi)
            gradient = value_and_gradient(loss, params.detach(live))[1]
            step(self.optimizer, live, gradient, self.clip_norm)
        theta = params.detach(params.clone(live))
        restore(self.optimizer, live, start, state)
        return theta


def learner_step(
    scene: Scene, estimator: Estimator | None, make_optimizer: MakeOptimizer, clip_norm: float
) -> list[Finding]:
    """Compare exact, difference and finite-difference derivatives through the learner's real step.

    The step is torch.nn.utils.clip_grad_norm_ over all of theta, then the optimizer with its
    moments. With `Unrolled` there are as many as it takes, 4 at most, and the feedback loss after
    them is differentiated; otherwise one, to first order in its length. What the strategy takes is
    compared too: it holds the trunk, and the norm of its gradient, constant.

    Args:
        scene: Its analytic derivative must be whole: nothing on the way from phi is cut.
        estimator: The run's. With `Implicit`, its solves are a finding of their own.
        make_optimizer: parameters -> the learner's optimizer.
        clip_norm: The norm at which the trainer clips.
    """
    learning = Learning.of(scene, make_optimizer, clip_norm)
    findings = [_through_steps(learning, estimator)]
    if isinstance(estimator, Implicit):
        findings.append(_solves(learning.scene, estimator))
    return findings


def _through_steps(learning: Learning, estimator: Estimator | None) -> Finding:
    scene, name = learning.scene, "learner_step"
    if scene.dtype != torch.float64:
        return Finding(name, "ok", "not measured: a step is too short to difference in float32")
    unrolled = isinstance(estimator, Unrolled)
    num_steps = min(estimator.num_steps, NUM_BATCHES) if unrolled else 1
    aligned = list(scene.aligned)
    g_down = None if unrolled else downstream(scene.feedback, scene.aligned)[1]

    def outer(theta: Params) -> Tensor:  # of theta_S alone: the feedback reaches no more
        theta_s = {name: theta[name] for name in aligned}
        return scene.feedback(theta_s) if g_down is None else params.dot(g_down, theta_s)

    def by_phi(product: Product, inner: list[InnerLoss], theta: Params, update: Update) -> Params:
        through = (
            Unrolled(num_steps, product=product, check_losses=False)
            if unrolled
            else OneStep(AdamAware(), product, check_losses=False)
        )
        return through(inner, outer, theta, scene.phi, update=update).by_phi

    found = differences(
        lambda phi: float(outer(learning.after(phi, num_steps)).detach()), scene.phi, scene.dtype
    )
    inner = [_whole(scene, k, held=not unrolled) for k in range(num_steps)]
    update = from_torch(learning.optimizer, learning.live, learning.clip_norm)
    exact = by_phi(ExactProduct(), inner, scene.theta, update)
    measured = (
        f"{num_steps} step{'s' * (num_steps > 1)} of {type(learning.optimizer).__name__}, "
        f"gradients clipped at {learning.clip_norm:g} (the last had {learning.norm:.3g}): relative "
        f"error against finite differences {found.error(exact):.1e} exact"
    )
    differenced = by_phi(DifferenceProduct(), inner, scene.theta, update)
    measured += f", {found.error(differenced):.1e} by difference"
    if not (found.agrees(exact) and found.agrees(differenced, DIFFERENCE_ERROR)):
        if not found.is_smooth or found.is_flat(exact):
            return Finding(name, "warning", measured, JUMPS)
        advice = "see exact_product; where that is ok, the step of the optimizer is not torch's"
        return Finding(name, "failed", measured, advice)
    if estimator is None or not estimator.needs_update:
        return Finding(name, "ok", measured)

    inner = [scene.inner(k) for k in range(num_steps)]
    theta, update = LearnerStep()(
        scene.problem, scene.theta, scene.aligned, lambda: inner[0](scene.phi), learning.optimizer
    )
    likeness = cosine(by_phi(_product(estimator), inner, theta, update), exact)
    measured += f"; as the strategy takes it, cosine {likeness:.4f} to the exact one"
    if likeness >= TRUSTED:
        return Finding(name, "ok", measured)
    advice = "the rest of the learner moves with phi too: let theta_S hold more (more tail blocks)"
    return Finding(name, "warning", measured, advice)


def _solves(scene: Scene, estimator: Implicit) -> Finding:
    """Check the solution x of an implicit solve, and the products along it."""
    name, residuals = "implicit_solve", []
    own = replace(estimator, num_batches=1, check_losses=False)

    def solve(with_: Implicit, batch: int = 0) -> Hypergradient:
        arguments = [scene.inner(batch)], scene.feedback, scene.aligned, scene.phi
        return with_(*arguments)

    for batch in range(NUM_BATCHES):
        try:
            residuals.append(solve(own, batch).diagnostics["residual"])
        except UnsolvedError:
            residuals.append(math.inf)
    measured = "residuals " + ", ".join(f"{residual:.3f}" for residual in residuals)
    advice = "raise damping, or use curvature=GaussNewton with solve=DampedLanczos"
    if max(residuals) >= 1:
        return Finding(name, "failed", measured + ": no better than x = 0, so skipped", advice)

    exact, differenced = (
        solve(replace(own, product=product)) for product in (ExactProduct(), DifferenceProduct())
    )
    x = exact.solution
    if x is None:
        raise MetaVPTError(f"{name}: {type(own).__name__} returned no solution of its solve")
    said, again = exact.diagnostics["residual"], _residual(scene, own, x, exact.diagnostics)
    reference = Reference.of(scene, w=params.scale(x, -1.0))
    errors = [reference.error(found.by_phi) for found in (exact, differenced)]
    measured += (
        f"; along x relative error against finite differences {errors[0]:.1e} exact, "
        f"{errors[1]:.1e} by difference; the first residual by a product of its own {again:.3f}"
    )
    if abs(said - again) > 1e-3 + 1e-3 * again:
        return Finding(name, "failed", measured, "the solver's residual is not that of its x")
    allowed = max(reference.tolerance, DIFFERENCE_ERROR)
    if not (reference.agrees(exact.by_phi) and reference.agrees(differenced.by_phi, allowed)):
        jumps = not reference.is_smooth or reference.is_flat(exact.by_phi)
        return Finding(
            name,
            "warning" if jumps else "failed",
            measured,
            JUMPS if jumps else "see exact_product",
        )
    if max(residuals) >= SOLVED:
        return Finding(name, "warning", measured, advice)
    return Finding(name, "ok", measured)


def _residual(scene: Scene, estimator: Implicit, x: Params, solved: dict[str, float]) -> float:
    """|(A + damping I) x - g_down| / |g_down|, by an exact product."""
    g_down = downstream(scene.feedback, scene.aligned)[1]
    with torch.no_grad():
        loss = scene.inner()(scene.phi)
    product = estimator.curvature(loss, params.leaves(scene.aligned), x, ExactProduct())
    rest = params.add(params.add(product, x, alpha=solved["damping"]), g_down, alpha=-1.0)
    return float(params.norm(rest) / params.norm(g_down))


def _product(estimator: Estimator | None) -> Product:
    return getattr(estimator, "product", DifferenceProduct())


def _whole(scene: Scene, batch: int, held: bool = False) -> InnerLoss:
    """Return phi -> (theta -> pretraining loss), by all of theta.

    With `held` the loss is that of a step at the scene's theta, see `at_step`.
    """

    def at_phi(phi: Params) -> Loss:
        loss = _Whole(scene, scene.task(phi, batch))
        return at_step(loss, scene.theta) if held else loss

    return at_phi


@dataclass(frozen=True)
class _Whole:
    """theta -> pretraining loss of a task, by all of theta."""

    scene: Scene
    task: Any

    def __call__(self, theta: Params) -> Tensor:
        return self.scene.pretrain(theta, self.task)

    @property
    def at(self) -> Callable[[Params], Loss] | None:
        """As that of a `ComposedLoss`; None where the problem's loss has none."""
        if getattr(self._tail({}), "at", None) is None:
            return None

        def at(theta: Params) -> Loss:
            held = cast(ComposedLoss, at_step(self._tail(theta), {}))
            return lambda theta: held.criterion(cast(ComposedLoss, self._tail(theta)).outputs({}))

        return at

    def _tail(self, theta: Params) -> Loss:
        return tail_loss(self.scene.problem, {**self.scene.theta, **theta}, self.task)
