"""Counts of the steps that feedback shaped, and of the steps on labels."""

from typing import Any

from metavpt.training.strategy import Proposal


class SteeredSteps:
    """Counts over a run.

    Attributes:
        steered: Steps on a task that feedback shaped. None: no step has been steered so far.
        labelled: Steps with a loss on labels.
    """

    def __init__(self) -> None:
        self.steered: int | None = None
        self.labelled = 0

    def count(self, proposal: Proposal) -> None:
        """Count one step."""
        if proposal.steered is not None:
            self.steered = (self.steered or 0) + proposal.steered
        self.labelled += proposal.labelled_loss is not None

    def warning(self, num_steps: int) -> str | None:
        """Return a warning if no step of a steered run was steered."""
        if self.steered != 0:
            return None
        return (
            f"none of the {num_steps} steps was steered, so this run equals one without feedback; "
            "lower strategy.burn_in, raise the budget, or look for skipped updates in the log"
        )

    def record(self) -> dict[str, int]:
        """Return the counts for the log, without those that do not apply."""
        steered = {} if self.steered is None else {"steered_steps": self.steered}
        return steered | ({"labelled_steps": self.labelled} if self.labelled else {})

    def state_dict(self) -> dict[str, Any]:
        """Return the counts."""
        return {"steered": self.steered, "labelled": self.labelled}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.steered, self.labelled = state["steered"], state["labelled"]
