"""What a run with a learned designer refuses, and what it skips."""

import pytest
import torch
from helpers.regression import Regression, X, Y, trainer_of

from metavpt import (
    ConjugateGradient,
    Implicit,
    ImpureLossError,
    Learned,
    MetaVPTError,
    UnreachedParameterError,
)
from metavpt.hypergradients import params


class Forgets(Regression):
    def feedback_loss(self, theta, batch):
        return (X[batch] @ self.learner.weight - Y[batch]).square().mean()


class Noisy(Regression):
    def pretrain_loss(self, theta, task):
        return super().pretrain_loss({"weight": torch.dropout(theta["weight"], 0.1, True)}, task)


@pytest.mark.parametrize(
    ("problem", "error", "words"),
    [
        (Forgets, UnreachedParameterError, "feedback loss depends on none of .*weight"),
        (Noisy, ImpureLossError, "pretraining loss is random"),
    ],
)
def test_a_run_stops_on_losses_that_cannot_steer(tmp_path, problem, error, words):
    with pytest.raises(error, match=words) as raised:
        trainer_of(tmp_path, Learned(every=2), problem=problem).run()
    assert isinstance(raised.value, MetaVPTError)


class Saddle(Regression):
    """The pretraining loss bends downwards: conjugate gradients leave x = 0, of residual 1."""

    def pretrain_loss(self, theta, task):
        return -super().pretrain_loss(theta, task)


def test_updates_without_a_solution_are_skipped_counted_and_warned_about_once(tmp_path):
    strategy = Learned(Implicit(ConjugateGradient()), every=2)
    trainer = trainer_of(tmp_path, strategy, problem=Saddle)
    before = params.clone(params.named(trainer.problem.designer))
    trainer.run()
    after = params.named(trainer.problem.designer)
    assert all(torch.equal(before[name], after[name]) for name in before)
    records = trainer.log.records()
    counts = [r["unsolved_updates"] for r in records if r["kind"] == "designer"]
    assert counts == [1, 2, 3, 4, 5, 6]
    warnings = [r["message"] for r in records if r["kind"] == "warning"]
    assert sum("no better than x = 0" in message for message in warnings) == 1
    assert trainer.budget.grad_evals > 12 + 6  # what the solves cost is charged
    resumed = Learned(Implicit(ConjugateGradient()))
    resumed.start(trainer.problem)
    resumed.load_state_dict(strategy.state_dict())
    assert resumed.num_unsolved == 6
