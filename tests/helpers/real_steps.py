"""Steps of a torch.optim optimizer after clip_grad_norm_, as functions of phi."""

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metavpt.hypergradients.params import Params

MakeOptimizer = Callable[[Iterable[Any]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, MakeOptimizer] = {
    "sgd_momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=0.02, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1),
}


class TwoLayers:
    """A learner of two layers whose inputs the designer scales: y = tanh((x * exp(phi)) A) B."""

    def __init__(self, num_batches: int = 8) -> None:
        g = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        self.batches = [(draw(10, 4), 3 * draw(10, 2)) for _ in range(num_batches)]
        self.labelled = draw(12, 4), draw(12, 2)
        self.theta: Params = {"first": draw(4, 3), "second": draw(3, 2)}
        self.phi: Params = {"log_scale": 0.3 * draw(4)}

    def inner(self, k: int) -> Callable[[Params], Callable[[Params], Tensor]]:
        """The pretraining loss on batch k, as estimators take it."""
        return lambda phi: lambda theta: self._loss(phi, {**self.theta, **theta}, self.batches[k])

    def outer(self, theta: Params) -> Tensor:
        x, y = self.labelled
        theta = {**self.theta, **theta}
        return ((torch.tanh(x @ theta["first"]) @ theta["second"] - y) ** 2).mean()

    def _loss(self, phi: Params, theta: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        hidden = torch.tanh((x * phi["log_scale"].exp()) @ theta["first"])
        return ((hidden @ theta["second"] - y) ** 2).mean()


def real_steps(
    losses: Sequence[Callable[[Params], Tensor]],
    live: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    max_norm: float | None,
) -> list[float]:
    """Step on each loss in turn, which moves `live`; return the norms before clipping."""
    norms = []
    trained = [p for p in live.values() if p.requires_grad]
    for loss in losses:
        gradients = torch.autograd.grad(loss(dict(live)), trained)
        for p, grad in zip(trained, gradients, strict=True):
            p.grad = grad
        if max_norm is not None:
            norms.append(float(nn.utils.clip_grad_norm_(live.values(), max_norm)))
        optimizer.step()
    return norms


def twin(
    live: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer]:
    """Copy parameters and their optimizer with its state."""
    copies = {name: nn.Parameter(p.detach().clone()) for name, p in live.items()}
    of = {p: copies[name] for name, p in live.items()}
    groups = [{**g, "params": [of[p] for p in g["params"]]} for g in optimizer.param_groups]
    other = type(optimizer)(groups)  # type: ignore[call-arg]
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return copies, other


def slopes(fn: Callable[[Params], float], phi: Params, step: float = 1e-3) -> Params:
    """dfn/dphi, by a central difference of fourth order in each entry."""
    found: Params = {}
    for name, p in phi.items():
        flat = torch.zeros(p.numel(), dtype=p.dtype)
        for i in range(p.numel()):
            unit = torch.zeros_like(flat)
            unit[i] = step
            values = {k: fn({**phi, name: p + k * unit.view_as(p)}) for k in (-2.0, -1.0, 1.0, 2.0)}
            flat[i] = (8 * (values[1.0] - values[-1.0]) - (values[2.0] - values[-2.0])) / (
                12 * step
            )
        found[name] = flat.view_as(p)
    return found
