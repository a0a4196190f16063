"""Value, cost and diagnostics of an estimate, in float64 on ridge regression."""

import math
from dataclasses import replace

import pytest
import torch
from helpers.ridge import Ridge

from metavpt.errors import MetaVPTError, NonFiniteError, UnsolvedError
from metavpt.hypergradients import params
from metavpt.hypergradients.directions import AdamAware, Cosine, Dot
from metavpt.hypergradients.estimators import Implicit, OneStep, Unrolled
from metavpt.hypergradients.linear_solvers import ConjugateGradient, DampedLanczos, Neumann
from metavpt.hypergradients.mixed_products import DifferenceProduct, ExactProduct
from metavpt.hypergradients.optimizer_updates import SGD, AdamW, ClipGradNorm, Rule, Update
from metavpt.hypergradients.params import Params
from metavpt.profiling import Clock


@pytest.fixture
def ridge() -> Ridge:
    return Ridge.random()


@pytest.fixture
def theta() -> Params:
    return {
        "theta": torch.randn(6, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    }


class Counted:
    """A ridge whose tasks are counted, and whether each was made with a graph."""

    def __init__(self, ridge: Ridge) -> None:
        self.ridge, self.graphs = ridge, []

    def __call__(self, phi: Params):
        self.graphs.append(torch.is_grad_enabled())
        return self.ridge.inner(phi)


def g_pre(ridge: Ridge, theta: Params) -> torch.Tensor:
    at = params.leaves(theta)
    return torch.autograd.grad(ridge.inner(ridge.phi)(at), at["theta"])[0]


def test_the_value_of_one_step_is_the_inner_product_on_average(ridge: Ridge, theta: Params) -> None:
    other = replace(ridge, y=ridge.y.flip(0))
    found = OneStep(product=ExactProduct(), step_size=0.3)(
        [ridge.inner, other.inner], ridge.outer, theta, ridge.phi
    )
    g_down = ridge.g_down(theta)
    expected = float(g_down @ (g_pre(ridge, theta) + g_pre(other, theta))) / 2
    assert found.value == pytest.approx(expected, rel=1e-12)
    assert found.diagnostics == pytest.approx(
        {"feedback_loss": float(ridge.outer(theta)), "g_down_norm": float(g_down.norm())}, rel=1e-12
    )
    assert found.solution is None


def test_the_value_of_an_implicit_step_is_along_its_solution(ridge: Ridge, theta: Params) -> None:
    other = replace(ridge, y=ridge.y.flip(0))
    solver = ConjugateGradient(100, 1e-13)
    found = Implicit(solver, 0.2, ExactProduct())(
        [ridge.inner, other.inner], ridge.outer, theta, ridge.phi
    )
    hessian = ridge.hessian() + 0.2 * torch.eye(6, dtype=torch.float64)
    w = torch.linalg.solve(hessian, ridge.g_down(theta))
    assert found.value == pytest.approx(
        float(w @ (g_pre(ridge, theta) + g_pre(other, theta))) / 2, rel=1e-9
    )
    assert found.solution is not None
    torch.testing.assert_close(found.solution["theta"], w, rtol=1e-9, atol=1e-12)
    said = found.diagnostics
    assert said["feedback_loss"] == pytest.approx(float(ridge.outer(theta)), rel=1e-12)
    assert said["g_down_norm"] == pytest.approx(float(ridge.g_down(theta).norm()), rel=1e-12)
    assert said["converged"] == 1.0
    assert said["iterations"] <= 7
    assert said["curvature_products"] == said["iterations"] + 1  # one confirms
    values = torch.linalg.eigvalsh(hessian)
    assert float(values[0]) <= said["min_curvature"] <= float(values[-1])
    assert said["residual"] <= 1e-13
    assert found.grad_evals == 1 + (said["curvature_products"] + 1) * 2 * 2


def test_a_solve_that_did_not_converge_says_so(ridge: Ridge, theta: Params) -> None:
    found = Implicit(ConjugateGradient(1, 1e-12))([ridge.inner], ridge.outer, theta, ridge.phi)
    assert found.diagnostics["converged"] == 0.0
    assert found.diagnostics["iterations"] == 1.0


@pytest.mark.parametrize(
    ("estimator", "cost"),
    [
        (OneStep(Dot(), DifferenceProduct()), 1 + 1),
        (OneStep(Dot(), ExactProduct()), 1 + 2),
        (OneStep(Cosine(), DifferenceProduct(), num_batches=3), 1 + 3 * 2),
        (Implicit(Neumann(4, 0.3), product=DifferenceProduct()), 1 + 3 + 1),
        (Implicit(Neumann(4, 0.3), product=ExactProduct(), num_batches=2), 1 + (3 + 1) * 2 * 2),
        (Unrolled(3, SGD(0.1), DifferenceProduct()), 1 + 3 * 2),
        (Unrolled(3, SGD(0.1), ExactProduct()), 1 + 3 * 3),
    ],
    ids=str,
)
def test_the_cost_in_passes_through_the_learner(
    ridge: Ridge, theta: Params, estimator, cost: int
) -> None:
    assert (
        estimator([ridge.inner] * estimator.num_batches, ridge.outer, theta, ridge.phi).grad_evals
        == cost
    )


@pytest.mark.parametrize(
    ("direction", "product", "num_losses"),
    [(Dot(), DifferenceProduct(), 2), (Dot(), ExactProduct(), 1), (Cosine(), ExactProduct(), 2)],
)
def test_no_gradient_is_taken_that_the_direction_does_not_need(
    ridge: Ridge, theta: Params, direction, product, num_losses: int
) -> None:
    calls = []

    def inner(phi: Params):
        return lambda theta: calls.append(1) or ridge.inner(phi)(theta)

    estimator = OneStep(direction, product, check_losses=False)
    estimator([inner], ridge.outer, theta, ridge.phi)
    assert len(calls) == num_losses


@pytest.mark.parametrize(
    ("solve", "curvature"),
    [
        (ConjugateGradient(), 0.0),
        (DampedLanczos(), 0.0),
        (ConjugateGradient(), -1.0),
        (Neumann(9, 3.0), -1.0),
    ],
)
def test_a_solution_that_is_no_better_than_zero_is_an_error(solve, curvature: float) -> None:
    theta, phi = ({"x": torch.ones(1, dtype=torch.float64)} for _ in range(2))
    inner = lambda phi: (
        lambda theta: (phi["x"] * theta["x"] + curvature / 2 * theta["x"].square()).sum()
    )
    with pytest.raises(UnsolvedError, match=r"residual .* no better than x = 0") as raised:
        Implicit(solve)([inner], lambda theta: theta["x"].sum(), theta, phi)
    assert raised.value.grad_evals >= 2


def test_one_unrolled_step_needs_no_curvature() -> None:
    """L = <phi, theta> has no Hessian in theta. theta' = theta - lr phi and F = |theta'|^2 / 2."""
    theta, phi = (
        {"x": torch.tensor(values, dtype=torch.float64)} for values in ([1.0, 2.0], [3.0, -1.0])
    )
    estimator = Unrolled(1, SGD(0.1), ExactProduct())
    found = estimator(
        [lambda phi: lambda theta: (phi["x"] * theta["x"]).sum()],
        lambda theta: (theta["x"] ** 2).sum() / 2,
        theta,
        phi,
    )
    torch.testing.assert_close(
        found.by_phi["x"], -0.1 * (theta["x"] - 0.1 * phi["x"]), rtol=1e-14, atol=0
    )


@pytest.mark.parametrize(
    ("offload", "error"), [(True, "copy out of meta tensor"), (False, "item.*meta tensor")]
)
def test_offloaded_steps_go_to_the_cpu(offload: bool, error: str) -> None:
    """Tensors without data cannot be moved; else the feedback loss after the steps fails first."""
    theta, phi = ({"x": torch.ones(2, device="meta")} for _ in range(2))
    outer = lambda theta: theta["x"].sum() if theta["x"].requires_grad else torch.ones(())
    with pytest.raises((NotImplementedError, RuntimeError), match=error):
        Unrolled(1, SGD(0.1), offload=offload, check_losses=False)(
            [lambda phi: lambda theta: (phi["x"] * theta["x"]).sum()], outer, theta, phi
        )


def test_the_time_of_a_solve_counts_as_its_own(ridge: Ridge, theta: Params) -> None:
    clock = Clock(by_path=True)
    with clock.listen("product"):
        Implicit(Neumann(2, 0.3))([ridge.inner], ridge.outer, theta, ridge.phi)
    assert set(clock.seconds) == {"product", "product/g_down", "product/solve"}


@pytest.mark.parametrize(("kept_graphs", "made_again"), [(0, 4), (1, 3), (3, 1), (4, 0), (9, 0)])
def test_unrolled_makes_again_what_it_did_not_keep(
    ridge: Ridge, theta: Params, kept_graphs: int, made_again: int
) -> None:
    inner = Counted(ridge)
    found = Unrolled(4, SGD(0.1), kept_graphs=kept_graphs, check_losses=False)(
        [inner] * 4, ridge.outer, theta, ridge.phi
    )
    kept = min(kept_graphs, 4)
    assert inner.graphs == [False] * (4 - kept) + [True] * (kept + made_again)
    assert found.diagnostics["feedback_loss"] == pytest.approx(float(ridge.outer(theta)), rel=1e-12)
    last = theta
    for _ in range(4):
        last = {"theta": last["theta"] - 0.1 * g_pre(ridge, last)}
    assert found.diagnostics["g_down_norm"] == pytest.approx(
        float(ridge.g_down(last).norm()), rel=1e-10
    )


def test_the_curvature_of_an_implicit_step_needs_no_graph_of_the_task(
    ridge: Ridge, theta: Params
) -> None:
    inner = Counted(ridge)
    Implicit(Neumann(3, 0.3), check_losses=False)([inner], ridge.outer, theta, ridge.phi)
    assert inner.graphs == [False, True]


@pytest.mark.parametrize(
    "estimator", [OneStep(), Implicit(), Unrolled(1, SGD(0.1))], ids=lambda e: type(e).__name__
)
def test_a_hypergradient_that_is_not_finite_is_an_error(
    ridge: Ridge, theta: Params, estimator
) -> None:
    """The square root of a designer's zero has no derivative."""
    phi = {"log_penalty": torch.zeros(6, dtype=torch.float64)}

    def inner(phi: Params):
        return lambda theta: ((theta["theta"] - 1) ** 2 * (1 + phi["log_penalty"].sqrt())).sum() / 2

    with pytest.raises(NonFiniteError, match=r"^the hypergradient is not finite$"):
        estimator([inner], ridge.outer, theta, phi)


def test_a_feedback_loss_of_infinity_is_said_with_its_gradient(ridge: Ridge, theta: Params) -> None:
    with pytest.raises(
        NonFiniteError, match=r"^the feedback loss is inf and the norm of its gradient"
    ):
        OneStep()(
            [ridge.inner], lambda theta: (theta["theta"] * math.inf).abs().sum(), theta, ridge.phi
        )
    with pytest.raises(
        NonFiniteError, match=r"^the feedback loss is inf and the norm of its gradient 2\.45$"
    ):
        OneStep()([ridge.inner], lambda theta: theta["theta"].sum() + math.inf, theta, ridge.phi)
    with pytest.raises(
        NonFiniteError, match=r"^the feedback loss is 0 and the norm of its gradient (nan|inf)"
    ):
        OneStep()(
            [ridge.inner], lambda theta: (0 * theta["theta"]).abs().sqrt().sum(), theta, ridge.phi
        )


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Implicit(num_batches=0), r"^Implicit: num_batches=0 must be positive$"),
        (lambda: OneStep(num_batches=0), r"^OneStep: num_batches=0 must be positive$"),
        (lambda: OneStep(step_size=math.nan), r"^OneStep: step_size=nan must be positive$"),
        (lambda: Unrolled(kept_graphs=-1), r"^Unrolled: kept_graphs=-1 must not be negative$"),
        (lambda: Unrolled(0), r"^Unrolled: num_steps=0 must be at least 1$"),
    ],
)
def test_hyper_parameters_out_of_range_are_named(make, words: str) -> None:
    with pytest.raises(MetaVPTError, match=words):
        make()


def test_what_needs_the_learners_optimizer_says_so() -> None:
    assert [OneStep(direction).needs_update for direction in (Dot(), Cosine(), AdamAware())] == [
        False,
        False,
        True,
    ]
    assert [e.needs_update for e in (Implicit(), Unrolled(), Unrolled(2, SGD(0.1)))] == [
        False,
        True,
        False,
    ]
    assert Unrolled(7).num_batches == 7


def after_steps(rule: Rule, theta: Params, num_steps: int = 3) -> Update:
    """The learner's update with moments of earlier gradients."""
    state, g = rule.init(theta), torch.Generator().manual_seed(3)
    for _ in range(num_steps):
        noise = {"theta": torch.randn(6, generator=g, dtype=torch.float64)}
        _, state = rule.step(theta, state, noise)
    return Update(rule, theta, state)


def relative_of(estimator, ridge: Ridge, theta: Params, rule: Rule | None = None):
    """The estimate in the common unit."""
    update = None if rule is None else after_steps(rule, theta)
    inner = [ridge.inner] * estimator.num_batches
    found = estimator(inner, ridge.outer, theta, ridge.phi, update=update)
    return found.relative(lambda: float(g_pre(ridge, theta).norm()))


def test_the_common_unit_of_dot_and_cosine_is_the_cosine(ridge: Ridge, theta: Params) -> None:
    down, pre = ridge.g_down(theta), g_pre(ridge, theta)
    cosine = float(down @ pre / (down.norm() * pre.norm()))
    raw = OneStep(product=ExactProduct())([ridge.inner], ridge.outer, theta, ridge.phi)
    dot = relative_of(OneStep(product=ExactProduct()), ridge, theta)
    assert dot.value == pytest.approx(cosine, rel=1e-12)
    assert relative_of(OneStep(Cosine(), ExactProduct()), ridge, theta).value == pytest.approx(
        cosine, rel=1e-12
    )
    size = float(down.norm() * pre.norm())
    torch.testing.assert_close(dot.by_phi, params.scale(raw.by_phi, 1 / size), rtol=1e-12, atol=0)


@pytest.mark.parametrize("lr", [1e-1, 4e-6])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_step_of_sgd_is_dot_in_the_common_unit_whatever_its_learning_rate(
    ridge: Ridge, theta: Params, lr: float, momentum: float
) -> None:
    dot = relative_of(OneStep(product=ExactProduct()), ridge, theta)
    rule = SGD(lr, momentum=momentum, weight_decay=0.1)
    aware = relative_of(OneStep(AdamAware(), ExactProduct()), ridge, theta, rule)
    torch.testing.assert_close(aware.by_phi, dot.by_phi, rtol=1e-8, atol=0)
    tiny = SGD(4e-6, momentum=momentum)
    unrolled = relative_of(Unrolled(1, product=ExactProduct()), ridge, theta, tiny)
    torch.testing.assert_close(unrolled.by_phi, dot.by_phi, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    "estimator",
    [OneStep(AdamAware(), ExactProduct()), Unrolled(4, product=ExactProduct())],
    ids=str,
)
@pytest.mark.parametrize("clip", [False, True], ids=["plain", "clipped"])
def test_the_common_unit_is_free_of_the_learning_rate(
    ridge: Ridge, theta: Params, estimator, clip: bool
) -> None:
    """At lr 5e-6 and 5e-8 the raw gradients differ by a factor of 100."""

    def found(lr: float):
        rule: Rule = AdamW(lr, weight_decay=0.1)
        return relative_of(
            estimator, ridge, theta, ClipGradNorm(rule, 0.1, rest_norm=0.2) if clip else rule
        )

    torch.testing.assert_close(found(5e-6).by_phi, found(5e-8).by_phi, rtol=1e-3, atol=1e-6)


def test_the_common_unit_of_an_implicit_step_is_the_cosine_with_its_solution(
    ridge: Ridge, theta: Params
) -> None:
    found = relative_of(Implicit(ConjugateGradient(100, 1e-13), 0.2, ExactProduct()), ridge, theta)
    matrix = ridge.hessian() + 0.2 * torch.eye(6, dtype=torch.float64)
    w, pre = torch.linalg.solve(matrix, ridge.g_down(theta)), g_pre(ridge, theta)
    assert found.value == pytest.approx(float(w @ pre / (w.norm() * pre.norm())), rel=1e-9)


def test_a_step_that_moves_nothing_has_no_relative_value(ridge: Ridge, theta: Params) -> None:
    """A learning rate of 0, as of a backbone whose head is warmed up."""
    found = relative_of(OneStep(AdamAware()), ridge, theta, AdamW(0.0))
    assert found.value == 0.0
    assert found.by_phi["log_penalty"].tolist() == [0.0] * 6
