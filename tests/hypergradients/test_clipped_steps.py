"""Clipping as part of the learner's step, against torch.optim and clip_grad_norm_, in float64."""

import math

import pytest
import torch
from helpers.differences import relative
from helpers.real_steps import OPTIMIZERS, MakeOptimizer, TwoLayers, real_steps, slopes, twin
from torch import nn

from metavpt.errors import MetaVPTError
from metavpt.hypergradients import params
from metavpt.hypergradients.directions import AdamAware, Normalized
from metavpt.hypergradients.estimators import OneStep, Unrolled
from metavpt.hypergradients.mixed_products import DifferenceProduct, ExactProduct
from metavpt.hypergradients.optimizer_updates import (
    SGD,
    AdamW,
    ClipGradNorm,
    Update,
    from_torch,
    last_grad_norm,
    vjp,
)
from metavpt.hypergradients.params import Params

ACTIVE, INACTIVE = 0.5, 1e3  # gradients have norms of 2 to 20
every_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
every_bound = pytest.mark.parametrize("max_norm", [ACTIVE, INACTIVE], ids=["active", "inactive"])


def trained(
    problem: TwoLayers, make: MakeOptimizer, max_norm: float
) -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer]:
    """The learner and its optimizer after three clipped steps, so that all moments count."""
    live = {name: nn.Parameter(p.clone()) for name, p in problem.theta.items()}
    optimizer = make(list(live.values()))
    real_steps([problem.inner(5 + k)(problem.phi) for k in range(3)], live, optimizer, max_norm)
    return live, optimizer


@every_optimizer
@every_bound
@pytest.mark.parametrize("num_steps", [1, 4])
@pytest.mark.parametrize(
    "product", [ExactProduct(), DifferenceProduct()], ids=["exact", "difference"]
)
def test_unrolled_is_the_derivative_of_clipped_steps_of_torch_optim(
    make: MakeOptimizer, max_norm: float, num_steps: int, product
) -> None:
    problem = TwoLayers()
    live, optimizer = trained(problem, make, max_norm)
    norms: list[float] = []

    def after(phi: Params) -> float:
        copies, other = twin(live, optimizer)
        losses = [problem.inner(k)(phi) for k in range(num_steps)]
        norms.extend(real_steps(losses, copies, other, max_norm))
        return float(problem.outer(params.detach(dict(copies))))

    expected = slopes(after, problem.phi)
    found = Unrolled(num_steps, product=product)(
        [problem.inner(k) for k in range(num_steps)],
        problem.outer,
        params.detach(dict(live)),
        problem.phi,
        update=from_torch(optimizer, dict(live), max_norm),
    )
    assert all((norm > max_norm) == (max_norm == ACTIVE) for norm in norms)
    assert relative(found.by_phi, expected) < 1e-6
    drop = float(problem.outer(params.detach(dict(live)))) - after(problem.phi)
    assert found.value == pytest.approx(drop, rel=1e-9)


@every_optimizer
@every_bound
@pytest.mark.parametrize("direction", [AdamAware(), Normalized(AdamAware())], ids=str)
def test_adam_aware_is_the_derivative_of_a_clipped_step_of_torch_optim(
    make: MakeOptimizer, max_norm: float, direction
) -> None:
    """To first order in the step, so along a linear feedback loss it is exact."""
    problem = TwoLayers()
    live, optimizer = trained(problem, make, max_norm)
    at = params.detach(params.clone(dict(live)))
    w = params.zip_with(torch.cos, at)  # any direction
    length = 1.0 if direction == AdamAware() else float(params.norm(w))

    def drop(phi: Params) -> float:
        copies, other = twin(live, optimizer)
        real_steps([problem.inner(0)(phi)], copies, other, max_norm)
        return float(params.dot(w, params.add(at, params.detach(dict(copies)), alpha=-1)))

    found = OneStep(direction, ExactProduct())(
        [problem.inner(0)],
        lambda theta: params.dot(w, theta),
        at,
        problem.phi,
        update=from_torch(optimizer, dict(live), max_norm),
    )
    expected = params.scale(slopes(drop, problem.phi), -1 / length)
    assert relative(found.by_phi, expected) < 1e-6
    assert found.value * length == pytest.approx(drop(problem.phi), rel=1e-9)


@every_optimizer
def test_the_rest_of_the_gradient_counts_in_the_norm(make: MakeOptimizer) -> None:
    """theta is a part of what is clipped. The rest has a constant gradient, so this is exact."""
    problem, max_norm = TwoLayers(), 6.0
    live, optimizer = trained(problem, make, max_norm)
    rest = torch.full((5,), 4.0, dtype=torch.float64)

    def with_rest(theta: Params) -> Params:
        return {**theta, "rest": torch.zeros(5, dtype=torch.float64)}

    both = {**live, "rest": nn.Parameter(torch.zeros(5, dtype=torch.float64))}
    optimizer = make(list(both.values()))
    pull = lambda loss: lambda theta: loss(theta) + theta["rest"] @ rest
    real_steps([pull(problem.inner(5)(problem.phi))], both, optimizer, max_norm)

    def after(phi: Params) -> float:
        copies, other = twin(both, optimizer)
        losses = [pull(problem.inner(k)(phi)) for k in range(4)]
        assert min(real_steps(losses, copies, other, max_norm)) > max_norm
        return float(problem.outer(params.detach(dict(copies))))

    own = {name: both[name] for name in live}
    optimizer.param_groups[0]["grad_norms"] = [3.0, 5.0, float(rest.norm())]
    optimizer.param_groups[0]["max_grad_norm"] = max_norm
    update = from_torch(optimizer, own)
    assert update.rule == ClipGradNorm(update.rule.of("first"), max_norm, float(rest.norm()))
    found = Unrolled(4, product=ExactProduct())(
        [problem.inner(k) for k in range(4)],
        problem.outer,
        params.detach(own),
        problem.phi,
        update=update,
    )
    assert relative(found.by_phi, slopes(after, problem.phi)) < 1e-6


def test_from_torch_reads_the_bound_of_the_trainer_and_the_last_norms() -> None:
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([{"params": [a]}, {"params": [b]}], lr=0.1)
    assert from_torch(optimizer, {"a": a}).rule == SGD(0.1)
    assert from_torch(optimizer, {"a": a}, 2.0).rule == ClipGradNorm(SGD(0.1), 2.0, 0.0)
    for group, norm in zip(optimizer.param_groups, (3.0, 4.0), strict=True):
        group["max_grad_norm"], group["grad_norms"] = 1.5, [norm]
    assert from_torch(optimizer, {"a": a}).rule == ClipGradNorm(SGD(0.1), 1.5, 4.0)
    assert from_torch(optimizer, {"a": a, "b": b}).rule == ClipGradNorm(SGD(0.1), 1.5, 0.0)
    assert last_grad_norm(optimizer) == 5.0
    assert last_grad_norm(optimizer, lambda p: p is b) == 4.0
    with pytest.raises(MetaVPTError, match="max_norm=0"):
        from_torch(optimizer, {"a": a}, 0.0)
    assert from_torch(optimizer, {"a": a}, math.inf).rule == SGD(0.1)


@pytest.mark.parametrize("rest_norm", [0.0, 2.0])
@every_bound
def test_clipping_is_torchs_and_its_pullback_that_of_autograd(
    max_norm: float, rest_norm: float
) -> None:
    theta = TwoLayers().theta
    grad = params.leaves(params.scale(theta, 3.0))
    rule = ClipGradNorm(AdamW(0.1), max_norm, rest_norm)
    live = [nn.Parameter(p) for p in theta.values()]
    for p, g in zip(live, grad.values(), strict=True):
        p.grad = g.detach().clone()
    rest = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    rest.grad = torch.full_like(rest, rest_norm)
    nn.utils.clip_grad_norm_([*live, rest], max_norm)
    torch.testing.assert_close(
        list(params.detach(rule.clip(grad)).values()), [p.grad for p in live], rtol=1e-12, atol=0
    )
    ct = params.zip_with(torch.sin, theta)
    expected = torch.autograd.grad(params.dot(ct, rule.clip(grad)), list(grad.values()))
    torch.testing.assert_close(
        list(rule.clip_vjp(grad, ct).values()), list(expected), rtol=1e-11, atol=1e-14
    )


def test_a_gradient_of_zero_is_not_clipped_and_has_a_finite_pullback() -> None:
    theta = TwoLayers().theta
    zero = params.zeros_like(theta)
    rule = ClipGradNorm(AdamW(0.1), 1.0)
    pulled = vjp(rule, theta, rule.init(theta), zero, theta)
    plain = vjp(rule.rule, theta, rule.init(theta), zero, theta)
    torch.testing.assert_close(pulled, plain, rtol=0, atol=0)
    update = Update(rule, theta, rule.init(theta))
    assert all(params.is_finite(x) for x in (rule.clip(zero), AdamAware()(theta, zero, update).w))
