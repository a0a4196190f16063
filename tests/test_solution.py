"""What a Solution says of itself: how far to trust x, from where it started, and what it cost; in float64."""

import math

import pytest
import torch
from test_linear_solve import Matrix, by_name, join, spd, split, symmetric, true_residual, vector
from torch import Tensor

from metavpt import params
from metavpt.errors import MetaVPTError, NonFiniteError
from metavpt.linear_solve import ConjugateGradient, LinearSolver, Neumann, Nystrom, Solution

EYE = torch.eye(30, dtype=torch.float64)


def eigenvector(a: Tensor, k: int) -> Tensor:
    return torch.linalg.eigh(a).eigenvectors[:, k]


@by_name
def test_nothing_to_solve_costs_nothing(solver: LinearSolver) -> None:
    matrix, x0 = Matrix(0.75 * EYE), split(vector())
    zero = solver(matrix, split(0 * vector()), 0.25, x0=x0)
    assert zero == Solution(zero.x, 0, 0.0, math.inf, True)
    assert matrix.calls == 0
    there = solver(matrix, split(vector()), 0.25, x0=x0)
    assert there == Solution(there.x, 0, 0.0, math.inf, True)
    torch.testing.assert_close(there.x, x0, rtol=0, atol=0)
    assert matrix.calls == 1


@by_name
def test_a_start_without_a_finite_residual_is_returned_as_it_is(solver: LinearSolver) -> None:
    x0 = split(vector(seed=2))
    found = solver(lambda x: params.scale(x, math.nan), split(vector()), 0.1, x0=x0)
    assert found == Solution(found.x, 0, math.inf, math.inf, False)
    torch.testing.assert_close(found.x, x0, rtol=0, atol=0)


@by_name
def test_a_solution_beyond_the_largest_number_is_not_taken(solver: LinearSolver) -> None:
    """x = b / (1e-200 + 1e-200) is 5e349 for b of 1e150: the start is all there is."""
    if isinstance(solver, Neumann):
        solver = Neumann(solver.num_terms, 1e200)
    found = solver(Matrix(1e-200 * EYE), split(1e150 * vector()), 1e-200)
    assert float(params.norm(found.x)) == 0
    assert (found.residual, found.converged) == (1.0, False)


@pytest.mark.parametrize("solver", [ConjugateGradient(3, 1e-12), Nystrom(rank=4)])
def test_the_residual_is_that_of_b_wherever_the_solver_started(solver: LinearSolver) -> None:
    a, b = spd(100), vector()
    for scale in (1e-3, 1.0, 1e3):
        found = solver(Matrix(a), split(b), 0.1, x0=split(scale * vector(seed=3)))
        assert found.residual == pytest.approx(true_residual(a + 0.1 * EYE, found.x, b), rel=1e-8)


@pytest.mark.parametrize("distance", [1e-4, 1.0, 1e3])
def test_cg_stops_at_the_first_step_within_the_tolerance_of_b(distance: float) -> None:
    a, b = spd(100), vector()
    x0 = split(torch.linalg.solve(a, b) + distance * vector(seed=3))
    found = ConjugateGradient(100, 1e-6)(Matrix(a), split(b), x0=x0)
    assert found.converged
    assert true_residual(a, found.x, b) <= 1e-6
    before = ConjugateGradient(found.num_iterations - 1, 1e-6)(Matrix(a), split(b), x0=x0)
    assert true_residual(a, before.x, b) > 1e-6


def test_neumann_that_neither_grows_nor_shrinks_has_converged_and_one_that_ends_stops() -> None:
    isometry = Neumann(10)(Matrix(2 * EYE), split(vector()))
    assert isometry.converged
    assert isometry.residual == pytest.approx(1, abs=1e-12)
    matrix = Matrix(EYE)
    ended = Neumann(10)(matrix, split(vector()))
    assert ended._replace(min_curvature=1.0) == Solution(ended.x, 10, 0.0, 1.0, True)
    assert ended.min_curvature == pytest.approx(1, abs=1e-15)
    assert matrix.calls == 1


def test_neumann_has_not_converged_if_a_term_outgrew_the_one_before_however_small_it_still_is() -> None:
    """A part that halves hides one that grows by a half: the norms of the terms fall for six and then rise, far below that of b."""
    values = torch.tensor([0.5] * 29 + [2.5], dtype=torch.float64)
    b = torch.tensor([0.0] * 28 + [1.0, 1e-3], dtype=torch.float64)
    assert Neumann(7)(Matrix(torch.diag(values)), split(b)).converged
    later = Neumann(9)(Matrix(torch.diag(values)), split(b))
    assert not later.converged
    assert later.residual < 0.03


def test_neumann_ends_where_the_square_of_a_term_underflows() -> None:
    matrix = Matrix((1 - 1e-6) * EYE)
    found = Neumann(60)(matrix, split(vector()))
    assert found.converged
    assert 26 <= matrix.calls <= 28  # a millionth each, down to 1e-162
    torch.testing.assert_close(join(found.x), vector() / (1 - 1e-6), rtol=1e-12, atol=0)


@pytest.mark.parametrize("step_size", [0.5, 1.5])
def test_neumann_meets_the_curvature_of_an_eigenvector(step_size: float) -> None:
    a = spd(100)
    expected = float(torch.linalg.eigvalsh(a)[20])
    found = Neumann(5, step_size)(Matrix(a), split(3 * eigenvector(a, 20)))
    assert found.min_curvature == pytest.approx(expected, rel=1e-10)
    assert found.residual == pytest.approx(abs(1 - step_size * expected) ** 4, rel=1e-10)


def test_neumann_that_overflows_says_how_many_terms_it_summed() -> None:
    a, b = 200 * spd(100), split(vector())
    found = Neumann(1000, 0.05)(Matrix(a), b)
    assert (found.residual, found.converged) == (math.inf, False)
    assert 155 < found.num_iterations < 170  # nine times larger each, up to a square of 1e308
    torch.testing.assert_close(found.x, Neumann(found.num_iterations, 0.05)(Matrix(a), b).x, rtol=0, atol=0)


@pytest.mark.parametrize("damping", [1e-3, 0.5])
def test_nystrom_at_full_rank_meets_the_smallest_curvature(damping: float) -> None:
    found = Nystrom(30)(Matrix(spd(100)), split(vector()), damping)
    assert found.min_curvature == pytest.approx(0.01 + damping, abs=1e-12)


def test_nystrom_takes_curvature_below_zero_for_flat() -> None:
    a = symmetric(torch.linspace(-1, 1, 30))
    values, vectors = torch.linalg.eigh(a)
    found = Nystrom(30)(Matrix(a), split(vector()), 0.1)
    expected = vectors @ ((vectors.T @ vector()) / (values.clamp_min(0) + 0.1))
    torch.testing.assert_close(join(found.x), expected, rtol=1e-9, atol=1e-9)
    assert found.min_curvature == pytest.approx(-0.9, abs=1e-12)
    assert not found.converged


@pytest.mark.parametrize(("curvature", "converged"), [(-0.125, True), (-0.25, False), (-0.375, False)])
def test_nystrom_has_converged_when_it_is_better_than_nothing(curvature: float, converged: bool) -> None:
    """All curvature is below zero and taken for flat, so x = b / damping and b - (A + damping I) x = -A b / damping."""
    b = 0 * vector()
    b[3] = 1.0
    found = Nystrom(30)(Matrix(curvature * EYE), split(b), 0.25)
    assert found.residual == pytest.approx(-curvature / 0.25, abs=1e-15)
    assert found.converged is converged


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_what_nystrom_takes_for_rounding_goes_by_the_scale_of_the_matrix(scale: float) -> None:
    a = scale * symmetric(torch.cat([torch.linspace(1, 3, 5), torch.zeros(25)]))
    found = Nystrom(8)(Matrix(a), split(vector()), 0.01 * scale)
    expected = torch.linalg.solve(a + 0.01 * scale * EYE, vector())
    torch.testing.assert_close(join(found.x), expected, rtol=1e-8, atol=1e-8 / scale)


def test_nystrom_draws_another_sketch_by_another_seed() -> None:
    first, again, other = (Nystrom(3, seed)(Matrix(spd(100)), split(vector()), 0.1) for seed in (0, 0, 1))
    torch.testing.assert_close(first.x, again.x, rtol=0, atol=0)
    assert float((join(first.x) - join(other.x)).norm()) > 1e-3


def test_nystrom_without_a_finite_sketch_knows_nothing() -> None:
    found = Nystrom(3)(lambda x: params.scale(x, math.inf), split(vector()), 0.1)
    assert found == Solution(found.x, 3, 1.0, math.inf, False)
    assert float(params.norm(found.x)) == 0


@by_name
def test_tensors_keep_their_dtypes_and_shapes(solver: LinearSolver) -> None:
    b = {"weight": vector()[:6].reshape(2, 3), "bias": vector()[6:].float()}
    found = solver(lambda x: params.scale(x, 0.5), b, 0.1)
    assert {name: (p.dtype, p.shape) for name, p in found.x.items()} == {name: (p.dtype, p.shape) for name, p in b.items()}


@by_name
def test_what_is_not_finite_is_said_in_words(solver: LinearSolver) -> None:
    with pytest.raises(NonFiniteError, match=r"^linear solve: the right-hand side b or the start x0 is not finite$"):
        solver(Matrix(EYE), split(vector() * math.inf), 0.1)
    with pytest.raises(MetaVPTError, match=r"^tolerance=inf: must be positive$"):
        ConjugateGradient(tolerance=math.inf)
    with pytest.raises(MetaVPTError, match=r"^num_terms=0: must be at least 1$"):
        Neumann(0)
