"""Bytes that a process sends by collectives, counted as they are called."""

import sys
from collections import Counter
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
scaling_estimate = import_module("scaling_estimate")

# How often a ring sends (n - 1)/n of the whole tensor: a reduction takes one round to add up, and
# one to hand out.
ROUNDS = {
    "c10d::allreduce_": 2,
    "c10d::_allgather_base_": 1,
    "c10d::allgather_": 1,
    "c10d::_reduce_scatter_base_": 1,
    "_c10d_functional::all_reduce": 2,
}
UNCOUNTED = {
    "_c10d_functional::_wrap_tensor_autograd",
    "_c10d_functional::wait_tensor",
    "c10d::broadcast_",  # of pickled objects
    "c10d::barrier",
}


class Traffic(TorchDispatchMode):
    """Counts bytes by part of the step, collective and ranks of the group.

    Only tensors of floating point count, and of several numbers: the rest are losses, counts and
    pickled objects. A collective that is not known here is an error.
    """

    def __init__(self):
        super().__init__()
        self.sent, self.part = Counter(), "step"

    @contextmanager
    def of(self, part):
        """Count what is sent inside as another part."""
        self.part, before = part, self.part
        try:
            yield
        finally:
            self.part = before

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor's own collectives come here in turn
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        if func.namespace in ("c10d", "_c10d_functional") and name not in UNCOUNTED:
            tensors = [leaf for leaf in tree_leaves((args, out)) if isinstance(leaf, Tensor)]
            if tensors[0].is_floating_point() and tensors[0].numel() > 1:
                ranks = tuple(dist.get_process_group_ranks(_group(args)))
                whole = max(tensor.nbytes for tensor in tensors)
                if name == "c10d::allgather_":  # each part is a tensor
                    whole *= len(ranks)
                sent = ROUNDS[name] * whole * (len(ranks) - 1) // len(ranks)
                self.sent[self.part, name, ranks] += sent
        return out


def _group(args):
    for leaf in tree_leaves(args):
        if isinstance(leaf, torch.ScriptObject):
            return dist.ProcessGroup.unbox(leaf)
    return _resolve_process_group(args[-1])
