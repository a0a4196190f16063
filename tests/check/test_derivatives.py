"""Silently wrong derivatives: forward mode, no_grad teachers, compiled learners, dtypes."""

from dataclasses import dataclass

import pytest
import torch
from channels import Channels, ChannelWeights
from helpers.verdicts import failed, findings
from torch import nn
from torch.func import functional_call

from metavpt import SGD, Cosine, DifferenceProduct, Implicit, OneStep, Unrolled
from metavpt.check import check_product
from metavpt.check.scene import Scene
from metavpt.hypergradients.curvature import ComposedLoss, GaussNewton
from metavpt.hypergradients.mixed_products import Derivative, ExactProduct, differentiate


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("estimator", "verdict"),
    [
        (None, "failed"),
        (OneStep(product=ExactProduct()), "failed"),
        (Implicit(curvature=GaussNewton()), "failed"),
        (OneStep(Cosine()), "warning"),
        (OneStep(), "warning"),
    ],
    ids=["unknown", "exact", "gauss_newton", "cosine", "difference"],
)
def test_a_compiled_learner_is_caught_and_everything_else_still_measured(estimator, verdict):
    problem = Channels()
    problem.learner = torch.compile(problem.learner, backend="aot_eager")
    found = findings(problem, estimator=estimator)
    assert found["compile"].verdict == verdict
    assert "learner" in found["compile"].measured
    assert "DifferenceProduct" in found["compile"].advice
    assert found["exact_product"].verdict == "ok"


def test_what_the_compile_check_says_of_estimators_is_so():
    """An aot-compiled learner: first derivatives work, double backward does not."""
    problem = Channels()
    plain = Scene.of(problem)
    problem.learner = torch.compile(problem.learner, backend="aot_eager")
    scene = Scene.of(problem)
    for estimator in (OneStep(), OneStep(Cosine()), Unrolled(2, SGD(0.1)), Implicit(damping=1.0)):
        torch.testing.assert_close(
            scene.estimate(estimator).by_phi, plain.estimate(estimator).by_phi, rtol=1e-4, atol=1e-6
        )
    with pytest.raises(RuntimeError, match="compiled with non-empty donated buffers"):
        scene.estimate(OneStep(product=ExactProduct()))
    theta = dict(problem.learner.named_parameters())
    loss = ComposedLoss(
        lambda theta: functional_call(problem.learner, theta, (torch.ones(2, 16),)),
        lambda outputs: outputs.square().sum(),
    )
    with pytest.raises(RuntimeError, match="compiled with non-empty donated buffers"):
        GaussNewton()(loss, theta, theta, DifferenceProduct())


def test_compiled_modules_and_losses_are_found_and_a_compiled_designer_is_harmless():
    problem = Channels()
    problem.learner[0].compile(backend="aot_eager")
    assert "learner.0" in findings(problem)["compile"].measured

    class CompiledLoss(Channels):
        feedback_loss = torch.compile(Channels.feedback_loss, backend="aot_eager")

    assert "feedback_loss" in findings(CompiledLoss())["compile"].measured
    problem = Channels()
    problem.designer = torch.compile(problem.designer, backend="aot_eager")
    assert failed(problem) == set()


class NormedChannels(Channels):
    def __init__(self, norm=nn.LayerNorm):
        super().__init__()
        self.learner = nn.Sequential(nn.Linear(16, 8), norm(8), nn.GELU(), nn.Linear(8, 16))


class NormedViews(NormedChannels):
    """The designer weighs what the learner sees, before the norm."""

    def pretrain_loss(self, theta, task):
        x, weights = task
        return ((functional_call(self.learner, theta, (16 * weights * x,)) - x) ** 2).mean()


@dataclass(frozen=True)
class ForwardProduct:
    """Forward mode, differentiated once more: silently wrong through LayerNorm (traps.md, 3)."""

    num_gradients = 1

    def __call__(self, loss, theta, w, wrt, *, retain_graph=False):
        with torch.enable_grad():
            value = torch.func.jvp(loss, (theta,), (w,))[1]
            return Derivative(differentiate(value, wrt, retain_graph=retain_graph), value.detach())


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch.func.jvp's own
@pytest.mark.parametrize("problem", [NormedViews, NormedChannels])
def test_forward_mode_over_layer_norm_is_caught(problem):
    """By phi where the designer comes before the norm, by theta in any case."""
    broken = check_product(ForwardProduct(), problem())
    assert broken.verdict == "failed"
    assert "LayerNorm" in broken.advice
    assert failed(problem(), estimator=OneStep(product=ForwardProduct())) == {"estimator_product"}


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_forward_mode_as_such_is_right():
    assert check_product(ForwardProduct(), Channels()).verdict == "ok"


@pytest.mark.parametrize(
    "product", [ExactProduct(), DifferenceProduct()], ids=["exact", "difference"]
)
def test_our_own_products_are_right_through_layer_norm(product):
    assert check_product(product, NormedViews()).verdict == "ok"


class Distilled(Channels):
    """The targets are what a frozen teacher makes of the designer's view, under no_grad or not."""

    credit = False

    def __init__(self):
        super().__init__()
        self.teacher = nn.Linear(16, 16).requires_grad_(False)

    def pretrain_loss(self, theta, task):
        x, weights = task
        view = 16 * weights * x
        with torch.set_grad_enabled(self.credit and torch.is_grad_enabled()):
            targets = self.teacher(view).tanh()
        return ((functional_call(self.learner, theta, (view,)) - targets) ** 2).mean()


class DistilledByChoice(Distilled):
    def __init__(self):
        super().__init__()
        self.teacher_credit = False

    @property
    def credit(self):
        return self.teacher_credit


def test_a_no_grad_teacher_is_explained():
    found = findings(Distilled())
    assert {name for name, finding in found.items() if finding.verdict == "failed"} == {
        "teacher_credit"
    }
    assert "teacher_credit = False" in found["teacher_credit"].advice
    assert found["exact_product"].verdict == "ok"


def test_a_no_grad_teacher_by_choice_is_information_and_one_with_credit_is_whole():
    chosen = findings(DistilledByChoice())["teacher_credit"]
    assert chosen.verdict == "ok"
    assert "by choice" in chosen.measured
    problem = DistilledByChoice()
    problem.teacher_credit = True
    assert "nothing" in findings(problem)["teacher_credit"].measured


class Straight(ChannelWeights):
    """Hard weights with the gradient of soft ones."""

    def forward(self, batch):
        soft = (self.logits + torch.linspace(0.0, 8.0, 16)).softmax(0)
        hard = (soft > 1 / 16).to(soft)
        return batch, hard + soft - soft.detach()


def test_a_straight_through_designer_is_no_failure():
    problem = Channels()
    problem.designer = Straight(16)
    found = findings(problem)
    assert found["exact_product"].verdict == "warning"
    assert failed(problem) == set()


def test_a_problem_that_insists_on_float32_is_checked_in_it():
    class Insisting(Channels):
        def pretrain_loss(self, theta, task):
            if task[0].dtype != torch.float32:
                raise TypeError("expected float32")
            return super().pretrain_loss(theta, task)

    found = findings(Insisting())
    assert found["float64"].verdict == "warning"
    assert "expected float32" in found["float64"].measured
    assert "float32" in found["exact_product"].measured
    assert found["exact_product"].verdict == "ok"


def test_a_problem_that_casts_to_float32_is_still_checked_in_float64():
    class Casting(Channels):
        def pretrain_loss(self, theta, task):
            x, weights = task
            return super().pretrain_loss(theta, (x.float(), weights.to(torch.float32)))

    found = findings(Casting())
    assert found["float64"].verdict == "ok"
    assert "float64" in found["exact_product"].measured


def test_attention_is_named_and_the_exact_product_goes_through_it():
    class Attending(Channels):
        def __init__(self):
            super().__init__()
            self.learner = nn.Sequential(nn.Linear(16, 16), Attention(), nn.Linear(16, 16))

    class Attention(nn.Module):
        def forward(self, x):
            q = x.view(-1, 1, 4, 4)
            return nn.functional.scaled_dot_product_attention(q, q, q).flatten(1)

    found = findings(Attending())
    assert found["attention"].verdict == "ok"
    assert "1 attention calls, flash_attention" in found["attention"].measured
    assert found["exact_product"].verdict == "ok"
