"""An estimator refuses losses that forget theta or that are not pure, at its first call."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.func import functional_call

from metavpt import (
    SGD,
    Cosine,
    DampedLanczos,
    ExactProduct,
    Implicit,
    OneStep,
    UnreachedParameterError,
    Unrolled,
)
from metavpt.errors import ImpureLossError
from metavpt.hypergradients import params
from metavpt.hypergradients.linear_targets import LinearProduct

ESTIMATORS = {
    "one_step": OneStep,
    "cosine": lambda **options: OneStep(Cosine(), **options),
    "exact": lambda **options: OneStep(product=ExactProduct(), **options),
    "implicit": lambda **options: Implicit(DampedLanczos(), **options),
    "unrolled": lambda **options: Unrolled(2, SGD(0.1), **options),
}
every_estimator = pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)


class Regression:
    """A network that is pretrained on targets scaled by phi; the feedback is its loss on others."""

    def __init__(self, *layers):
        torch.manual_seed(0)
        middle = layers or (nn.Tanh(),)
        self.network = nn.Sequential(nn.Linear(3, 8), *middle, nn.Linear(8, 1)).double()
        self.x, self.y, self.goal = (
            torch.randn(16, width, dtype=torch.float64) for width in (3, 1, 1)
        )
        self.theta = params.detach(params.named(self.network))
        self.phi = {"scale": torch.ones(16, 1, dtype=torch.float64)}
        self.num_evaluations = {"inner": 0, "outer": 0}

    def told(self, theta):
        return functional_call(self.network, theta, (self.x,))

    def inner(self, phi):
        def loss(theta):
            self.num_evaluations["inner"] += 1
            return (self.told(theta) - phi["scale"] * self.y).square().mean()

        return loss

    def outer(self, theta):
        self.num_evaluations["outer"] += 1
        return (self.told(theta) - self.goal).square().mean()

    def __call__(self, estimator, **losses):
        losses = {"inner": self.inner, "outer": self.outer, **losses}
        inner = [losses["inner"]] * estimator.num_batches
        return estimator(inner, losses["outer"], self.theta, self.phi)


@dataclass(frozen=True)
class Linear:
    """The loss <targets, cost(theta)>."""

    cost: Callable
    targets: torch.Tensor

    def __call__(self, theta):
        return (self.targets * self.cost(theta)).sum()

    def slopes(self, theta, w, derivative, absolute=True):
        return derivative(self.cost, theta, w)


@every_estimator
@pytest.mark.parametrize("grows", [True, False], ids=["trainable", "frozen"])
def test_a_feedback_loss_that_forgets_theta_is_an_error_that_names_it(estimator, grows):
    at = Regression()
    at.network.requires_grad_(grows)
    forgets = lambda theta: (at.network(at.x) - at.goal).square().mean()
    for options in ({}, {"check_losses": False}):
        with pytest.raises(UnreachedParameterError, match=r"feedback loss .*0\.weight"):
            at(estimator(**options), outer=forgets)


@every_estimator
def test_a_pretraining_loss_that_forgets_theta_is_an_error_that_names_it(estimator):
    at = Regression()
    forgets = lambda phi: lambda theta: (at.network(at.x) - phi["scale"] * at.y).square().mean()
    with pytest.raises(UnreachedParameterError, match=r"pretraining loss .*0\.weight"):
        at(estimator(), inner=forgets)


def test_a_linear_pretraining_loss_that_forgets_theta_is_an_error_that_names_it():
    at = Regression()
    forgets = lambda phi: Linear(lambda theta: at.network(at.x), phi["scale"])
    with pytest.raises(UnreachedParameterError, match=r"pretraining loss .*0\.weight"):
        at(OneStep(product=LinearProduct()), inner=forgets)


@every_estimator
def test_a_head_that_the_feedback_loss_does_not_use_is_no_error(estimator):
    at = Regression()
    at.theta["head"] = torch.ones(1, dtype=torch.float64)
    inner = lambda phi: lambda theta: at.inner(phi)(theta_of(theta)) * theta["head"].square().sum()
    theta_of = lambda theta: {name: p for name, p in theta.items() if name != "head"}
    found = at(estimator(), inner=inner, outer=lambda theta: at.outer(theta_of(theta)))
    assert float(params.norm(found.by_phi)) > 0


@every_estimator
def test_dropout_in_train_mode_is_an_error_and_in_eval_mode_is_none(estimator):
    at = Regression(nn.Tanh(), nn.Dropout(0.1))
    with pytest.raises(ImpureLossError, match=r"pretraining loss is random.*Dropout.*eval"):
        at(estimator())
    at.network.eval()
    at(estimator())


@every_estimator
def test_a_random_feedback_loss_is_an_error(estimator):
    at = Regression()
    noisy = lambda theta: at.outer(theta) * (1 + 1e-9 * torch.rand((), dtype=torch.float64))
    with pytest.raises(ImpureLossError, match="feedback loss is random"):
        at(estimator(), outer=noisy)


def test_a_random_task_is_an_error():
    at = Regression()

    def noisy(phi):
        noise = torch.rand_like(at.y)
        return lambda theta: (at.told(theta) - phi["scale"] * noise).square().mean()

    with pytest.raises(ImpureLossError, match="pretraining loss is random"):
        at(OneStep(), inner=noisy)


@every_estimator
def test_batch_norm_that_moves_its_statistics_is_an_error(estimator):
    at = Regression(nn.BatchNorm1d(8), nn.Tanh())
    with pytest.raises(ImpureLossError, match=r"moves the running statistics of BatchNorm1d"):
        at(estimator())
    at.network.eval()
    mean = at.network[1].running_mean.clone()
    at(estimator())
    assert torch.equal(at.network[1].running_mean, mean)


def test_batch_norm_without_statistics_is_pure():
    at = Regression(nn.BatchNorm1d(8, track_running_stats=False), nn.Tanh())
    assert params.norm(at(OneStep()).by_phi) > 0


@every_estimator
def test_check_losses_false_turns_the_checks_of_purity_off(estimator):
    for layers in ([nn.Tanh(), nn.Dropout(0.1)], [nn.BatchNorm1d(8), nn.Tanh()]):
        Regression(*layers)(estimator(check_losses=False))


@every_estimator
def test_only_the_first_call_costs_more(estimator):
    counts = []
    at, checked = Regression(), estimator()
    for method in (estimator(check_losses=False), checked, checked):
        at.num_evaluations = dict.fromkeys(at.num_evaluations, 0)
        at(method)
        counts.append(at.num_evaluations)
    off, first, second = counts
    assert first == {name: count + 2 for name, count in off.items()}
    assert second == off


@every_estimator
def test_a_check_that_failed_is_made_again(estimator):
    at, method = Regression(nn.Tanh(), nn.Dropout(0.1)), estimator()
    for _ in range(2):
        with pytest.raises(ImpureLossError):
            at(method)


def test_estimators_that_have_checked_equal_those_that_have_not():
    at, used = Regression(), OneStep()
    at(used)
    assert used == OneStep()
    assert hash(used) == hash(OneStep())
    assert repr(used) == repr(OneStep())


def test_dropout_hides_the_direction_that_eval_mode_shows():
    """Why the check is there: by differences, noise of dropout is divided by a small step."""
    at = Regression(nn.Tanh(), nn.Dropout(0.1))
    noisy = at(OneStep(check_losses=False)).by_phi
    at.network.eval()
    exact = at(OneStep(product=ExactProduct())).by_phi
    cosine = params.dot(noisy, exact) / params.norm(noisy) / params.norm(exact)
    assert float(cosine) < 0.9


@every_estimator
def test_gpt2_with_its_default_dropout_is_an_error_and_in_eval_mode_is_none(estimator):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=13, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    assert config.attn_pdrop == config.resid_pdrop == config.embd_pdrop == 0.1
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).double()
    tokens = torch.randint(13, (2, 4, 8), generator=torch.Generator().manual_seed(0))
    theta = params.detach(params.named(model))
    phi = {"weights": torch.ones(4, dtype=torch.float64)}

    def losses(theta, texts):
        logits = functional_call(model, theta, (texts,)).logits[:, :-1]
        each = nn.functional.cross_entropy(logits.mT, texts[:, 1:], reduction="none")
        return each.mean(dim=1)

    def take(**options):
        method = estimator(**options)
        inner = [lambda phi: lambda theta: losses(theta, tokens[0]) @ phi["weights"]]
        outer = lambda theta: losses(theta, tokens[1]).mean()
        return method(inner * method.num_batches, outer, theta, phi)

    model.train()
    with pytest.raises(ImpureLossError, match=r"pretraining loss is random.*Dropout.*eval"):
        take()
    model.eval()
    assert params.is_finite(take().by_phi)
