"""Each trap, seeded in a small problem, is caught by the check that is there for it; a sound problem passes all."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from channels import Channels, ChannelWeights
from torch import nn
from torch.func import functional_call

from metavpt import AdamW, Cosine, DifferenceProduct, Learned, OneStep, Unrolled, params
from metavpt.checks import Finding, check, check_product
from metavpt.checks.copies import leaves, map_tensors, twin
from metavpt.checks.cost import measure
from metavpt.checks.modes import Float64, Uncut
from metavpt.checks.purity import snapshot
from metavpt.checks.scene import Scene
from metavpt.products import Derivative, ExactProduct, differentiate

FOUNDATIONS = {"compile", "pretrain_purity", "feedback_purity", "designer_purity"}


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def findings(problem, **options) -> dict[str, Finding]:
    found = check(problem, **options)
    assert max(Counter(finding.name for finding in found).values()) == 1
    return {finding.name: finding for finding in found}


def failed(problem, **options) -> set[str]:
    return {name for name, finding in findings(problem, **options).items() if finding.verdict == "failed"}


def test_a_sound_problem_passes_every_check():
    found = findings(Channels())
    assert {name: finding.verdict for name, finding in found.items() if finding.verdict != "ok"} == {}
    assert found.keys() >= FOUNDATIONS | {"designer_reach", "pretrain_reach", "feedback_reach", "float64", "tail", "teacher_credit"}
    assert found.keys() >= {"exact_product", "difference_product", "float32", "bfloat16", "difference_step", "attention", "first_order"}
    assert sum(name.startswith("cost ") for name in found) == 5


class MovingCenter(Channels):
    """A centre that the loss itself moves."""

    def __init__(self):
        super().__init__()
        self.center = nn.BatchNorm1d(16, affine=False)

    def pretrain_loss(self, theta, task):
        x, weights = task
        self.center.running_mean += 0.1 * x.mean(0)
        return super().pretrain_loss(theta, (x - self.center.running_mean, weights))


class MovingStatistics(Channels):
    """BatchNorm in training mode: the same value each time, but the running statistics move."""

    def __init__(self):
        super().__init__()
        self.learner = nn.Sequential(nn.Linear(16, 4), nn.BatchNorm1d(4), nn.Linear(4, 16))


class Dropout(Channels):
    def feedback_loss(self, theta, batch):
        x, y = batch
        return super().feedback_loss(theta, (nn.functional.dropout(x, 0.1), y))


class Counting(Channels):
    """A counter that is no part of any state_dict."""

    calls = 0

    def pretrain_loss(self, theta, task):
        self.calls = self.calls + 1
        return super().pretrain_loss(theta, task)


class NumpyNoise(Channels):
    """Moves numpy's random state without any effect."""

    def pretrain_loss(self, theta, task):
        np.random.rand()
        return super().pretrain_loss(theta, task)


@pytest.mark.parametrize(
    ("problem", "names", "words"),
    [
        (MovingCenter, {"pretrain_purity"}, "center.running_mean"),
        (MovingStatistics, {"pretrain_purity", "feedback_purity"}, "learner.1.running_mean"),
        (Dropout, {"feedback_purity"}, "gave another loss; it moved torch's global random state"),
        (Counting, {"pretrain_purity"}, "moved calls"),
        (NumpyNoise, {"pretrain_purity"}, "numpy's global random state"),
    ],
)
def test_an_impure_loss_is_caught(problem, names, words):
    found = findings(problem())
    assert {name for name, finding in found.items() if finding.verdict == "failed"} == names
    assert words in found[max(names)].measured
    assert "exact_product" not in found  # finite differences of an impure loss say nothing


class RandomWeights(ChannelWeights):
    def forward(self, batch):
        return batch, (self.logits + 0.1 * torch.randn(16)).softmax(0)


def test_a_random_task_is_caught():
    problem = Channels()
    problem.designer = RandomWeights(16)
    found = findings(problem)
    assert found["designer_purity"].verdict == "failed"
    assert "another task" in found["designer_purity"].measured
    assert "seeded by the batch" in found["designer_purity"].advice


class IdleWeights(ChannelWeights):
    """One parameter is never used."""

    def __init__(self, num_channels):
        super().__init__(num_channels)
        self.idle = nn.Parameter(torch.zeros(3))


class Additive(Channels):
    """A penalty on phi inside the loss: it moves the loss and no parameter of the learner."""

    def pretrain_loss(self, theta, task):
        x, weights, idle = task
        return super().pretrain_loss(theta, (x, weights)) + idle.square().sum()


class PassingIdle(IdleWeights):
    def forward(self, batch):
        return *super().forward(batch), self.idle


def test_a_parameter_of_the_designer_that_is_not_reached_is_named():
    problem = Channels()
    problem.designer = IdleWeights(16)
    found = findings(problem)
    assert found["designer_reach"].verdict == "failed"
    assert "does not depend on idle" in found["designer_reach"].measured
    problem = Additive()
    problem.designer = PassingIdle(16)
    assert "(the loss itself does on idle" in findings(problem)["designer_reach"].measured


def test_a_no_grad_designer_is_not_reached():
    class Cut(Channels):
        def pretrain_loss(self, theta, task):
            return super().pretrain_loss(theta, tuple(part.detach() for part in task))

    assert "does not depend on logits" in findings(Cut())["designer_reach"].measured


class TwoHeads(Channels):
    """`aux` is used by pretraining alone."""

    def __init__(self):
        super().__init__()
        self.learner = nn.ModuleDict({"body": self.learner, "aux": nn.Linear(16, 16)})

    def pretrain_loss(self, theta, task):
        x, weights = task
        z = functional_call(self.learner["body"], params.subset(theta, "body."), (x,))
        return (weights * (functional_call(self.learner["aux"], params.subset(theta, "aux."), (z,)) - x) ** 2).sum(1).mean()

    def feedback_loss(self, theta, batch):
        x, y = batch
        return ((functional_call(self.learner["body"], params.subset(theta, "body."), (x,))[:, :4] - y) ** 2).mean()


def test_the_share_without_feedback_is_told_and_all_of_it_fails():
    found = findings(TwoHeads())
    assert found["feedback_reach"].verdict == "ok"
    assert "65%" in found["feedback_reach"].measured
    assert "aux.weight" in found["feedback_reach"].measured
    problem = TwoHeads()
    problem.aligned_parameters = lambda: ["aux.weight", "aux.bias"]
    assert failed(problem) == {"feedback_reach"}


def test_an_aligned_parameter_that_pretraining_does_not_use_is_named():
    problem = Channels()
    problem.learner.append(nn.Identity())
    problem.learner.register_parameter("idle", nn.Parameter(torch.zeros(2)))
    found = findings(problem)
    assert found["pretrain_reach"].verdict == "failed"
    assert "idle" in found["pretrain_reach"].measured


class WrongTail(Channels):
    def pretrain_tail(self, theta, task):
        return lambda theta_s: 1.001 * self.pretrain_loss({**theta, **theta_s}, task)


class FrozenTail(Channels):
    """Right at theta_S, wrong beside it: the hidden layer is kept, though theta_S holds its parameters."""

    def pretrain_tail(self, theta, task):
        x, weights = task
        hidden = functional_call(self.learner[0], params.subset(theta, "0."), (x,))
        body = params.subset(theta, "0.")

        def tail(theta_s):
            drift = sum((theta_s[f"0.{name}"] - p).sum() for name, p in body.items())
            out = functional_call(self.learner[1], params.subset({**theta, **theta_s}, "1."), (hidden + 0.0 * drift,))
            return (weights * (out - x) ** 2).sum(1).mean()

        return tail


@pytest.mark.parametrize("problem", [WrongTail, FrozenTail])
def test_an_inconsistent_tail_is_caught(problem):
    assert failed(problem()) == {"tail"}


@pytest.mark.parametrize(
    ("estimator", "verdict"),
    [(None, "failed"), (OneStep(product=ExactProduct()), "failed"), (OneStep(Cosine()), "failed"), (OneStep(), "warning")],
    ids=["unknown", "exact", "cosine", "difference"],
)
def test_a_compiled_learner_is_caught_and_everything_else_still_measured(estimator, verdict):
    problem = Channels()
    problem.learner = torch.compile(problem.learner, backend="aot_eager")
    found = findings(problem, estimator=estimator)
    assert found["compile"].verdict == verdict
    assert "learner" in found["compile"].measured
    assert "DifferenceProduct" in found["compile"].advice
    assert found["exact_product"].verdict == "ok"


def test_what_the_compile_check_says_of_directions_is_so():
    """An aot-compiled learner: first derivatives once work, double backward and a retained graph do not."""
    problem = Channels()
    problem.learner = torch.compile(problem.learner, backend="aot_eager")
    scene = Scene.of(problem)
    assert params.is_finite(scene.estimate(OneStep()).by_phi)
    for estimator in (OneStep(product=ExactProduct()), OneStep(Cosine())):
        with pytest.raises(RuntimeError, match="compiled with non-empty donated buffers"):
            scene.estimate(estimator)


def test_modules_compiled_in_place_and_compiled_losses_are_found_and_a_compiled_designer_is_harmless():
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


@pytest.mark.parametrize("product", [ExactProduct(), DifferenceProduct()], ids=["exact", "difference"])
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
    assert {name for name, finding in found.items() if finding.verdict == "failed"} == {"teacher_credit"}
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


def test_an_error_in_the_users_code_is_a_finding():
    class Broken(Channels):
        def feedback_loss(self, theta, batch):
            raise ValueError("no labels")

    assert "no labels" in findings(Broken())["purity"].measured


def test_a_non_finite_loss_is_caught():
    class Infinite(Channels):
        def pretrain_loss(self, theta, task):
            return super().pretrain_loss(theta, task) / 0.0

    assert failed(Infinite()) == {"pretrain_purity"}


def test_a_designer_without_parameters_is_only_a_warning():
    problem = Channels()
    problem.designer = nn.Identity()
    assert findings(problem)["designer"].verdict == "warning"


def test_the_problem_and_the_random_state_are_left_as_they_were():
    class Fitting(Channels):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 4)

        def fit_heads(self):
            torch.rand(1), np.random.rand()
            with torch.no_grad():
                self.head.weight += 1

    problem = Fitting()
    before, dictionary = snapshot(problem), dict(vars(problem))
    check(problem)
    after = snapshot(problem)
    assert all(torch.equal(a, after[k]) if isinstance(a, torch.Tensor) else a == after[k] for k, a in before.items())
    assert vars(problem) == dictionary
    assert all(p.grad is None for module in (problem.learner, problem.designer) for p in module.parameters())


def test_twins_share_what_attributes_share_and_leave_out_what_cannot_be_copied():
    problem = Channels()
    problem.again = problem.learner
    problem.optimizer = torch.optim.Adam(problem.learner.parameters())
    problem.running = [iter(())]
    problem.running.append(i for i in range(3))
    other = twin(problem)
    assert other.again is other.learner is not problem.learner
    assert other.optimizer.param_groups[0]["params"][0] is other.learner[0].weight
    assert other.running is problem.running


def test_batches_in_dataclasses_are_widened():
    @dataclass(frozen=True)
    class Batch:
        x: torch.Tensor
        seed: int

    wide = map_tensors(torch.Tensor.double, [Batch(torch.ones(2), 3)])
    assert wide[0].x.dtype == torch.float64
    assert list(leaves(wide))[1] == 3


def test_float64_mode_draws_the_numbers_of_float32():
    def draw():
        return torch.rand(5, generator=torch.Generator().manual_seed(0)) + torch.ones(5).float()

    narrow = draw()
    with Float64():
        wide = draw()
    assert wide.dtype == torch.float64
    assert torch.equal(wide.float(), narrow)


def test_uncut_mode_undoes_no_grad_and_detach():
    x = torch.ones(2, requires_grad=True)
    with Uncut():
        with torch.no_grad():
            y = 2 * x
        z = x.detach() * 3
    assert y.requires_grad
    assert z.requires_grad
    with torch.no_grad():
        assert not (2 * x).requires_grad


def test_memory_is_the_peak_of_what_is_held():
    def three_then_one():
        a, b, c = (torch.ones(250_000) for _ in range(3))
        del a, b
        return c

    cost = measure(three_then_one, torch.device("cpu"))
    assert cost.peak_bytes == pytest.approx(3_000_000, rel=0.01)


def test_unrolled_and_learned_estimators_are_accepted():
    strategy = Learned(Unrolled(2, AdamW(lr=1e-3)))
    assert failed(Channels(), estimator=strategy.estimator) == set()
