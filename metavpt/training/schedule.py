"""The learning rate over a run, and what it is the learning rate of."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor
from torch.optim import Optimizer

from metavpt.errors import MetaVPTError
from metavpt.learners.annealing import cosine
from metavpt.problem import Problem, supports


@dataclass(frozen=True)
class WarmupCosine:
    """A factor for the peak learning rate: linear over `warmup_steps`, then half a cosine down to `final` at the end of the budget.

    It follows the share of the budget spent, whatever its unit, so it cannot overrun and serves
    budgets in seconds as well.
    """

    warmup_steps: int = 0
    final: float = 0.0

    def __post_init__(self) -> None:
        if self.warmup_steps < 0 or not 0 <= self.final <= 1:
            raise MetaVPTError(
                f"schedule: warmup_steps={self.warmup_steps} must not be negative and "
                f"final={self.final} lies in [0, 1]"
            )

    def __call__(self, step: int, progress: float) -> float:
        """`step` counts from 0, `progress` in [0, 1]."""
        warmup = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        return warmup * cosine(1.0, self.final, progress)


def parameter_groups(problem: Problem, weight_decay: float) -> list[dict[str, Any]]:
    """Of the learner: matrices decay, vectors (biases, norms) do not; what head warm-up freezes stands in groups of its own."""
    warm = set(warm_up_names(problem))
    groups: dict[tuple[bool, bool], list[Tensor]] = {}
    for name, p in problem.learner.named_parameters():
        if p.requires_grad:
            groups.setdefault((p.ndim >= 2, name in warm), []).append(p)
    if not groups:
        raise MetaVPTError(f"{type(problem).__name__}.learner has no trainable parameter")
    return [
        {"params": group, "weight_decay": weight_decay if decays else 0.0, "warm": is_warm}
        for (decays, is_warm), group in groups.items()
    ]


def make_optimizer(
    make: Callable[[Any], Optimizer], parameters: Iterable[Any], key: str
) -> Optimizer:
    """Call `make` on parameters or groups of them.

    Raises:
        MetaVPTError: An option of the optimizer is out of its range, or `make` makes something
            else. The message names the option below `key`.
    """
    try:
        optimizer = make(parameters)
    except (TypeError, ValueError) as error:
        option = ".lr" if "learning rate" in str(error) else ""
        raise MetaVPTError(f"{key}{option}: {' '.join(str(error).split())}") from error
    if not isinstance(optimizer, Optimizer):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise MetaVPTError(
            f"{key}: must make a torch.optim.Optimizer, not a {type(optimizer).__name__}"
        )
    return optimizer


class WarmsUp(Protocol):
    """A problem with fresh parameters on a released backbone: the head warm-up trains these alone."""

    def warm_up_parameters(self) -> Sequence[str]:
        """Return the names of the learner's parameters that the head warm-up trains."""
        ...


def warm_up_names(problem: Problem) -> Sequence[str]:
    """Return the names of the parameters that the head warm-up trains: by default all."""
    if supports(problem, WarmsUp):
        return problem.warm_up_parameters()
    return [name for name, p in problem.learner.named_parameters() if p.requires_grad]
