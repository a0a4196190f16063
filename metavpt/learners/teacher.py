"""The EMA teacher of self-distillation (Mean Teacher, arXiv 1703.01780; DINO, arXiv 2104.14294)."""

import copy
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from metavpt.errors import MetaVPTError


class Teacher(nn.Module):
    """A frozen copy of a learner that follows it by a moving average.

    Its parameters are frozen; gradients still pass through to its inputs.
    """

    def __init__(self, learner: nn.Module) -> None:
        super().__init__()
        self.learner = copy.deepcopy(learner).requires_grad_(False).eval()

    def forward(self, *args: Any) -> Any:
        """Run the copy."""
        return self.learner(*args)

    def train(self, mode: bool = True) -> "Teacher":
        """Stay in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def update(self, student: nn.Module, momentum: float) -> None:
        """Set teacher <- momentum * teacher + (1 - momentum) * student; copy buffers.

        Raises:
            MetaVPTError: The student's parameters are not the teacher's.
        """
        own, other = dict(self.learner.named_parameters()), dict(student.named_parameters())
        if own.keys() != other.keys():
            raise MetaVPTError(
                f"the teacher follows another model: {sorted(own.keys() ^ other.keys())[0]} is in "
                "only one of the two"
            )
        mine, theirs = [held(p) for p in own.values()], [held(other[name]) for name in own]
        torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
            mine, theirs, 1.0 - momentum
        )
        for mine, theirs in zip(self.learner.buffers(), student.buffers(), strict=True):
            mine.copy_(theirs)


def held(p: torch.Tensor) -> torch.Tensor:
    """Return what this process holds of a parameter: all of it, or its shard."""
    return p.to_local() if isinstance(p, DTensor) else p
