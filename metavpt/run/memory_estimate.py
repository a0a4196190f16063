"""Memory of training, counted on the meta device, where tensors have a size and no storage."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the elements of `tensors`."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def state_bytes(optimizer: Optimizer) -> int:
    """Return the bytes of the optimizer's state after a step. Parameters are on the meta device."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.empty_like(p)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return num_bytes(leaf for leaf in tree_leaves(optimizer.state) if isinstance(leaf, Tensor))


def saved_bytes(loss: Callable[[], Any], kept: Iterable[Tensor]) -> int:
    """Return the bytes that autograd saves for the backward pass of loss(), each storage once.

    Attention counts as in the fused kernels, without an N x N matrix. No gradient is computed.

    Args:
        loss: Computes the loss.
        kept: Tensors that are in memory anyway. They do not count.
    """
    counted: dict[int, torch.UntypedStorage] = {}
    known = {tensor.untyped_storage()._cdata for tensor in kept}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            counted[storage._cdata] = storage  # kept alive, so that its id stays unique
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), _FusedAttention():
        loss()
    return sum(storage.nbytes() for storage in counted.values())


class _FusedAttention(TorchFunctionMode):
    """Replaces attention, since torch would keep all probabilities on the meta device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return _Attention.apply(*args[:3])
        return func(*args, **(kwargs or {}))


class _Attention(torch.autograd.Function):
    """Keeps the tensors that flash attention keeps: inputs, output, and a number for each query."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1]))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError
