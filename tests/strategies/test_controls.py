"""Controls that train the learner on labels, and the guard that lets nobody else do it."""

import itertools
import json

import pytest
import torch
from helpers.regression import Regression, X, Y, trainer_of

from metavpt import Fixed, Learned, MetaVPTError
from metavpt.strategies.controls import Direct, LabelsOnly
from metavpt.training.strategy import num_labelled


class Watched(Regression):
    """Says what pretraining did."""

    def __init__(self):
        super().__init__()
        self.progress = []

    def after_step(self, task, progress):
        self.progress.append(progress)


def log(folder, kind):
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [record for record in records if record["kind"] == kind]


def descend(weight, stream, gradient, steps=12):
    """Gradient descent as the trainer does it: a cosine schedule of the rate, clipped at norm 1."""
    batches = stream.source(stream.seed)
    for step, rows in zip(range(steps), batches, strict=False):
        g = gradient(weight, rows)
        g = g * min(1.0, 1.0 / float(g.norm()))
        rate = 0.1 * (1 + torch.tensor(step / steps * torch.pi).cos()) / 2
        weight = weight - rate * g
    return weight


def feedback_gradient(weight, rows):
    return 2 * X[rows].T @ (X[rows] @ weight - Y[rows]) / Y[rows].numel()


def test_labels_only_descends_the_feedback_loss_and_nothing_else(tmp_path):
    trainer = trainer_of(tmp_path, LabelsOnly(), problem=Watched)
    start = trainer.problem.learner.weight.detach().clone()
    expected = descend(start, trainer.streams.feedback, feedback_gradient)
    trainer.run()
    weight = trainer.problem.learner.weight.detach()
    assert torch.allclose(weight, expected, atol=1e-6)
    assert not torch.allclose(weight, start, atol=1e-2)
    assert trainer.streams.pretrain.position == trainer.streams.meta.position == 0
    assert trainer.problem.progress == []  # no teacher follows a step that pretrains nothing
    assert (trainer.budget.steps, trainer.budget.samples) == (12, 12 * 8)
    assert log(tmp_path, "train")[-1]["labelled_steps"] == 12


def test_direct_descends_the_sum_of_both_losses(tmp_path):
    trainer = trainer_of(tmp_path, Direct(weight=2.0))
    pretrain = trainer.streams.pretrain.source(trainer.streams.pretrain.seed)

    def gradient(weight, rows):
        x = X[next(pretrain)]
        return 2 * x.T @ (x @ weight - x[:, :3]) / (3 * len(x)) + 2 * feedback_gradient(
            weight, rows
        )

    start = trainer.problem.learner.weight.detach().clone()
    expected = descend(start, trainer.streams.feedback, gradient)
    trainer.run()
    assert torch.allclose(trainer.problem.learner.weight.detach(), expected, atol=1e-6)


def test_labels_only_resumes_bit_for_bit(tmp_path):
    whole = trainer_of(tmp_path / "whole", LabelsOnly())
    whole.run()
    cut = trainer_of(tmp_path / "cut", LabelsOnly())
    for _ in range(7):
        cut.step()
    cut.save()
    resumed = trainer_of(tmp_path / "cut", LabelsOnly())
    resumed.resume()
    resumed.run()
    assert torch.equal(whole.problem.learner.weight, resumed.problem.learner.weight)


class Smuggler(Fixed):
    """Adds the feedback loss and does not say that it does."""

    def next_task(self, state):
        rows = next(state.streams.feedback)
        return (
            super()
            .next_task(state)
            ._replace(labelled_loss=lambda theta: state.problem.feedback_loss(theta, rows))
        )


def test_a_strategy_that_does_not_state_it_cannot_train_on_labels(tmp_path):
    with pytest.raises(MetaVPTError, match=r"^Smuggler\.next_task proposes a labelled_loss"):
        trainer_of(tmp_path, Smuggler()).run()


@pytest.mark.parametrize(
    ("batch", "count"),
    [
        ((torch.zeros(5, 2), torch.zeros(5)), 5),
        ({"x": torch.zeros(5, 2), "y": torch.zeros(5)}, 5),  # one batch with named tensors
        ({"a": (torch.zeros(5, 2), 7), "b": (torch.zeros(3, 2), 7)}, 8),  # two batches by name
    ],
)
def test_num_labelled_counts_samples(batch, count):
    assert num_labelled(batch) == count


def test_a_run_counts_its_steered_steps(tmp_path):
    learned = trainer_of(tmp_path / "learned", Learned(every=4, burn_in=0.25))
    learned.run()
    assert log(tmp_path / "learned", "train")[-1]["steered_steps"] == 12 - 3
    assert log(tmp_path / "learned", "warning") == []
    fixed = trainer_of(tmp_path / "fixed", Fixed())
    fixed.run()
    assert "steered_steps" not in log(tmp_path / "fixed", "train")[-1]
    random = trainer_of(tmp_path / "random", Learned(random_seed=0))
    random.run()
    assert "steered_steps" not in log(tmp_path / "random", "train")[-1]  # moved, by no feedback


def test_a_run_that_was_never_steered_ends_with_a_warning(tmp_path):
    trainer = trainer_of(tmp_path, Learned(burn_in=12))
    trainer.run()
    assert log(tmp_path, "train")[-1]["steered_steps"] == 0
    (warning,) = log(tmp_path, "warning")
    assert "none of the 12 steps was steered" in warning["message"]


def test_steered_steps_survive_a_resume(tmp_path):
    cut = trainer_of(tmp_path, Learned(every=4, burn_in=0.25))
    for _ in itertools.repeat(None, 7):
        cut.step()
    cut.save()
    resumed = trainer_of(tmp_path, Learned(every=4, burn_in=0.25))
    resumed.resume()
    resumed.run()
    assert resumed.steered.steered == 9
