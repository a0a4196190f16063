"""Next-token targets as soft as steered ones that know nothing of the feedback: controls."""

from typing import Literal

from torch.optim import Optimizer

from metavpt.errors import MetaVPTError
from metavpt.objectives.target_task import SoftTargets, Targets
from metavpt.problem import Problem
from metavpt.strategies.learned import Fixed, Proposal
from metavpt.strategies.tilted_targets import check_gate
from metavpt.training.budget import Budget
from metavpt.training.streams import Streams


class Softened(Fixed):
    """Targets with the share `gate` of the learner's own top-K prediction, or uniform on it: as soft as steered ones, without feedback."""

    def __init__(
        self,
        kind: Literal["self_distillation", "smoothing"] = "self_distillation",
        gate: float = 0.5,
        num_candidates: int = 64,
    ) -> None:
        if kind not in ("self_distillation", "smoothing"):
            raise MetaVPTError(f"strategy.kind={kind}: known are self_distillation, smoothing")
        check_gate(gate)
        self.targets = SoftTargets(
            gate, num_candidates, residual=1.0 if kind == "self_distillation" else 0.0
        )

    def next_task(
        self, problem: Problem, streams: Streams, optimizer: Optimizer, budget: Budget
    ) -> Proposal:
        return with_targets(super().next_task(problem, streams, optimizer, budget), self.targets)


def with_targets(proposal: Proposal, targets: Targets) -> Proposal:
    """The recipe's task with other targets."""
    if not hasattr(proposal.task, "_replace") or "targets" not in getattr(
        proposal.task, "_fields", ()
    ):
        raise MetaVPTError(
            f"the recipe's task is a {type(proposal.task).__name__} without targets to choose; "
            "these controls are for next-token prediction (TargetTask)"
        )
    return proposal._replace(task=proposal.task._replace(targets=targets))
