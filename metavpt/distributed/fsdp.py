"""FSDP2 for learners: the trunk is sharded over processes, aligned parameters stay whole.

Hypergradients need gradients of gradients by theta_S alone, and fully_shard frees the storage that
a second derivative needs (pytorch #172543). So theta_S, and everything outside the trunk, stays
whole. It is small beside the trunk, products with it are those of one device, and
`DifferenceProduct` runs the sharded trunk once, with first derivatives.

Hybrid sharding (HSDP) shards the trunk over the processes of a machine and replicates the shards
over machines. Gathers then stay within a machine, and gradients of shards cross between machines.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only

from metavpt.distributed import collectives
from metavpt.errors import MetaVPTError


class Shardable(Protocol):
    """A problem whose trunks `parallel=fsdp` and `parallel=hsdp` can shard over processes."""

    def trunks(self) -> Sequence[nn.Module]:
        """Return modules that run by their forward alone and hold no aligned parameter."""
        ...

    def whole_parameters(self) -> Sequence[str]:
        """Return names of a trunk's parameters that losses also read outside its forward.

        These stay whole. Default: none.
        """
        return []


def shard(loss: Any, mesh: DeviceMesh) -> nn.Module:
    """Shard the trunks of the problem of `loss`, a `PretrainLoss`: each block, then the rest.

    Args:
        loss: A `PretrainLoss`.
        mesh: Of one dimension: the trunks are sharded over it. Of two: they are sharded over the
            second, and the shards are replicated over the first.

    Raises:
        MetaVPTError: The problem has no trunk, or an aligned parameter lies in one.
    """
    option = "parallel=fsdp" if mesh.ndim == 1 else "parallel=hsdp"
    trunks = list(loss.problem.trunks()) if hasattr(loss.problem, "trunks") else []
    aligned = set(loss.problem.aligned_parameters())
    if not trunks:
        raise MetaVPTError(
            f"{option}: the problem {type(loss.problem).__name__} has no trunk to shard; "
            "define trunks (Shardable), or use parallel=ddp"
        )
    inside = {id(p) for trunk in trunks for p in trunk.parameters()}
    for name, p in loss.learner.named_parameters():
        if name in aligned and id(p) in inside:
            raise MetaVPTError(
                f"{option}: {name} is one of aligned_parameters and lies in a trunk; theta_S must "
                "stay whole"
            )
    shared = _shared(loss.problem, trunks)
    for trunk in trunks:
        for block in _blocks(trunk):
            fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=shared)
        # not kept after a forward pass either: a teacher's, which has no backward pass to free it,
        # would then miss its next update
        fully_shard(trunk, mesh=mesh, reshard_after_forward=True, ignored_params=shared)
    loss.is_sharded = True
    return loss


def _blocks(trunk: nn.Module) -> Iterable[nn.Module]:
    for child in trunk.children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict | nn.Sequential):
            yield from (
                block for block in child.children() if any(True for _ in block.parameters())
            )


def _shared(problem: Any, trunks: Iterable[nn.Module]) -> set[nn.Parameter]:
    """Return parameters of trunks that losses also read directly, such as a tied embedding."""
    names = set(problem.whole_parameters()) if hasattr(problem, "whole_parameters") else set()
    return {p for trunk in trunks for name, p in trunk.named_parameters() if name in names}


def gathered(state: Any) -> Any:
    """Replace shards in `state` by whole tensors on the CPU of rank 0, and by None on other ranks.

    Every rank must call it.
    """

    def gather(tensor: DTensor) -> Tensor | None:
        whole = _whole(tensor.detach())
        return whole.cpu() if collectives.rank() == 0 else None

    return tree_map_only(DTensor, gather, state)


def scattered(state: Any, like: Any) -> Any:
    """Shard whole tensors on every rank where `like` has shards: the inverse of `gathered`.

    A tensor in `like` stands for all tensors below it of its shape, as a parameter for its moments.
    """
    if isinstance(state, Mapping):
        return {
            name: scattered(value, like.get(name) if isinstance(like, Mapping) else like)
            for name, value in state.items()
        }
    if (
        isinstance(like, DTensor)
        and isinstance(state, Tensor)
        and not isinstance(state, DTensor)
        and state.shape == like.shape
    ):
        return distribute_tensor(
            state.to(like.device), like.device_mesh, like.placements, src_data_rank=None
        )
    return state


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
