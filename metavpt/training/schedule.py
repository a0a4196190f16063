"""What changes over a run and when: the learning rate, by groups of parameters, and updates."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor
from torch.optim import Optimizer

from metavpt.errors import MetaVPTError
from metavpt.learners.annealing import cosine
from metavpt.problem import Problem, supports
from metavpt.training.budget import Budget


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


@dataclass
class Period:
    """Updates at the end of the burn-in and every `every` steps from there on.

    Attributes:
        every: Steps from one update to the next.
        burn_in: Steps before the first update; below 1 the share of the budget that they take.
        start: The step of the first update; None until it is known.
        num_updates: Updates so far that succeeded.
    """

    every: int = 8
    burn_in: float = 0
    start: int | None = None
    num_updates: int = 0

    def __post_init__(self) -> None:
        if self.every < 1 or self.burn_in < 0 or (self.burn_in >= 1 and self.burn_in % 1):
            raise MetaVPTError(
                f"strategy: every={self.every} must be at least 1 and burn_in={self.burn_in} "
                "a number of steps, or a share of the budget below 1"
            )
        if self.start is None and not self.burn_in % 1:
            self.start = int(self.burn_in)

    def due(self, budget: Budget) -> bool:
        """Return whether an update comes before the next step."""
        if self.start is None and budget.progress >= self.burn_in:
            self.start = budget.steps
        done = -1 if self.start is None else budget.steps - self.start
        return done >= 0 and done % self.every == 0

    def state_dict(self) -> dict[str, Any]:
        """Return the step of the first update and the number of updates."""
        return {"start": self.start, "num_updates": self.num_updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.start, self.num_updates = state["start"], state["num_updates"]


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
