"""The EMA teacher of self-distillation (Mean Teacher, arXiv 1703.01780; DINO, arXiv 2104.14294)."""

import copy
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from metavpt.errors import MetaVPTError
from metavpt.hypergradients import trees

Answer = TypeVar("Answer")


class Teacher(nn.Module):
    """A frozen copy of a learner that follows it by a moving average.

    Its parameters are frozen; gradients still pass through to its inputs.
    """

    def __init__(self, learner: nn.Module) -> None:
        super().__init__()
        self.learner = copy.deepcopy(learner).requires_grad_(False).eval()
        self._last: tuple[list[Any], Any] | None = None  # inputs and answer of the last `once`

    def forward(self, *args: Any) -> Any:
        """Run the copy."""
        return self.learner(*args)

    def once(self, inputs: Sequence[Tensor], answer: Callable[[], Answer]) -> Answer:
        """Return `answer()`, which is not computed again for the inputs of the last call.

        Inputs are the same if they share their memory: a task is the same with and without its
        graph. What is kept has no graph, so it is not used where a derivative by the inputs is
        wanted. It is forgotten when the teacher moves.

        Args:
            inputs: The tensors that the answer depends on, besides the teacher.
            answer: Computes tensors in containers.
        """
        asked = [_memory(x) for x in inputs]
        needs_graph = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
        if self._last and self._last[0] == asked and not needs_graph:
            return self._last[1]
        self._last = None  # before the next answer takes its memory
        made = answer()
        self._last = asked, trees.map_tensors(Tensor.detach, made)
        return made

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
        self._last = None

    def load_state_dict(self, *args: Any, **options: Any) -> Any:
        """Restore a state."""
        self._last = None
        return super().load_state_dict(*args, **options)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the last answer out of copies."""
        return {**self.__dict__, "_last": None}


def _memory(x: Tensor) -> tuple[Any, ...]:
    """Return what is equal for tensors in the same memory, until one of them is written to."""
    return x.untyped_storage(), x.storage_offset(), x.shape, x.stride(), x.dtype, x._version


def held(p: torch.Tensor) -> torch.Tensor:
    """Return what this process holds of a parameter: all of it, or its shard."""
    return p.to_local() if isinstance(p, DTensor) else p
