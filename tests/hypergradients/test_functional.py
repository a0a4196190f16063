"""The one-call interface, against closed forms and finite differences in float64."""

import pytest
import torch
from helpers.ridge import Ridge
from torch import nn
from torch.func import functional_call

from metavpt import SGD, ConjugateGradient, ExactProduct, Implicit, MetaVPTError, OneStep, Unrolled
from metavpt.hypergradients import params
from metavpt.hypergradients.functional import hypergradient

CG = Implicit(ConjugateGradient(tolerance=1e-12), product=ExactProduct())


def central_difference(function, at, eps=1e-6):
    """d function / d at, entry by entry."""
    grad = torch.zeros_like(at)
    for k in range(at.numel()):
        step = torch.zeros_like(at).flatten()
        step[k] = eps
        step = step.view_as(at)
        grad.view(-1)[k] = (function(at + step) - function(at - step)) / (2 * eps)
    return grad


def test_hypergradient_implicit_equals_the_closed_form_of_ridge():
    ridge = Ridge.random()
    found = hypergradient(
        lambda theta, phi: ridge.inner(phi)(theta),
        lambda theta, phi: ridge.outer(theta),
        ridge.solution(),
        ridge.phi,
        CG,
    )
    torch.testing.assert_close(
        found.by_phi["log_penalty"], ridge.hypergradient(), rtol=1e-9, atol=1e-11
    )


def test_hypergradient_takes_tensors_and_adds_the_direct_term():
    """theta* = phi, F = |theta|^2 / 2 + <phi, c>: dF/dphi = phi + c."""
    phi = torch.randn(4, dtype=torch.float64)
    c = torch.randn(4, dtype=torch.float64)
    found = hypergradient(
        lambda theta, phi: (theta - phi).square().sum() / 2,
        lambda theta, phi: theta.square().sum() / 2 + (phi * c).sum(),
        phi.clone(),
        phi,
        CG,
    )
    torch.testing.assert_close(found.by_phi["phi"], phi + c, rtol=1e-10, atol=1e-12)


def test_hypergradient_unrolled_takes_the_direct_term_at_the_end_of_the_unroll():
    lr, num_steps = 0.3, 3
    a = torch.randn(5, 5, dtype=torch.float64)
    theta, phi = torch.randn(5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    inner = lambda theta, phi: (a @ theta - phi).square().sum() / 20
    outer = lambda theta, phi: (theta * phi.exp()).square().sum() / 2

    def trained(phi):
        at = theta.clone()
        for _ in range(num_steps):
            at = at - lr * (a.T @ (a @ at - phi)) / 10
        return outer(at, phi)

    method = Unrolled(num_steps, SGD(lr), ExactProduct())
    found = hypergradient(inner, outer, theta, phi, method)
    torch.testing.assert_close(
        found.by_phi["phi"], central_difference(trained, phi), rtol=1e-6, atol=1e-8
    )


def test_hypergradient_takes_modules_and_their_optimizer():
    torch.manual_seed(0)
    learner, weights = nn.Linear(3, 2).double(), nn.Linear(3, 1).double()
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.1)
    x, y = torch.randn(16, 3, dtype=torch.float64), torch.randn(16, 2, dtype=torch.float64)

    def inner(theta, phi):
        weight = functional_call(weights, phi, (x,)).sigmoid()
        return (weight * (functional_call(learner, theta, (x,)) - y).square()).mean()

    def outer(theta, phi):
        return (functional_call(learner, theta, (x,)) - 2 * y).square().mean()

    before = params.clone(params.named(learner))
    found = hypergradient(inner, outer, learner, weights, Unrolled(2), optimizer=optimizer)
    assert found.by_phi.keys() == dict(weights.named_parameters()).keys()
    assert float(params.norm(found.by_phi)) > 0
    for name, p in learner.named_parameters():
        assert torch.equal(p, before[name])
        assert p.grad is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"theta": [1.0]}, "theta must be a dict"),
        ({"phi": {}}, "phi: it holds no parameter"),
        ({"phi": {"a": torch.arange(3)}}, "phi: 'a' is no floating-point tensor"),
        ({"inner": lambda theta, phi: (theta - phi).square()}, "inner must return a scalar"),
        ({"outer": lambda theta, phi: 1.0}, "outer must return a scalar"),
        ({"inner": [lambda theta, phi: theta.sum()] * 3}, "inner holds 3 losses"),
        ({"inner": 3}, "inner must be a function"),
        ({"method": Unrolled(2)}, "give optimizer="),
    ],
)
def test_hypergradient_names_a_wrong_argument(change, words):
    arguments = {
        "inner": lambda theta, phi: (theta - phi).square().sum(),
        "outer": lambda theta, phi: theta.square().sum(),
        "theta": torch.ones(3),
        "phi": torch.ones(3),
        "method": OneStep(),
    }
    with pytest.raises(MetaVPTError, match=words):
        hypergradient(**{**arguments, **change})
