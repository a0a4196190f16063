"""The lower bound compared with real runs in FLOPs, which other processes cannot change."""

import dataclasses
import itertools

import pytest
import torch
from torch import nn
from torch.func import functional_call

from metavpt import (
    Budget,
    Cosine,
    ExactProduct,
    Fixed,
    Implicit,
    Learned,
    OneStep,
    Problem,
    Unrolled,
)
from metavpt.bench import cost_model, flops
from metavpt.hypergradients import params
from metavpt.hypergradients.linear_solvers import Neumann
from metavpt.strategies.selection import Greedy
from metavpt.training.strategy import Strategy, TrainState
from metavpt.training.streams import Stream, Streams

WIDTH, DEPTH, TAIL = 16, 8, 3


class Layers(nn.Module):
    def __init__(self, first: int, last: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(first, last))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).tanh()
        return x


class Deep(Problem):
    """A stack of matrices that predicts the designer's output. All FLOPs are matrix products."""

    def __init__(self) -> None:
        self.learner = nn.Sequential(Layers(0, DEPTH - TAIL), Layers(DEPTH - TAIL, DEPTH))
        self.designer = nn.Linear(WIDTH, WIDTH, bias=False)

    def pretrain_batches(self, seed):
        return itertools.repeat(
            torch.randn(32, WIDTH, generator=torch.Generator().manual_seed(seed))
        )

    def feedback_batches(self, seed):
        return self.pretrain_batches(seed)

    def aligned_parameters(self):
        return [name for name in params.named(self.learner) if name.startswith("1.")]

    def pretrain_loss(self, theta, task):
        return self.pretrain_tail(theta, task)({})

    def pretrain_tail(self, theta, task):
        hidden = functional_call(self.learner[0], params.subset(theta, "0."), (task,))
        tail = lambda theta_s: functional_call(
            self.learner[1], params.subset({**theta, **theta_s}, "1."), (hidden,)
        )
        return lambda theta_s: (tail(theta_s) - task).square().mean()

    def per_sample_tail(self, theta, task):
        hidden = functional_call(self.learner[0], params.subset(theta, "0."), (task,))
        return lambda theta_s: (
            functional_call(self.learner[1], params.subset({**theta, **theta_s}, "1."), (hidden,))
            .square()
            .mean(dim=1)
        )

    def feedback_loss(self, theta, batch):
        return functional_call(self.learner, theta, (batch,)).square().mean()

    def candidates(self, batch, num_candidates):
        return [batch + k for k in range(num_candidates)]

    def recipe(self, batch):
        return batch

    def evaluate(self):
        return {}


def scene(strategy: Strategy):
    torch.manual_seed(0)
    problem = Deep()
    strategy.start(problem)
    sources = (problem.pretrain_batches, problem.pretrain_batches, problem.feedback_batches)
    streams = Streams(*(Stream(source, seed) for seed, source in enumerate(sources)))
    optimizer = torch.optim.AdamW(problem.learner.parameters(), lr=1e-3)
    for group in optimizer.param_groups:  # as after the learner's first step
        group["grad_norms"] = [1.0] * len(group["params"])
    return problem, streams, optimizer


def flops_of(stopwatch: cost_model.Stopwatch, name: str) -> int:
    prepare, run = getattr(stopwatch, f"_{name}")()
    prepared = prepare()
    return flops.count(lambda: run(prepared))


ESTIMATORS = {
    "one_step": OneStep(),
    "cosine": OneStep(Cosine()),
    "two_batches": OneStep(num_batches=2),
    "exact": OneStep(product=ExactProduct()),
    "implicit": Implicit(Neumann(5), damping=1e-2),
    "implicit_exact": Implicit(Neumann(5), damping=1e-2, product=ExactProduct()),
    "unrolled_1": Unrolled(1),
    "unrolled_4": Unrolled(4),
    "unrolled_kept": Unrolled(4, kept_graphs=4),
    "unrolled_exact": Unrolled(3, product=ExactProduct()),
}


@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
def test_no_update_takes_less_than_its_lower_bound_and_ours_take_little_more(estimator):
    strategy = Learned(dataclasses.replace(estimator, check_losses=False), every=1)
    problem, streams, optimizer = scene(strategy)
    record = {}
    taken = flops.count(
        lambda: record.update(
            strategy.update(TrainState(problem, streams, optimizer, Budget(steps=1)))
        )
    )
    counts = cost_model.of_update(estimator, record.get("curvature_products", 0.0))
    assert counts
    stopwatch = cost_model.Stopwatch(problem, strategy, streams)
    least = cost_model.seconds(counts, lambda name: flops_of(stopwatch, name))
    # unrolling evaluates the feedback at theta before its steps too, no small part of a single step
    most = 1.6 if isinstance(estimator, Unrolled) and estimator.num_steps == 1 else 1.25
    assert 0.97 < taken / least < most


def test_a_step_on_its_own_batch_takes_little_more_than_its_lower_bound():
    """The task is made once, and this problem has no teacher that would be asked once."""
    strategy = Learned(OneStep(check_losses=False), every=1, own_batch=True)
    problem, streams, optimizer = scene(strategy)
    state = TrainState(problem, streams, optimizer, Budget(steps=1))
    theta = params.named(problem.learner)
    taken = flops.count(
        lambda: problem.pretrain_loss(theta, strategy.next_task(state).task).backward()
    )
    counts = cost_model.of_step(strategy)
    assert counts
    assert "design" not in counts
    assert counts["learner_own"] == 1
    stopwatch = cost_model.Stopwatch(problem, strategy, streams)
    least = cost_model.seconds(counts, lambda name: flops_of(stopwatch, name))
    assert 0.97 < taken / least < 1.25


def test_greedy_takes_its_lower_bound():
    strategy = Greedy(num_candidates=4, every=1)
    problem, streams, optimizer = scene(strategy)
    taken = flops.count(
        lambda: strategy.next_task(TrainState(problem, streams, optimizer, Budget(steps=1)))
    )
    counts = cost_model.of_step(strategy)
    assert counts == {"learner": 1, "score": 4, "score_tail": 4, "heads": 1, "g_down": 1}
    stopwatch = cost_model.Stopwatch(problem, strategy, streams)
    least = cost_model.seconds(
        {**(counts or {}), "learner": 0}, lambda name: flops_of(stopwatch, name)
    )
    assert taken == pytest.approx(least, rel=0.01)


def test_updates_are_shared_out_among_the_steps_between_them():
    assert cost_model.of_step(Fixed()) == {"learner": 1}
    by_8 = cost_model.of_step(Learned(OneStep(), every=8))
    by_1 = cost_model.of_step(Learned(OneStep(), every=1))
    assert by_8
    assert by_1
    assert by_8["learner"] == by_1["learner"] == by_8["design"] == 1
    assert by_8["g_down"] == by_1["g_down"] / 8 == 1 / 8
    assert by_8["tail"] == 3 / 8
    kept = cost_model.of_step(Learned(OneStep(), every=8, feedback_every=4))
    assert kept == {**by_8, "heads": 1 / 32, "g_down": 1 / 32}
    assert (
        cost_model.seconds({"learner": 1, "tail": 3 / 8}, {"learner": 2.0, "tail": 8.0}.__getitem__)
        == 5.0
    )


def test_what_nobody_has_counted_is_not_guessed():
    class Other:
        num_batches, needs_update = 1, False

    assert cost_model.of_step(Learned(Other())) is None  # type: ignore[arg-type]
    assert cost_model.of_step(Other()) is None  # type: ignore[arg-type]
