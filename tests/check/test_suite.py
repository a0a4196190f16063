"""Each trap, planted in a small problem, is caught by its check; a sound problem passes all."""

from itertools import islice

import numpy as np
import pytest
import torch
from channels import Channels, ChannelWeights
from helpers.verdicts import failed, findings
from torch import nn
from torch.func import functional_call

from metavpt import AdamW, Learned, Unrolled
from metavpt.check import check
from metavpt.check.purity import held_out, on_gpu, rounded, snapshot
from metavpt.check.scene import Scene
from metavpt.hypergradients import params

FOUNDATIONS = {"compile", "pretrain_purity", "feedback_purity", "designer_purity"}


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def test_a_sound_problem_passes_every_check():
    found = findings(Channels())
    assert {
        name: finding.verdict for name, finding in found.items() if finding.verdict != "ok"
    } == {}
    assert found.keys() >= FOUNDATIONS | {
        "designer_reach",
        "pretrain_reach",
        "feedback_reach",
        "float64",
        "tail",
        "teacher_credit",
    }
    assert found.keys() >= {
        "exact_product",
        "difference_product",
        "float32",
        "bfloat16",
        "difference_step",
        "attention",
        "first_order",
    }
    assert sum(name.startswith("cost ") for name in found) == 5


class HeldOut(Channels):
    """Held-out batches that are those of the feedback, from `first` on."""

    def __init__(self, first):
        super().__init__()
        self.first = first

    def held_out_batches(self, seed):
        return islice(self.feedback_batches(seed), self.first, None)


@pytest.mark.parametrize(("first", "verdict", "shared"), [(0, "warning", 64), (1, "ok", 0)])
def test_held_out_samples_that_are_fed_back(first, verdict, shared):
    (found,) = held_out(Scene.of(HeldOut(first)), seed=0)
    assert found.verdict == verdict
    assert f"{shared} of 64 samples" in found.measured
    assert held_out(Scene.of(Channels()), seed=0) == []


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
        return (
            (
                weights
                * (functional_call(self.learner["aux"], params.subset(theta, "aux."), (z,)) - x)
                ** 2
            )
            .sum(1)
            .mean()
        )

    def feedback_loss(self, theta, batch):
        x, y = batch
        return (
            (functional_call(self.learner["body"], params.subset(theta, "body."), (x,))[:, :4] - y)
            ** 2
        ).mean()


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
    """Right at theta_S, wrong beside it: a cached hidden layer whose parameters theta_S holds."""

    def pretrain_tail(self, theta, task):
        x, weights = task
        hidden = functional_call(self.learner[0], params.subset(theta, "0."), (x,))
        body = params.subset(theta, "0.")

        def tail(theta_s):
            drift = sum((theta_s[f"0.{name}"] - p).sum() for name, p in body.items())
            out = functional_call(
                self.learner[1], params.subset({**theta, **theta_s}, "1."), (hidden + 0.0 * drift,)
            )
            return (weights * (out - x) ** 2).sum(1).mean()

        return tail


@pytest.mark.parametrize("problem", [WrongTail, FrozenTail])
def test_an_inconsistent_tail_is_caught(problem):
    assert failed(problem()) == {"tail"}


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


def test_losses_that_differ_by_rounding_are_a_warning_on_a_gpu_alone():
    a = torch.tensor(300.0)
    assert "3.1e-07 apart" in rounded(a, a + 1e-4)
    assert not rounded(a, a + 1e-2)
    assert not rounded(a, a * torch.nan)
    assert not on_gpu([a], [a + 1e-4])  # on a CPU they are the same or another


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
    assert all(
        torch.equal(a, after[k]) if isinstance(a, torch.Tensor) else a == after[k]
        for k, a in before.items()
    )
    assert vars(problem) == dictionary
    assert all(
        p.grad is None
        for module in (problem.learner, problem.designer)
        for p in module.parameters()
    )


def test_unrolled_and_learned_estimators_are_accepted():
    strategy = Learned(Unrolled(2, AdamW(lr=1e-3)))
    assert failed(Channels(), estimator=strategy.estimator) == set()
