"""A toy with a known answer, to try a whole comparison in seconds: `problem=toy_sources`."""

from collections.abc import Callable, Iterator
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from typing_extensions import override

from metavpt.hypergradients.params import Params
from metavpt.problem import Directions, Problem
from metavpt.strategies.selection import SupportsCandidates, SupportsSelection


class Batch(NamedTuple):
    """Samples of all sources, mixed."""

    x: Tensor  # (B, D)
    y: Tensor  # (B, M)
    source: Tensor  # (B,) int64
    seed: int


class Task(NamedTuple):
    """A batch with a weight for each sample."""

    x: Tensor
    y: Tensor
    weight: Tensor  # (B,)


class SourceWeights(nn.Module):
    """The designer: a weight for each source, 1 on average and at the start."""

    def __init__(self, num_sources: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(num_sources))

    def forward(self, batch: Batch) -> Task:
        """Make the task of a batch."""
        return weighted(batch, self.logits.softmax(0))


class Sources(Problem, SupportsCandidates, SupportsSelection):
    """Regression on a stream of sources y = A_s x + noise. The feedback is about source 0 alone.

    The best weights are known: all on source 0. Uniform weights lead the learner to the mean of all
    A_s.
    """

    metric_directions: Directions = MappingProxyType({"error": "lower"})

    def __init__(
        self,
        num_sources: int = 4,
        num_inputs: int = 16,
        num_outputs: int = 4,
        noise: float = 1.0,
        batch_size: int = 64,
    ) -> None:
        self.learner = nn.Linear(num_inputs, num_outputs, bias=False)
        self.designer = SourceWeights(num_sources)
        # A_s, drawn from the seed of the run.
        self.maps = torch.randn(num_sources, num_outputs, num_inputs)
        self.noise, self.batch_size = noise, batch_size

    @override
    def pretrain_batches(self, seed: int) -> Iterator[Batch]:
        rng = torch.Generator().manual_seed(seed)
        while True:
            yield self._draw(self.batch_size, len(self.maps), rng)

    @override
    def feedback_batches(self, seed: int) -> Iterator[Batch]:
        rng = torch.Generator().manual_seed(seed)
        while True:
            yield self._draw(self.batch_size // 4, 1, rng)

    @override
    def pretrain_loss(self, theta: Params, task: Task) -> Tensor:
        return (task.weight * self._errors(theta, task.x, task.y)).mean()

    @override
    def per_sample_tail(self, theta: Params, task: Task) -> Callable[[Params], Tensor]:
        return lambda theta_s: task.weight * self._errors({**theta, **theta_s}, task.x, task.y)

    @override
    def feedback_loss(self, theta: Params, batch: Batch) -> Tensor:
        return self._errors(theta, batch.x, batch.y).mean()

    def candidates(self, batch: Batch, num_candidates: int) -> list[Task]:
        """Weights uniform on the simplex."""
        rng = torch.Generator().manual_seed(batch.seed)
        draws = -torch.rand(num_candidates, len(self.maps), generator=rng).log()
        return [weighted(batch, draw / draw.sum()) for draw in draws]

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Mean squared error on source 0 without noise, in closed form: |W - A_0|^2 / M."""
        (weight,) = self.learner.parameters()
        return {"error": float((weight - self.maps[0]).square().sum() / len(self.maps[0]))}

    def _draw(self, size: int, num_sources: int, rng: torch.Generator) -> Batch:
        x = torch.randn(size, self.maps.shape[2], generator=rng)
        source = torch.randint(num_sources, (size,), generator=rng)
        y = torch.einsum("bmd,bd->bm", self.maps[source], x)
        noise = self.noise * torch.randn(y.shape, generator=rng)
        return Batch(x, y + noise, source, int(torch.randint(2**31, (), generator=rng)))

    def _errors(self, theta: Params, x: Tensor, y: Tensor) -> Tensor:
        """(B,)."""
        return (functional_call(self.learner, theta, (x,)) - y).square().mean(dim=1)


def weighted(batch: Batch, shares: Tensor) -> Task:
    """The batch with the weights of its sources, `shares` (S,) on the simplex."""
    return Task(batch.x, batch.y, (len(shares) * shares)[batch.source])
