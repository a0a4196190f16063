"""A regression with a designer, small enough to write everything out: features are theta x."""

import torch
from torch import nn

from metavpt import Budget, Checkpoints, Fixed, Problem, RunLog, Trainer

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

    def replay_batch(self, theta, batch, w, derivative):
        values = -derivative(lambda own: X[batch] @ own["weight"], {"weight": theta["weight"]}, w)
        return {"rows": batch, "values": values}

    def designer_loss(self, replay):
        shift = X[replay["rows"]] @ self.designer.weight
        return -(shift * replay["values"]).mean() + 0.5 * shift.square().mean()


def trainer_of(folder, strategy, steps=12, problem=Regression):
    make = lambda groups: torch.optim.SGD(groups, lr=0.1)
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


def last_drawn(stream):
    batches = stream.source(stream.seed)
    return [next(batches) for _ in range(stream.position)][-1]


def assert_resumes(trainer_of, strategy, folder):
    """A run stopped after 7 of 12 steps ends like an uninterrupted one, and unlike `Fixed`."""
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
