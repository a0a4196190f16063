"""Steering in a plain PyTorch loop."""

import copy

import pytest
import torch
from channels import Channels

from metavpt import Cosine, Fixed, Learned, MetaVPTError, OneStep
from metavpt.hypergradients import params
from metavpt.strategies.controls import LabelsOnly
from metavpt.strategies.steering import Steering


def loop(num_steps, strategy):
    """A user's loop on the README's problem; returns the problem and the steering object."""
    torch.manual_seed(0)
    problem = Channels()
    batches = problem.pretrain_batches(1)
    labelled = [batch for batch, _ in zip(problem.feedback_batches(2), range(8), strict=False)]
    optimizer = torch.optim.AdamW(problem.learner.parameters(), lr=1e-2)
    steering = Steering(
        problem.learner,
        problem.designer,
        problem.pretrain_loss,
        problem.feedback_loss,
        labelled,
        optimizer,
        strategy,
    )
    for _ in range(num_steps):
        loss = problem.pretrain_loss(params.named(problem.learner), steering(next(batches)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return problem, steering


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.05)


def test_steering_finds_the_channels_that_feedback_needs():
    fixed, _ = loop(300, Fixed())
    steered, steering = loop(300, Learned(OneStep(Cosine()), adam, every=4))
    assert fixed.evaluate()["useful_mse"] > 0.3
    assert steered.evaluate()["useful_mse"] < 0.1 * fixed.evaluate()["useful_mse"]
    assert steering.budget.steps == 300


def test_steering_updates_the_designer_when_it_is_due_and_returns_a_detached_task():
    problem = Channels()
    labelled = [next(iter(problem.feedback_batches(2)))]
    optimizer = torch.optim.SGD(problem.learner.parameters(), lr=0.1)
    steering = Steering(
        problem.learner,
        problem.designer,
        problem.pretrain_loss,
        problem.feedback_loss,
        labelled,
        optimizer,
        Learned(optimizer=adam, every=3, burn_in=1),
    )
    updated = []
    for step, batch in zip(range(7), problem.pretrain_batches(0), strict=False):
        before = copy.deepcopy(problem.designer.logits.detach())
        _, weights = steering(batch)
        assert not weights.requires_grad
        assert all(p.grad is None for p in problem.learner.parameters())
        updated.append(not torch.equal(before, problem.designer.logits.detach()))
        assert bool(steering.record) == updated[step]
    assert updated == [False, True, False, False, True, False, False]


def test_steering_refuses_feedback_that_ends():
    problem = Channels()
    optimizer = torch.optim.SGD(problem.learner.parameters(), lr=0.1)
    with pytest.raises(MetaVPTError, match="feedback is an iterator"):
        Steering(
            problem.learner,
            problem.designer,
            problem.pretrain_loss,
            problem.feedback_loss,
            problem.feedback_batches(0),
            optimizer,
        )


def test_steering_resumes_bit_for_bit():
    strategy = lambda: Learned(OneStep(), adam, every=2)
    problem, steering = loop(5, strategy())
    saved = copy.deepcopy(steering.state_dict())
    other, resumed = loop(0, strategy())
    resumed.load_state_dict(saved)
    other.learner.load_state_dict(problem.learner.state_dict())
    batch = next(iter(problem.pretrain_batches(9)))
    for _ in range(3):
        assert torch.equal(steering(batch)[1], resumed(batch)[1])


@pytest.mark.parametrize(
    ("strategy", "words"),
    [(Learned(burn_in=0.1), "share of a budget"), (LabelsOnly(), "trains the learner on labels")],
)
def test_steering_refuses_what_only_a_trainer_can_do(strategy, words):
    problem = Channels()
    with pytest.raises(MetaVPTError, match=f"^Steering: .*{words}"):
        Steering(
            problem.learner,
            problem.designer,
            problem.pretrain_loss,
            problem.feedback_loss,
            [next(iter(problem.feedback_batches(2)))],
            torch.optim.SGD(problem.learner.parameters(), lr=0.1),
            strategy,
        )
