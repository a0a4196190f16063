"""Arithmetic on parameters held as a dict of tensors, name -> tensor."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

Params = dict[str, Tensor]


def named(module: nn.Module) -> Params:
    """The trainable parameters of `module` by name: the live tensors, not copies.

    Those that are sharded over processes (DTensors, see `metavpt.distributed.fsdp`) are left out:
    their modules use them, no loss is a function of them.
    """
    return {
        name: p
        for name, p in module.named_parameters()
        if p.requires_grad and not hasattr(p, "device_mesh")
    }


def leaves(params: Params) -> Params:
    """Return the same values as new leaves that require a gradient. No memory is copied."""
    return {name: p.detach().requires_grad_() for name, p in params.items()}


def views(params: Params) -> Params:
    """The same values as tensors of their own in the graph, whose gradients go on to `params`."""
    return {name: p.view_as(p) for name, p in params.items()}


def detach(params: Params) -> Params:
    """The same values outside the autograd graph; no memory is copied."""
    return {name: p.detach() for name, p in params.items()}


def clone(params: Params) -> Params:
    """A detached copy in memory of its own."""
    return {name: p.detach().clone() for name, p in params.items()}


def subset(params: Params, prefix: str) -> Params:
    """The entries under `prefix`, with the prefix taken off their names."""
    return {name.removeprefix(prefix): p for name, p in params.items() if name.startswith(prefix)}


def zip_with(fn: Callable[..., Tensor], *params: Params) -> Params:
    """`fn` applied entry by entry; all arguments hold the same names."""
    first, *others = params
    return {name: fn(p, *(other[name] for other in others)) for name, p in first.items()}


def zeros_like(params: Params) -> Params:
    """Zeros of the shapes of `params`."""
    return zip_with(torch.zeros_like, params)


def add(x: Params, y: Params, alpha: float | Tensor = 1.0) -> Params:
    """Compute x + alpha * y."""
    return zip_with(lambda a, b: a + alpha * b, x, y)


def scale(x: Params, alpha: float | Tensor) -> Params:
    """Compute alpha * x."""
    return zip_with(lambda a: alpha * a, x)


def dot(x: Params, y: Params) -> Tensor:
    """<x, y>, a scalar; accumulated over entries in their own dtype."""
    return torch.stack([(x[name] * y[name]).sum() for name in x]).sum()


def norm(x: Params) -> Tensor:
    """The Euclidean norm of all entries taken as one vector, a scalar."""
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(p) for p in x.values()]))


def drift(x: Params, start: Params) -> float:
    """Compute |x - start| / |start|."""
    return float(norm(add(x, start, alpha=-1.0)) / norm(start))


def is_finite(x: Params) -> bool:
    """Whether every entry of every tensor is finite."""
    return bool(torch.isfinite(norm(x)))
