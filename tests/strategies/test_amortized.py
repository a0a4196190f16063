"""The learned tilt on a minimal learner and designer: features theta x, targets t + phi x."""

import pytest
import torch
from channels import Channels
from helpers.regression import X, Y, assert_resumes, last_drawn, sgd, trainer_of

from metavpt import Fixed, MetaVPTError
from metavpt.hypergradients import params
from metavpt.hypergradients.linear_targets import CentralDifference
from metavpt.strategies.amortized import Amortized


def amortized(lr=0.2, **options):
    options = {"every": 2, "phi_steps": 5, "replay": 3, **options}
    return Amortized(optimizer=sgd(lr), derivative=CentralDifference(), max_norm=1e9, **options)


def test_the_steps_of_phi_are_gradient_steps_on_the_last_batches_newest_first(tmp_path):
    trainer = trainer_of(tmp_path, amortized(ema=0.0))
    problem, stored, phi = trainer.problem, [], torch.zeros(6, 3, dtype=torch.float64)
    for step in range(8):
        theta = problem.learner.weight.detach().clone()
        trainer.step()
        if step % 2 == 0:
            rows, labelled = (
                trainer.strategy.buffer.entries[0]["rows"],
                last_drawn(trainer.streams.feedback),
            )
            error = X[labelled] @ theta - Y[labelled]
            g_down = 2 * X[labelled].T @ error / error.numel()
            stored = [(rows, -X[rows] @ g_down), *stored][:3]
            for k in range(5):
                x, a = X[stored[k % len(stored)][0]], stored[k % len(stored)][1]
                phi = phi - 0.2 * x.T @ (x @ phi - a) / a.numel()
        torch.testing.assert_close(problem.designer.weight.detach(), phi, rtol=1e-7, atol=1e-10)
    assert phi.norm() > 0


def test_with_lr_0_it_is_fixed_bit_for_bit(tmp_path):
    fixed, still = (
        trainer_of(tmp_path / "fixed", Fixed()),
        trainer_of(tmp_path / "still", amortized(lr=0.0)),
    )
    fixed.run()
    still.run()
    assert torch.equal(fixed.problem.learner.weight, still.problem.learner.weight)


def test_feedback_is_read_at_its_steps_alone_and_steers_in_between(tmp_path):
    trainer = trainer_of(tmp_path, amortized(every=4))
    seen = []
    for _ in range(8):
        trainer.step()
        seen.append(
            (
                trainer.streams.feedback.state_dict()["position"],
                trainer.problem.designer.weight.detach().clone(),
            )
        )
    assert [position for position, _ in seen] == [1, 1, 1, 1, 2, 2, 2, 2]
    assert torch.equal(seen[0][1], seen[3][1])
    assert not torch.equal(seen[3][1], seen[4][1])


@pytest.mark.parametrize("random_seed", [None, 0])
def test_resumes_bit_for_bit_and_differs_from_fixed(tmp_path, random_seed):
    assert_resumes(trainer_of, lambda: amortized(random_seed=random_seed), tmp_path)


def test_true_feedback_teaches_what_a_random_direction_does_not(tmp_path):
    """The loss of the feedback after 60 steps, where pretraining alone leads elsewhere."""
    losses = {}
    for name, strategy in {
        "fixed": Fixed(),
        "true": amortized(),
        "random": amortized(random_seed=0),
    }.items():
        trainer = trainer_of(tmp_path / name, strategy, steps=60)
        trainer.run()
        losses[name] = trainer.metrics["loss"]
    assert losses["true"] < 0.8 * min(losses["fixed"], losses["random"])


def test_a_replay_batch_that_is_not_finite_is_skipped_and_counted(tmp_path):
    trainer = trainer_of(tmp_path, amortized())
    trainer.problem.replay_batch = lambda *_: {
        "rows": torch.arange(2),
        "values": torch.full((2, 3), torch.nan, dtype=torch.float64),
    }
    trainer.step()
    assert trainer.strategy.buffer.num_skipped == 1
    assert not trainer.strategy.buffer.entries
    assert not params.named(trainer.problem.designer)["weight"].any()


@pytest.mark.parametrize("options", [{"phi_steps": 0}, {"replay": 0}])
def test_settings_that_make_no_sense_are_named(options):
    with pytest.raises(MetaVPTError, match=next(iter(options))):
        amortized(**options)


def test_a_problem_without_replay_batches_is_refused_before_step_0(tmp_path):
    with pytest.raises(MetaVPTError, match="Channels does not have"):
        trainer_of(tmp_path, amortized(), problem=Channels)
