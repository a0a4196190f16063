"""A point with two quadratic feedbacks whose gradients, conflicts and hypergradients are known."""

from pathlib import Path

import pytest
import torch
from scipy.optimize import nnls
from torch import nn

from metavpt import Budget, Learned, Problem, RunLog, Trainer
from metavpt.feedback.aggregation import MultipleFeedbacks, TorchJD
from metavpt.hypergradients.estimators import downstream
from metavpt.strategies.learned import feedback_on


class Weights(nn.Module):
    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.linspace(-1, 1, 4, dtype=torch.float64))

    def forward(self, batch):
        return batch, self.logits.softmax(0)


class Point(nn.Module):
    def __init__(self):
        super().__init__()
        self.p = nn.Parameter(torch.tensor([0.3, -1.0, 2.0, 0.7], dtype=torch.float64))


class Pulled(MultipleFeedbacks, Problem):
    """A point in R^4. Feedback j is |theta - goal_j|^2 / 2, with gradient g_j at first."""

    def __init__(self, gradients, weights=None):
        self.learner, self.designer = Point(), Weights()
        self.gradients = {
            name: torch.tensor(g, dtype=torch.float64) for name, g in gradients.items()
        }
        self.goals = {name: self.learner.p.detach() - g for name, g in self.gradients.items()}
        self.feedback_weights = weights or dict.fromkeys(gradients, 1.0)

    def pretrain_batches(self, seed):
        g = torch.Generator().manual_seed(seed)
        while True:
            x = torch.randn(8, 4, generator=g, dtype=torch.float64)
            yield torch.cat(
                [x, torch.arange(8)[:, None] % len(self.goals)], 1
            )  # the last column names the domain

    def feedback_batches(self, seed):
        while True:
            yield torch.zeros(1)

    def by_domain(self, batch):
        return {name: batch[batch[:, 4] == j] for j, name in enumerate(self.goals)}

    def pretrain_loss(self, theta, task):
        x, weights = task
        return (weights * (theta["p"] - x[:, :4] - x[:, 4:]) ** 2).sum(1).mean()

    def per_sample_tail(self, theta, task):
        x, weights = task
        return lambda theta_s: (weights * ({**theta, **theta_s}["p"] - x[:, :4]) ** 2).sum(1)

    def candidates(self, batch, num_candidates):
        return [
            (batch, torch.full((8, 4), 0.1 * (k + 1), dtype=torch.float64))
            for k in range(num_candidates)
        ]

    def recipe(self, batch):
        return self.candidates(batch, 1)[0]

    def feedback_losses(self, theta, batch):
        return {name: ((theta["p"] - goal) ** 2).sum() / 2 for name, goal in self.goals.items()}

    def evaluate(self):
        return {}


class Summed(Pulled):
    """The same with the weighted sum written by hand."""

    def __init__(self, gradients, weights):
        super().__init__(gradients, {"feedback": 1.0})
        self.by_hand = weights

    def feedback_losses(self, theta, batch):
        total = sum(
            self.by_hand[name] * ((theta["p"] - goal) ** 2).sum() / 2
            for name, goal in self.goals.items()
        )
        return {"feedback": total}


CONFLICT = {"a": [3.0, 6.0, 0.0, 1.5], "b": [-1.0, -0.5, 1.0, 0.0]}
THREE = {"a": [3.0, 6.0, 0.0, 1.5], "b": [-1.0, -0.5, 1.0, 0.0], "c": [0.3, -2.0, 0.1, 1.0]}


def gradient(combination, problem):
    """d(outer loss)/d theta by a rule with a single outer loss, and the answer of the rule."""
    feedback = feedback_on(problem, torch.zeros(1))
    combined = combination(feedback)
    return downstream(combined.outer_loss, feedback.aligned)[1]["p"], combined


def hypergradient(problem, estimator, combination=None):
    """The designer's gradient in `Learned` on the first batches, and what was charged."""
    strategy = Learned(
        estimator, lambda p: torch.optim.SGD(p, lr=1.0), combination=combination, max_norm=1e9
    )
    loop = trainer(problem, strategy)
    return strategy.estimate(loop.state)[0]


def trainer(problem, strategy, folder=Path("unused"), steps=4):
    return Trainer(
        problem,
        strategy,
        Budget(steps=steps),
        RunLog(folder),
        optimizer=lambda g: torch.optim.SGD(g, lr=0.1),
    )


class ScipyProjector:
    """min_v v'Gv over v >= u, as least squares |L'(u + x)| over x >= 0 with G = LL'."""

    def __call__(self, U, G):
        factor = torch.linalg.cholesky(G + 1e-12 * torch.eye(len(G), dtype=G.dtype)).T.numpy()
        return torch.stack(
            [
                u + torch.from_numpy(nnls(factor, -factor @ u.numpy())[0])
                for u in U.reshape(-1, len(G))
            ]
        ).reshape(U.shape)


def rule(name, **options):
    """`TorchJD(name)`. scipy solves the quadratic programs if quadprog is not installed."""
    pytest.importorskip("torchjd")
    return TorchJD(
        name,
        {"projector": ScipyProjector(), **options} if name in ("UPGrad", "DualProj") else options,
    )
