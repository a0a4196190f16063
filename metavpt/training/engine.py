"""How the learner's own step runs: device, precision, processes, microbatches and compiled blocks.

Lightning Fabric distributes the loss and handles precision; the loop stays in `Trainer`.
"""

import os
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
import torch.distributed as dist
from lightning_fabric import Fabric
from lightning_fabric.plugins import Precision
from lightning_fabric.strategies.ddp import DDPStrategy
from lightning_fabric.strategies.model_parallel import ModelParallelStrategy
from lightning_fabric.strategies.strategy import Strategy
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_
from torch.optim import Optimizer

from metavpt.distributed import collectives, fsdp
from metavpt.errors import MetaVPTError, check_known
from metavpt.hypergradients import params
from metavpt.hypergradients.distributed_losses import averaged
from metavpt.hypergradients.params import Params
from metavpt.problem import Problem, supports
from metavpt.profiling import phase
from metavpt.training.strategy import Proposal

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
BACKENDS = {
    "cuda": "cpu:gloo,cuda:nccl",
    "cpu": "gloo",
}  # gloo too: counts, clocks and paths are agreed on without the GPU


def make_fabric(
    device: str | None = None,
    precision: str = "32-true",
    devices: int = 1,
    nodes: int = 1,
    parallel: str = "ddp",
) -> Fabric:
    """Make a launched Fabric of `devices` processes on each of `nodes` machines.

    Under torchrun both numbers are torchrun's.

    Args:
        device: See `pick_device`.
        precision: Of the learner's own step. Hypergradients are taken in float32 whatever it is,
            see `metavpt.hypergradients.mixed_products`.
        devices: Processes on a machine, a GPU each.
        nodes: Machines.
        parallel: How several processes share the learner: "ddp", each holds all of it; "fsdp", each
            a part of its trunk (`Shardable.trunks`); "hsdp", each a part among the processes of its
            machine, and every machine all of it.
    """
    check_known(precision, "precision", *PRECISIONS)
    device = pick_device(device)
    if "LOCAL_WORLD_SIZE" in os.environ:  # torchrun says it
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = int(os.environ["WORLD_SIZE"]) // devices
    kind, _, index = device.partition(":")
    if devices < 1 or nodes < 1 or ((index or kind == "mps") and devices * nodes > 1):
        raise MetaVPTError(
            f"devices={devices} nodes={nodes} device={device}: wants at least 1 of each, and of "
            "several cpu or cuda without an index"
        )
    accelerator = kind if kind in ("cuda", "mps") else "cpu"
    where: Any = [int(index)] if index and accelerator == "cuda" else devices
    strategy = (
        _strategy(parallel, devices, nodes, BACKENDS[accelerator])
        if devices * nodes > 1
        else "auto"
    )
    fabric = Fabric(
        accelerator=accelerator,
        devices=where,
        num_nodes=nodes,
        precision=precision,  # type: ignore[arg-type]
        strategy=strategy,
    )
    if (
        devices * nodes > 1
        and "TORCHELASTIC_RESTART_COUNT" in os.environ
        and not dist.is_initialized()
    ):
        _meet(BACKENDS[accelerator], os.environ["TORCHELASTIC_RESTART_COUNT"])
    fabric.launch()
    return fabric


def pick_device(device: str | None) -> str:
    """Choose the device.

    MPS is taken only where it is asked for: it has no float64, in which ridge heads and the
    metrics of dense tasks are computed.

    Args:
        device: cpu, cuda, cuda:1 or mps. None or auto: cuda where there is one, else cpu.

    Raises:
        MetaVPTError: It is not there, or the name is not one of a device.
    """
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device is None or device == "auto":
        return "cuda" if num_gpus else "cpu"
    kind, colon, index = device.partition(":")
    if kind not in ("cpu", "cuda", "mps", "meta") or (colon and not index.isdecimal()):
        raise MetaVPTError(
            f"device={device}: known are auto, cpu, mps, cuda, and cuda:1 for the second GPU"
        )
    if kind == "cuda" and int(index or 0) >= num_gpus:
        raise MetaVPTError(
            f"device={device}: torch finds {num_gpus} GPUs here; choose another, or device=cpu"
        )
    if kind == "mps" and not torch.backends.mps.is_available():
        raise MetaVPTError(f"device={device}: torch finds no MPS here; choose device=cpu")
    return device


def _meet(backend: str, attempt: str) -> None:
    """Create the process group before Fabric does, since torchrun's store outlives a restart."""
    store, rank, size = next(iter(rendezvous("env://")))
    dist.init_process_group(
        backend, store=PrefixStore(f"attempt_{attempt}", store), rank=rank, world_size=size
    )


def _strategy(parallel: str, devices: int, nodes: int, backend: str) -> Strategy:
    check_known(parallel, "parallel", "ddp", "fsdp", "hsdp")
    if parallel == "ddp":
        # a problem may leave parameters out of a step's loss, such as a head whose term weighs
        # nothing
        return DDPStrategy(
            process_group_backend=backend, find_unused_parameters=True, gradient_as_bucket_view=True
        )
    if parallel == "fsdp" or nodes == 1:  # on one machine both are the same
        return ModelParallelStrategy(
            lambda loss, mesh: fsdp.shard(loss, mesh["data_parallel"]),
            devices * nodes,
            1,
            process_group_backend=backend,
        )
    if devices == 1:
        raise MetaVPTError(
            "parallel=hsdp shards over the processes of a machine, and each machine has one; use "
            "ddp, or fsdp to shard over machines"
        )
    # Lightning names the second dimension after tensor parallelism. Here all processes share the
    # batch: the machines are the first dimension, the processes of a machine the second.
    return ModelParallelStrategy(fsdp.shard, nodes, devices, process_group_backend=backend)


class PretrainLoss(nn.Module):
    """The pretraining loss as a module of the learner, which Fabric can distribute.

    Its backward pass leaves the mean over the ranks in .grad. DistributedDataParallel averages what
    it wraps, and fully_shard what it shards. What fully_shard leaves whole is averaged here.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.learner, self.problem, self.is_sharded = problem.learner, problem, False

    def forward(self, proposal: Proposal) -> Tensor:
        """Compute the loss of a proposal."""

        def loss(theta: Params) -> Tensor:
            return proposal.loss(self.problem, theta)

        return (averaged(loss) if self.is_sharded else loss)(params.named(self.learner))


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
    """The loss of a task, its gradient and the optimizer's step, under `fabric`.

    Options are those of `Trainer`. Sharding replaces the learner's parameters, so create whatever
    holds them afterwards.
    """

    def __init__(
        self,
        problem: Problem,
        fabric: Fabric | None,
        accumulate: int,
        recompute: bool,
        compile: str | None,
    ) -> None:
        if accumulate < 1:
            raise MetaVPTError(f"trainer.accumulate={accumulate} must be at least 1")
        self.problem, self.accumulate, self.is_compiled = problem, accumulate, compile is not None
        self.fabric = fabric or Fabric(accelerator="cpu", devices=1)
        if recompute:
            recompute_blocks(problem.learner)
        if compile:
            compile_blocks(problem.learner, compile)
        self.loss = self.fabric.strategy.setup_module(PretrainLoss(problem))

    @property
    def precision(self) -> Precision:
        """Return Fabric's precision plugin."""
        return self.fabric.strategy.precision

    def eager(self) -> AbstractContextManager[None]:
        """Run compiled blocks eagerly inside.

        torch.compile does not support double backward, and the shapes of a probe would make it
        compile again, with dynamic shapes.
        """
        return torch.compiler.set_stance("force_eager") if self.is_compiled else nullcontext()

    def backward(self, proposal: Proposal) -> Tensor:
        """Compute the mean loss, and its gradient in .grad, over ranks and microbatches."""
        parts = (
            microbatches(self.problem, proposal.task, self.accumulate)
            if self.accumulate > 1 and proposal.task is not None
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
        """Clip the gradient, and leave the norms in `optimizer.param_groups` for `from_torch`.

        Returns:
            The norm of the gradient before it was clipped, over all that the ranks hold.
        """
        self.precision.unscale_gradients(optimizer)
        norms = _clip_grad_norm(self.problem.learner.parameters(), max_norm)
        total = _total_norm(norms)
        if norms and torch.isfinite(total):
            values = dict(zip(norms, torch.stack(list(norms.values())).tolist(), strict=True))
            for group in optimizer.param_groups:
                group["grad_norms"] = [values.get(p, 0.0) for p in group["params"]]
        return total

    def take_step(self, optimizer: Optimizer) -> None:
        """Take the optimizer's step."""
        self.fabric.strategy.optimizer_step(optimizer)

    def skip_step(self) -> None:
        """In float16 the loss was scaled too far."""
        if scaler := getattr(self.precision, "scaler", None):
            scaler.update()


def _clip_grad_norm(parameters: Iterable[Tensor], max_norm: float) -> dict[Tensor, Tensor]:
    """Clip gradients, some of them sharded, as `torch.nn.utils.clip_grad_norm_` does.

    Args:
        parameters: All that the norm is taken over. Those without a gradient do not count.
        max_norm: The largest norm of the gradient.

    Returns:
        The norm of each parameter's gradient before it was clipped. The norm of all of them is
        `_total_norm`.
    """
    held = {p: p.grad for p in parameters if p.grad is not None}
    norms = {p: torch.linalg.vector_norm(_local(grad)) for p, grad in held.items()}
    if sharded := [p for p in held if isinstance(p, DTensor)]:
        squares = torch.stack([norms[p] for p in sharded]).square()
        mesh = sharded[0].device_mesh
        # a replica holds all of a gradient, a shard some of it
        kinds = [Partial() if kind.is_shard() else Replicate() for kind in sharded[0].placements]
        whole = DTensor.from_local(squares, mesh, kinds).full_tensor().sqrt()
        norms.update(zip(sharded, whole, strict=True))
    for kind in (True, False):  # one call takes tensors of one kind
        clip_grads_with_norm_(
            [p for p in held if isinstance(p, DTensor) is kind], max_norm, _total_norm(norms)
        )
    return norms


def _total_norm(norms: Mapping[Tensor, Tensor]) -> Tensor:
    """Return the norm of all gradients from the norm of each."""
    if not norms:
        return torch.tensor(0.0)
    return torch.linalg.vector_norm(torch.stack(list(norms.values())))


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def compile_blocks(learner: nn.Module, backend: str) -> None:
    """Compile each block by itself, in place. One compilation serves all blocks of one shape.

    Compiled functions have no second derivative (pytorch #91469), so code that takes hypergradients
    must run them eagerly: `torch.compiler.set_stance("force_eager")`.
    """
    for block in _blocks(learner):
        block.compile(backend=backend)


def recompute_blocks(learner: nn.Module) -> None:
    """Keep the input of each block instead of what is in it, see `learners.recompute`."""
    able = [module for module in learner.modules() if hasattr(module, "recompute")]
    if not able:
        raise MetaVPTError(
            f"trainer.recompute=true: {type(learner).__name__} has no part with an attribute "
            "`recompute`"
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
            f"trainer.compile: {type(learner).__name__} has no blocks, members of a ModuleList or "
            "ModuleDict, to compile"
        )
    return blocks
