"""Lanczos with the least damping that it can solve for, against dense matrices in float64."""

import pytest
import torch
from helpers.linear_systems import Matrix, join, spd, split, symmetric, true_residual, vector

from metavpt import DampedLanczos, MetaVPTError
from metavpt.hypergradients import params

EYE = torch.eye(30, dtype=torch.float64)


def galerkin(a, b, num_products, damping):
    """The solution of (A + damping I) x = b in the Krylov space, by dense algebra."""
    powers = [b / b.norm()]
    for _ in range(num_products - 1):
        power = a @ powers[-1]
        powers.append(power / power.norm())
    q = torch.linalg.qr(torch.stack(powers, dim=1)).Q
    return q @ torch.linalg.solve(q.T @ (a + damping * EYE) @ q, q.T @ b)


@pytest.mark.parametrize("tolerance", [0.5, 0.1, 1e-3])
@pytest.mark.parametrize("max_iterations", [1, 3, 8])
@pytest.mark.parametrize("damping", [0.0, 0.02])
@pytest.mark.parametrize(
    "a",
    [spd(10), spd(1e6), symmetric(torch.linspace(-0.1, 1, 30)), -spd(10)],
    ids=["well", "ill", "indefinite", "negative"],
)
def test_every_curved_system_is_solved_at_the_damping_that_is_told(
    a, damping, max_iterations, tolerance
):
    b, matrix = vector(), Matrix(a)
    found = DampedLanczos(max_iterations, tolerance)(matrix, split(b), damping)
    total = damping + found.added_damping
    assert found.converged
    assert found.added_damping >= 0
    assert found.residual == pytest.approx(true_residual(a + total * EYE, found.x, b), rel=1e-6)
    assert found.residual <= tolerance
    assert matrix.calls == found.num_iterations + 1 <= max_iterations + 1
    expected = galerkin(a, b, found.num_iterations, total)
    torch.testing.assert_close(join(found.x), expected, rtol=0, atol=1e-7 * float(expected.norm()))


def test_the_damping_is_the_least_that_reaches_the_tolerance():
    a, b = spd(1e6), vector()
    found = DampedLanczos(5, 0.2)(Matrix(a), split(b))
    assert found.residual == pytest.approx(0.99 * 0.2, rel=1e-3)
    less = galerkin(a, b, 5, 0.9 * found.added_damping)
    assert float((b - a @ less - 0.9 * found.added_damping * less).norm() / b.norm()) > 0.2


def test_a_system_that_is_solved_without_damping_is_not_damped():
    a, b = symmetric(torch.tensor([1.0, 2.0, 5.0]).repeat(10)), vector()
    found = DampedLanczos(10, 1e-6)(Matrix(a), split(b))
    assert (found.num_iterations, found.added_damping) == (3, 0.0)
    torch.testing.assert_close(join(found.x), torch.linalg.solve(a, b), rtol=1e-10, atol=1e-12)


def test_negative_curvature_is_damped_to_at_least_its_own_size():
    a, b = symmetric(torch.linspace(-0.5, 1, 30)), vector()
    found = DampedLanczos(30, 0.3)(Matrix(a), split(b))
    assert found.min_curvature == pytest.approx(-0.5, abs=1e-6)
    assert found.added_damping == pytest.approx(1.0, abs=1e-5)


def test_a_singular_matrix_is_solved_in_float32():
    a, b = symmetric(torch.tensor([0.0, 0.0, 1.0]).repeat(10)), vector()
    found = DampedLanczos(10, 0.1)(Matrix(a.float()), split(b.float()))
    assert found.converged
    x = params.zip_with(torch.Tensor.double, found.x)
    assert true_residual(a + found.added_damping * EYE, x, b) < 0.1


def test_without_curvature_there_is_no_solution_but_by_a_damping_that_is_given():
    b = vector()
    none = DampedLanczos()(Matrix(0 * EYE), split(b))
    assert (none.residual, none.converged, float(params.norm(none.x))) == (1, False, 0)
    given = DampedLanczos()(Matrix(0 * EYE), split(b), 0.5)
    torch.testing.assert_close(join(given.x), 2 * b, rtol=1e-12, atol=0)


def test_products_that_are_not_finite_leave_x_at_zero():
    found = DampedLanczos()(lambda v: params.scale(v, float("nan")), split(vector()))
    assert (found.residual, found.converged, float(params.norm(found.x))) == (1, False, 0)


@pytest.mark.parametrize("scale_a", [1e-30, 1e30])
@pytest.mark.parametrize("scale_b", [1e-100, 1e100])
def test_scales_change_nothing_but_the_scale(scale_a, scale_b):
    a, b = symmetric(torch.linspace(-0.1, 1, 30)), split(vector())
    expected = DampedLanczos(6, 0.1)(Matrix(a), b)
    found = DampedLanczos(6, 0.1)(Matrix(scale_a * a), params.scale(b, scale_b))
    assert found.added_damping == pytest.approx(scale_a * expected.added_damping, rel=1e-3)
    torch.testing.assert_close(
        join(found.x) * scale_a / scale_b, join(expected.x), rtol=1e-3, atol=1e-6
    )


@pytest.mark.parametrize("options", [{"max_iterations": 0}, {"tolerance": 0.0}, {"tolerance": 1.0}])
def test_bad_options_are_named(options):
    with pytest.raises(MetaVPTError, match=next(iter(options))):
        DampedLanczos(**options)
