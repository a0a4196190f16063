"""Linear systems with known solutions, and the solvers to try on them."""

import math

import pytest
import torch
from torch import Tensor

from metavpt.hypergradients.linear_solvers import (
    ConjugateGradient,
    LinearSolver,
    Neumann,
    Nystrom,
)
from metavpt.hypergradients.params import Params

SOLVERS: list[LinearSolver] = [
    ConjugateGradient(),
    Neumann(num_terms=5, step_size=0.1),
    Nystrom(rank=4),
]
by_name = pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)


def split(x: Tensor) -> Params:
    """A vector as a dict of two tensors, one of them a matrix."""
    return {"weight": x[:6].reshape(2, 3), "bias": x[6:]}


def join(x: Params) -> Tensor:
    return torch.cat([x["weight"].reshape(-1), x["bias"]])


class Matrix:
    """A matvec that counts its calls."""

    def __init__(self, a: Tensor) -> None:
        self.a, self.calls = a, 0

    def __call__(self, x: Params) -> Params:
        self.calls += 1
        return split(self.a @ join(x))


def symmetric(eigenvalues: Tensor, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(
        torch.randn(len(eigenvalues), len(eigenvalues), generator=generator, dtype=torch.float64)
    ).Q
    return q @ torch.diag(eigenvalues.double()) @ q.T


def spd(condition: float, n: int = 30, seed: int = 0) -> Tensor:
    return symmetric(torch.logspace(-math.log10(condition), 0, n, dtype=torch.float64), seed)


def vector(n: int = 30, seed: int = 1) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def true_residual(a: Tensor, x: Params, b: Tensor) -> float:
    return float((b - a @ join(x)).norm() / b.norm())
