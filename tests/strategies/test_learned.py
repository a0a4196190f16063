"""The learner's step as strategies model it, against the trainer's clip and torch.optim."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.differences import relative
from helpers.real_steps import OPTIMIZERS, real_steps, slopes, twin
from torch import Tensor, nn
from torch.func import functional_call

from metavpt import (
    AdamAware,
    Budget,
    ConjugateGradient,
    Cosine,
    Dot,
    ExactProduct,
    Fixed,
    Implicit,
    Learned,
    OneStep,
    Problem,
    RunLog,
    Trainer,
    Unrolled,
)
from metavpt.hypergradients import params
from metavpt.hypergradients.directions import Aim
from metavpt.hypergradients.optimizer_updates import ClipGradNorm, last_grad_norm
from metavpt.hypergradients.params import Params
from metavpt.strategies.selection import Greedy, sample_values
from metavpt.training.strategy import TrainState
from metavpt.training.streams import Streams

ESTIMATORS = {
    "dot": OneStep(Dot(), ExactProduct()),
    "cosine": OneStep(Cosine(), ExactProduct()),
    "adam_aware": OneStep(AdamAware(), ExactProduct()),
    "unrolled": Unrolled(2, product=ExactProduct()),
    "implicit": Implicit(ConjugateGradient(200, 1e-10), damping=1.0, product=ExactProduct()),
}


class Scale(nn.Module):
    """The designer: a factor for each input."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.linspace(-0.3, 0.4, 4))

    def forward(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, y = batch
        return x * self.log_scale.exp(), y


class Deep(Problem):
    """A trunk, a tail (theta_S) and a head of which the feedback knows nothing."""

    def __init__(self, trunk_trains: bool) -> None:
        torch.manual_seed(0)
        self.learner = nn.ModuleDict(
            {"trunk": nn.Linear(4, 4), "tail": nn.Linear(4, 3), "head": nn.Linear(3, 2)}
        ).double()
        self.learner["trunk"].requires_grad_(trunk_trains)
        self.designer = Scale().double()
        self.readout = torch.randn(3, 2, dtype=torch.float64)

    def pretrain_batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        g = torch.Generator().manual_seed(seed)
        while True:
            x, y = (torch.randn(10, n, generator=g, dtype=torch.float64) for n in (4, 2))
            yield x, 3 * y

    feedback_batches = pretrain_batches

    def aligned_parameters(self) -> list[str]:
        return ["tail.weight", "tail.bias"]

    def tail_parameters(self) -> list[str]:
        return [name for name in params.named(self.learner) if not name.startswith("trunk.")]

    def _part(self, name: str, theta: Params, x: Tensor) -> Tensor:
        own = params.subset({**params.named(self.learner), **theta}, f"{name}.")
        return torch.tanh(functional_call(self.learner[name], own, (x,)))

    def pretrain_tail(self, theta: Params, task: Any) -> Callable[[Params], Tensor]:
        x, y = task
        state = self._part("trunk", theta, x)

        def loss(theta_s: Params) -> Tensor:
            own = {**theta, **theta_s}
            head = functional_call(
                self.learner["head"],
                params.subset(own, "head."),
                (self._part("tail", own, state),),
            )
            return ((head - y) ** 2).mean()

        return loss

    def pretrain_loss(self, theta: Params, task: Any) -> Tensor:
        return self.pretrain_tail(theta, task)({})

    def per_sample_tail(self, theta: Params, task: Any) -> Callable[[Params], Tensor]:
        x, y = task
        return lambda theta_s: torch.stack(
            [
                self.pretrain_tail(theta, (x[i : i + 1], y[i : i + 1]))(theta_s)
                for i in range(len(x))
            ]
        )

    def candidates(self, batch: Any, num_candidates: int) -> list[Any]:
        x, y = batch
        return [(x * (1 + k), y) for k in range(num_candidates)]

    def feedback_loss(self, theta: Params, batch: Any) -> Tensor:
        x, y = batch
        features = self._part("tail", theta, self._part("trunk", theta, x))
        return ((features @ self.readout - y) ** 2).mean()

    def evaluate(self) -> dict[str, float]:
        return {}


def trained(
    folder: Path, optimizer: str, trunk_trains: bool = False, clip_norm: float = 0.5
) -> Trainer:
    """Five ordinary steps."""
    trainer = Trainer(
        Deep(trunk_trains),
        Fixed(),
        Budget(steps=50),
        RunLog(folder),
        optimizer=OPTIMIZERS[optimizer],
        clip_norm=clip_norm,
    )
    for _ in range(5):
        trainer.step()
    trainer._schedule()  # as the trainer does before it asks for a task
    return trainer


def state_of(trainer: Trainer, num_batches: int) -> tuple[TrainState, list[Any], Any]:
    """What the strategy sees, and the unlabelled batches and the labelled one that it will draw."""
    batches, labelled = trainer.problem.pretrain_batches(7), trainer.problem.feedback_batches(8)
    unlabelled, labelled = [next(batches) for _ in range(num_batches)], next(labelled)
    streams: Any = Streams(trainer.streams.pretrain, iter(unlabelled), iter([labelled]))
    state = TrainState(trainer.problem, streams, trainer.optimizer, trainer.budget)
    return state, unlabelled, labelled


@pytest.mark.parametrize("clip_norm", [0.5, 1e3], ids=["active", "inactive"])
@pytest.mark.parametrize("num_steps", [1, 4])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_unrolled_follows_the_trainers_step_through_theta_s_and_the_head(
    tmp_path: Path, optimizer: str, num_steps: int, clip_norm: float
) -> None:
    """With a frozen trunk the derivative is exact, though theta_S is a part of what is clipped."""
    trainer = trained(tmp_path, optimizer, clip_norm=clip_norm)
    problem: Any = trainer.problem
    state, unlabelled, labelled = state_of(trainer, num_steps)
    strategy = Learned(Unrolled(num_steps, product=ExactProduct()))
    strategy.start(problem)
    live = dict(problem.learner.named_parameters())

    def after(phi: Params) -> float:
        copies, other = twin({n: p for n, p in live.items() if p.requires_grad}, trainer.optimizer)
        tasks = [functional_call(problem.designer, phi, (batch,)) for batch in unlabelled]
        losses = [lambda theta, task=task: problem.pretrain_loss(theta, task) for task in tasks]
        norms = real_steps(losses, copies, other, clip_norm)
        assert all((norm > clip_norm) == (clip_norm == 0.5) for norm in norms)
        moved = {name: p.detach() for name, p in copies.items() if name.startswith("tail.")}
        return float(problem.feedback_loss({**params.detach(live), **moved}, labelled))

    found, _ = strategy.estimate(state)
    phi = params.detach(params.named(problem.designer))
    drop = float(problem.feedback_loss(params.detach(live), labelled)) - after(phi)
    unit = drop / found.value  # the common unit, which scales value and gradient alike
    assert unit > 0
    assert relative(params.scale(found.by_phi, unit), slopes(after, phi)) < 1e-6


def test_the_trunks_gradient_counts_by_its_norm_in_the_last_step(tmp_path: Path) -> None:
    trainer = trained(tmp_path, "adamw", trunk_trains=True)
    problem, seen = trainer.problem, []

    class Spy(AdamAware):
        def __call__(self, g_down, g_pre, update=None) -> Aim:
            seen.append((g_pre.keys(), update.rule))
            return super().__call__(g_down, g_pre, update)

    strategy = Learned(OneStep(Spy(), ExactProduct()))
    strategy.start(problem)
    # the last step's gradients are still there, clipped to a norm of 0.5
    total = torch.nn.utils.get_total_norm([p.grad for p in problem.learner.parameters()])
    trunk = torch.nn.utils.get_total_norm([p.grad for p in problem.learner["trunk"].parameters()])
    expected = float(trunk / total) * last_grad_norm(trainer.optimizer)
    strategy.estimate(state_of(trainer, 1)[0])
    ((names, rule),) = seen
    assert list(names) == ["tail.weight", "tail.bias", "head.weight", "head.bias"]
    assert isinstance(rule, ClipGradNorm)
    assert rule.max_norm == 0.5
    assert rule.rest_norm == pytest.approx(expected, rel=1e-9)


def test_a_run_without_clipping_follows_the_plain_step(tmp_path: Path) -> None:
    """With clip_norm=inf nothing is clipped; a bound that is never reached changes nothing."""
    found = []
    for clip_norm in (float("inf"), 1e6):
        trainer = trained(tmp_path / str(clip_norm), "adamw", clip_norm=clip_norm)
        strategy = Learned(Unrolled(2))
        strategy.start(trainer.problem)
        found.append(strategy.estimate(state_of(trainer, 2)[0])[0])
    torch.testing.assert_close(found[0].by_phi, found[1].by_phi, rtol=1e-12, atol=0)


def test_greedy_values_samples_along_the_clipped_step(tmp_path: Path) -> None:
    """A sample's value under AdamAware is the first-order drop that its weight brings."""
    trainer = trained(tmp_path, "adamw")
    problem: Any = trainer.problem
    state, _, labelled = state_of(trainer, 0)
    strategy = Greedy(2, every=1, direction=AdamAware())
    strategy.start(problem)
    batch = next(problem.pretrain_batches(9))
    strategy.feedback.renew(state)
    w = strategy.feedback.along(state, batch)
    live = dict(problem.learner.named_parameters())
    at = params.detach(live)
    leaves = params.leaves({name: at[name] for name in problem.aligned_parameters()})
    grads = torch.autograd.grad(problem.feedback_loss({**at, **leaves}, labelled), leaves.values())
    g_down = dict(zip(leaves, grads, strict=True))
    task = problem.recipe(batch)

    def drop(weight: Params) -> float:
        copies, other = twin({n: p for n, p in live.items() if p.requires_grad}, trainer.optimizer)
        loss = lambda theta: (
            problem.pretrain_loss(theta, task)
            + weight["weight"] @ problem.per_sample_tail({**at, **theta}, task)({})
        )
        real_steps([loss], copies, other, trainer.clip_norm)
        return sum(
            float((g_down[name] * (at[name] - copies[name].detach())).sum()) for name in g_down
        )

    assert w is not None
    found = sample_values(state, w)(task)
    expected = slopes(drop, {"weight": torch.zeros(10, dtype=torch.float64)})["weight"]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)


class Regularized(Deep):
    """A regularizer of a given weight: the mean square of the scales."""

    weight = 1.0

    def regularizer(self, task: Any) -> Tensor:
        return self.weight * (self.designer.log_scale**2).mean()


def share_under(estimator: Any, folder: Path, lr: float = 1e-3, weight: float = 1.0) -> float:
    """The share of the regularizer that one update records."""
    problem = Regularized(trunk_trains=False)
    problem.weight = weight
    trainer = Trainer(
        problem,
        Learned(estimator, lambda p: torch.optim.SGD(p, lr=0.0), every=1, burn_in=5),
        Budget(steps=50),
        RunLog(folder),
        optimizer=lambda p: torch.optim.AdamW(p, lr=lr),
    )
    for _ in range(6):
        trainer.step()
    (record,) = (r for r in trainer.log.records() if r["kind"] == "designer")
    return record["regularizer_share"]


@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
def test_the_share_of_the_regularizer_is_that_of_the_gradients_norms(
    tmp_path: Path, estimator: Any
) -> None:
    """With ten times the weight, share / (1 - share) is ten times as large."""
    share, more = (share_under(estimator, tmp_path / str(w), weight=w) for w in (0.01, 0.1))
    assert 0 < share < more < 1
    assert more / (1 - more) == pytest.approx(10 * share / (1 - share), rel=1e-6)
    assert share_under(estimator, tmp_path / "none", weight=0.0) == 0.0


@pytest.mark.parametrize("estimator", ["adam_aware", "unrolled"])
def test_the_share_of_the_regularizer_is_free_of_the_learning_rate(
    tmp_path: Path, estimator: str
) -> None:
    """The learner barely moves in 5 steps; in the raw unit the shares are 1.00."""
    shares = [share_under(ESTIMATORS[estimator], tmp_path / str(lr), lr) for lr in (1e-5, 1e-8)]
    assert shares[0] == pytest.approx(shares[1], rel=1e-2)
    assert shares[1] < 0.95


def test_the_first_update_before_any_step_has_the_gradients_own_norm(tmp_path: Path) -> None:
    """At step 0 the learner has left no norm, so it is measured: the value of Dot is a cosine."""
    values = []
    for name in ("dot", "cosine"):
        trainer = Trainer(
            Deep(False), Learned(ESTIMATORS[name]), Budget(steps=9), RunLog(tmp_path / name)
        )
        trainer.step()
        values += [r["value"] for r in trainer.log.records() if r["kind"] == "designer"]
    assert values[0] == pytest.approx(values[1], rel=1e-9)


class LinearFeedback(Deep):
    """The feedback loss is linear in theta_S, and counts its labelled batches."""

    num_read = 0

    def feedback_batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self.pretrain_batches(0):
            self.num_read += 1
            yield batch

    def feedback_loss(self, theta: Params, batch: Any) -> Tensor:
        slopes = (
            (p * torch.linspace(-1, 1, p.numel()).view_as(p)).sum()
            for name, p in theta.items()
            if name.startswith("tail.")
        )
        return torch.stack(list(slopes)).sum()


@pytest.mark.parametrize("estimator", ["cosine", "adam_aware", "unrolled", "implicit"])
def test_a_kept_gradient_of_a_linear_feedback_changes_no_update(
    tmp_path: Path, estimator: str
) -> None:
    found = {}
    for feedback_every in (1, 3):
        problem = LinearFeedback(False)
        strategy = Learned(ESTIMATORS[estimator], every=2, feedback_every=feedback_every)
        trainer = Trainer(
            problem, strategy, Budget(steps=12), RunLog(tmp_path / str(feedback_every)),
            optimizer=OPTIMIZERS["adamw"],
        )  # fmt: skip
        for _ in range(12):
            trainer.step()
        found[feedback_every] = problem.designer.log_scale.detach().clone()
        assert problem.num_read == {1: 6, 3: 2}[feedback_every]
    torch.testing.assert_close(found[3], found[1], rtol=1e-9, atol=1e-12)


def test_a_kept_gradient_survives_a_checkpoint(tmp_path: Path) -> None:
    whole, cut, resumed = (Deep(False) for _ in range(3))
    strategies = [Learned(every=1, feedback_every=4) for _ in range(3)]
    first, second, third = (
        Trainer(problem, strategy, Budget(steps=6), RunLog(tmp_path / str(k)))
        for k, (problem, strategy) in enumerate(zip((whole, cut, resumed), strategies, strict=True))
    )
    for _ in range(6):
        first.step()
    for _ in range(3):
        second.step()
    third.load_state_dict(second.state_dict())
    for _ in range(3):
        third.step()
    torch.testing.assert_close(resumed.designer.log_scale, whole.designer.log_scale, rtol=0, atol=0)
