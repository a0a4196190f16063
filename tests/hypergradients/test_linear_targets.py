from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from helpers.tiny_lm import TinyLanguage, packed, tiny_designer, tiny_lm
from torch import Tensor
from torch.func import functional_call

from metavpt.check.modes import Float64
from metavpt.errors import MetaVPTError, UnreachedParameterError
from metavpt.hypergradients import params
from metavpt.hypergradients.directions import AdamAware, Cosine, Dot
from metavpt.hypergradients.estimators import Implicit, OneStep, Unrolled
from metavpt.hypergradients.linear_targets import (
    CentralDifference,
    DirectionalDerivative,
    ForwardMode,
    LinearProduct,
)
from metavpt.hypergradients.mixed_products import (
    DifferenceProduct,
    ExactProduct,
    value_and_gradient,
)
from metavpt.hypergradients.optimizer_updates import SGD, AdamW, State, Update
from metavpt.hypergradients.params import Params
from metavpt.learners.pretrained_lm import LoRA
from metavpt.objectives import next_token
from metavpt.objectives.target_task import TargetTask, target_loss
from metavpt.strategies.learned import inner_loss

BATCH = packed([[5, 7], [9]])


@pytest.fixture(autouse=True)
def float64():
    """transformers computes norms in float32 whatever the model's dtype."""
    with Float64():
        yield


@pytest.fixture(autouse=True)
def chunk(monkeypatch):
    monkeypatch.setattr(next_token, "CHUNK", 5)


class Point:
    """theta, phi and w of the tiny problem, its designer away from where it starts."""

    def __init__(self, kind="llama", lora=None):
        self.problem = TinyLanguage(
            tiny_lm(kind, tail_layers=2, lora=lora), tiny_designer(moved=0.3)
        )
        with torch.no_grad():
            for p in params.named(self.problem.learner).values():
                p.add_(0.05 * torch.randn_like(p))
        self.theta = params.detach(params.named(self.problem.learner))
        self.aligned = {name: self.theta[name] for name in self.problem.aligned_parameters()}
        self.phi = params.named(self.problem.designer)
        g = torch.Generator().manual_seed(3)
        self.w = {
            name: torch.randn(p.shape, generator=g, dtype=torch.float64)
            for name, p in self.aligned.items()
        }

    def by(self, product):
        theta, phi = params.leaves(self.aligned), params.leaves(self.phi)
        with torch.enable_grad():
            loss = inner_loss(self.problem, self.theta, BATCH)(phi)
        (by_phi,), value = product(loss, theta, self.w, (phi,))
        return by_phi, value

    def value(self, phi):
        """<w, dL_pre/dtheta> by a backward pass through `target_loss`, without the product."""
        with torch.no_grad():
            task = functional_call(self.problem.designer, phi, (BATCH,))
        loss = lambda theta_s: target_loss(self.problem.learner, {**self.theta, **theta_s}, task)
        return params.dot(self.w, value_and_gradient(loss, self.aligned)[1])


def relative_error(x, truth):
    return float(params.norm(params.add(x, truth, alpha=-1.0)) / params.norm(truth))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("lora", [None, LoRA(rank=2)], ids=["full", "lora"])
def test_linear_is_the_exact_product(kind, lora):
    point = Point(kind, lora)
    truth, value = point.by(ExactProduct())
    assert min(float(g.abs().max()) for g in truth.values()) > 0  # every phi is reached
    by_phi, own_value = point.by(LinearProduct(ForwardMode()))
    assert relative_error(by_phi, truth) < 1e-10
    torch.testing.assert_close(own_value, value, rtol=1e-10, atol=0)
    for product in (LinearProduct(CentralDifference()), DifferenceProduct()):
        by_phi, own_value = point.by(product)
        assert relative_error(by_phi, truth) < 1e-6
        torch.testing.assert_close(own_value, value, rtol=1e-6, atol=0)


def test_linear_is_the_finite_difference_in_phi():
    point = Point()
    by_phi, value = point.by(LinearProduct())
    torch.testing.assert_close(value, point.value(point.phi), rtol=1e-9, atol=0)
    g = torch.Generator().manual_seed(4)
    for _ in range(3):
        v = {
            name: torch.randn(p.shape, generator=g, dtype=torch.float64)
            for name, p in point.phi.items()
        }
        above, below = (
            point.value(params.add(params.detach(point.phi), v, alpha=eps)) for eps in (1e-5, -1e-5)
        )
        torch.testing.assert_close(
            (above - below) / 2e-5, params.dot(by_phi, v), rtol=1e-5, atol=1e-9
        )


def test_the_value_over_the_recipe_is_the_difference_of_two_values_and_has_the_same_gradient():
    point = Point()
    truth, value = point.by(LinearProduct())
    by_phi, over = point.by(LinearProduct(absolute=False))
    plain = TargetTask(BATCH, point.problem.recipe(BATCH).targets)
    loss = lambda theta_s: target_loss(point.problem.learner, {**point.theta, **theta_s}, plain)
    recipe = params.dot(point.w, value_and_gradient(loss, point.aligned)[1])
    torch.testing.assert_close(over, value - recipe, rtol=1e-9, atol=1e-12)
    assert relative_error(by_phi, truth) < 1e-12


@pytest.mark.parametrize("direction", [Dot(), Cosine(), AdamAware()], ids=["dot", "cosine", "adam"])
def test_it_goes_with_any_direction(direction):
    point = Point()
    inner, outer = inner_loss(point.problem, point.theta, BATCH), point.problem.feedback_loss
    labelled = packed([[8]], seed=9)
    rule = AdamW(lr=1e-2)
    state = rule.init(point.aligned)
    update = Update(rule, point.aligned, State(dict.fromkeys(point.aligned, 1), state.moments))
    estimates = [
        OneStep(direction, product)(
            [inner],
            lambda p: outer({**point.theta, **p}, labelled),
            point.aligned,
            point.phi,
            update=update,
        )
        for product in (LinearProduct(), ExactProduct())
    ]
    assert relative_error(estimates[0].by_phi, estimates[1].by_phi) < 1e-9
    assert estimates[0].value == pytest.approx(estimates[1].value, rel=1e-9)


@pytest.mark.parametrize("estimator", ["unrolled", "implicit"])
def test_where_the_derivative_by_theta_is_asked_for_the_general_product_is_taken(estimator):
    point = Point()
    inner = inner_loss(point.problem, point.theta, BATCH)
    outer = lambda p: point.problem.feedback_loss({**point.theta, **p}, packed([[8]], seed=9))
    by = []
    for product in (LinearProduct(general=ExactProduct()), ExactProduct()):
        estimate = (
            Unrolled(2, SGD(0.1), product)
            if estimator == "unrolled"
            else Implicit(damping=10.0, product=product)
        )
        by.append(estimate([inner] * estimate.num_batches, outer, point.aligned, point.phi).by_phi)
    assert relative_error(*by) < 1e-9


def test_no_gradient_of_the_learner_is_taken(monkeypatch):
    point = Point()
    task = point.problem.designer(BATCH)
    loss = point.problem.pretrain_tail(point.theta, task)
    point.problem.learner.tail.register_forward_hook(
        lambda module, args, out: asked.append(out.requires_grad)
    )
    asked = []
    LinearProduct(CentralDifference())(loss, params.leaves(point.aligned), point.w, (point.phi,))
    assert asked == [False, False, False]  # two sides and, for the absolute value, the middle


@dataclass(frozen=True)
class CostLoss:
    """The plainest `LinearLoss`: any differentiable cost of the shape of `targets`."""

    cost: Callable[[Params], Tensor]
    targets: Tensor

    def __call__(self, theta: Params) -> Tensor:
        return (self.targets * self.cost(theta)).sum()

    def slopes(
        self, theta: Params, w: Params, derivative: DirectionalDerivative, absolute: bool = True
    ) -> Tensor:
        return derivative(self.cost, theta, w)


def test_any_loss_that_shows_its_costs_will_do():
    """As for a cross-entropy of prototypes with teacher probabilities, which a designer may set."""
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(7, 3, generator=g), torch.randn(4, 3, generator=g)
    theta, w = {"weight": weight.requires_grad_()}, {"weight": torch.randn(4, 3, generator=g)}
    phi = {"logits": torch.randn(7, 4, generator=g).requires_grad_()}
    loss = CostLoss(
        lambda p: -(x @ p["weight"].T).log_softmax(dim=1) / 7, phi["logits"].softmax(dim=1)
    )
    truth = ExactProduct()(loss, theta, w, (phi,), retain_graph=True)
    for product, tolerance in (
        (LinearProduct(), 1e-12),
        (LinearProduct(CentralDifference()), 1e-8),
    ):
        found = product(loss, theta, w, (phi,), retain_graph=True)
        assert relative_error(found.by[0], truth.by[0]) < tolerance
        torch.testing.assert_close(found.value, truth.value, rtol=tolerance, atol=tolerance)


def test_other_losses_and_idle_parameters_are_errors():
    theta = {"a": torch.ones(2).requires_grad_()}
    with pytest.raises(MetaVPTError, match="must be linear in its targets"):
        LinearProduct()(
            lambda p: p["a"].sum(), theta, theta, ({"phi": torch.ones(1).requires_grad_()},)
        )
    idle = {"idle": torch.ones(1).requires_grad_()}
    q = torch.ones(2).requires_grad_()
    with pytest.raises(UnreachedParameterError, match="idle"):
        LinearProduct()(CostLoss(lambda p: p["a"] ** 2, q), theta, params.detach(theta), (idle,))
