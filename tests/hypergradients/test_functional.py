"""The one-call interface, against closed forms and finite differences in float64."""

import pytest
import torch
from helpers.ridge import Ridge
from torch import nn
from torch.func import functional_call

from metavpt import (
    SGD,
    Adam,
    AdamW,
    ConjugateGradient,
    ExactProduct,
    Implicit,
    MetaVPTError,
    OneStep,
    UnreachedParameterError,
    Unrolled,
)
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


def forward_difference(function, at, eps=1e-5):
    """d function / d at of a number, from values at and above it, to second order."""
    values = [function(at + k * eps) for k in range(3)]
    return (4 * values[1] - 3 * values[0] - values[2]) / (2 * eps)


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


LEARNED = {  # name -> our rule of phi, torch's optimizer and its options of phi
    "SGD": (
        lambda phi: SGD(phi["a"].exp(), weight_decay=phi["b"]),
        torch.optim.SGD,
        lambda phi: {"lr": phi["a"].exp(), "weight_decay": phi["b"]},
    ),
    "momentum": (
        lambda phi: SGD(phi["a"].exp(), momentum=phi["b"]),
        torch.optim.SGD,
        lambda phi: {"lr": phi["a"].exp(), "momentum": phi["b"]},
    ),
    "Adam": (
        lambda phi: Adam(phi["a"].exp(), betas=(phi["b"], 0.9), eps=1e-3, weight_decay=0.2),
        torch.optim.Adam,
        lambda phi: {
            **{"lr": phi["a"].exp(), "betas": (phi["b"], 0.9), "eps": 1e-3, "weight_decay": 0.2}
        },
    ),
    "AdamW": (
        lambda phi: AdamW(phi["a"].exp(), weight_decay=phi["b"]),
        torch.optim.AdamW,
        lambda phi: {"lr": phi["a"].exp(), "weight_decay": phi["b"]},
    ),
}


@pytest.mark.parametrize(
    ("name", "second"),
    # also at a weight decay of zero, which has a derivative
    [("SGD", 0.0), ("SGD", 0.3), ("momentum", 0.5), ("Adam", 0.5), ("AdamW", 0.0), ("AdamW", 0.3)],
)
def test_learned_hyperparameters_of_the_optimizer_equal_finite_differences(name, second):
    """Against torch.optim, trained anew for each difference; `c` is in the loss, `a` in both."""
    torch.manual_seed(0)
    make_rule, kind, options = LEARNED[name]
    xs, ys = torch.randn(5, 12, 4).double(), torch.randn(5, 12).double()
    start = torch.randn(4).double()
    phi = {
        "a": torch.tensor(-2.0).double(),
        "b": torch.tensor(second).double(),
        "c": torch.randn(12).double(),
    }

    def inner(x, y):
        return lambda theta, phi: (
            (phi["c"].sigmoid() * (x @ theta["w"] - y) ** 2).mean() + phi["a"] * theta["w"].sum()
        )

    outer = lambda theta, phi: (xs[0] @ theta["w"] - ys[1]).square().mean() + phi["a"].square()
    losses = [inner(x, y) for x, y in zip(xs, ys, strict=True)]

    def trained(phi):
        w = start.clone().requires_grad_()
        numbers = {
            key: tuple(map(float, value)) if isinstance(value, tuple) else float(value)
            for key, value in options(phi).items()
        }
        optimizer = kind([w], **numbers)
        for loss in losses:
            optimizer.zero_grad()
            loss({"w": w}, phi).backward()
            optimizer.step()
        return outer({"w": w.detach()}, phi)

    method = Unrolled(len(losses), make_rule, ExactProduct())
    found = hypergradient(losses, outer, {"w": start}, phi, method).by_phi
    for key in phi:
        # torch refuses a negative weight decay
        difference = forward_difference if phi[key].max() == 0 else central_difference
        expected = difference(lambda at, key=key: trained({**phi, key: at}), phi[key])
        torch.testing.assert_close(found[key], expected, rtol=1e-6, atol=1e-8)


def test_a_learning_rate_alone_is_learned_and_a_parameter_of_nothing_is_named():
    target = torch.tensor([1.0, -2.0])
    inner = lambda theta, phi: (theta - target).square().sum() / 2
    outer = lambda theta, phi: (theta - target).square().sum() / 2
    start, log_lr = torch.zeros(2), torch.tensor(-3.0)
    method = Unrolled(4, lambda phi: SGD(phi["phi"].exp()))
    optimizer = torch.optim.Adam([log_lr], lr=0.1)
    for _ in range(100):
        log_lr.grad = hypergradient(inner, outer, start, log_lr, method).by_phi["phi"]
        optimizer.step()
    assert log_lr.exp() == pytest.approx(1.0, abs=0.2)  # one step of length 1 is the solution
    with pytest.raises(UnreachedParameterError, match="depends on b"):
        hypergradient(
            inner, outer, start, {"a": log_lr, "b": log_lr}, Unrolled(4, lambda phi: SGD(phi["a"]))
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
