"""Estimators against closed forms, finite differences and each other, on ridge regression."""

from dataclasses import replace

import pytest
import torch
from helpers.ridge import Ridge

from metavpt.errors import MetaVPTError, NonFiniteError, UnsolvedError
from metavpt.hypergradients import params
from metavpt.hypergradients.directions import AdamAware, Clipped, Cosine, Dot, Normalized
from metavpt.hypergradients.estimators import Implicit, OneStep, Unrolled
from metavpt.hypergradients.linear_solvers import ConjugateGradient, Neumann
from metavpt.hypergradients.mixed_products import DifferenceProduct, ExactProduct
from metavpt.hypergradients.optimizer_updates import SGD, AdamW, Update

PRODUCTS = {"exact": ExactProduct(), "difference": DifferenceProduct()}


@pytest.fixture
def ridge() -> Ridge:
    return Ridge.random()


@pytest.fixture
def theta() -> params.Params:
    return {
        "theta": torch.randn(6, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    }


def finite_difference(fn, phi: params.Params, step: float = 1e-5) -> torch.Tensor:
    """dfn/dphi, one central difference per coordinate."""
    base = phi["log_penalty"]
    columns = [
        fn({"log_penalty": base + step * e}) - fn({"log_penalty": base - step * e})
        for e in torch.eye(len(base), dtype=base.dtype)
    ]
    return torch.stack(columns) / (2 * step)


def unroll(
    ridge: Ridge, theta: params.Params, phi: params.Params, rule, num_steps: int, state=None
) -> params.Params:
    """The plain forward unroll, differentiable by backprop through every step: the reference."""
    state = state or rule.init(theta)
    theta = params.leaves(theta)
    for _ in range(num_steps):
        gradient = torch.autograd.grad(ridge.inner(phi)(theta), theta["theta"], create_graph=True)[
            0
        ]
        theta, state = rule.step(theta, state, {"theta": gradient})
    return theta


def backprop(ridge: Ridge, theta: params.Params, rule, num_steps: int, state=None) -> torch.Tensor:
    phi = params.leaves(ridge.phi)
    return torch.autograd.grad(
        ridge.outer(unroll(ridge, theta, phi, rule, num_steps, state)), phi["log_penalty"]
    )[0]


@pytest.mark.parametrize("num_features", [3, 6, 12])
def test_implicit_by_cg_at_the_solution_is_the_closed_form(num_features):
    ridge = Ridge.random(num_features)
    result = Implicit(ConjugateGradient(100, 1e-14), product=ExactProduct())(
        [ridge.inner], ridge.outer, ridge.solution(), ridge.phi
    )
    torch.testing.assert_close(
        result.by_phi["log_penalty"], ridge.hypergradient(), rtol=1e-9, atol=1e-11
    )
    assert result.diagnostics["converged"] == 1.0
    assert result.diagnostics["residual"] < 1e-12


def test_closed_form_is_the_finite_difference_of_the_solved_problem(ridge):
    expected = finite_difference(lambda phi: ridge.outer(ridge.solution(phi)), ridge.phi)
    torch.testing.assert_close(ridge.hypergradient(), expected, rtol=1e-7, atol=1e-9)


def test_a_long_unroll_tends_to_the_closed_form(ridge):
    zero = {"theta": torch.zeros(6, dtype=torch.float64)}
    result = Unrolled(300, SGD(lr=0.5), ExactProduct())(
        [ridge.inner] * 300, ridge.outer, zero, ridge.phi
    )
    torch.testing.assert_close(
        result.by_phi["log_penalty"], ridge.hypergradient(), rtol=1e-6, atol=1e-8
    )


@pytest.mark.parametrize("num_steps", [1, 2, 5, 16])
def test_unrolled_from_a_stationary_point_is_the_neumann_series(ridge, num_steps):
    at = ridge.solution()
    unrolled = Unrolled(num_steps, SGD(lr=0.3), ExactProduct())(
        [ridge.inner] * num_steps, ridge.outer, at, ridge.phi
    )
    series = Implicit(Neumann(num_steps, step_size=0.3), product=ExactProduct())(
        [ridge.inner], ridge.outer, at, ridge.phi
    )
    torch.testing.assert_close(unrolled.by_phi, series.by_phi, rtol=1e-10, atol=1e-12)


def test_one_step_is_the_first_term_of_the_neumann_series(ridge, theta):
    one_step = OneStep(product=ExactProduct(), step_size=0.3)(
        [ridge.inner], ridge.outer, theta, ridge.phi
    )
    series = Implicit(Neumann(1, step_size=0.3), product=ExactProduct())(
        [ridge.inner], ridge.outer, theta, ridge.phi
    )
    torch.testing.assert_close(one_step.by_phi, series.by_phi, rtol=1e-12, atol=1e-14)


def test_one_step_differs_from_one_unrolled_step_by_the_square_of_lr(ridge, theta):
    def gap(lr: float) -> float:
        one = OneStep(product=ExactProduct(), step_size=lr)(
            [ridge.inner], ridge.outer, theta, ridge.phi
        )
        unrolled = Unrolled(1, SGD(lr), ExactProduct())(
            [ridge.inner], ridge.outer, theta, ridge.phi
        )
        return float((one.by_phi["log_penalty"] - unrolled.by_phi["log_penalty"]).norm())

    assert gap(1e-2) / gap(1e-3) == pytest.approx(100, rel=0.02)


@pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)
@pytest.mark.parametrize("num_steps", [1, 3, 10])
@pytest.mark.parametrize(
    "rule",
    [SGD(0.2), SGD(0.1, momentum=0.9, weight_decay=0.01), AdamW(0.05, weight_decay=0.1)],
    ids=str,
)
def test_unrolled_is_backprop_through_the_unroll_and_finite_differences(
    ridge, theta, rule, num_steps, product
):
    result = Unrolled(num_steps, rule, product)(
        [ridge.inner] * num_steps, ridge.outer, theta, ridge.phi
    )
    torch.testing.assert_close(
        result.by_phi["log_penalty"], backprop(ridge, theta, rule, num_steps), rtol=1e-7, atol=1e-9
    )
    differences = finite_difference(
        lambda phi: ridge.outer(unroll(ridge, theta, phi, rule, num_steps)).detach(), ridge.phi
    )
    torch.testing.assert_close(result.by_phi["log_penalty"], differences, rtol=1e-5, atol=1e-8)
    drop = ridge.outer(theta) - ridge.outer(
        params.detach(unroll(ridge, theta, ridge.phi, rule, num_steps))
    )
    assert result.value == pytest.approx(float(drop))


@pytest.mark.parametrize(
    "options",
    [{"offload": True}, {"kept_graphs": 0}, {"kept_graphs": 3}, {"kept_graphs": 99}],
    ids=str,
)
@pytest.mark.parametrize("num_steps", [1, 4, 7])
def test_how_steps_are_kept_changes_nothing(ridge, theta, num_steps, options):
    plain, other = (
        Unrolled(num_steps, AdamW(0.05), **kept)(
            [ridge.inner] * num_steps, ridge.outer, theta, ridge.phi
        )
        for kept in ({}, options)
    )
    assert torch.equal(plain.by_phi["log_penalty"], other.by_phi["log_penalty"])


def test_unrolled_starts_from_the_state_of_the_real_optimizer(ridge, theta):
    rule = AdamW(0.05, weight_decay=0.1)
    g = torch.Generator().manual_seed(3)
    _, state = rule.step(
        theta, rule.init(theta), {"theta": torch.randn(6, generator=g, dtype=torch.float64)}
    )
    result = Unrolled(4, product=ExactProduct())(
        [ridge.inner] * 4, ridge.outer, theta, ridge.phi, update=Update(rule, theta, state)
    )
    torch.testing.assert_close(
        result.by_phi["log_penalty"], backprop(ridge, theta, rule, 4, state), rtol=1e-9, atol=1e-11
    )


@pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)
@pytest.mark.parametrize(
    "direction",
    [
        Dot(),
        Cosine(),
        AdamAware(),
        Normalized(),
        Normalized(Cosine()),
        Normalized(AdamAware()),
        Clipped(0.1),
        Clipped(0.1, Cosine()),
        Clipped(0.1, AdamAware()),
        Clipped(1e6),
    ],
    ids=str,
)
def test_one_step_is_the_derivative_of_the_value_that_it_reports(ridge, theta, direction, product):
    rule = AdamW(0.05)
    update = Update(rule, theta, rule.init(theta))

    def value(phi: params.Params) -> torch.Tensor:
        exact = OneStep(direction, ExactProduct())(
            [ridge.inner], ridge.outer, theta, phi, update=update
        )
        return torch.tensor(exact.value, dtype=torch.float64)

    result = OneStep(direction, product)(
        [ridge.inner], ridge.outer, theta, ridge.phi, update=update
    )
    torch.testing.assert_close(
        result.by_phi["log_penalty"],
        -finite_difference(value, ridge.phi, 1e-4),
        rtol=1e-5,
        atol=1e-7,
    )


def test_adam_aware_value_is_the_drop_in_a_linear_feedback_loss_after_one_real_step(ridge, theta):
    """For a linear outer loss first order is exact: the value is the gain of torch.optim.AdamW."""
    g_down = torch.randn(6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    live = torch.nn.Parameter(theta["theta"].clone())
    optimizer = torch.optim.AdamW([live], lr=0.05, weight_decay=0.1)
    rule = AdamW(0.05, weight_decay=0.1)

    def outer(theta: params.Params) -> torch.Tensor:
        return g_down @ theta["theta"]

    update = Update(rule, theta, rule.init(theta))
    result = OneStep(AdamAware(), ExactProduct())(
        [ridge.inner], outer, theta, ridge.phi, update=update
    )
    ridge.inner(ridge.phi)({"theta": live}).backward()
    optimizer.step()
    assert result.value == pytest.approx(
        float(g_down @ (theta["theta"] - live.detach())), rel=1e-12
    )
    after_step = lambda phi: outer(unroll(ridge, theta, phi, rule, 1)).detach()
    torch.testing.assert_close(
        result.by_phi["log_penalty"], finite_difference(after_step, ridge.phi), rtol=1e-6, atol=1e-8
    )


def test_several_batches_are_averaged(ridge, theta):
    other = replace(ridge, y=ridge.y.flip(0))
    for estimator in (
        OneStep(product=ExactProduct()),
        Implicit(Neumann(1), product=ExactProduct()),
    ):
        both = estimator([ridge.inner, other.inner], ridge.outer, theta, ridge.phi).by_phi
        single = [
            estimator([one.inner], ridge.outer, theta, ridge.phi).by_phi for one in (ridge, other)
        ]
        torch.testing.assert_close(
            both, params.scale(params.add(*single), 0.5), rtol=1e-12, atol=1e-14
        )


def test_warm_start_saves_iterations(ridge):
    estimator = Implicit(ConjugateGradient(100, 1e-10), product=ExactProduct())
    first = estimator([ridge.inner], ridge.outer, ridge.solution(), ridge.phi)
    second = estimator(
        [ridge.inner], ridge.outer, ridge.solution(), ridge.phi, start=first.solution
    )
    assert second.diagnostics["iterations"] <= 1 < first.diagnostics["iterations"]


def test_a_solve_on_a_saddle_is_better_than_none_or_an_error(ridge):
    """Saddles of differing batches, each solve started from the last."""
    torch.manual_seed(0)
    theta = {"w": torch.randn(40, dtype=torch.float64)}
    phi = {"s": torch.ones((), dtype=torch.float64)}
    estimator, start = Implicit(ConjugateGradient(5), damping=1e-2, product=ExactProduct()), None
    for _ in range(12):
        q = torch.linalg.qr(torch.randn(40, 40, dtype=torch.float64)).Q
        a = q @ torch.diag(torch.linspace(-0.2, 3.0, 40, dtype=torch.float64)) @ q.T
        inner = lambda phi, a=a: lambda theta: phi["s"] * theta["w"] @ a @ theta["w"] / 2
        try:
            found = estimator([inner], lambda theta: theta["w"].sum(), theta, phi, start=start)
        except UnsolvedError:
            start = None
            continue
        start = found.solution
        assert start is not None
        assert found.diagnostics["residual"] < 1


@pytest.mark.parametrize(
    "estimator", [OneStep(), Implicit(), Unrolled(2, SGD(0.1))], ids=lambda e: type(e).__name__
)
def test_estimators_change_nothing_and_keep_nothing(ridge, theta, estimator):
    before, phi_before = theta["theta"].clone(), ridge.phi["log_penalty"].clone()
    losses = [ridge.inner] * estimator.num_batches
    first = estimator(losses, ridge.outer, theta, ridge.phi)
    second = estimator(losses, ridge.outer, theta, ridge.phi)
    assert torch.equal(theta["theta"], before)
    assert torch.equal(ridge.phi["log_penalty"], phi_before)
    assert theta["theta"].grad is None
    assert not theta["theta"].requires_grad
    assert torch.equal(first.by_phi["log_penalty"], second.by_phi["log_penalty"])


@pytest.mark.parametrize(
    "estimator", [OneStep(), Implicit(), Unrolled(1, SGD(0.1))], ids=lambda e: type(e).__name__
)
def test_a_feedback_loss_that_is_not_finite_is_an_error(ridge, theta, estimator):
    with pytest.raises(NonFiniteError, match="feedback loss"):
        estimator(
            [ridge.inner], lambda theta: theta["theta"].sum() * float("nan"), theta, ridge.phi
        )


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Unrolled(num_steps=0), "num_steps=0"),
        (lambda: OneStep(step_size=-1.0), "step_size=-1"),
        (lambda: OneStep(num_batches=0), "num_batches=0"),
        (lambda: Implicit(damping=-0.1), "damping=-0.1"),
        (lambda: Clipped(max_norm=0.0), "max_norm=0"),
    ],
)
def test_bad_hyper_parameters_are_named(make, words):
    with pytest.raises(MetaVPTError, match=words):
        make()


def test_unrolled_says_what_it_lacks(ridge, theta):
    with pytest.raises(MetaVPTError, match="needs an optimizer"):
        Unrolled(1)([ridge.inner], ridge.outer, theta, ridge.phi)
    with pytest.raises(MetaVPTError, match="num_steps=2"):
        Unrolled(2, SGD(0.1))([ridge.inner], ridge.outer, theta, ridge.phi)
