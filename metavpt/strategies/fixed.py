"""The baseline: no designer and no feedback."""

from typing import Any

from metavpt.problem import Problem
from metavpt.training.strategy import Proposal, TrainState, draw, recipe_of


class Fixed:
    """The baseline recipe for every batch."""

    def start(self, problem: Problem) -> None:
        """Need nothing."""

    def next_task(self, state: TrainState) -> Proposal:
        """Make the recipe's task of the next batch."""
        return recipe_of(state, draw(state), {})

    def state_dict(self) -> dict[str, Any]:
        """Return an empty state."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore nothing."""
