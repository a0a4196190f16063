"""linear_solve against dense matrices, in float64 unless stated."""

import math
from collections.abc import Callable

import pytest
import torch
from helpers.linear_systems import (
    Matrix,
    by_name,
    join,
    spd,
    split,
    symmetric,
    true_residual,
    vector,
)
from torch import Tensor

from metavpt.errors import MetaVPTError, NonFiniteError
from metavpt.hypergradients import params
from metavpt.hypergradients.linear_solvers import (
    ConjugateGradient,
    LinearSolver,
    Matvec,
    Neumann,
    Nystrom,
)
from metavpt.hypergradients.params import Params


def indefinite(n: int = 30) -> Tensor:
    return symmetric(torch.linspace(-1, 1, n))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("condition", [1, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6])
@pytest.mark.parametrize(
    ("tolerance", "max_iterations"),
    [(1e-3, 20), (1e-6, 20), (1e-6, 2000), (1e-9, 2000), (1e-14, 500)],
)
def test_cg_solves_to_the_residual_asked_for_or_says_not(
    condition: float, seed: int, tolerance: float, max_iterations: int
) -> None:
    a, b = spd(condition, seed=seed), vector(seed=seed + 10)
    found = ConjugateGradient(max_iterations, tolerance)(Matrix(a), split(b))
    true = true_residual(a, found.x, b)
    assert found.converged == (found.residual <= tolerance)
    if found.converged:
        assert true <= tolerance * (1 + 1e-9) + 1e-15 + 1e-16 * condition
    assert found.residual == pytest.approx(
        true, rel=1e-2, abs=1e-15 * condition
    )  # the rounding of a matvec
    assert found.num_iterations <= max_iterations
    if max_iterations >= 2000:
        assert found.converged


@pytest.mark.parametrize("condition", [1, 1e2, 1e4])
@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_cg_equals_the_dense_solution(condition: float, damping: float) -> None:
    a, b = spd(condition), vector()
    damped = a + damping * torch.eye(30, dtype=torch.float64)
    found = ConjugateGradient(2000, 1e-12)(Matrix(a), split(b), damping)
    expected = torch.linalg.solve(damped, b)
    assert found.converged
    torch.testing.assert_close(
        join(found.x), expected, rtol=0, atol=1e-12 * condition * float(expected.norm())
    )
    assert 1 / condition + damping - 1e-12 <= found.min_curvature <= 1 + damping


def test_cg_ends_in_as_many_steps_as_there_are_eigenvalues() -> None:
    matrix = Matrix(symmetric(torch.tensor([1.0, 2.0, 5.0]).repeat(10)))
    found = ConjugateGradient(tolerance=1e-10)(matrix, split(vector()))
    assert found.converged
    assert (found.num_iterations, matrix.calls) == (3, 4)  # one call confirms


@pytest.mark.parametrize("condition", [1e1, 1e3])
@pytest.mark.parametrize("tolerance", [1e-3, 1e-8])
def test_cg_in_float32(condition: float, tolerance: float) -> None:
    a, b = spd(condition), vector()
    found = ConjugateGradient(500, tolerance)(Matrix(a.float()), split(b.float()))
    assert found.x["weight"].dtype == torch.float32
    true = true_residual(a, params.zip_with(Tensor.double, found.x), b)
    assert true < 1e-3
    assert found.converged == (found.residual <= tolerance)  # 1e-8 is out of reach, and it says so
    assert found.converged == (tolerance == 1e-3)


@pytest.mark.parametrize("n_terms_or_steps", [1, 2, 5, 40])
@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_indefinite_is_never_nan_and_never_converged(n_terms_or_steps: int, damping: float) -> None:
    a, b = indefinite(), split(vector())
    for solver in (
        ConjugateGradient(n_terms_or_steps, 1e-12),
        Neumann(n_terms_or_steps + 60),
        Nystrom(n_terms_or_steps),
    ):
        found = solver(Matrix(a), b, damping or 1e-3)
        assert params.is_finite(found.x)
        assert not math.isnan(found.residual)
        assert not found.converged


@pytest.mark.parametrize("seed", range(20))
def test_cg_on_negative_curvature_keeps_its_best_iterate(seed: int) -> None:
    a, b = symmetric(torch.linspace(-0.1, 1, 30)), vector(seed=seed)
    found = ConjugateGradient(30, 1e-12)(Matrix(a), split(b))
    assert found.min_curvature <= 0
    assert not found.converged
    residuals = [1.0] + [
        true_residual(a, ConjugateGradient(k, 1e-12)(Matrix(a), split(b)).x, b)
        for k in range(1, found.num_iterations + 1)
    ]
    assert found.residual == pytest.approx(true_residual(a, found.x, b))
    assert found.residual == pytest.approx(min(residuals))


def test_cg_on_negative_curvature_at_once() -> None:
    a, b = -spd(10), vector()
    cold = ConjugateGradient()(Matrix(a), split(b))
    assert (float(params.norm(cold.x)), cold.residual) == (0, 1)
    assert cold.num_iterations == 0
    assert cold.min_curvature < 0
    x0 = split(vector(seed=3))
    warm = ConjugateGradient()(Matrix(a), split(b), x0=x0)
    torch.testing.assert_close(join(warm.x), join(x0), rtol=0, atol=0)
    zero = ConjugateGradient()(Matrix(0 * a), split(b))
    assert not zero.converged
    assert (float(params.norm(zero.x)), zero.residual) == (0, 1)


@by_name
@pytest.mark.parametrize("scale_a", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("scale_b", [1e-140, 1e-3, 1.0, 1e3, 1e140])
@pytest.mark.parametrize("definite", [True, False])
def test_scales_change_nothing_but_the_scale(
    solver: LinearSolver, scale_a: float, scale_b: float, definite: bool
) -> None:
    a, b = (spd(100) if definite else indefinite()), split(vector())
    expected = solver(Matrix(a), b, 0.1)
    if isinstance(solver, Neumann):
        solver = Neumann(solver.num_terms, solver.step_size / scale_a)
    found = solver(Matrix(scale_a * a), params.scale(b, scale_b), scale_a * 0.1)
    torch.testing.assert_close(
        join(found.x) * scale_a / scale_b, join(expected.x), rtol=1e-8, atol=1e-8
    )
    assert found.num_iterations == expected.num_iterations
    assert found.converged == expected.converged
    assert found.residual == pytest.approx(expected.residual, rel=1e-6)
    assert found.min_curvature == pytest.approx(expected.min_curvature * scale_a, rel=1e-6)


@by_name
def test_zero_right_hand_side(solver: LinearSolver) -> None:
    matrix = Matrix(spd(10))
    found = solver(matrix, split(torch.zeros(30, dtype=torch.float64)), 0.1, x0=split(vector()))
    assert float(params.norm(found.x)) == 0
    assert found.converged
    assert found.residual == 0
    assert matrix.calls == 0


@by_name
def test_warm_start_from_the_solution(solver: LinearSolver) -> None:
    a, b = spd(100), vector()
    x = split(torch.linalg.solve(a + 0.1 * torch.eye(30, dtype=torch.float64), b))
    found = solver(Matrix(a), split(b), 0.1, x0=x)
    torch.testing.assert_close(join(found.x), join(x), rtol=1e-10, atol=1e-10)
    assert found.residual < 1e-10
    if isinstance(solver, ConjugateGradient):
        assert found.num_iterations <= 1
        assert found.converged


@pytest.mark.parametrize("num_terms", [1, 2, 3, 10, 50])
@pytest.mark.parametrize("step_size", [0.1, 1.0, 1.9])
@pytest.mark.parametrize("damping", [0.0, 0.05])
def test_neumann_is_the_geometric_series(num_terms: int, step_size: float, damping: float) -> None:
    matrix, b, eye = Matrix(spd(100)), vector(), torch.eye(30, dtype=torch.float64)
    found = Neumann(num_terms, step_size)(matrix, split(b), damping)
    factor = eye - step_size * (matrix.a + damping * eye)
    powers = [torch.linalg.matrix_power(factor, k) @ b for k in range(num_terms)]
    torch.testing.assert_close(
        join(found.x), step_size * sum(powers, torch.zeros_like(b)), rtol=0, atol=1e-12
    )
    assert found.residual == pytest.approx(float(powers[-1].norm() / b.norm()), rel=1e-9)
    assert found.converged
    assert matrix.calls == num_terms - 1


def test_neumann_reports_divergence() -> None:
    a, b = spd(100), vector()
    found = Neumann(30, step_size=2.5)(Matrix(a), split(b))
    assert not found.converged
    assert found.residual > 1
    factor = torch.eye(30, dtype=torch.float64) - 2.5 * a
    expected = 2.5 * sum(
        (torch.linalg.matrix_power(factor, k) @ b for k in range(30)), torch.zeros_like(b)
    )
    torch.testing.assert_close(join(found.x), expected, rtol=1e-10, atol=1e-10)
    overflowed = Neumann(1000, step_size=1e3)(Matrix(a), split(b))
    assert not overflowed.converged
    assert params.is_finite(overflowed.x)
    assert overflowed.residual >= 1


@pytest.mark.parametrize("condition", [1, 1e2, 1e4])
def test_nystrom_is_exact_at_full_rank(condition: float) -> None:
    matrix, b, damping = Matrix(spd(condition)), vector(), 1e-3
    found = Nystrom(rank=50)(matrix, split(b), damping)
    expected = torch.linalg.solve(matrix.a + damping * torch.eye(30, dtype=torch.float64), b)
    torch.testing.assert_close(join(found.x), expected, rtol=1e-8, atol=1e-8)
    assert found.residual < 1e-9
    assert found.converged
    assert matrix.calls == 31


def test_nystrom_is_exact_on_a_matrix_of_its_rank() -> None:
    a, b = symmetric(torch.cat([torch.linspace(1, 3, 5), torch.zeros(25)])), vector()
    found = Nystrom(rank=5)(Matrix(a), split(b), 0.01)
    torch.testing.assert_close(
        join(found.x),
        torch.linalg.solve(a + 0.01 * torch.eye(30, dtype=torch.float64), b),
        rtol=1e-8,
        atol=1e-8,
    )


@pytest.mark.parametrize("rank", [1, 5, 10])
def test_nystrom_knows_its_residual_and_has_a_generator_of_its_own(rank: int) -> None:
    a, b, before = spd(1e3), vector(), torch.get_rng_state()
    found, again = Nystrom(rank)(Matrix(a), split(b), 0.1), Nystrom(rank)(Matrix(a), split(b), 0.1)
    assert found.residual == pytest.approx(
        true_residual(a + 0.1 * torch.eye(30, dtype=torch.float64), found.x, b)
    )
    assert found.num_iterations == rank
    torch.testing.assert_close(found.x, again.x, rtol=0, atol=0)
    assert torch.equal(before, torch.get_rng_state())


@by_name
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("after", [0, 1, 3, 4])
@pytest.mark.parametrize("warm", [False, True])
def test_a_product_that_is_not_finite_stops_the_solver(
    solver: LinearSolver, bad: float, after: int, warm: bool
) -> None:
    matrix = Matrix(spd(100))

    def matvec(x: Params) -> Params:
        return (
            matrix(x)
            if matrix.calls < after
            else {**matrix(x), "bias": torch.full_like(x["bias"], bad)}
        )

    found = solver(matvec, split(vector()), 0.1, x0=split(vector(seed=2)) if warm else None)
    assert params.is_finite(found.x)
    assert not math.isnan(found.residual + found.min_curvature)
    if not isinstance(solver, Neumann) or after < 4:
        assert not found.converged


@by_name
def test_the_matvec_keeps_the_grad_mode_and_the_result_is_detached(solver: LinearSolver) -> None:
    a = spd(10).requires_grad_()

    def matvec(x: Params) -> Params:
        assert torch.is_grad_enabled()
        return split(a @ join(x))

    found = solver(matvec, split(vector().requires_grad_()), 0.1)
    assert not any(p.requires_grad for p in found.x.values())


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: ConjugateGradient(max_iterations=0), "max_iterations"),
        (lambda: ConjugateGradient(tolerance=0), "tolerance"),
        (lambda: ConjugateGradient(tolerance=math.nan), "tolerance"),
        (lambda: Neumann(num_terms=0), "num_terms"),
        (lambda: Neumann(step_size=-1), "step_size"),
        (lambda: Nystrom(rank=0), "rank"),
        (lambda: Nystrom()(Matrix(spd(10)), split(vector())), "damping"),
    ],
)
def test_errors_name_the_field(make: Callable[[], object], field: str) -> None:
    with pytest.raises(MetaVPTError, match=f"^{field}="):
        make()


@by_name
def test_bad_arguments(solver: LinearSolver) -> None:
    matvec: Matvec = Matrix(spd(10))
    for damping in (-0.1, math.nan, math.inf):
        with pytest.raises(MetaVPTError, match="damping"):
            solver(matvec, split(vector()), damping)
    with pytest.raises(NonFiniteError):
        solver(matvec, split(vector() * math.nan), 0.1)
    with pytest.raises(NonFiniteError):
        solver(matvec, split(vector()), 0.1, x0=split(vector() * math.inf))


def test_cg_equals_scipy_step_by_step() -> None:
    linalg = pytest.importorskip("scipy.sparse.linalg")
    a, b = spd(100), vector()
    for steps in (1, 3, 10):
        expected = torch.from_numpy(linalg.cg(a.numpy(), b.numpy(), rtol=1e-14, maxiter=steps)[0])
        torch.testing.assert_close(
            join(ConjugateGradient(steps, 1e-14)(Matrix(a), split(b)).x),
            expected,
            rtol=0,
            atol=1e-10,
        )
