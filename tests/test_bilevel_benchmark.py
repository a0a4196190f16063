"""The problems of the bilevel benchmark: hypergradients against closed forms, and loops."""

import numpy as np
import pytest
import torch
from bilevel_benchmark.problems import (
    Bilevel,
    draw_breast_cancer,
    draw_cleaning,
    draw_generated,
    draw_quadratic,
    state_cleaning,
    state_logistic,
    state_quadratic,
)
from bilevel_benchmark.record import Recorder
from bilevel_benchmark.solvers import SOLVERS, STEPS, soba
from bilevel_benchmark.table import table
from torch import Tensor

import metavpt

EXACT = metavpt.ExactProduct()


class Steps(Recorder):
    """A recorder that ends a run after so many calls, whatever time they take."""

    def __call__(self, phi: object, evaluations: float) -> bool:
        self.rows.append((0.0, 0.0, evaluations, np.array(phi, dtype=np.float64)))
        return len(self.rows) <= self.limit


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    return draw_quadratic(0, num=64, dim=8)


@pytest.fixture(scope="module")
def quadratic(arrays: dict[str, np.ndarray]) -> Bilevel:
    return state_quadratic(arrays, torch.float64)


def logistic() -> Bilevel:
    pytest.importorskip("sklearn")
    return state_logistic(draw_breast_cancer(0), torch.float64)


def generated() -> Bilevel:
    pytest.importorskip("sklearn")
    return state_logistic(draw_generated(0, num=256), torch.float64)


def cleaning() -> Bilevel:
    pytest.importorskip("sklearn")
    return state_cleaning(draw_cleaning(0), torch.float64)


def losses(problem: Bilevel):
    return (
        lambda theta, phi: problem.inner(theta, phi, None),
        lambda theta, phi: problem.outer(theta, phi, None),
    )


def close(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def test_the_estimators_agree_with_the_closed_form_of_the_quadratic(
    arrays: dict[str, np.ndarray], quadratic: Bilevel
) -> None:
    mean = {key: torch.from_numpy(values).double().mean(0) for key, values in arrays.items()}
    phi = quadratic.phi0 + torch.linspace(-1, 1, 8).double()
    value, theta = quadratic.value(phi)
    g_theta = mean["outer_A"] @ theta + phi @ mean["outer_C"] + mean["outer_a"]
    g_phi = mean["outer_B"] @ phi + mean["outer_C"] @ theta + mean["outer_b"]
    exact = g_phi - mean["inner_C"] @ torch.linalg.solve(mean["inner_A"], g_theta)
    lr = 0.2
    one_step = g_phi - lr * mean["inner_C"] @ g_theta
    solver = metavpt.ConjugateGradient(50, 1e-13)

    def of(method: metavpt.OneStep | metavpt.Unrolled | metavpt.Implicit) -> Tensor:
        return metavpt.hypergradient(*losses(quadratic), theta, phi, method).by_phi["phi"]

    assert close(of(metavpt.Implicit(solver, product=EXACT)), exact) < 1e-10
    assert close(of(metavpt.Unrolled(500, metavpt.SGD(0.6), EXACT)), exact) < 1e-6
    assert close(of(metavpt.OneStep(product=EXACT, step_size=lr)), one_step) < 1e-12
    assert value == pytest.approx(float(quadratic.outer(theta, phi, None)))


def test_a_batch_of_all_rows_is_the_whole_loss(quadratic: Bilevel) -> None:
    for problem in (quadratic, logistic(), cleaning()):
        for loss, num in ((problem.inner, problem.num_inner), (problem.outer, problem.num_outer)):
            theta, phi = problem.theta0 + 0.1, problem.phi0
            parts = [loss(theta, phi, slice(k, k + num // 2)) for k in (0, num // 2)]
            assert float(sum(parts)) / 2 == pytest.approx(float(loss(theta, phi, None)), rel=1e-9)


@pytest.mark.parametrize("make", [logistic, generated, cleaning])
def test_implicit_is_the_slope_of_the_value_function(make) -> None:
    problem: Bilevel = make()
    phi = problem.phi0
    theta, _, _ = problem.descend(phi, problem.theta0, 1e-10)
    method = metavpt.Implicit(metavpt.ConjugateGradient(2000, 1e-10), product=EXACT)
    found = metavpt.hypergradient(*losses(problem), theta, phi, method).by_phi["phi"]
    along = torch.randn(phi.shape, generator=torch.Generator().manual_seed(1)).double()
    step = 1e-3
    above, below = (problem.value(phi + sign * step * along, theta)[0] for sign in (1, -1))
    assert float(found @ along) == pytest.approx((above - below) / (2 * step), rel=1e-3)


SETTINGS = {"seed": 0, "step_size": 0.1, "batch": 32}


@pytest.mark.parametrize(
    ("solver", "make", "ratio"),
    [
        *(
            (solver, make, ratio)
            for solver in SOLVERS
            for make, ratio in ((None, 0.3), (cleaning, 1e-3))
        ),
        ("unrolled", logistic, 0.1),
        ("implicit", logistic, 0.1),
    ],
)
def test_every_loop_lowers_the_value_function(
    solver: str, make, ratio: float, quadratic: Bilevel
) -> None:
    problem: Bilevel = make() if make else quadratic
    record = Steps(12.0 if solver == "implicit" else 40.0)
    settings = {} if solver == "implicit" else {**SETTINGS, "ratio": ratio}
    if solver in ("implicit", "soba"):
        settings["is_compiled"] = False
    SOLVERS[solver](problem, record, **settings)
    values = [
        problem.value(torch.from_numpy(row[3]))[0] for row in record.rows[:: len(record.rows) - 1]
    ]
    assert values[1] < values[0]
    assert record.rows[-1][2] > 0


def test_newton_and_descent_find_the_same_minimum() -> None:
    problem = logistic()
    phi = problem.phi0 - 6.0
    by_newton, factor, _ = problem.newton(phi, problem.theta0, 1e-9)
    by_descent, _, _ = problem.descend(phi, problem.theta0, 1e-9)
    assert close(by_newton, by_descent) < 1e-4
    hessian = torch.autograd.functional.hessian(lambda at: problem.inner(at, phi, None), by_newton)
    assert close(factor @ factor.T, hessian) < 1e-10


def test_implicit_ends_at_the_minimum_of_the_quadratic(quadratic: Bilevel) -> None:
    record = Steps(100.0)
    SOLVERS["implicit"](quadratic, record, tolerance=1e-9, is_compiled=False)
    phi = torch.from_numpy(record.rows[-1][3]).requires_grad_()
    (slope,) = torch.autograd.grad(quadratic.outer(quadratic.solution(phi), phi, None), phi)
    assert float(slope.norm()) < 1e-4


@pytest.mark.parametrize("is_drawn", [True, False])
def test_the_steps_of_soba_are_those_of_its_paper(is_drawn: bool) -> None:
    """Drawn samples are all the same one here, so that draws do not matter."""
    arrays = draw_quadratic(0, num=64, dim=8)
    mean = {key: torch.from_numpy(values).double().mean(0) for key, values in arrays.items()}
    start = ("theta0", "phi0")
    sample = {key: arrays[key] if key in start else mean[key][None].numpy() for key in arrays}
    problem = state_quadratic(sample, torch.float64)
    theta, phi, v = problem.theta0, problem.phi0, torch.zeros(8).double()
    for t in range(1, STEPS + 1):
        lr = 0.1 / t**0.5 if is_drawn else 0.1
        by_theta = mean["inner_A"] @ theta + phi @ mean["inner_C"] + mean["inner_a"]
        g_theta = mean["outer_A"] @ theta + phi @ mean["outer_C"] + mean["outer_a"]
        g_phi = mean["outer_B"] @ phi + mean["outer_C"] @ theta + mean["outer_b"]
        theta, v, phi = (
            theta - lr * by_theta,
            v - lr * (mean["inner_A"] @ v + g_theta),
            phi - lr / 0.5 * (mean["inner_C"] @ v + g_phi),
        )
    record = Steps(1.0)
    batch = 64 if is_drawn else None
    soba(problem, record, seed=0, step_size=0.1, ratio=0.5, batch=batch, is_compiled=False)
    assert close(torch.from_numpy(record.rows[-1][3]), phi) < 1e-6  # sizes of steps are in float32


def test_the_table_holds_the_seconds_to_a_gap() -> None:
    def row(solver: str, values: list[float]) -> dict[str, object]:
        curve = [
            {"seconds": k / 10, "evaluations": 5.0 * k, "value": value, "test_error": None}
            for k, value in enumerate(values)
        ]
        return {"problem": "p", "seed": 0, "solver": solver, "curve": curve}

    text = table([row("a", [1.0, 0.5, 0.05]), row("metavpt b", [1.0, 0.0, 0.3])])
    lines = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert lines[0].startswith("| **metavpt b** | 0.100 | 0.100 | 0.100 | 5 | 5 | 0.0e+00")
    assert lines[1].startswith("| a | 0.200 | - | - | 10 | - | 5.0e-02")
