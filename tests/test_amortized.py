"""The learned tilt on a learner and a designer small enough to write everything out: features are theta x, targets t + phi x."""

import pytest
import torch
from torch import nn

from metavpt import Budget, Checkpoints, Fixed, MetaVPTError, Problem, RunLog, Trainer, params
from metavpt.amortized import Amortized, RandomAmortized
from metavpt.linear_product import CentralDifference

X = torch.randn(40, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = X @ torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Map(nn.Module):
    def __init__(self, scale):
        super().__init__()
        rng = torch.Generator().manual_seed(2)
        self.weight = nn.Parameter(scale * torch.randn(6, 3, dtype=torch.float64, generator=rng))


class Shift(Map):
    def forward(self, batch):
        return batch, self.weight


class Regression(Problem):
    """Pretraining tells x its own first three numbers, moved by the designer; feedback wants Y."""

    def __init__(self):
        self.learner, self.designer = Map(0.1), Shift(0.0)

    def _batches(self, seed):
        rng = torch.Generator().manual_seed(seed)
        while True:
            yield torch.randint(len(X), (8,), generator=rng)

    pretrain_batches = feedback_batches = meta_batches = _batches

    def recipe(self, batch):
        return batch, torch.zeros(6, 3, dtype=torch.float64)

    def pretrain_loss(self, theta, task):
        rows, move = task
        return (X[rows] @ theta["weight"] - X[rows, :3] - X[rows] @ move).square().mean()

    def feedback_loss(self, theta, batch):
        return (X[batch] @ theta["weight"] - Y[batch]).square().mean()

    def evaluate(self):
        with torch.no_grad():
            return {"loss": float((X @ self.learner.weight - Y).square().mean())}

    def lesson(self, theta, batch, w, derivative):
        values = -derivative(lambda own: X[batch] @ own["weight"], {"weight": theta["weight"]}, w)
        return {"rows": batch, "values": values}

    def taught(self, lesson):
        shift = X[lesson["rows"]] @ self.designer.weight
        return -(shift * lesson["values"]).mean() + 0.5 * shift.square().mean()


def trainer_of(folder, strategy, steps=12, problem=Regression):
    make = lambda groups: torch.optim.SGD(groups, lr=0.1)  # noqa: E731
    checkpoints = Checkpoints(folder / "checkpoints")
    return Trainer(
        problem(),
        strategy,
        Budget(steps=steps),
        RunLog(folder),
        checkpoints,
        make,
        weight_decay=0.0,
        log_every=1,
    )


def sgd(lr):
    return lambda parameters: torch.optim.SGD(parameters, lr=lr)


def amortized(kind=Amortized, lr=0.2, **options):
    options = {"meta_every": 2, "phi_steps": 5, "replay": 3, **options}
    return kind(optimizer=sgd(lr), derivative=CentralDifference(), max_norm=1e9, **options)


def test_the_steps_of_phi_are_gradient_steps_on_the_last_lessons_newest_first(tmp_path):
    trainer = trainer_of(tmp_path, amortized(ema=0.0))
    problem, lessons, phi = trainer.problem, [], torch.zeros(6, 3, dtype=torch.float64)
    for step in range(8):
        theta = problem.learner.weight.detach().clone()
        trainer.step()
        if step % 2 == 0:
            rows, labelled = (
                trainer.strategy.lessons.held[0]["rows"],
                last_drawn(trainer.streams.feedback),
            )
            error = X[labelled] @ theta - Y[labelled]
            g_down = 2 * X[labelled].T @ error / error.numel()
            lessons = [(rows, -X[rows] @ g_down), *lessons][:3]
            for k in range(5):
                x, a = X[lessons[k % len(lessons)][0]], lessons[k % len(lessons)][1]
                phi = phi - 0.2 * x.T @ (x @ phi - a) / a.numel()
        torch.testing.assert_close(problem.designer.weight.detach(), phi, rtol=1e-7, atol=1e-10)
    assert phi.norm() > 0


def last_drawn(stream):
    batches = stream.source(stream.seed)
    return [next(batches) for _ in range(stream.position)][-1]


def test_with_lr_0_it_is_fixed_bit_for_bit(tmp_path):
    fixed, still = (
        trainer_of(tmp_path / "fixed", Fixed()),
        trainer_of(tmp_path / "still", amortized(lr=0.0)),
    )
    fixed.run()
    still.run()
    assert torch.equal(fixed.problem.learner.weight, still.problem.learner.weight)


def test_feedback_is_read_at_its_steps_alone_and_steers_in_between(tmp_path):
    trainer = trainer_of(tmp_path, amortized(meta_every=4))
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


@pytest.mark.parametrize("kind", [Amortized, RandomAmortized])
def test_resumes_bit_for_bit_and_differs_from_fixed(tmp_path, kind):
    assert_resumes(trainer_of, lambda: amortized(kind), tmp_path)


def assert_resumes(trainer_of, strategy, folder):
    """A run stopped after 7 of its 12 steps ends where one that was not does, and elsewhere than `Fixed`."""
    whole = trainer_of(folder / "whole", strategy())
    whole.run()
    killed = trainer_of(folder / "parts", strategy())
    for _ in range(7):
        killed.step()
    killed.save()
    resumed = trainer_of(folder / "parts", strategy())
    resumed.resume()
    resumed.run()
    assert torch.equal(whole.problem.learner.weight, resumed.problem.learner.weight)
    fixed = trainer_of(folder / "fixed", Fixed())
    fixed.run()
    assert not torch.equal(whole.problem.learner.weight, fixed.problem.learner.weight)


def test_true_feedback_teaches_what_a_random_direction_does_not(tmp_path):
    """The loss of the feedback after 60 steps, where pretraining alone leads elsewhere."""
    losses = {}
    for name, strategy in {
        "fixed": Fixed(),
        "true": amortized(),
        "random": amortized(RandomAmortized),
    }.items():
        trainer = trainer_of(tmp_path / name, strategy, steps=60)
        trainer.run()
        losses[name] = trainer.metrics["loss"]
    assert losses["true"] < 0.8 * min(losses["fixed"], losses["random"])


def test_a_lesson_that_is_not_finite_is_skipped_and_counted(tmp_path):
    trainer = trainer_of(tmp_path, amortized())
    trainer.problem.lesson = lambda *_: {
        "rows": torch.arange(2),
        "values": torch.full((2, 3), torch.nan, dtype=torch.float64),
    }
    trainer.step()
    assert trainer.strategy.lessons.num_skipped == 1
    assert not trainer.strategy.lessons.held
    assert not params.named(trainer.problem.designer)["weight"].any()


@pytest.mark.parametrize("options", [{"phi_steps": 0}, {"replay": 0}])
def test_settings_that_make_no_sense_are_named(options):
    with pytest.raises(MetaVPTError, match=next(iter(options))):
        amortized(**options)


def test_problems_without_lessons_say_so(tmp_path):
    trainer = trainer_of(tmp_path, amortized())
    trainer.problem.lesson = lambda *a: Problem.lesson(trainer.problem, *a)
    with pytest.raises(MetaVPTError, match="has no lesson"):
        trainer.step()
