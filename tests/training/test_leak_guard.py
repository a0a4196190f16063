"""Labels reach the learner through tasks alone: what breaks that is caught in the step that does it."""

import pytest
import torch
from channels import Channels
from hypothesis import given, settings
from hypothesis import strategies as st

from metavpt import Budget, Fixed, Learned, MetaVPTError, OneStep, RunLog, Trainer
from metavpt.training.leak_guard import untouched


class Leaky(Fixed):
    def __init__(self, leak, at):
        self.leak, self.at = leak, at

    def next_task(self, state):
        if state.budget.steps == self.at:
            self.leak(state.problem, next(state.streams.feedback))
        return super().next_task(state)


def backward(problem, labelled):
    problem.feedback_loss(dict(problem.learner.named_parameters()), labelled).backward()


def write(problem, labelled):
    with torch.no_grad():
        problem.learner[1].bias.add_(labelled[1].mean())


def optimizer_step(problem, labelled):
    optimizer = torch.optim.SGD(problem.learner.parameters(), lr=1e-3)
    backward(problem, labelled)
    optimizer.step()
    optimizer.zero_grad()


LEAKS = {
    backward: r"left a gradient in learner\.0\.weight\.grad",
    write: r"wrote to learner\.1\.bias",
    optimizer_step: r"wrote to learner\.",
}


@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize(
    ("leak", "words"), LEAKS.items(), ids=lambda value: getattr(value, "__name__", None)
)
def test_a_strategy_that_trains_the_learner_on_labels_is_stopped(tmp_path, leak, words, at):
    trainer = Trainer(Channels(), Leaky(leak, at), Budget(steps=6), RunLog(tmp_path))
    with pytest.raises(MetaVPTError, match=rf"Leaky\.next_task {words}"):
        trainer.run()
    assert trainer.budget.steps == at


@given(which=st.integers(0, 3), kind=st.sampled_from(["grad", "copy_", "mul_", "zero_"]))
@settings(max_examples=30, deadline=None)
def test_every_parameter_and_every_way_to_write_is_seen(which, kind):
    learner = Channels().learner
    name, p = list(learner.named_parameters())[which]
    with pytest.raises(MetaVPTError, match=rf"learner\.{name}"), untouched(learner, "this"):
        touch(p, kind)


def touch(p, kind):
    if kind == "grad":
        p.grad = torch.zeros_like(p)
    else:
        with torch.no_grad():
            getattr(p, kind)(*{"copy_": [p + 1], "mul_": [2.0]}.get(kind, []))


def test_designer_updates_pass(tmp_path):
    trainer = Trainer(
        Channels(),
        Learned(OneStep(), every=1),
        Budget(steps=3),
        RunLog(tmp_path),
        first_order_every=1,
    )
    trainer.run()
    assert trainer.budget.steps == 3
