"""Hypergradients: how the feedback loss after a learner step changes with the designer.

An estimator is a value object of its hyper-parameters. It is called on closures and does not know
a Problem:

    inner_losses  phi -> (theta -> pretraining loss), one for each unlabelled batch. What does not
                  depend on theta runs once, in between.
    outer_loss    theta -> feedback loss
    theta, phi    The point of the derivative. Neither is changed.

Every estimator is a sum of one product, d<w, dL_pre/dtheta>/dphi, with a detached direction w (see
`mixed_products`).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Protocol

import torch
from torch import Tensor

from metavpt.errors import MetaVPTError, NonFiniteError, UnreachedParameterError, UnsolvedError
from metavpt.hypergradients import params
from metavpt.hypergradients.curvature import Curvature, Hessian, at_step
from metavpt.hypergradients.directions import Direction, Dot
from metavpt.hypergradients.linear_solvers import ConjugateGradient, LinearSolver, Solution
from metavpt.hypergradients.loss_checks import ChecksLosses
from metavpt.hypergradients.mixed_products import (
    DifferenceProduct,
    Loss,
    Product,
    reached,
    value_and_gradient,
)
from metavpt.hypergradients.optimizer_updates import Rule, Update, step_length, vjp
from metavpt.hypergradients.params import Params
from metavpt.hypergradients.trajectory import Trajectory, Unroll
from metavpt.profiling import phase

InnerLoss = Callable[[Params], Loss]
OuterLoss = Callable[[Params], Tensor]


@dataclass(frozen=True)
class Hypergradient:
    """A gradient for the designer's optimizer to descend.

    Estimators differ in the step that they value, and some include its learning rate. `relative`
    brings all of them to one unit: V / (|g_down| |step|), the drop of the feedback loss as a share
    of the drop that a step of this length could bring to first order. See docs/method.md.

    Attributes:
        by_phi: The gradient, with the names and shapes of phi: minus the derivative of V.
        value: V, the first-order drop of the feedback loss per unit of `step_size`.
        grad_evals: Gradients of a loss by theta that the estimator took. A run's budget counts
            passes as they run.
        diagnostics: Scalars for the log: feedback loss, norms, residuals.
        solution: The solution of an implicit solve, to start the next one from. None: zero is no
            worse.
        unit: |g_down| |step|.
        per_gradient: Whether `unit` lacks the factor |g_pre|: the step is the pretraining gradient,
            whose norm the estimator does not know.
    """

    by_phi: Params
    value: float
    grad_evals: int
    diagnostics: dict[str, float] = field(default_factory=dict)
    solution: Params | None = None
    unit: float = 1.0
    per_gradient: bool = False

    def relative(self, gradient_norm: Callable[[], float]) -> "Hypergradient":
        """Return the same in the common unit; zero where the step has no length.

        Args:
            gradient_norm: Returns |g_pre|, where `per_gradient`.
        """
        unit = self.unit * (gradient_norm() if self.per_gradient else 1.0)
        factor = 1 / unit if unit > 0 else 0.0
        return replace(
            self,
            by_phi=params.scale(self.by_phi, factor),
            value=self.value * factor,
            unit=1.0,
            per_gradient=False,
        )


class Estimator(Protocol):
    """A way to compute a hypergradient."""

    @property
    def num_batches(self) -> int:
        """Return the number of unlabelled batches, one for each inner loss."""
        ...

    @property
    def needs_update(self) -> bool:
        """Return whether the learner's optimizer is needed as `update`."""
        ...

    def __call__(
        self,
        inner_losses: Sequence[InnerLoss],
        outer_loss: OuterLoss,
        theta: Params,
        phi: Params,
        *,
        update: Update | None = None,
        start: Params | None = None,
    ) -> Hypergradient:
        """Estimate the hypergradient.

        Args:
            inner_losses: phi -> (theta -> pretraining loss), `num_batches` of them.
            outer_loss: theta -> feedback loss.
            theta: theta_S.
            phi: The designer's parameters.
            update: The step of the learner's optimizer, if `needs_update`.
            start: The `solution` of an earlier call, for implicit solves.
        """
        ...


@dataclass(frozen=True)
class OneStep(ChecksLosses):
    """d L_down(theta - step_size * g_pre(theta; phi)) / dphi, to first order in step_size.

    This is -step_size * d<w, g_pre>/dphi, averaged over the batches: one-step gradient alignment
    (V-Pretraining, section 3). With `Dot`, w is g_down; other directions value the same step
    differently.
    """

    direction: Direction = field(default_factory=Dot)
    product: Product = field(default_factory=DifferenceProduct)
    step_size: float = 1.0
    num_batches: int = 1

    def __post_init__(self) -> None:
        _positive("OneStep", step_size=self.step_size, num_batches=self.num_batches)

    @property
    def needs_update(self) -> bool:
        """Return whether the direction needs it."""
        return self.direction.needs_update

    def __call__(
        self,
        inner_losses: Sequence[InnerLoss],
        outer_loss: OuterLoss,
        theta: Params,
        phi: Params,
        *,
        update: Update | None = None,
        start: Params | None = None,
    ) -> Hypergradient:
        """Estimate the hypergradient, see `Estimator`."""
        self.check_once(inner_losses, outer_loss, theta, phi)
        theta, phi = params.leaves(theta), params.leaves(phi)
        feedback_loss, g_down = downstream(outer_loss, theta)
        total, total_value, total_unit, grad_evals = params.zeros_like(phi), 0.0, 0.0, 1
        per_gradient = False
        for inner in inner_losses:
            with torch.enable_grad():
                loss = inner(phi)
            g_pre = value_and_gradient(loss, theta)[1] if self.direction.needs_g_pre else None
            w, value, unit = self.direction(g_down, g_pre, update)
            (by_phi,), inner_product = self.product(loss, theta, w, (phi,))
            total = params.add(total, by_phi)
            total_value += float(inner_product if value is None else value)
            per_gradient = unit is None
            total_unit += float(params.norm(w)) if unit is None else unit
            grad_evals += self.product.num_gradients + self.direction.needs_g_pre
        count = len(inner_losses)
        diagnostics = {"feedback_loss": feedback_loss, "g_down_norm": float(params.norm(g_down))}
        return finite(
            Hypergradient(
                params.scale(total, -self.step_size / count),
                total_value / count,
                grad_evals,
                diagnostics,
                unit=total_unit / count,
                per_gradient=per_gradient,
            )
        )


@dataclass(frozen=True)
class Implicit(ChecksLosses):
    """dL_down(theta*(phi))/dphi = -d<w, g_pre>/dphi with (H + damping I) w = g_down.

    H is the curvature of the pretraining loss. Implicit differentiation (Lorraine et al. 2020) at
    theta, which the learner's own training keeps near a stationary point. H and the product are
    averages over the batches. Residual, iterations, damping and smallest curvature of the solve are
    diagnostics. A solve that ends with a residual of 1 or more, that of x = 0, raises
    `UnsolvedError`.

    With the default curvature, the Hessian, and damping 0 the hypergradient is exact at a minimum.
    Away from one the Hessian is indefinite: use `GaussNewton` and `DampedLanczos` there, as
    strategy=implicit does.
    """

    solve: LinearSolver = field(default_factory=ConjugateGradient)
    damping: float = 0.0
    product: Product = field(default_factory=DifferenceProduct)
    curvature: Curvature = field(default_factory=Hessian)
    num_batches: int = 1
    needs_update = False

    def __post_init__(self) -> None:
        _positive("Implicit", num_batches=self.num_batches)
        if self.damping < 0:
            raise MetaVPTError(f"Implicit: damping={self.damping} must not be negative")

    def __call__(
        self,
        inner_losses: Sequence[InnerLoss],
        outer_loss: OuterLoss,
        theta: Params,
        phi: Params,
        *,
        update: Update | None = None,
        start: Params | None = None,
    ) -> Hypergradient:
        """Estimate the hypergradient, see `Estimator`.

        Raises:
            UnsolvedError: The solve ended with a residual of 1 or more, no better than x = 0.
        """
        self.check_once(inner_losses, outer_loss, theta, phi)
        theta, phi = params.leaves(theta), params.leaves(phi)
        feedback_loss, g_down = downstream(outer_loss, theta)
        with torch.no_grad():
            # H does not differentiate the task: its trunk runs once, without a graph.
            fixed = [inner(phi) for inner in inner_losses]
        count = len(inner_losses)
        solution, num_products = self.solution(fixed, g_down, theta, start)
        solve_cost = 1 + num_products * self.product.num_gradients * count
        total, value = params.zeros_like(phi), 0.0
        for inner in inner_losses:
            with torch.enable_grad():
                loss = inner(phi)
            (by_phi,), inner_product = self.product(loss, theta, solution.x, (phi,))
            total, value = params.add(total, by_phi), value + float(inner_product)
        diagnostics = {
            "feedback_loss": feedback_loss,
            "g_down_norm": float(params.norm(g_down)),
            "residual": solution.residual,
            "damping": self.damping + solution.added_damping,
            "iterations": float(solution.num_iterations),
            "curvature_products": float(num_products),
            "min_curvature": solution.min_curvature,
            "converged": float(solution.converged),
        }
        grad_evals = solve_cost + self.product.num_gradients * count
        # A useless x0 would make the next solve start worse, without bound for an indefinite H.
        useful = solution.x if solution.residual < 1 else None
        return finite(
            Hypergradient(
                params.scale(total, -1 / count),
                value / count,
                grad_evals,
                diagnostics,
                useful,
                unit=float(params.norm(solution.x)),
                per_gradient=True,
            )
        )

    def solution(
        self,
        losses: Sequence[Loss],
        g_down: Params,
        theta: Params,
        start: Params | None = None,
    ) -> tuple[Solution, int]:
        """Solve (H + damping I) w = g_down for the mean curvature H of the losses at theta.

        Returns:
            The solution, and the number of products with H.

        Raises:
            UnsolvedError: The solve ended with a residual of 1 or more, no better than x = 0.
        """
        theta, num_products = params.leaves(theta), 0

        def hessian_product(v: Params) -> Params:
            nonlocal num_products
            num_products += 1
            products = [self.curvature(loss, theta, v, self.product) for loss in losses]
            return params.scale(reduce(params.add, products), 1 / len(products))

        with phase("solve"):
            found = self.solve(hessian_product, g_down, damping=self.damping, x0=start)
        _check_solved(found, 1 + num_products * self.product.num_gradients * len(losses))
        return found, num_products


@dataclass(frozen=True)
class Unrolled(ChecksLosses, Unroll):
    """dL_down(theta_K(phi))/dphi through K = `num_steps` steps of the learner's optimizer.

    Each step has its own unlabelled batch. This is the discrete adjoint, replayed backwards one
    step at a time: with (theta', moments') = U(theta, moments, g) and cotangents of the left side,
    w is U's pullback to g, and d<w, g_k>/d(theta, phi) carries it through the gradient. Exact for
    SGD, Adam and AdamW, and through gradient clipping. Memory is that of `kept_graphs` steps, K
    gradients of theta's size, and every sqrt(K)-th theta with its moments, from which the others
    are replayed elementwise.

    Phi may hold hyper-parameters of the optimizer, such as its learning rate: `optimizer` is then a
    function of phi, see `Unroll`.

    Args:
        product: The mixed product.
        offload: Whether stored steps wait in CPU memory.
        kept_graphs: The last steps whose graph to phi is kept instead of recomputed: more memory,
            less time.
    """

    product: Product = field(default_factory=DifferenceProduct)
    offload: bool = False
    kept_graphs: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kept_graphs < 0:
            raise MetaVPTError(f"Unrolled: kept_graphs={self.kept_graphs} must not be negative")

    def __call__(
        self,
        inner_losses: Sequence[InnerLoss],
        outer_loss: OuterLoss,
        theta: Params,
        phi: Params,
        *,
        update: Update | None = None,
        start: Params | None = None,
    ) -> Hypergradient:
        """Estimate the hypergradient, see `Estimator`."""
        phi = params.leaves(phi)
        if len(inner_losses) != self.num_steps:
            raise MetaVPTError(
                f"Unrolled: num_steps={self.num_steps} needs as many inner losses, not "
                f"{len(inner_losses)}"
            )
        self.check_once(inner_losses, outer_loss, theta, phi)
        with torch.enable_grad():
            rule, _, state = self.begin(theta, phi, update)
        hyper = {} if self.optimizer is None or isinstance(self.optimizer, Rule) else phi
        # Hyper-parameters need not be in the loss; all else must, and the product says so.
        in_loss = _reached_by(inner_losses[0], theta, phi) if hyper else phi
        before = float(outer_loss(params.detach(theta)).detach())
        trajectory = Trajectory(
            rule, params.detach(theta), state, math.isqrt(self.num_steps), self.offload
        )
        kept: list[Loss] = []
        for k, inner in enumerate(inner_losses, start=1):
            keep = k > self.num_steps - self.kept_graphs
            with torch.set_grad_enabled(keep):
                loss = inner(phi)
                here = at_step(loss, trajectory.theta)
            trajectory.advance(value_and_gradient(here, trajectory.theta)[1])
            kept += [loss] * keep
        feedback_loss, ct_theta = downstream(outer_loss, trajectory.theta)
        diagnostics = {"feedback_loss": before, "g_down_norm": float(params.norm(ct_theta))}
        length = step_length(
            trajectory.theta, rule, params.detach(theta), state, self.num_steps, ct_theta
        )
        unit = diagnostics["g_down_norm"] * length

        total, ct_moments = Params(), None
        for k, (theta_k, state_k, gradient) in zip(
            reversed(range(self.num_steps)), trajectory.backwards(), strict=True
        ):
            pulled = vjp(rule, theta_k, state_k, gradient, ct_theta, ct_moments, hyper)
            total = _plus(total, pulled.phi)
            theta_k = params.leaves(theta_k)
            with torch.enable_grad():
                loss = kept.pop() if kept else inner_losses[k](phi)
                here = at_step(loss, theta_k)
                # what a loss holds of theta_k is no part of its gradient, but moves with theta_k
                moving = params.views(theta_k) if here is not loss else theta_k
            # before the first step theta does not depend on phi
            wrt = (in_loss, theta_k) if k else (in_loss,) if in_loss else ()
            by_phi, *by_theta = self.product(here, moving, pulled.grad, wrt).by if wrt else ({},)
            total = _plus(total, by_phi)
            if by_theta:
                ct_theta, ct_moments = params.add(pulled.theta, by_theta[0]), pulled.moments
        if missing := [name for name in phi if name not in total]:
            raise UnreachedParameterError(
                f"neither the pretraining loss nor the optimizer depends on {', '.join(missing)}"
            )
        total = {name: total[name] for name in phi}
        grad_evals = 1 + self.num_steps * (1 + self.product.num_gradients) + bool(hyper)
        return finite(
            Hypergradient(total, before - feedback_loss, grad_evals, diagnostics, unit=unit)
        )


def _reached_by(inner: InnerLoss, theta: Params, phi: Params) -> Params:
    """Return the part of phi that the pretraining loss depends on."""
    theta = params.detach(theta)
    names = reached(lambda at: inner(at)(theta), phi)
    return {name: phi[name] for name in names}


def _plus(total: Params, part: Params) -> Params:
    """Add up names that either may lack."""
    return {**total, **{name: total[name] + p if name in total else p for name, p in part.items()}}


@phase("g_down")
def downstream(outer_loss: OuterLoss, theta: Params) -> tuple[float, Params]:
    """Compute the feedback loss and its gradient g_down, both detached.

    Raises:
        NonFiniteError: One of them is not finite.
    """
    loss, g_down = value_and_gradient(outer_loss, theta, "feedback")
    if not (torch.isfinite(loss) and params.is_finite(g_down)):
        norm = float(params.norm(g_down))
        raise NonFiniteError(
            f"the feedback loss is {float(loss):.3g} and the norm of its gradient {norm:.3g}"
        )
    return float(loss), g_down


def finite(hypergradient: Hypergradient) -> Hypergradient:
    """The same, or `NonFiniteError`: a NaN never reaches the designer silently."""
    if not params.is_finite(hypergradient.by_phi):
        raise NonFiniteError("the hypergradient is not finite")
    return hypergradient


def _check_solved(solution: Solution, grad_evals: int) -> None:
    """Raise UnsolvedError, with what the solve cost, for an x that is no better than 0."""
    if solution.residual >= 1 and not solution.converged:
        raise UnsolvedError(
            f"the implicit solve ended with residual {solution.residual:.3g}, no better than "
            f"x = 0, after {solution.num_iterations} iterations "
            f"(smallest curvature {solution.min_curvature:.3g}): "
            "raise damping, or use curvature=GaussNewton with solve=DampedLanczos",
            grad_evals,
        )


def _positive(owner: str, **values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise MetaVPTError(f"{owner}: {name}={value} must be positive")
