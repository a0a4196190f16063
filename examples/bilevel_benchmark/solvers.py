"""metavpt on a bilevel problem: three estimators in plain loops, and the single loop of SOBA.

    python -m bilevel_benchmark.solvers PROBLEM FILE.npz SECONDS JOBS OUT

`one_step`, `unrolled` and `implicit` call `metavpt.hypergradient`. `soba` (Dagreou et al., 2022)
keeps the solution v of the linear system from step to step and moves it by one stochastic gradient
step, so it needs the product alone. At these sizes an operator costs more to call than to compute:
`soba` is compiled, and so is Newton's method within `implicit`.
"""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor
from torch.func import grad, vjp

import metavpt
from bilevel_benchmark.problems import Bilevel, Rows, state
from bilevel_benchmark.record import Recorder
from metavpt.hypergradients.linear_solvers import Matvec, Solution

EXACT = metavpt.ExactProduct()
STEPS = 4  # of `soba` in one call


def batches(num: int, size: int | None, seed: int) -> Iterator[Rows]:
    """Yield slices of `size` samples, all in random order, then again. Yield None for all."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        if size is None:
            yield None
            continue
        for k in torch.randperm(num // size, generator=generator).tolist():
            yield slice(k * size, (k + 1) * size)


def count(num: int, rows: Rows) -> int:
    """Return how many samples `rows` holds."""
    return num if rows is None else rows.stop - rows.start


def one_step(step_size: float) -> metavpt.OneStep:
    """Return the derivative through one step of theta."""
    return metavpt.OneStep(product=EXACT, step_size=step_size, check_losses=False)


def unrolled(step_size: float) -> metavpt.Unrolled:
    """Return the derivative through ten steps of theta, which goes on from where they end."""
    return metavpt.Unrolled(10, metavpt.SGD(step_size), product=EXACT, check_losses=False)


def in_turn(
    make: Callable[[float], metavpt.OneStep | metavpt.Unrolled], problem: Bilevel,
    record: Recorder, *, seed: int, step_size: float, ratio: float, batch: int | None,
) -> None:  # fmt: skip
    """Descend theta and phi in turn, phi along the derivative that `make` makes."""
    method = make(step_size)
    theta, phi = problem.theta0, problem.phi0
    inner_batches = batches(problem.num_inner, batch, seed)
    outer_batches = batches(problem.num_outer, batch, seed + 1)
    evaluations = 0.0
    record.start()
    while record(phi, evaluations):
        rows = [next(inner_batches) for _ in range(method.num_batches)]
        outer_rows = next(outer_batches)
        losses = [lambda theta, phi, r=r: problem.inner(theta, phi, r) for r in rows]
        found = metavpt.hypergradient(
            losses,
            lambda theta, phi, r=outer_rows: problem.outer(theta, phi, r),
            theta,
            phi,
            method,
        )
        for loss in losses:
            at = theta.detach().requires_grad_()
            theta = (at - step_size * torch.autograd.grad(loss(at, phi), at)[0]).detach()
        phi = phi - step_size / ratio * found.by_phi["phi"]
        by_inner = found.grad_evals - 1 + len(rows)
        evaluations += by_inner * count(problem.num_inner, rows[0])
        evaluations += count(problem.num_outer, outer_rows)


@dataclass(frozen=True)
class Factored:
    """Solves with the Cholesky factor of the Hessian that Newton's method made."""

    factor: Tensor

    def __call__(
        self, matvec: Matvec, b: metavpt.Params, damping: float = 0.0,
        x0: metavpt.Params | None = None,
    ) -> Solution:  # fmt: skip
        x = {
            name: torch.cholesky_solve(values[:, None], self.factor)[:, 0]
            for name, values in b.items()
        }
        return Solution(x, 1, 0.0, float("inf"), True)


def implicit(
    problem: Bilevel, record: Recorder, *, tolerance: float = 1e-3, is_compiled: bool = True
) -> None:
    """Quasi-Newton on the value function, with its gradient by implicit differentiation.

    Each evaluation solves the inner problem and the linear system from where the last one ended: by
    Newton's method and its factor where theta is small, else by L-BFGS and conjugate gradients. The
    outer L-BFGS needs no step size; its first step has length 1 in each phi on average. All samples
    are used at once.
    """
    size = problem.theta0.numel()
    iterative = metavpt.ConjugateGradient(2 * size, tolerance)
    theta, solution, evaluations = problem.theta0, None, 0.0
    unit = problem.phi0.numel() ** 0.5
    derivatives = compiled(problem.derivatives) if is_compiled else problem.derivatives

    def inner(theta: Tensor, phi: Tensor) -> Tensor:
        return problem.inner(theta, phi, None)

    def outer(theta: Tensor, phi: Tensor) -> Tensor:
        return problem.outer(theta, phi, None)

    def value_and_gradient(at: np.ndarray) -> tuple[float, np.ndarray]:
        nonlocal theta, solution, evaluations
        phi = problem.phi0 + unit * torch.from_numpy(at).to(problem.phi0.dtype)
        solve: metavpt.ConjugateGradient | Factored = iterative
        if problem.is_small:
            theta, factor, num_gradients = problem.newton(phi, theta, 1e-2 * tolerance, derivatives)
            solve = Factored(factor)
        else:
            theta, _, num_gradients = problem.descend(phi, theta, 1e-2 * tolerance)
        method = metavpt.Implicit(solve, product=EXACT, check_losses=False)
        try:
            found = metavpt.hypergradient(inner, outer, theta, phi, method, start=solution)
        except metavpt.UnsolvedError:  # the last solution was no start for this one
            found = metavpt.hypergradient(inner, outer, theta, phi, method)
        solution = found.solution if found.diagnostics["converged"] else None
        num_gradients += found.grad_evals - 1
        evaluations += num_gradients * problem.num_inner + problem.num_outer
        if not record(phi, evaluations):
            raise StopIteration
        slope = unit * found.by_phi["phi"].double().numpy()
        return found.diagnostics["feedback_loss"], slope

    record.start()
    record(problem.phi0, 0.0)
    options = {"maxiter": 10**6, "maxfun": 10**6, "gtol": 0.0, "ftol": 0.0, "maxcor": 30}
    with suppress(StopIteration, metavpt.UnsolvedError):
        minimize(
            value_and_gradient, np.zeros(problem.phi0.numel()), jac=True, method="L-BFGS-B",
            options=options,
        )  # fmt: skip


def soba(
    problem: Bilevel, record: Recorder, *, seed: int, step_size: float, ratio: float,
    batch: int | None, is_compiled: bool = True,
) -> None:  # fmt: skip
    """Move theta, v and phi at once, each by one step of size step_size.

    The steps shrink as 1 / sqrt(t) if samples are drawn, and keep their size if all are used.
    """
    theta, phi = problem.theta0, problem.phi0
    v = torch.zeros_like(theta)
    generator = torch.Generator().manual_seed(seed)
    steps = soba_steps(problem)
    if is_compiled:
        steps = compiled(steps)

    def draw(num: int) -> Tensor | None:
        return None if batch is None else torch.randint(num, (STEPS, batch), generator=generator)

    num, num_outer = problem.num_inner, problem.num_outer
    cost = 3 * (batch or num) + (batch or num_outer)
    evaluations, t = 0.0, torch.arange(1.0, STEPS + 1)
    lr = torch.full_like(t, step_size)
    record.start()
    while record(phi, evaluations):
        if batch is not None:
            lr, t = step_size / t.sqrt(), t + STEPS
        theta, v, phi = steps(theta, v, phi, lr, lr / ratio, draw(num), draw(num_outer))
        evaluations += STEPS * cost


@cache
def soba_steps(problem: Bilevel) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """Return a function that takes STEPS steps of `soba`."""

    def step(
        theta: Tensor, v: Tensor, phi: Tensor, lr: Tensor, lr_phi: Tensor, rows: Rows,
        outer_rows: Rows,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        def by_theta(theta: Tensor, phi: Tensor) -> Tensor:
            return grad(problem.inner)(theta, phi, rows)

        slope, times = vjp(by_theta, theta, phi)
        product, cross = times(v)
        g_theta, g_phi = grad(problem.outer, argnums=(0, 1))(theta, phi, outer_rows)
        return theta - lr * slope, v - lr * (product + g_theta), phi - lr_phi * (cross + g_phi)

    def steps(
        theta: Tensor, v: Tensor, phi: Tensor, lr: Tensor, lr_phi: Tensor, rows: Tensor | None,
        outer_rows: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        for k in range(STEPS):
            some = None if rows is None else rows[k]
            some_outer = None if outer_rows is None else outer_rows[k]
            theta, v, phi = step(theta, v, phi, lr[k], lr_phi[k], some, some_outer)
        return theta, v, phi

    return steps


@cache
def compiled(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function, once."""
    return torch.compile(fn, fullgraph=True, dynamic=False)


SOLVERS: dict[str, Callable[..., None]] = {
    "one_step": partial(in_turn, one_step), "unrolled": partial(in_turn, unrolled),
    "implicit": implicit, "soba": soba,
}  # fmt: skip


def run(name: str, file: str, seconds: float, jobs: list[tuple[str, Any]], out: str) -> None:
    """Run each solver with its settings, after a start that is not timed."""
    arrays = dict(np.load(file))
    stated = {dtype: state(name, arrays, dtype) for dtype in (torch.float32, torch.float64)}
    for k, (solver, settings) in enumerate(jobs):
        problem = stated[torch.float64 if solver == "implicit" else torch.float32]
        for limit in (0.01, seconds):
            record = Recorder(limit)
            with suppress(metavpt.NonFiniteError):  # a step size too large: the run ends there
                SOLVERS[solver](problem, record, **settings)
        record.save(f"{out}.{k}.npz")


if __name__ == "__main__":
    torch.set_num_threads(1)
    name, file, seconds, jobs, out = sys.argv[1:]
    run(name, file, float(seconds), json.loads(jobs), out)
