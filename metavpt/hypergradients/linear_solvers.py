"""Solvers of (A + damping I) x = b, where A is known only by its products with a vector.

    x, num_iterations, residual, min_curvature, converged = ConjugateGradient()(matvec, b, damping=1e-2)

A is symmetric (a Hessian or a Gauss-Newton matrix); `b`, `x` and the vectors that `matvec` maps are dicts of tensors. No solver raises on a
matrix that it cannot handle, and none returns NaN: what went wrong is in the Solution.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from metavpt.errors import MetaVPTError, NonFiniteError
from metavpt.hypergradients import params
from metavpt.hypergradients.params import Params

Matvec = Callable[[Params], Params]


class Solution(NamedTuple):
    """`x`, always finite, and how far to trust it.

    num_iterations  steps (ConjugateGradient), terms (Neumann), vectors of the sketch (Nystrom)
    residual        |b - (A + damping I) x| / |b|; infinite where it is not known. What each solver knows of it, it says
    min_curvature   smallest p^T (A + damping I) p / p^T p met: not positive means indefinite; infinite where none was met
    converged       the solver's own verdict
    """

    x: Params
    num_iterations: int
    residual: float
    min_curvature: float
    converged: bool


class LinearSolver(Protocol):
    """Solves (A + damping I) x = b, from `x0` if given.

    Raises MetaVPTError on a negative damping, NonFiniteError where `b` or `x0` is not finite.
    """

    def __call__(
        self, matvec: Matvec, b: Params, damping: float = 0.0, x0: Params | None = None
    ) -> Solution: ...


@dataclass(frozen=True)
class ConjugateGradient:
    """Hestenes & Stiefel (1952): one matvec a step, plus one whenever the residual is taken afresh.

    Converged means that the true residual is at most `tolerance`: the recurrence only claims it, a matvec confirms it, and where
    the two have come apart the method restarts from the true residual. Without convergence `residual` is the recurrence's, taken
    afresh every 50 steps.

    On a direction of curvature <= 0 the matrix is indefinite: it stops and keeps the last x, not converged. If that is the very
    first direction, x is `x0`, or without one b |b| / |(A + damping I) b|, the one-step direction in the units of a solution
    (zero if the product is).
    """

    max_iterations: int = 20
    tolerance: float = 1e-6

    refresh_every = (
        50  # steps after which rounding in the recurrence would show at condition numbers of 1e6
    )

    def __post_init__(self) -> None:
        _at_least_one("max_iterations", self.max_iterations)
        _positive("tolerance", self.tolerance)

    def __call__(
        self, matvec: Matvec, b: Params, damping: float = 0.0, x0: Params | None = None
    ) -> Solution:
        return _solve_from(x0, partial(self._iterate, is_cold=x0 is None), matvec, b, damping)

    def _iterate(self, product: Matvec, b: Params, scale: float, *, is_cold: bool) -> Solution:
        goal = self.tolerance * scale
        x, r, p = params.zeros_like(b), b, b
        error, min_curvature, k = 1.0, math.inf, 0
        while k < self.max_iterations and error > goal:
            product_p = product(p)
            curvature, length = float(params.dot(p, product_p)), float(params.dot(p, p))
            if not (math.isfinite(curvature) and length > 0):
                break
            min_curvature = min(min_curvature, curvature / length)
            if curvature <= 0:
                if k == 0 and is_cold:
                    x, error = _one_step(b, product_p)
                break
            alpha = (
                float(params.dot(r, p)) / curvature
            )  # r.p is r.r but for rounding, under which only this one never overshoots
            next_x = params.add(x, p, alpha=alpha)
            if not params.is_finite(next_x):
                break
            x, r, k = next_x, params.add(r, product_p, alpha=-alpha), k + 1
            previous, error = error, float(params.norm(r))
            has_drifted = False
            if error <= goal or k % self.refresh_every == 0:
                recurred, r = error, params.add(b, product(x), alpha=-1)
                error = float(params.norm(r))
                has_drifted = error > 2 * recurred  # then p has lost its conjugacy too
            p = r if has_drifted else params.add(r, p, alpha=(error / previous) ** 2)
        return Solution(x, k, error, min_curvature, error <= goal)


@dataclass(frozen=True)
class Neumann:
    """x = step_size sum_{k < num_terms} (I - step_size (A + damping I))^k b, by num_terms - 1 matvecs (one more with `x0`).

    This is the adjoint of `num_terms` gradient steps of size `step_size` (Lorraine et al., 2020); one term gives step_size b.
    `residual` is |last term| / |b|, exact for the sum without its last term: x itself has a smaller one if the series converges.
    Converged means that no term outgrew the one before it: every step_size (A + damping I) met lies between 0 and 2. A series that grows is
    summed all the same, being the truncated unroll that it stands for, until it overflows.
    """

    num_terms: int = 10
    step_size: float = 1.0

    def __post_init__(self) -> None:
        _at_least_one("num_terms", self.num_terms)
        _positive("step_size", self.step_size)

    def __call__(
        self, matvec: Matvec, b: Params, damping: float = 0.0, x0: Params | None = None
    ) -> Solution:
        return _solve_from(x0, self._sum, matvec, b, damping)

    def _sum(self, product: Matvec, b: Params, scale: float) -> Solution:
        growth = 1 + math.sqrt(
            torch.finfo(next(iter(b.values())).dtype).eps
        )  # rounding alone is no growth
        total, term, size = b, b, 1.0
        min_curvature, shrinks = math.inf, True
        for k in range(1, self.num_terms):
            product_term = product(term)
            curvature = float(params.dot(term, product_term))
            term = params.add(term, product_term, alpha=-self.step_size)
            next_total, next_size = params.add(total, term), float(params.norm(term))
            if not (
                math.isfinite(curvature)
                and math.isfinite(next_size)
                and params.is_finite(next_total)
            ):
                return Solution(
                    params.scale(total, self.step_size), k, math.inf, min_curvature, False
                )
            min_curvature = min(min_curvature, curvature / size**2)
            shrinks = shrinks and next_size <= growth * size
            total, size = next_total, next_size
            if size**2 == 0:  # the series has ended: every further term is zero to rounding
                break
        return Solution(
            params.scale(total, self.step_size), self.num_terms, size, min_curvature, shrinks
        )


@dataclass(frozen=True)
class Nystrom:
    """Inverts a low-rank approximation of A, plus damping: `rank` matvecs and one for the true residual (one more with `x0`).

    A ~ (A Q) (Q^T A Q)^+ (A Q)^T = U diag(s) U^T for an orthonormal Gaussian sketch Q, and by Woodbury's identity
    x = U diag(1 / (s + damping)) U^T b + (b - U U^T b) / damping (Hataya & Yamada, 2023; factored stably as in Tropp et al., 2017).
    Exact where A has that rank and is positive semidefinite; directions of the sketch with curvature <= 0 are taken as flat.
    Memory: three times `rank` vectors. Converged means that x is better than none, residual < 1. `damping` must be positive.
    """

    rank: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        _at_least_one("rank", self.rank)

    def __call__(
        self, matvec: Matvec, b: Params, damping: float = 0.0, x0: Params | None = None
    ) -> Solution:
        if not damping > 0:
            raise MetaVPTError(f"damping={damping}: Nystrom divides by it, so it must be positive")
        return _solve_from(x0, partial(self._invert, damping=damping), matvec, b, damping)

    def _invert(self, product: Matvec, b: Params, scale: float, *, damping: float) -> Solution:
        flat = _flatten(b)
        generator = torch.Generator(flat.device).manual_seed(self.seed)
        shape = (flat.numel(), min(self.rank, flat.numel()))
        sketch = torch.linalg.qr(
            torch.randn(shape, generator=generator, dtype=flat.dtype, device=flat.device)
        ).Q
        # [N, rank]
        image = (
            torch.stack([_flatten(product(_unflatten(column, b))) for column in sketch.T], dim=1)
            - damping * sketch
        )
        if not bool(torch.isfinite(image).all()):
            return Solution(params.zeros_like(b), shape[1], 1.0, math.inf, False)
        core = sketch.T @ image
        curvatures, vectors = torch.linalg.eigh((core + core.T) / 2)
        kept = curvatures > shape[1] * torch.finfo(flat.dtype).eps * curvatures.abs().max()
        u, roots, _ = torch.linalg.svd(
            image @ (vectors[:, kept] / curvatures[kept].sqrt()), full_matrices=False
        )
        along = u.T @ flat
        x = _unflatten(u @ (along / (roots**2 + damping)) + (flat - u @ along) / damping, b)
        residual = float(params.norm(params.add(b, product(x), alpha=-1)))
        return Solution(x, shape[1], residual, float(curvatures.min()) + damping, residual < 1)


def _solve_from(
    x0: Params | None,
    iterate: Callable[[Matvec, Params, float], Solution],
    matvec: Matvec,
    b: Params,
    damping: float,
) -> Solution:
    """x0 + |r| iterate(A + damping I, r / |r|, |b| / |r|) with r = b - (A + damping I) x0.

    Every solver starts from zero on a unit vector, so that no scale of b can under- or overflow in it.
    """
    if not 0 <= damping < math.inf:
        raise MetaVPTError(f"damping={damping}: must be a finite number, not negative")
    if not (params.is_finite(b) and (x0 is None or params.is_finite(x0))):
        raise NonFiniteError("linear solve: the right-hand side b or the start x0 is not finite")
    b = params.detach(b)
    size = float(params.norm(b))
    if size == 0:
        return Solution(params.zeros_like(b), 0, 0.0, math.inf, True)

    def product(v: Params) -> Params:
        return params.add(params.detach(matvec(v)), v, alpha=damping)

    x0 = None if x0 is None else params.detach(x0)
    r = b if x0 is None else params.add(b, product(x0), alpha=-1)
    error = float(params.norm(r))
    start = params.zeros_like(b) if x0 is None else x0
    if error == 0 or not math.isfinite(error):
        return Solution(start, 0, error if error == 0 else math.inf, math.inf, error == 0)
    found = iterate(product, params.zip_with(lambda a: a / error, r), size / error)
    x = params.add(start, found.x, alpha=error)
    if not params.is_finite(x):
        return found._replace(x=start, residual=error / size, converged=False)
    residual = found.residual * error / size if math.isfinite(found.residual) else math.inf
    return found._replace(x=x, residual=residual)


def _one_step(b: Params, product_b: Params) -> tuple[Params, float]:
    """x = b |b| / |A b| for a unit b, and its residual |b - A x|."""
    size = float(params.norm(product_b))
    alpha = 1 / size if size > 0 else 0.0
    return params.scale(b, alpha), float(params.norm(params.add(b, product_b, alpha=-alpha)))


def _flatten(x: Params) -> Tensor:
    return torch.cat([p.reshape(-1) for p in x.values()])


def _unflatten(flat: Tensor, like: Params) -> Params:
    parts = flat.split([p.numel() for p in like.values()])
    return {
        name: part.view_as(p).to(p.dtype)
        for (name, p), part in zip(like.items(), parts, strict=True)
    }


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise MetaVPTError(f"{name}={value}: must be at least 1")


def _positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise MetaVPTError(f"{name}={value}: must be positive")
