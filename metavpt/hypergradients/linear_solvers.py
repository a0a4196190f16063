"""Solvers of (A + damping I) x = b, where A is known only by its products with a vector.

    solution = ConjugateGradient()(matvec, b, damping=1e-2)

A is symmetric (a Hessian or a Gauss-Newton matrix); `b`, `x` and the vectors that `matvec` maps are
dicts of tensors. No solver raises on a matrix that it cannot handle, and none returns NaN: what
went wrong is in the Solution.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, reduce
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from metavpt.errors import MetaVPTError, NonFiniteError
from metavpt.hypergradients import params
from metavpt.hypergradients.params import Params

Matvec = Callable[[Params], Params]


class Solution(NamedTuple):
    """`x`, always finite, and how far to trust it.

    num_iterations  steps (ConjugateGradient, DampedLanczos), terms (Neumann), vectors of the sketch
    (Nystrom) residual        |b - (A + damping I) x| / |b|; infinite where it is not known. What
    each solver knows of it, it says min_curvature   smallest p^T (A + damping I) p / p^T p met: not
    positive means indefinite; infinite where none was met converged       the solver's own verdict
    added_damping   what DampedLanczos adds to the damping that it is asked for; residual and x
    include it
    """

    x: Params
    num_iterations: int
    residual: float
    min_curvature: float
    converged: bool
    added_damping: float = 0.0


class LinearSolver(Protocol):
    """Solves (A + damping I) x = b, from `x0` if given.

    Raises MetaVPTError on a negative damping, NonFiniteError where `b` or `x0` is not finite.
    """

    def __call__(
        self, matvec: Matvec, b: Params, damping: float = 0.0, x0: Params | None = None
    ) -> Solution:
        """Solve (A + damping I) x = b.

        Args:
            matvec: v -> A v.
            b: The right-hand side.
            damping: The damping.
            x0: The start. None: zero.
        """
        ...


@dataclass(frozen=True)
class ConjugateGradient:
    """Hestenes & Stiefel (1952): one matvec a step, plus one whenever the residual is taken afresh.

    Converged means that the true residual is at most `tolerance`: the recurrence only claims it, a
    matvec confirms it, and where the two have come apart the method restarts from the true
    residual. Without convergence `residual` is the recurrence's, taken afresh every 50 steps.

    On a direction of curvature <= 0 the matrix is indefinite: it stops, not converged, with the
    iterate of smallest residual, the start included.
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
        """Solve the system, see `LinearSolver`."""
        return _solve_from(x0, self._iterate, matvec, b, damping)

    def _iterate(self, product: Matvec, b: Params, scale: float) -> Solution:
        goal = self.tolerance * scale
        x, r, p = params.zeros_like(b), b, b
        error, min_curvature, k = 1.0, math.inf, 0
        best, best_error = x, error
        while k < self.max_iterations and error > goal:
            product_p = product(p)
            curvature, length = float(params.dot(p, product_p)), float(params.dot(p, p))
            if not (math.isfinite(curvature) and length > 0):
                break
            min_curvature = min(min_curvature, curvature / length)
            if curvature <= 0:
                return Solution(best, k, best_error, min_curvature, False)
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
            if error < best_error:
                best, best_error = x, error
        return Solution(x, k, error, min_curvature, error <= goal)


@dataclass(frozen=True)
class DampedLanczos:
    """Lanczos with the least damping that brings the residual to `tolerance`.

    Lanczos tridiagonalizes A on the Krylov space of b: A Q = Q T + beta_k q_{k+1} e_k^T. The same Q
    serves A + lambda I for every lambda. So x(lambda) = |b| Q (T + lambda I)^-1 e_1 and its
    residual prod_i beta_i / prod_i (theta_i + lambda), theta the eigenvalues of T, cost no further
    product. The residual falls as lambda grows, and lambda is the least value from `damping` up
    whose residual is at most `tolerance`: the damping of Levenberg and Marquardt, found within one
    solve. Where A is indefinite, lambda is at least twice the most negative curvature, which keeps
    x small along such directions.

    x lies between the solution at `damping` and b / lambda, the direction of a single step. The
    larger `added_damping`, the nearer it is to the second. A start `x0` is not used, as its
    residual depends on the damping. Memory: `max_iterations` + 1 vectors.

    Args:
        max_iterations: Products with A at most. One more measures the true residual.
        tolerance: The residual to reach, below 1, that of x = 0.
    """

    max_iterations: int = 10
    tolerance: float = 0.3

    def __post_init__(self) -> None:
        _at_least_one("max_iterations", self.max_iterations)
        if not 0 < self.tolerance < 1:
            raise MetaVPTError(f"tolerance={self.tolerance}: must lie between 0 and 1")

    def __call__(
        self, matvec: Matvec, b: Params, damping: float = 0.0, x0: Params | None = None
    ) -> Solution:
        """Solve (A + lambda I) x = b with the least lambda >= `damping` that meets `tolerance`."""
        return _solve_from(None, self._solve, matvec, b, damping)

    def _solve(self, product: Matvec, b: Params, scale: float) -> Solution:
        basis, alphas, betas = [b], list[float](), list[float]()
        lowest = shift = math.inf
        eps = torch.finfo(next(iter(b.values())).dtype).eps
        while len(alphas) < self.max_iterations and shift > 0:
            image = product(basis[-1])
            alpha = float(params.dot(image, basis[-1]))
            image = _orthogonal(image, basis)
            beta = float(params.norm(image))
            if not math.isfinite(alpha + beta):
                break
            alphas.append(alpha)
            betas.append(beta)
            curvatures = torch.linalg.eigvalsh(_tridiagonal(alphas, betas))
            lowest, top = float(curvatures[0]), float(curvatures.abs().max())
            shift = self._least_shift(curvatures, torch.tensor(betas).double(), eps)
            if beta <= len(alphas) * eps * top:  # A maps the space onto itself: it cannot grow
                break
            basis.append(params.scale(image, 1 / beta))
        if not math.isfinite(shift):  # no curvature, or a product that is not finite
            return Solution(params.zeros_like(b), len(alphas), 1.0, lowest, False)
        unit = torch.eye(len(alphas), dtype=torch.float64)
        y = torch.linalg.solve(_tridiagonal(alphas, betas) + shift * unit, unit[0]).tolist()
        x = reduce(params.add, map(params.scale, basis, y))
        rest = params.add(params.add(b, product(x), alpha=-1), x, alpha=-shift)
        error = float(params.norm(rest))
        error = error if math.isfinite(error) else math.inf
        return Solution(x, len(alphas), error, lowest, error <= self.tolerance, shift)

    def _least_shift(self, curvatures: Tensor, betas: Tensor, eps: float) -> float:
        """The least shift >= 0 of T that reaches `tolerance`; infinite without any curvature."""
        size = float(torch.cat([curvatures.abs(), betas]).max())
        if size == 0:
            return math.inf
        curvatures, betas = curvatures / size, betas / size
        lowest, goal = float(curvatures[0]), 0.99 * self.tolerance  # the rest is left to rounding

        def excess(shift: float) -> float:
            return float((betas / (curvatures + shift)).prod()) - goal

        is_singular = lowest <= len(curvatures) * eps
        floor = max(0.0, -2 * lowest, math.sqrt(eps) if is_singular else 0.0)
        if excess(floor) <= 0:
            return size * floor
        # the residual is at most prod_i beta_i / (lowest + shift)^k
        reach = float((betas.log().mean() - math.log(goal) / len(betas)).exp())
        low, high = floor, reach - lowest
        for _ in range(50):  # bisection
            middle = (low + high) / 2
            low, high = (middle, high) if excess(middle) > 0 else (low, middle)
        return size * high


@dataclass(frozen=True)
class Neumann:
    """x = step_size sum_{k < num_terms} (I - step_size (A + damping I))^k b.

    It takes num_terms - 1 matvecs, and one more with `x0`. This is the adjoint of `num_terms`
    gradient steps of size `step_size` (Lorraine et al., 2020); one term gives step_size b.
    `residual` is |last term| / |b|, exact for the sum without its last term: x itself has a smaller
    one if the series converges. Converged means that no term outgrew the one before it: every
    step_size (A + damping I) met lies between 0 and 2. A growing series is summed all the same,
    until it overflows, since it is the truncated unroll.
    """

    num_terms: int = 10
    step_size: float = 1.0

    def __post_init__(self) -> None:
        _at_least_one("num_terms", self.num_terms)
        _positive("step_size", self.step_size)

    def __call__(
        self, matvec: Matvec, b: Params, damping: float = 0.0, x0: Params | None = None
    ) -> Solution:
        """Sum the series, see `LinearSolver`."""
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
    """Inverts a low-rank approximation of A, plus damping, by `rank` matvecs.

    One more matvec gives the true residual, and another one is needed with `x0`.

    A ~ (A Q) (Q^T A Q)^+ (A Q)^T = U diag(s) U^T for an orthonormal Gaussian sketch Q, and by
    Woodbury's identity x = U diag(1 / (s + damping)) U^T b + (b - U U^T b) / damping (Hataya &
    Yamada, 2023; factored stably as in Tropp et al., 2017). Exact if A has that rank and is
    positive semidefinite; directions of the sketch with curvature <= 0 count as flat. Memory: three
    times `rank` vectors. Converged means that x is better than none, residual < 1. `damping` must
    be positive.
    """

    rank: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        _at_least_one("rank", self.rank)

    def __call__(
        self, matvec: Matvec, b: Params, damping: float = 0.0, x0: Params | None = None
    ) -> Solution:
        """Solve the system, see `LinearSolver`."""
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

    Every solver starts from zero on a unit vector, so that no scale of b can under- or overflow in
    it.
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


def _orthogonal(v: Params, basis: list[Params]) -> Params:
    """Remove from v its part in the span of an orthonormal basis."""
    for _ in range(2):  # the second pass removes what rounding left
        for q in basis:
            v = params.add(v, q, alpha=-float(params.dot(v, q)))
    return v


def _tridiagonal(alphas: list[float], betas: list[float]) -> Tensor:
    """The symmetric matrix with `alphas` on its diagonal and `betas` beside it, (k, k) float64."""
    beside = torch.diag(torch.tensor(betas[: len(alphas) - 1], dtype=torch.float64), 1)
    return torch.diag(torch.tensor(alphas, dtype=torch.float64)) + beside + beside.T


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
