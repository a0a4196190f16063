"""Collectives for data-parallel training, through which derivatives of every order pass.

Rank r of n holds rows [r B/n, (r+1) B/n) of a batch of B and computes F_r with them. The objective
is F, the mean of the F_r. Two functions make autograd differentiate F:

    enter(x)   identity forward, mean over ranks backward
    leave(x)   mean over ranks forward, identity backward

Each is the derivative of the other, so derivatives of every order are those of F, with the same
bits on every rank. DistributedDataParallel does not do this for gradients of gradients (pytorch
#63929). With one process, and without torch.distributed, all functions here return their argument.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from metavpt.errors import MetaVPTError

Item = TypeVar("Item")
Result = TypeVar("Result")


def rank() -> int:
    """Return the rank of this process; 0 without torch.distributed."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def size() -> int:
    """Return the number of processes; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def enter(theta: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return `theta`; in the backward pass its gradient is averaged by one all-reduce."""
    if size() == 1 or not theta:
        return theta
    return dict(zip(theta, _Enter.apply(*theta.values()), strict=True))  # type: ignore[arg-type]


def leave(x: Tensor) -> Tensor:
    """Return the mean of x over ranks; identity in the backward pass."""
    return x if size() == 1 else _Leave.apply(x)[0]  # type: ignore[index]


def mean(x: Tensor) -> Tensor:
    """Return the mean of x over ranks, in the middle of a loss: a statistic of the whole batch."""
    return enter({"": leave(x)})[""] if size() > 1 else x


def summed(x: Tensor) -> Tensor:
    """Return the sum of x over ranks, in the middle of a loss."""
    return x if size() == 1 else size() * mean(x)


def own(x: Any) -> Any:
    """Return this rank's rows of a batch, or of a tensor, that every rank holds."""
    return x if size() == 1 else cut(x, rank(), size())


def cut(x: Any, k: int, num_parts: int) -> Any:
    """Return the k-th of `num_parts` equal parts of a batch or task.

    Tensors with the same first dimension as the first tensor are split along it; others are kept
    whole.
    """
    num = next((len(leaf) for leaf in tree_leaves(x) if isinstance(leaf, Tensor) and leaf.ndim), 0)
    if num % num_parts:
        raise MetaVPTError(
            f"a batch of {num} does not make {num_parts} equal parts; choose a batch size that "
            f"{num_parts} divides"
        )
    count = num // num_parts
    own = slice(k * count, (k + 1) * count)
    return tree_map_only(
        Tensor, lambda tensor: tensor[own] if tensor.ndim and len(tensor) == num else tensor, x
    )


def rows(num: int) -> slice:
    """Return this rank's rows among `num`."""
    count = num // size()
    return slice(rank() * count, (rank() + 1) * count)


def drawn(draw: Callable[[tuple[int, ...]], Tensor], shape: Sequence[int], dim: int = 0) -> Tensor:
    """Draw random numbers for the global batch and return this rank's part.

    So results do not depend on the number of processes.

    Args:
        draw: shape -> random numbers.
        shape: Of this rank's part.
        dim: The dimension of the samples.
    """
    whole = [count * (size() if k == dim else 1) for k, count in enumerate(shape)]
    return draw(tuple(whole)).narrow(dim, rank() * shape[dim], shape[dim])


def mean_count(count: Tensor) -> Tensor:
    """Return the denominator of a rank's sum for which the mean over ranks is the global mean.

    That is global_sum / max(global_count, 1).
    """
    return count.clamp_min(1) if size() == 1 else leave(count.float()).clamp_min(1 / size())


def weighed(loss: Tensor, count: int) -> Tensor:
    """Weight a rank's mean over `count` items, so that the mean over ranks is that over items."""
    return loss if size() == 1 else loss * count / leave(loss.new_tensor(float(count)))


def gather(x: Any) -> Any:
    """Concatenate what the ranks hold, without a graph: the inverse of `own`."""
    if size() == 1:
        return x
    return tree_map_only(Tensor, lambda tensor: torch.cat(_all_gather(tensor.detach())), x)


def joined(x: Tensor) -> Tensor:
    """Concatenate one tensor over ranks with a graph, for a loss that is no mean over ranks."""
    return x if size() == 1 else _Join.apply(x)  # type: ignore[return-value]


def share_out(compute: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Yield compute(item) for each item in order; one rank computes it and all receive it.

    Every rank calls it with the same items, and computes equally often, because under FSDP2 all
    ranks gather weights together. A rank reads only its own items if they can be indexed.
    """
    if size() == 1:
        yield from map(compute, items)
        return
    indexed: Any = items if hasattr(items, "__getitem__") else None
    read = (
        (partial(indexed.__getitem__, k) for k in range(len(indexed)))
        if indexed is not None
        else (partial(_same, x) for x in items)
    )
    while group := list(islice(read, size())):
        yield from every(compute(group[min(rank(), len(group) - 1)]()))[: len(group)]


def _same(x: Any) -> Any:
    return x


def logsumexp(x: Tensor) -> Tensor:
    """Return log sum exp over dim 0 and over ranks: x (..., K) -> (1, K)."""
    local = x.logsumexp(dim=0, keepdim=True)
    if size() == 1:
        return local
    highest = local.detach().clone()
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    return highest + (size() * mean((local - highest).exp())).log()


def total(count: int) -> int:
    """Return the sum of the ranks' counts."""
    if size() == 1:
        return count
    summed = torch.tensor(count)
    dist.all_reduce(summed)
    return int(summed)


def first(value: Any) -> Any:
    """Return rank 0's value."""
    if size() == 1:
        return value
    held = [value]
    dist.broadcast_object_list(held, src=0, device=torch.device("cpu"))
    return held[0]


def every(value: Any) -> list[Any]:
    """Return each rank's value, in order: plain data, and equally many tensors of any shape."""
    if size() == 1:
        return [value]
    held: list[Any] = [None] * size()
    dist.all_gather_object(held, tree_map_only(Tensor, lambda tensor: tensor.to("meta"), value))
    found: list[list[Tensor]] = [[] for _ in held]
    for tensor, *shapes in zip(_tensors(value), *map(_tensors, held), strict=True):
        flat = tensor.new_zeros(max(shape.numel() for shape in shapes))
        flat[: tensor.numel()] = tensor.detach().flatten()
        for own, part, shape in zip(found, _all_gather(flat), shapes, strict=True):
            own.append(part[: shape.numel()].view(shape.shape))
    rest = iter([tensor for own in found for tensor in own])
    return tree_map_only(Tensor, lambda _: next(rest), held)


def _tensors(x: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(x) if isinstance(leaf, Tensor)]


def any_of(value: Any) -> Any:
    """Return the value of the first rank whose value is not None."""
    return next((found for found in every(value) if found is not None), None)


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)  # what no rank's loss depends on must stay known as such

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return _where_there_are_any(_Leave, grads)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> tuple[Tensor, ...]:
        return tuple(tangent.view_as(tangent) for tangent in tangents)


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(_means(tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return _where_there_are_any(_Enter, grads)


class _Join(torch.autograd.Function):
    """The rows of all ranks. `_Part` is its transpose, and it is that of `_Part`."""

    @staticmethod
    def forward(tensor: Tensor) -> Tensor:
        return torch.cat(_all_gather(tensor))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return _Part.apply(*grads)  # type: ignore[return-value]


class _Part(torch.autograd.Function):
    """This rank's rows of the sum over ranks."""

    @staticmethod
    def forward(tensor: Tensor) -> Tensor:
        part = torch.empty_like(own(tensor), memory_format=torch.contiguous_format)
        # the second name is that of older versions of torch
        reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        reduce_scatter(part, tensor.contiguous())
        return part

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return _Join.apply(*grads)  # type: ignore[return-value]


def _where_there_are_any(
    function: type[torch.autograd.Function], grads: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    there = [grad for grad in grads if grad is not None]
    found = iter(function.apply(*there) if there else ())  # type: ignore[arg-type]
    return tuple(None if grad is None else next(found) for grad in grads)


def _means(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Average tensors over ranks, with one all-reduce per dtype."""
    means: dict[int, Tensor] = {}
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        chosen = [k for k, tensor in enumerate(tensors) if tensor.dtype == dtype]
        flat = torch.cat([tensors[k].detach().reshape(-1) for k in chosen])
        dist.all_reduce(flat)
        parts = flat.div_(size()).split([tensors[k].numel() for k in chosen])
        means |= {k: part.view(tensors[k].shape) for k, part in zip(chosen, parts, strict=True)}
    return [means[k] for k in range(len(tensors))]


def _all_gather(tensor: Tensor) -> list[Tensor]:
    parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(size())]
    dist.all_gather(parts, tensor.contiguous())
    return parts
