"""The learning rate over a run, and the parameter groups of the optimizer."""

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
    """A factor for the peak learning rate: linear warm-up, then a half cosine over the budget.

    It follows the share of the budget that is spent, in any unit. So it cannot overrun, and it
    works for budgets in seconds.

    Args:
        warmup_steps: Steps of the warm-up.
        final: The factor at the end of the budget, in [0, 1].
    """

    warmup_steps: int = 0
    final: float = 0.0

    def __post_init__(self) -> None:
        if self.warmup_steps < 0 or not 0 <= self.final <= 1:
            raise MetaVPTError(
                f"schedule: warmup_steps={self.warmup_steps} must not be negative, and "
                f"final={self.final} must lie in [0, 1]"
            )

    def __call__(self, step: int, progress: float) -> float:
        """Return the factor.

        Args:
            step: The step, from 0.
            progress: The share of the budget that is spent, in [0, 1].
        """
        warmup = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        return warmup * cosine(1.0, self.final, progress)


def parameter_groups(problem: Problem, weight_decay: float) -> list[dict[str, Any]]:
    """Group the learner's parameters.

    Matrices decay, vectors (biases, norms) do not. Parameters that the head warm-up trains have
    groups of their own.

    Raises:
        MetaVPTError: The learner has no trainable parameter.
    """
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

    Args:
        make: Builds the optimizer.
        parameters: Parameters or groups.
        key: The configuration key of the optimizer, for errors.

    Raises:
        MetaVPTError: An option is out of range, or `make` returns something else. The message names
            the option below `key`.
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
    """A problem with new parameters on a released backbone. The head warm-up trains only these."""

    def warm_up_parameters(self) -> Sequence[str]:
        """Return the names of the learner's parameters that the head warm-up trains."""
        ...


def warm_up_names(problem: Problem) -> Sequence[str]:
    """Return the parameters that the head warm-up trains. Default: all."""
    if supports(problem, WarmsUp):
        return problem.warm_up_parameters()
    return [name for name, p in problem.learner.named_parameters() if p.requires_grad]
