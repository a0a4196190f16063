"""Diagnostics of a Solution: trust, start and cost, in float64."""

import math

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
    Neumann,
    Nystrom,
    Solution,
)
from metavpt.hypergradients.params import Params

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


def test_cg_takes_no_step_where_zero_is_within_the_tolerance() -> None:
    matrix = Matrix(EYE)
    found = ConjugateGradient(tolerance=1.0)(matrix, split(vector()))
    assert found == Solution(found.x, 0, 1.0, math.inf, True)
    assert matrix.calls == 0


def test_cg_confirms_a_residual_that_is_the_tolerance_itself() -> None:
    a, b = spd(2), split(vector())
    claimed = ConjugateGradient(10, 1e-12)(Matrix(a), b).residual
    matrix = Matrix(a)
    ConjugateGradient(10, claimed)(matrix, b)
    assert matrix.calls == 11


@pytest.mark.parametrize(("steps", "refreshes"), [(49, 0), (50, 1), (100, 2), (120, 2)])
def test_cg_takes_the_residual_afresh_every_fifty_steps(steps: int, refreshes: int) -> None:
    matrix, b = Matrix(spd(1e9)), vector()
    found = ConjugateGradient(steps, 1e-15)(matrix, split(b))
    assert (found.num_iterations, found.converged) == (steps, False)
    assert matrix.calls == steps + refreshes
    if steps % 50 == 0:
        assert found.residual == pytest.approx(true_residual(matrix.a, found.x, b), rel=1e-6)


@pytest.mark.parametrize(("claimed", "second"), [(0.25, 0.75), (0.2, 0.5)])
def test_cg_restarts_where_the_true_residual_is_more_than_twice_the_one_it_claims(
    claimed: float, second: float
) -> None:
    """A = I, but the first product is wrong: x = b / 2, the residual is b / 2, not `claimed`.

    The second direction is that residual r, or at twice the claim or less r + |r|^2 b, for unit b.
    """
    directions: list[Tensor] = []

    def matvec(x: Params) -> Params:
        directions.append(x["x"])
        return (
            {"x": torch.tensor([2.0, 2 * claimed], dtype=torch.float64)}
            if len(directions) == 1
            else x
        )

    ConjugateGradient(2, 0.3)(matvec, {"x": torch.tensor([1.0, 0.0], dtype=torch.float64)})
    assert directions[1].tolist() == [0.5, 0.0]  # x, to confirm
    assert directions[2].tolist() == [second, 0.0]


def test_cg_takes_no_step_of_infinite_curvature() -> None:
    """That step would be of length zero."""
    found = ConjugateGradient()(lambda x: params.scale(x, math.inf), split(vector()))
    assert found == Solution(found.x, 0, 1.0, math.inf, False)
    assert float(params.norm(found.x)) == 0


def test_cg_ends_where_the_square_of_a_direction_underflows() -> None:
    """The recurrence of one number shrinks below the rounding of x, unconfirmed before step 50."""
    found = ConjugateGradient(49, 1e-300)(
        lambda x: params.scale(x, 49.0), {"x": torch.ones(1, dtype=torch.float64)}
    )
    assert not found.converged
    assert 1 < found.num_iterations < 49
    assert found.residual < 1e-162
    assert float(found.x["x"]) == pytest.approx(1 / 49, rel=1e-14)


def test_neumann_that_neither_grows_nor_shrinks_has_converged_and_one_that_ends_stops() -> None:
    isometry = Neumann(10)(Matrix(2 * EYE), split(vector()))
    assert isometry.converged
    assert isometry.residual == pytest.approx(1, abs=1e-12)
    matrix = Matrix(EYE)
    ended = Neumann(10)(matrix, split(vector()))
    assert ended._replace(min_curvature=1.0) == Solution(ended.x, 10, 0.0, 1.0, True)
    assert ended.min_curvature == pytest.approx(1, abs=1e-12)
    assert matrix.calls == 1


def test_neumann_has_not_converged_if_a_term_outgrew_the_one_before_however_small_it_still_is() -> (
    None
):
    """A part that halves hides one that grows by half: norms fall for six terms and then rise."""
    values = torch.tensor([0.5] * 29 + [2.5], dtype=torch.float64)
    b = torch.tensor([0.0] * 28 + [1.0, 1e-3], dtype=torch.float64)
    assert Neumann(7)(Matrix(torch.diag(values)), split(b)).converged
    later = Neumann(9)(Matrix(torch.diag(values)), split(b))
    assert not later.converged
    assert later.residual < 0.03


@pytest.mark.parametrize(("growth", "converged"), [(2.0**-26, True), (2.0**-25, False)])
def test_neumann_takes_growth_up_to_the_root_of_the_machine_epsilon_for_rounding(
    growth: float, converged: bool
) -> None:
    assert Neumann(2)(Matrix((2 + growth) * EYE), split(EYE[3])).converged is converged


def test_neumann_ends_where_the_square_of_a_term_underflows() -> None:
    matrix = Matrix((1 - 1e-6) * EYE)
    found = Neumann(60)(matrix, split(vector()))
    assert found.converged
    assert 26 <= matrix.calls <= 28  # a millionth each, down to 1e-162
    torch.testing.assert_close(join(found.x), vector() / (1 - 1e-6), rtol=1e-12, atol=0)
    number = Neumann(60)(
        lambda x: params.scale(x, 1 - 1e-6), {"x": torch.ones(1, dtype=torch.float64)}
    )  # its length is no root of a square
    assert (number.num_iterations, number.converged) == (60, True)
    assert number.residual == pytest.approx(1e-162, rel=1e-6)


@pytest.mark.parametrize("step_size", [0.5, 1.5])
def test_neumann_meets_the_curvature_of_an_eigenvector(step_size: float) -> None:
    a = spd(100)
    expected = float(torch.linalg.eigvalsh(a)[20])
    found = Neumann(5, step_size)(Matrix(a), split(3 * eigenvector(a, 20)))
    assert found.min_curvature == pytest.approx(expected, rel=1e-10)
    assert found.residual == pytest.approx(abs(1 - step_size * expected) ** 4, rel=1e-10)


@pytest.mark.parametrize(("curvature", "num_terms"), [(9.0, 162), (9e9, 158)])
def test_neumann_that_overflows_says_how_many_terms_it_summed(
    curvature: float, num_terms: int
) -> None:
    """Each term is nine times the one before, until its square or its curvature overflows."""
    matrix, b, step_size = Matrix(curvature * EYE), split(EYE[3]), 10 / curvature
    found = Neumann(1000, step_size)(matrix, b)
    assert (found.num_iterations, found.residual, found.converged) == (num_terms, math.inf, False)
    assert matrix.calls == num_terms
    torch.testing.assert_close(found.x, Neumann(num_terms, step_size)(matrix, b).x, rtol=0, atol=0)


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


@pytest.mark.parametrize(
    ("curvature", "converged"), [(-0.125, True), (-0.25, False), (-0.375, False)]
)
def test_nystrom_has_converged_when_it_is_better_than_nothing(
    curvature: float, converged: bool
) -> None:
    """Negative curvature is flat: x = b / damping and b - (A + damping I) x = -A b / damping."""
    b = 0 * vector()
    b[3] = 1.0
    found = Nystrom(30)(Matrix(curvature * EYE), split(b), 0.25)
    assert found.residual == pytest.approx(-curvature / 0.25, abs=1e-14)
    assert found.converged is converged


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_what_nystrom_takes_for_rounding_goes_by_the_scale_of_the_matrix(scale: float) -> None:
    a = scale * symmetric(torch.cat([torch.linspace(1, 3, 5), torch.zeros(25)]))
    found = Nystrom(8)(Matrix(a), split(vector()), 0.01 * scale)
    expected = torch.linalg.solve(a + 0.01 * scale * EYE, vector())
    torch.testing.assert_close(join(found.x), expected, rtol=1e-8, atol=1e-8 / scale)


def test_nystrom_draws_another_sketch_by_another_seed() -> None:
    first, again, other = (
        Nystrom(3, seed)(Matrix(spd(100)), split(vector()), 0.1) for seed in (0, 0, 1)
    )
    torch.testing.assert_close(first.x, again.x, rtol=0, atol=0)
    assert float((join(first.x) - join(other.x)).norm()) > 1e-3


def test_nystrom_of_no_curvature_at_all_divides_by_the_damping() -> None:
    found = Nystrom(3)(Matrix(0 * EYE), split(vector()), 0.25)
    torch.testing.assert_close(join(found.x), 4 * vector(), rtol=1e-14, atol=0)
    assert (found.min_curvature, found.converged) == (0.25, True)


def test_nystrom_sketches_where_b_lies_whatever_the_default_device() -> None:
    expected = Nystrom(3)(Matrix(spd(100)), split(vector()), 0.1)
    matrix, b = Matrix(spd(100)), split(vector())
    with torch.device("meta"):
        found = Nystrom(3)(matrix, b, 0.1)
    torch.testing.assert_close(found.x, expected.x, rtol=0, atol=0)


def test_nystrom_without_a_finite_sketch_knows_nothing() -> None:
    found = Nystrom(3)(lambda x: params.scale(x, math.inf), split(vector()), 0.1)
    assert found == Solution(found.x, 3, 1.0, math.inf, False)
    assert float(params.norm(found.x)) == 0


@by_name
def test_tensors_keep_their_dtypes_and_shapes(solver: LinearSolver) -> None:
    b = {"weight": vector()[:6].reshape(2, 3), "bias": vector()[6:].float()}
    found = solver(lambda x: params.scale(x, 0.5), b, 0.1)
    assert {name: (p.dtype, p.shape) for name, p in found.x.items()} == {
        name: (p.dtype, p.shape) for name, p in b.items()
    }


@by_name
def test_what_is_not_finite_is_said_in_words(solver: LinearSolver) -> None:
    with pytest.raises(
        NonFiniteError, match=r"^linear solve: the right-hand side b or the start x0 is not finite$"
    ):
        solver(Matrix(EYE), split(vector() * math.inf), 0.1)
    with pytest.raises(MetaVPTError, match=r"^tolerance=inf: must be positive$"):
        ConjugateGradient(tolerance=math.inf)
    with pytest.raises(MetaVPTError, match=r"^num_terms=0: must be at least 1$"):
        Neumann(0)
