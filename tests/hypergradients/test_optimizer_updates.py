"""optimizers against torch.optim, finite differences and TorchOpt, in float64."""

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metavpt.errors import MetaVPTError
from metavpt.hypergradients import params
from metavpt.hypergradients.optimizer_updates import (
    SGD,
    Adam,
    AdamW,
    Moments,
    PerParameter,
    Rule,
    State,
    Update,
    first_order_value,
    from_torch,
    vjp,
)
from metavpt.hypergradients.params import Params

SGD_OPTIONS: list[dict[str, Any]] = [
    {"lr": 0.1},
    {"lr": 0.1, "weight_decay": 0.05},
    {"lr": 0.1, "momentum": 0.9},
    {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.05},
    {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.05},
]
ADAM_OPTIONS: list[dict[str, Any]] = [
    {"lr": 0.01},
    {"lr": 0.01, "betas": (0.6, 0.9), "eps": 1e-3, "weight_decay": 0.1},
    {"lr": 0.01, "betas": (0.0, 0.9), "weight_decay": 0.0},
]
CASES: list[tuple[type[torch.optim.Optimizer], type[Rule], dict[str, Any]]] = [
    *((torch.optim.SGD, SGD, options) for options in SGD_OPTIONS),
    *((torch.optim.Adam, Adam, options) for options in ADAM_OPTIONS),
    *((torch.optim.AdamW, AdamW, options) for options in ADAM_OPTIONS),
]


def case_id(value: object) -> str | None:
    return value.__name__ if isinstance(value, type) else None


every_case = pytest.mark.parametrize(("kind", "rule_type", "options"), CASES, ids=case_id)


def parameters(seed: int = 0) -> dict[str, nn.Parameter]:
    return {
        name: nn.Parameter(value)
        for name, value in random_like(
            {"weight": torch.empty(3, 2), "bias": torch.empty(4)}, seed
        ).items()
    }


def random_like(theta: Params, seed: int) -> Params:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(p.shape, generator=generator, dtype=torch.float64)
        for name, p in theta.items()
    }


def torch_step(
    optimizer: torch.optim.Optimizer, theta: dict[str, nn.Parameter], grad: Params
) -> None:
    for name, p in theta.items():
        p.grad = grad[name].clone()
    optimizer.step()


def assert_same_steps(
    rule: Rule,
    state: State,
    optimizer: torch.optim.Optimizer,
    theta: dict[str, nn.Parameter],
    seeds: Iterable[int],
) -> None:
    """Rule and optimizer give equal parameters and moments for equal gradients."""
    values = params.clone(dict(theta))
    state = State(
        state.num_steps, {name: params.clone(moments) for name, moments in state.moments.items()}
    )
    for seed in seeds:
        grad = random_like(values, seed)
        values, state = rule.step(values, state, grad)
        torch_step(optimizer, theta, grad)
        torch.testing.assert_close(values, params.detach(dict(theta)), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        state.moments, from_torch(optimizer, dict(theta)).state.moments, rtol=1e-12, atol=1e-12
    )


@every_case
def test_steps_equal_torch(
    kind: Callable[..., torch.optim.Optimizer], rule_type: type[Rule], options: dict[str, Any]
) -> None:
    theta, rule = parameters(), rule_type(**options)
    assert_same_steps(
        rule, rule.init(dict(theta)), kind(theta.values(), **options), theta, range(50)
    )


@every_case
@pytest.mark.parametrize("num_before", [0, 1, 7])
def test_from_torch_goes_on_as_the_optimizer_does(
    kind: Callable[..., torch.optim.Optimizer],
    rule_type: type[Rule],
    options: dict[str, Any],
    num_before: int,
) -> None:
    theta = parameters()
    optimizer = kind(theta.values(), **options)
    for seed in range(num_before):
        torch_step(optimizer, theta, random_like(dict(theta), 100 + seed))
    update = from_torch(optimizer, dict(theta))
    assert update.rule == rule_type(**options)
    torch.testing.assert_close(update.theta, params.detach(dict(theta)), rtol=0, atol=0)
    assert_same_steps(update.rule, update.state, optimizer, theta, range(3))


def test_from_torch_reads_the_parameter_groups() -> None:
    theta = parameters()
    groups = [
        {"params": [theta["weight"]], "weight_decay": 0.1},
        {"params": [theta["bias"]], "weight_decay": 0.0, "lr": 0.05},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    torch_step(optimizer, theta, random_like(dict(theta), 9))
    update = from_torch(optimizer, dict(theta))
    assert update.rule == PerParameter(
        {"weight": AdamW(0.01, weight_decay=0.1), "bias": AdamW(0.05, weight_decay=0.0)}
    )
    assert_same_steps(update.rule, update.state, optimizer, theta, range(3))
    assert from_torch(optimizer, {"bias": theta["bias"]}).rule == AdamW(0.05, weight_decay=0.0)


def test_groups_with_and_without_momentum() -> None:
    theta = parameters()
    optimizer = torch.optim.SGD(
        [{"params": [theta["weight"]], "momentum": 0.9}, {"params": [theta["bias"]]}], lr=0.1
    )
    torch_step(optimizer, theta, random_like(dict(theta), 9))
    rule, values, state = from_torch(optimizer, dict(theta))
    assert_same_steps(rule, state, optimizer, theta, range(3))
    assert (
        set(
            vjp(rule, values, state, random_like(values, 1), random_like(values, 2)).moments["bias"]
        )
        == set()
    )


def test_from_torch_of_parameters_that_have_not_stepped_alike() -> None:
    theta = parameters()
    optimizer = torch.optim.Adam(theta.values(), lr=0.01)
    theta["weight"].grad = torch.ones_like(theta["weight"])
    optimizer.step()  # bias has no gradient and does not step
    rule, _, state = from_torch(optimizer, dict(theta))
    assert state.num_steps == {"weight": 1, "bias": 0}
    assert_same_steps(rule, state, optimizer, theta, range(3))


def test_from_torch_after_loading_a_state_and_with_a_tensor_lr() -> None:
    theta = parameters()
    optimizer = torch.optim.AdamW(theta.values(), lr=torch.tensor(0.01, dtype=torch.float64))
    torch_step(optimizer, theta, random_like(dict(theta), 9))
    again = torch.optim.AdamW(theta.values())
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    rule, _, state = from_torch(again, dict(theta))
    assert rule == AdamW(0.01)
    assert_same_steps(rule, state, again, theta, range(3))


def test_from_torch_changes_nothing_in_the_optimizer() -> None:
    theta = parameters()
    optimizer = torch.optim.AdamW(theta.values())
    rule, values, state = from_torch(optimizer, dict(theta))
    rule.step(values, state, random_like(values, 1))
    assert len(optimizer.state) == 0
    torch_step(optimizer, theta, random_like(values, 2))
    before = copy.deepcopy(optimizer.state_dict()), params.clone(dict(theta))
    rule, values, state = from_torch(optimizer, dict(theta))
    rule.step(values, state, random_like(values, 1))
    vjp(rule, values, state, random_like(values, 1), values, state.moments)
    torch.testing.assert_close(
        (optimizer.state_dict(), params.detach(dict(theta))), before, rtol=0, atol=0
    )


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda p: torch.optim.RMSprop(p), "RMSprop"),
        (lambda p: torch.optim.LBFGS(p), "LBFGS: .* use torch.optim.SGD, Adam or AdamW"),
        (lambda p: torch.optim.Rprop(p), "Rprop: .* use torch.optim.SGD, Adam or AdamW"),
        (lambda p: torch.optim.SparseAdam(p), "SparseAdam: .* use torch.optim.SGD, Adam or AdamW"),
        (
            lambda p: type("Own", (torch.optim.AdamW,), {})(p),
            "Own",
        ),  # a subclass may step as it likes
        (lambda p: torch.optim.AdamW(p, amsgrad=True), "amsgrad"),
        (lambda p: torch.optim.SGD(p, maximize=True), "maximize"),
    ],
)
def test_what_has_no_rule_is_named(
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], names: str
) -> None:
    theta = parameters()
    with pytest.raises(MetaVPTError, match=names):
        from_torch(make(list(theta.values())), dict(theta))


def test_a_parameter_that_the_optimizer_does_not_hold_is_named() -> None:
    theta = parameters()
    with pytest.raises(MetaVPTError, match="bias"):
        from_torch(torch.optim.SGD([theta["weight"]], lr=0.1), dict(theta))


def moments_like(moments: Moments, seed: int, *, positive: bool = False) -> Moments:
    found = {name: random_like(entry, seed + k) for k, (name, entry) in enumerate(moments.items())}
    # apart from zero, where sqrt would bend too sharply for a finite difference
    return (
        {name: params.zip_with(lambda m: m**2 + 0.5, entry) for name, entry in found.items()}
        if positive
        else found
    )


def inner(x: Moments, y: Moments) -> Tensor:
    return sum(
        (params.dot(x[name], y[name]) for name in x if x[name]),
        torch.zeros((), dtype=torch.float64),
    )


@every_case
@pytest.mark.parametrize("num_steps", [0, 1, 5])
def test_vjp_equals_finite_differences(
    kind: Callable[..., torch.optim.Optimizer],
    rule_type: type[Rule],
    options: dict[str, Any],
    num_steps: int,
) -> None:
    rule, theta = rule_type(**options), random_like(dict(parameters()), 0)
    moments = moments_like(rule.init(theta).moments, 10, positive=True)
    grad, ct_theta, ct_moments = (
        random_like(theta, 20),
        random_like(theta, 30),
        moments_like(moments, 40),
    )
    state = State(dict.fromkeys(theta, num_steps), moments)
    pulled = vjp(rule, theta, state, grad, ct_theta, ct_moments)
    along = random_like(theta, 50), moments_like(moments, 60), random_like(theta, 70)

    def value(eps: float) -> Tensor:
        moved = {name: params.add(moments[name], along[1][name], eps) for name in moments}
        after, at = rule.step(
            params.add(theta, along[0], eps),
            State(state.num_steps, moved),
            params.add(grad, along[2], eps),
        )
        return params.dot(ct_theta, after) + inner(ct_moments, at.moments)

    eps = 1e-5
    expected = (8 * (value(eps) - value(-eps)) - (value(2 * eps) - value(-2 * eps))) / (12 * eps)
    found = (
        params.dot(pulled.theta, along[0])
        + inner(pulled.moments, along[1])
        + params.dot(pulled.grad, along[2])
    )
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)
    zeros = {name: params.zeros_like(entry) for name, entry in moments.items()}
    torch.testing.assert_close(
        vjp(rule, theta, state, grad, ct_theta), vjp(rule, theta, state, grad, ct_theta, zeros)
    )


def unrolled(
    rule: Rule, theta: Params, grads: list[Params], ct_theta: Params
) -> tuple[Params, tuple[Tensor, ...]]:
    """The last theta and its derivatives by the first and each gradient, by `vjp` step by step."""
    trail = [(theta, rule.init(theta))]
    for grad in grads:
        trail.append(rule.step(*trail[-1], grad))
    after, _ = trail.pop()
    found: list[Params] = []
    ct_moments: Moments | None = None
    for (theta, state), grad in zip(reversed(trail), reversed(grads), strict=True):
        ct_theta, ct_moments, by_grad, _ = vjp(rule, theta, state, grad, ct_theta, ct_moments)
        found.insert(0, by_grad)
    return after, tuple(p for group in (ct_theta, *found) for p in group.values())


@every_case
def test_chained_vjp_equals_backward_through_the_steps(
    kind: Callable[..., torch.optim.Optimizer], rule_type: type[Rule], options: dict[str, Any]
) -> None:
    rule, theta = rule_type(**options), params.leaves(random_like(dict(parameters()), 0))
    grads = [params.leaves(random_like(theta, 20 + k)) for k in range(3)]
    ct_theta = random_like(theta, 30)
    after, found = unrolled(rule, theta, grads, ct_theta)
    everything = [p for group in (theta, *grads) for p in group.values()]
    expected = torch.autograd.grad(params.dot(ct_theta, after), everything)
    assert not any(p.requires_grad for p in found)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rule", [Adam(), AdamW(), Adam(weight_decay=0.1)], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_square_root_of_zero_is_finite(rule: Adam, dtype: torch.dtype) -> None:
    """Entries that never had a gradient have a finite derivative; other entries are unchanged."""
    theta = {"weight": torch.zeros(3, dtype=dtype)}
    grad = {
        "weight": torch.tensor([0.0, 1e-30, 1.0], dtype=dtype)
    }  # in float32 1e-60 underflows to zero as well
    ones = {"weight": torch.ones(3, dtype=dtype)}
    state = rule.init(theta)
    pulled = vjp(
        rule,
        theta,
        state,
        grad,
        ones,
        {"weight": {"exp_avg": ones["weight"], "exp_avg_sq": ones["weight"]}},
    )
    for entry in (pulled.theta, pulled.grad, pulled.moments["weight"]):
        assert params.is_finite(entry)
    slope = first_order_value(Update(rule, theta, state), grad, ones)[0]["weight"]
    assert slope[0] == pytest.approx(
        rule.lr / rule.eps, rel=1e-5
    )  # the true slope of lr g / (|g| + eps) at 0
    assert float(slope[2]) == pytest.approx(rule.lr * rule.eps, rel=1e-2, abs=1e-9)


def test_nan_is_not_hidden_by_the_guard() -> None:
    theta = {"weight": torch.ones(2)}
    after, _ = Adam().step(theta, Adam().init(theta), {"weight": torch.tensor([float("nan"), 1.0])})
    assert torch.isnan(after["weight"]).tolist() == [True, False]


@every_case
@pytest.mark.parametrize("num_steps", [0, 4])
def test_first_order_value_is_the_pullback_of_the_drop(
    kind: Callable[..., torch.optim.Optimizer],
    rule_type: type[Rule],
    options: dict[str, Any],
    num_steps: int,
) -> None:
    rule, theta = rule_type(**options), random_like(dict(parameters()), 0)
    state = State(
        dict.fromkeys(theta, num_steps), moments_like(rule.init(theta).moments, 10, positive=True)
    )
    grad, g_down = random_like(theta, 20), random_like(theta, 30)
    w, value = first_order_value(Update(rule, theta, state), grad, g_down)
    torch.testing.assert_close(
        w, vjp(rule, theta, state, grad, params.scale(g_down, -1)).grad, rtol=1e-12, atol=1e-12
    )
    after, _ = rule.step(theta, state, grad)
    torch.testing.assert_close(
        value, params.dot(g_down, params.add(theta, after, -1)), rtol=1e-10, atol=1e-12
    )
    if rule == SGD(0.1):  # the dot product of V-Pretraining, in the units of a step
        torch.testing.assert_close(
            (w, value), (params.scale(g_down, 0.1), 0.1 * params.dot(g_down, grad))
        )
    with torch.no_grad():
        torch.testing.assert_close(
            first_order_value(Update(rule, theta, state), grad, g_down), (w, value), rtol=0, atol=0
        )


@pytest.fixture
def float64_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.peers
@pytest.mark.usefixtures(
    "float64_by_default"
)  # TorchOpt's bias correction is in the default dtype: 1e-7 off in float32
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("decoupled", [False, True])
def test_unrolled_derivative_equals_torchopt(weight_decay: float, decoupled: bool) -> None:
    torchopt = pytest.importorskip("torchopt")
    theta, ct_theta = (
        params.leaves(random_like(dict(parameters()), 0)),
        random_like(dict(parameters()), 30),
    )
    grads = [params.leaves(random_like(theta, 20 + k)) for k in range(3)]
    make = torchopt.adamw if decoupled else torchopt.adam
    peer = make(lr=0.01, weight_decay=weight_decay)
    peer_state, after = peer.init(theta), theta
    for grad in grads:
        # a copy: TorchOpt adds the coupled weight decay into the gradient's own dict
        updates, peer_state = peer.update(dict(grad), peer_state, params=after, inplace=False)
        after = torchopt.apply_updates(after, updates, inplace=False)
    everything = [p for group in (theta, *grads) for p in group.values()]
    expected = torch.autograd.grad(params.dot(ct_theta, after), everything)

    rule = Adam(0.01, weight_decay=weight_decay, decoupled_weight_decay=decoupled)
    ours, found = unrolled(rule, theta, grads, ct_theta)
    torch.testing.assert_close(ours, after, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
