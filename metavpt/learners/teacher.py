"""The EMA teacher of self-distillation (Mean Teacher, arXiv 1703.01780; DINO, arXiv 2104.14294)."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from metavpt.distributed import collectives
from metavpt.errors import MetaVPTError
from metavpt.hypergradients import trees

Answer = TypeVar("Answer")


class Known(NamedTuple):
    """An answer of a teacher.

    Attributes:
        inputs: What it was asked about.
        memory: Where these were, see `_memory`.
        answer: Without a graph.
    """

    inputs: list[Tensor]
    memory: list[Any]
    answer: Any

    def equals(self, inputs: Sequence[Tensor]) -> bool:
        """Return whether `inputs` have the same values, and these were not written to."""
        return [_memory(x) for x in self.inputs] == self.memory and all(
            x.dtype == y.dtype and torch.equal(x, y)
            for x, y in zip(self.inputs, inputs, strict=True)
        )


class Teacher(nn.Module):
    """A frozen copy of a learner that follows it by a moving average.

    Its parameters are frozen; gradients still pass through to its inputs.
    """

    def __init__(self, learner: nn.Module) -> None:
        super().__init__()
        self.learner = copy.deepcopy(learner).requires_grad_(False).eval()
        self._known: list[Known] = []  # by `once`, the newest last
        self._num_kept, self._by_value = 1, False

    def forward(self, *args: Any) -> Any:
        """Run the copy."""
        return self.learner(*args)

    def once(self, inputs: Sequence[Tensor], answer: Callable[[], Answer]) -> Answer:
        """Return `answer()`, which is not computed again for the inputs of the last call.

        Inputs are the same if they share their memory: a task is the same with and without its
        graph. What is kept has no graph, so it is not used where a derivative by the inputs is
        wanted. It is forgotten when the teacher moves. See also `keep`.

        Args:
            inputs: The tensors that the answer depends on, besides the teacher.
            answer: Computes tensors in containers.
        """
        needs_graph = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
        found = None if needs_graph else self._find(inputs)
        if found is None:
            self._forget_all_but(self._num_kept - 1)  # before the next answer takes their memory
            made = answer()
            kept = trees.map_tensors(Tensor.detach, made)
        else:
            made = kept = self._known.pop(found).answer
        self._known.append(Known([x.detach() for x in inputs], [_memory(x) for x in inputs], kept))
        return made

    @contextmanager
    def keep(self, num_answers: int) -> Iterator[None]:
        """Let `once` keep several answers inside the block, and recognise inputs by their values.

        An estimator that makes a task again, with its graph, then asks no second time about it.
        """
        before, self._num_kept, self._by_value = self._num_kept, num_answers, True
        try:
            yield
        finally:
            self._num_kept, self._by_value = before, False
            self._forget_all_but(before)

    def _find(self, inputs: Sequence[Tensor]) -> int | None:
        """Return the place of what is known of `inputs`; all ranks agree on it."""
        asked = [_memory(x) for x in inputs]
        places = [k for k, known in enumerate(self._known) if known.memory == asked]
        if places or not self._by_value or not self._known:
            return places[0] if places else None
        equal = [k for k, known in enumerate(self._known) if known.equals(inputs)]
        found = set(collectives.every(equal[0] if equal else None))
        return found.pop() if len(found) == 1 else None

    def _forget_all_but(self, num_answers: int) -> None:
        self._known = self._known[max(len(self._known) - num_answers, 0) :]

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
        self._known = []

    def load_state_dict(self, *args: Any, **options: Any) -> Any:
        """Restore a state."""
        self._known = []
        return super().load_state_dict(*args, **options)

    def __getstate__(self) -> dict[str, Any]:
        """Leave answers out of copies."""
        return {**self.__dict__, "_known": []}


def _memory(x: Tensor) -> tuple[Any, ...]:
    """Return what is equal for tensors in the same memory, until one of them is written to."""
    return x.untyped_storage(), x.storage_offset(), x.shape, x.stride(), x.dtype, x._version


def held(p: torch.Tensor) -> torch.Tensor:
    """Return what this process holds of a parameter: all of it, or its shard."""
    return p.to_local() if isinstance(p, DTensor) else p
