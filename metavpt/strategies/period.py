"""When a strategy updates what it learns."""

from dataclasses import dataclass
from typing import Any

from metavpt.errors import MetaVPTError
from metavpt.training.budget import Budget


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
