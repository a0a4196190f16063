"""Steps that come to nothing because something is not finite: how many in a row, and what the last one was made of."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from metavpt.distributed import collectives
from metavpt.errors import NonFiniteError
from metavpt.hypergradients import trees
from metavpt.training import checkpoint

FILE = "failure.pt"  # in the folder of the run


class Failures:
    """Counts the learner's steps and the designer's updates that were skipped, each in a row; at `limit` of either the run ends.

    Before a step that may be the last one that is borne, all of the state is kept in memory; with limit 1 that is every step. It goes to
    failure.pt together with the task, from which `python -m metavpt.debug` takes the step again.
    """

    def __init__(self, limit: int, folder: Path) -> None:
        self.limit, self.folder = limit, folder
        self.steps = 0
        self.updates = 0
        self._before: dict[str, Any] | None = None

    def prepare(self, state: Callable[[], dict[str, Any]]) -> None:
        """Before a step; `state` gives what a checkpoint would hold."""
        worst = max(self.steps, self.updates)
        self._before = (
            {"random": checkpoint.random_state(), "trainer": copy.deepcopy(state())}
            if worst + 1 >= self.limit
            else None
        )

    def count_update(self, record: dict[str, float], task: Any) -> None:
        """What the strategy measured; a designer update that was skipped says so in there."""
        if record:
            self.updates = self.updates + 1 if "skipped_updates" in record else 0
        if self.updates >= self.limit:
            self._end(
                f"the feedback loss, its hypergradient or the designer's step was not finite for {self.updates} updates in a row; "
                "lower strategy.optimizer.lr or look at the labelled data",
                task,
            )

    def count_step(self, task: Any, loss: Tensor, grad_norm: Tensor) -> None:
        """A step of the learner that was skipped."""
        self.steps += 1
        if self.steps >= self.limit:
            self._end(
                f"the pretraining loss or its gradient was not finite for {self.steps} steps in a row; "
                "lower the learning rate (trainer.optimizer.lr) or look at the data",
                task,
                loss=float(loss),
                grad_norm=float(grad_norm),
            )

    def _end(self, message: str, task: Any, **values: float) -> None:
        if self._before is not None and collectives.rank() == 0:
            kept = [tensor.detach().cpu().clone() for tensor in trees.tensors(task)]
            self.folder.mkdir(parents=True, exist_ok=True)
            checkpoint.write(self.folder / FILE, {**self._before, "task": kept, "values": values})
            message += f"; python -m metavpt.debug run={self.folder} takes the last one again and says where it begins"
        raise NonFiniteError(message)

    def state_dict(self) -> dict[str, int]:
        return {"steps": self.steps, "updates": self.updates}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.steps, self.updates = state["steps"], state["updates"]
