"""How the learner's own step runs: where, in which precision, on how many processes, in how many parts, through which blocks."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from metavpt.distributed import collectives, fsdp
from metavpt.errors import MetaVPTError
from metavpt.problem import Problem, supports
from metavpt.profiling.timers import phase
from metavpt.training.strategy import Proposal

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from lightning_fabric.plugins import Precision


class Splittable(Protocol):
    """A problem whose tasks are not split along the first dimension of their tensors."""

    def microbatches(self, task: Any, num_parts: int) -> list[Any]:
        """Split a task into `num_parts` tasks of equal size, for gradient accumulation."""
        ...


def microbatches(problem: Problem, task: Any, num_parts: int) -> list[Any]:
    """Split a task for gradient accumulation.

    By default every tensor whose first dimension equals the batch size is split along it.
    """
    if supports(problem, Splittable):
        return problem.microbatches(task, num_parts)
    return [collectives.cut(task, k, num_parts) for k in range(num_parts)]


class Execution:
    """The loss of a task, its gradient and the optimizer's step, as `fabric` has them. Options as in `Trainer`.

    Sharding makes other parameters of the learner's: whoever holds on to them comes after this.
    """

    def __init__(
        self,
        problem: Problem,
        fabric: "Fabric | None",
        accumulate: int,
        recompute: bool,
        compile: str | None,
    ) -> None:
        if accumulate < 1:
            raise MetaVPTError(f"trainer.accumulate={accumulate} must be at least 1")
        self.problem, self.accumulate, self.is_compiled = problem, accumulate, compile is not None
        from lightning_fabric import Fabric  # here, as it takes longer to import than all else

        from metavpt.training.fabric import PretrainLoss

        self.fabric = fabric or Fabric(accelerator="cpu", devices=1)
        if recompute:
            recompute_blocks(problem.learner)
        if compile:
            compile_blocks(problem.learner, compile)
        self.loss = self.fabric.strategy.setup_module(PretrainLoss(problem))

    @property
    def precision(self) -> "Precision":
        return self.fabric.strategy.precision

    def eager(self) -> AbstractContextManager[None]:
        """Run compiled blocks eagerly inside.

        torch.compile does not support double backward, and the shapes of a probe would make it
        compile again, with dynamic shapes.
        """
        return torch.compiler.set_stance("force_eager") if self.is_compiled else nullcontext()

    def backward(self, proposal: Proposal) -> Tensor:
        """Leave the gradient in .grad, the mean over ranks and over the parts of the task; the mean loss."""
        parts = (
            microbatches(self.problem, proposal.task, self.accumulate)
            if self.accumulate > 1
            else [proposal.task]
        )
        total = torch.zeros((), device=self.fabric.device)
        for k, task in enumerate(parts, start=1):
            distributed = self.loss if isinstance(self.loss, DistributedDataParallel) else None
            with distributed.no_sync() if distributed and k < len(parts) else nullcontext():
                with phase("forward"), self.fabric.autocast():
                    loss = self.loss(proposal._replace(task=task)) / len(parts)
                with phase("backward"):
                    self.fabric.backward(loss)
            total = total + loss.detach()
        return collectives.leave(total)

    def clip_gradients(self, optimizer: Optimizer, max_norm: float) -> Tensor:
        """The norm of the gradient before it was clipped, over all that the ranks hold."""
        self.precision.unscale_gradients(optimizer)
        return fsdp.clip_grad_norm(self.problem.learner.parameters(), max_norm)

    def take_step(self, optimizer: Optimizer) -> None:
        self.fabric.strategy.optimizer_step(optimizer)

    def skip_step(self) -> None:
        """In float16 the loss was scaled too far."""
        if scaler := getattr(self.precision, "scaler", None):
            scaler.update()


def compile_blocks(learner: nn.Module, backend: str) -> None:
    """torch.compile of each block by itself, in place: one compilation serves blocks of one shape, and the rest stays as it is.

    Compiled functions have no second derivative (pytorch #91469), so what takes hypergradients must run them eagerly:
    `torch.compiler.set_stance("force_eager")`.
    """
    for block in _blocks(learner):
        block.compile(backend=backend)


def recompute_blocks(learner: nn.Module) -> None:
    """Keep the input of each block instead of what is in it, see `learners.recompute`."""
    able = [module for module in learner.modules() if hasattr(module, "recompute")]
    if not able:
        raise MetaVPTError(
            f"trainer.recompute=true: {type(learner).__name__} has no part with an attribute `recompute`"
        )
    for module in able:
        module.recompute = True  # pyright: ignore[reportArgumentType]


def _blocks(learner: nn.Module) -> Iterable[nn.Module]:
    found = [
        block
        for module in learner.modules()
        if isinstance(module, nn.ModuleList | nn.ModuleDict)
        for block in module.children()
    ]
    inner = {id(part) for block in found for part in block.modules() if part is not block}
    blocks = [block for block in found if id(block) not in inner]
    if not blocks:
        raise MetaVPTError(
            f"trainer.compile: {type(learner).__name__} has no blocks, members of a ModuleList or ModuleDict, to compile"
        )
    return blocks
