"""TorchOpt's unroll against ours, in float64 on ridge regression."""

from dataclasses import dataclass

import pytest
import torch
from helpers.ridge import Ridge

from metavpt.errors import MetaVPTError, NonFiniteError
from metavpt.hypergradients import params
from metavpt.hypergradients.estimators import Unrolled
from metavpt.hypergradients.mixed_products import ExactProduct
from metavpt.hypergradients.optimizer_updates import (
    SGD,
    Adam,
    AdamW,
    ClipGradNorm,
    PerParameter,
    Rule,
    Update,
)
from metavpt.interop.torchopt import TorchOptUnroll

pytestmark = pytest.mark.peers
torchopt = pytest.importorskip("torchopt")

RULES = [
    SGD(0.2),
    SGD(0.1, momentum=0.9, weight_decay=0.01, nesterov=True),
    SGD(0.1, momentum=0.9, dampening=0.3),
    Adam(0.05, weight_decay=0.1),
    AdamW(0.05, weight_decay=0.1),
]


@pytest.fixture
def ridge() -> Ridge:
    return Ridge.random()


@pytest.fixture
def theta() -> params.Params:
    return {
        "theta": torch.randn(6, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    }


def state_after(rule, theta: params.Params, num_steps: int):
    """The state of an optimizer that has taken steps."""
    state, rng = rule.init(theta), torch.Generator().manual_seed(3)
    for _ in range(num_steps):
        _, state = rule.step(
            theta,
            state,
            {name: torch.randn(p.shape, generator=rng, dtype=p.dtype) for name, p in theta.items()},
        )
    return state


@pytest.mark.parametrize("num_steps", [1, 4, 16])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_equals_unrolled_from_fresh_moments(ridge, theta, rule, num_steps):
    arguments = [ridge.inner] * num_steps, ridge.outer, theta, ridge.phi
    ours, theirs = (
        Unrolled(num_steps, rule, ExactProduct())(*arguments),
        TorchOptUnroll(num_steps, rule)(*arguments),
    )
    torch.testing.assert_close(theirs.by_phi, ours.by_phi, rtol=1e-8, atol=1e-12)
    assert theirs.value == pytest.approx(ours.value, rel=1e-10)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_equals_unrolled_from_the_state_of_the_real_optimizer(ridge, theta, rule):
    update = Update(rule, theta, state_after(rule, theta, 3))
    arguments = [ridge.inner] * 4, ridge.outer, theta, ridge.phi
    ours, theirs = (
        Unrolled(4, product=ExactProduct())(*arguments, update=update),
        TorchOptUnroll(4)(*arguments, update=update),
    )
    torch.testing.assert_close(theirs.by_phi, ours.by_phi, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("max_norm", [0.3, 100.0])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_equals_unrolled_through_clipping(ridge, theta, rule, max_norm):
    clipping = ClipGradNorm(rule, max_norm, rest_norm=0.4)
    update = Update(clipping, theta, state_after(rule, theta, 3))
    arguments = [ridge.inner] * 4, ridge.outer, theta, ridge.phi
    ours, theirs = (
        Unrolled(4, product=ExactProduct())(*arguments, update=update),
        TorchOptUnroll(4)(*arguments, update=update),
    )
    torch.testing.assert_close(theirs.by_phi, ours.by_phi, rtol=1e-8, atol=1e-12)
    assert theirs.value == pytest.approx(ours.value, rel=1e-10)


def test_parameter_groups_have_their_own_options(ridge):
    """Two parameters, one of which decays: as the trainer's groups do."""
    rng = torch.Generator().manual_seed(7)
    theta = {name: torch.randn(6, generator=rng, dtype=torch.float64) for name in ("a", "b")}
    rule = PerParameter({"a": AdamW(0.05, weight_decay=0.1), "b": AdamW(0.01, weight_decay=0.0)})

    def merged(loss):
        return lambda theta: loss({"theta": theta["a"] + theta["b"]})

    arguments = [lambda phi: merged(ridge.inner(phi))] * 3, merged(ridge.outer), theta, ridge.phi
    update = Update(rule, theta, state_after(rule, theta, 2))
    ours, theirs = (
        Unrolled(3, product=ExactProduct())(*arguments, update=update),
        TorchOptUnroll(3)(*arguments, update=update),
    )
    torch.testing.assert_close(theirs.by_phi, ours.by_phi, rtol=1e-8, atol=1e-12)


def test_their_own_step_count_costs_float64_its_digits(ridge, theta):
    """MetaAdam takes 1 - 0.999 in float32, 1.3e-5 off; with a count in theta's dtype it fits."""

    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.theta = torch.nn.Parameter(theta["theta"].clone())

    phi, module = params.leaves(ridge.phi), Module()
    optimizer = torchopt.MetaAdamW(module, lr=0.05, weight_decay=0.1)
    optimizer.step(ridge.inner(phi)({"theta": module.theta}))
    (theirs,) = torch.autograd.grad(ridge.outer({"theta": module.theta}), list(phi.values()))
    ours = Unrolled(1, AdamW(0.05, weight_decay=0.1), ExactProduct())(
        [ridge.inner], ridge.outer, theta, ridge.phi
    )
    error = float((theirs - ours.by_phi["log_penalty"]).norm() / theirs.norm())
    assert 1e-7 < error < 1e-4


def test_they_differentiate_the_root_of_zero_where_we_do_not(ridge, theta):
    """An entry whose gradient is exactly 0: NaN with TorchOpt (an error here), finite with ours."""

    def inner(phi):
        return lambda theta: ridge.inner(phi)(
            {"theta": theta["theta"] * torch.tensor([0.0, 1, 1, 1, 1, 1], dtype=torch.float64)}
        )

    arguments = [inner] * 2, ridge.outer, theta, ridge.phi
    assert params.is_finite(Unrolled(2, AdamW(0.05), ExactProduct())(*arguments).by_phi)
    with pytest.raises(NonFiniteError):
        TorchOptUnroll(2, AdamW(0.05))(*arguments)


def test_bad_input_is_named(ridge, theta):
    @dataclass(frozen=True)
    class Lion(Rule):
        def moment_names(self, name):
            return ()

        def update(self, name, p, moments, num_steps, grad):
            return -grad, {}

    with pytest.raises(MetaVPTError, match="num_steps=0"):
        TorchOptUnroll(0)
    with pytest.raises(MetaVPTError, match="needs an optimizer"):
        TorchOptUnroll(1)([ridge.inner], ridge.outer, theta, ridge.phi)
    with pytest.raises(MetaVPTError, match="Lion"):
        TorchOptUnroll(1, Lion())([ridge.inner], ridge.outer, theta, ridge.phi)
