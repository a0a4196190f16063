"""What a strategy is charged, against independent counters inside the learner."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp

from metavpt import (
    Budget,
    ConjugateGradient,
    Cosine,
    Fixed,
    Implicit,
    Learned,
    MetaVPTError,
    OneStep,
    Problem,
    RunLog,
    Trainer,
    Unrolled,
)
from metavpt.hypergradients import params
from metavpt.profiling import PassCounter, uncounted
from metavpt.strategies.controls import Adversarial, Direct, Hardest, LabelsOnly
from metavpt.strategies.selection import Greedy, GreedySelection

BATCH, LABELLED, HEAD_STEPS = 64, 8, 100


class Count(torch.autograd.Function):
    """The identity, which counts the samples that pass it, forward and backward."""

    forward_samples = backward_samples = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        Count.forward_samples += len(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        Count.backward_samples += len(gradients[0])
        return gradients[0]


class CountedMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 6))

    def forward(self, x: Tensor) -> Tensor:
        return Count.apply(self.layers(x))  # type: ignore[return-value]


class Weights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(6))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, torch.ones_like(x) * self.logits.exp()


class Counted(Problem):
    """Autoencoding with channel weights; heads are "fitted" by passes of labelled batches."""

    def __init__(self) -> None:
        self.learner, self.designer = CountedMLP().double(), Weights().double()

    def pretrain_batches(self, seed: int) -> Any:
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield torch.randn(BATCH, 6, generator=generator, dtype=torch.float64)

    def feedback_batches(self, seed: int) -> Any:
        return (x[:LABELLED] for x in self.pretrain_batches(seed))

    def pretrain_loss(self, theta: params.Params, task: Any) -> Tensor:
        return self.per_sample_tail(theta, task)({}).mean()

    def per_sample_tail(self, theta: params.Params, task: Any) -> Any:
        x, weights = task
        return lambda theta_s: (
            weights * (functional_call(self.learner, {**theta, **theta_s}, (x,)) - x) ** 2
        ).sum(1)

    def candidates(self, batch: Tensor, num_candidates: int) -> list[Any]:
        return [(batch, torch.full_like(batch, k + 1.0)) for k in range(num_candidates)]

    def feedback_loss(self, theta: params.Params, batch: Tensor) -> Tensor:
        return (
            (functional_call(self.learner, theta, (batch,))[:, :2] - batch[:, :2]).square().mean()
        )

    def fit_heads(self) -> None:
        for _ in range(HEAD_STEPS):
            with torch.no_grad():
                self.learner(torch.ones(LABELLED, 6, dtype=torch.float64))

    def evaluate(self) -> dict[str, float]:
        return {}


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1e-3)


UNCHECKED = {"check_losses": False}  # checks are no part of the cost, but the counters see them
STRATEGIES = {
    "fixed": Fixed,
    "one_step": lambda: Learned(OneStep(**UNCHECKED), sgd, every=2),
    "cosine": lambda: Learned(OneStep(Cosine(), **UNCHECKED), sgd, every=2),
    "random": lambda: Learned(OneStep(**UNCHECKED), sgd, every=2, random_seed=0),
    "unrolled": lambda: Learned(Unrolled(3, **UNCHECKED), sgd, every=2),
    "implicit": lambda: Learned(
        Implicit(ConjugateGradient(3), damping=1.0, **UNCHECKED), sgd, every=2
    ),
    "greedy": lambda: Greedy(3, every=2),
    "selection": lambda: GreedySelection(3, every=2),
    "hardest": lambda: Hardest(3),
    "adversarial": lambda: Adversarial(sgd, every=2),
}


def trainer(folder: Any, strategy: Any, **limits: int) -> Trainer:
    torch.manual_seed(0)
    return Trainer(
        Counted(),
        strategy,
        Budget(**(limits or {"steps": 5})),
        RunLog(folder),
        optimizer=torch.optim.AdamW,
    )


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategy_is_charged_what_passes_through_the_learner(tmp_path: Any, name: str) -> None:
    """A forward pass of a batch is a third of a unit, its backward pass two thirds."""
    loop = trainer(tmp_path, STRATEGIES[name]())
    next_task, units = loop.strategy.next_task, []

    def counted(state: Any) -> Any:
        Count.forward_samples = Count.backward_samples = 0
        proposal = next_task(state)
        units.append((Count.forward_samples + 2 * Count.backward_samples) / 3 / BATCH)
        return proposal

    loop.strategy.next_task = counted  # type: ignore[method-assign]
    charged = []
    for _ in range(5):
        before = loop.budget.grad_evals
        loop.step()
        charged.append(loop.budget.grad_evals - before - 1)
    assert (sum(charged) > 0) == (name != "fixed")
    # Before its first update an unrolled step finds out which parameters the loss reads, once in a
    # process, which is not charged.
    assert charged[1:] == pytest.approx(units[1:], rel=1e-12)
    assert charged[0] == pytest.approx(units[0] - (name == "unrolled"), rel=1e-12)


def test_heads_are_charged_for_the_passes_that_they_take(tmp_path: Any) -> None:
    """100 steps of heads on 8 frames cost as much as 4.2 training steps on 64 images."""
    loop = trainer(tmp_path, Greedy(1, every=4))
    loop.run()
    heads, g_down, scores = HEAD_STEPS * LABELLED / 3 / BATCH, LABELLED / BATCH, 5 * 2 / 3
    assert loop.budget.grad_evals == pytest.approx(5 + 2 * (heads + g_down) + scores, rel=1e-12)


def test_labels_that_train_the_learner_are_charged(tmp_path: Any) -> None:
    loop = trainer(tmp_path, Direct())
    loop.run()
    heads = HEAD_STEPS * LABELLED / 3 / BATCH
    assert loop.budget.grad_evals == pytest.approx(5 * (1 + heads + LABELLED / BATCH), rel=1e-12)


def test_a_learner_of_labels_alone_is_charged_its_steps_and_heads(tmp_path: Any) -> None:
    loop = trainer(tmp_path, LabelsOnly())
    loop.run()
    assert loop.budget.grad_evals == pytest.approx(5 * (1 + HEAD_STEPS / 3), rel=1e-12)


def test_the_budget_ends_with_the_passes_of_the_strategy(tmp_path: Any) -> None:
    loop = trainer(tmp_path, Greedy(3, every=1), grad_evals=30)
    loop.run()
    assert loop.budget.steps == 5  # each at 1 + 100 / 24 + 1 / 8 + 3 * 2 / 3, some 7.3 units


def test_a_resumed_run_charges_alike(tmp_path: Any) -> None:
    """Though its estimator checks the losses anew."""
    whole = trainer(tmp_path / "whole", Learned(OneStep(), sgd, every=2))
    whole.run()
    first = trainer(tmp_path / "first", Learned(OneStep(), sgd, every=2), steps=2)
    first.run()
    second = trainer(tmp_path / "second", Learned(OneStep(), sgd, every=2))
    second.load_state_dict(first.state_dict())
    second.run()
    assert second.budget.grad_evals == whole.budget.grad_evals


def test_passes_that_run_no_layer_cannot_be_limited(tmp_path: Any) -> None:
    class Bare(Counted):
        def pretrain_loss(self, theta: params.Params, task: Any) -> Tensor:
            return sum((p.square().sum() for p in theta.values()), torch.zeros(()))

    loop = Trainer(Bare(), Fixed(), Budget(grad_evals=3), RunLog(tmp_path))
    with pytest.raises(MetaVPTError, match=r"budget\.grad_evals: .* runs no layer of the learner"):
        loop.run()


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Conv2d(3, 4, 2, stride=2), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(self.embed(x).flatten(2).transpose(1, 2))


def test_work_is_the_multiply_adds_of_the_layers() -> None:
    learner, x = Convolutions(), torch.randn(2, 3, 6, 8, requires_grad=True)
    counter = PassCounter(learner)
    forward = 2 * (3 * 4) * (4 * 3 * 2 * 2 + 4 * 5)  # samples, positions, weights of both layers
    with counter.on():
        out = learner(x)
    assert counter.work == forward
    out.sum().backward()  # it is off
    assert counter.work == forward
    with counter.on():
        (gradient,) = torch.autograd.grad(learner(x).square().sum(), x, create_graph=True)
        gradient.square().sum().backward()
    assert counter.work == forward + 5 * forward  # forward, backward, backward through both


def test_checks_of_losses_are_left_out() -> None:
    learner, x = nn.Linear(3, 2), torch.randn(4, 3)
    counter = PassCounter(learner)
    with counter.on(), uncounted():
        learner(x).sum().backward()
    assert counter.work == 0


def test_forward_mode_counts_twice_and_other_modules_do_not_count() -> None:
    learner, other, x = nn.Linear(3, 2), nn.Linear(3, 2), torch.randn(4, 3)
    counter = PassCounter(learner)
    theta = params.detach(params.named(learner))
    with counter.on():
        other(x)
        jvp(lambda theta: functional_call(learner, theta, (x,)), (theta,), (theta,))
    assert counter.work == 2 * 4 * 6
