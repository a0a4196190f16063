"""Device, precision and processes of a run: Lightning Fabric, which is not given the loop."""

import os
from typing import Any

import torch
import torch.distributed as dist
from lightning_fabric import Fabric
from lightning_fabric.strategies.ddp import DDPStrategy
from lightning_fabric.strategies.model_parallel import ModelParallelStrategy
from lightning_fabric.strategies.strategy import Strategy
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from metavpt.distributed import fsdp
from metavpt.errors import MetaVPTError, check_known
from metavpt.hypergradients import params
from metavpt.hypergradients.distributed_losses import averaged
from metavpt.hypergradients.params import Params
from metavpt.problem import Problem
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
    """A Fabric of `devices` processes on each of `nodes` machines, already launched.

    device     cpu, cuda or cuda:1; None: the GPU where there is one
    precision  of the learner's own step; hypergradients are taken in float32 whatever it is, see `metavpt.hypergradients.mixed_products`
    devices    processes on a machine, a GPU each. Under torchrun both numbers are torchrun's
    parallel   how several share the learner: "ddp", each holds all of it; "fsdp", each a part of its trunk (`Shardable.trunks`)
    """
    check_known(precision, "precision", *PRECISIONS)
    if "LOCAL_WORLD_SIZE" in os.environ:  # torchrun says it
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = int(os.environ["WORLD_SIZE"]) // devices
    kind, _, index = (device or ("cuda" if torch.cuda.is_available() else "cpu")).partition(":")
    if devices < 1 or nodes < 1 or (index and devices * nodes > 1):
        raise MetaVPTError(
            f"devices={devices} nodes={nodes} device={device}: wants at least 1 of each, and of several no index in device"
        )
    accelerator = "cuda" if kind == "cuda" else "cpu"
    where: Any = [int(index)] if index and accelerator == "cuda" else devices
    strategy = (
        _strategy(parallel, devices * nodes, BACKENDS[accelerator])
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


def _meet(backend: str, attempt: str) -> None:
    """Make the process group before Fabric would: torchrun's store outlives a restart, and processes must not meet at dead addresses."""
    store, rank, size = next(iter(rendezvous("env://")))
    dist.init_process_group(
        backend, store=PrefixStore(f"attempt_{attempt}", store), rank=rank, world_size=size
    )


def _strategy(parallel: str, num_processes: int, backend: str) -> Strategy:
    if parallel == "ddp":
        # a problem may leave parameters out of a step's loss, such as a head whose term weighs nothing
        return DDPStrategy(
            process_group_backend=backend, find_unused_parameters=True, gradient_as_bucket_view=True
        )
    if parallel == "fsdp":
        return ModelParallelStrategy(fsdp.shard, num_processes, 1, process_group_backend=backend)
    raise MetaVPTError(f"parallel={parallel}: known are ddp, fsdp")


class PretrainLoss(nn.Module):
    """The pretraining loss as a module of the learner, for Fabric to distribute: its backward pass leaves the mean over the ranks in .grad.

    DistributedDataParallel averages what it wraps, and fully_shard what it shards. What fully_shard leaves whole is averaged here.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.learner, self.problem, self.is_sharded = problem.learner, problem, False

    def forward(self, proposal: Proposal) -> Tensor:
        def loss(theta: Params) -> Tensor:
            return proposal.loss(self.problem, theta)

        return (averaged(loss) if self.is_sharded else loss)(params.named(self.learner))
