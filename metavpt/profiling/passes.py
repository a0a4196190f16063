"""Counts of the passes through a model, taken as they run."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._pytree import tree_leaves

_paused: list[None] = []  # an entry for each `uncounted` that is open


@contextmanager
def uncounted() -> Iterator[None]:
    """Leave what runs inside out of every count: checks that are no part of a method's cost."""
    _paused.append(None)
    try:
        yield
    finally:
        _paused.pop()


class PassCounter:
    """Counts passes through the layers of a module while it is on.

    `work` is in multiply-adds of the layers' weights. A backward pass counts as two forward passes,
    a pass in forward mode as two: the values and their tangents. Attention between tokens,
    embeddings and what is elementwise are left out.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.work = 0.0
        self._is_on = False

    @contextmanager
    def on(self) -> Iterator[None]:
        """Count what runs inside."""
        layers = {id(layer) for layer in self.module.modules()}

        def count(layer: nn.Module, inputs: Any, output: Any) -> None:
            if id(layer) in layers and not _paused:
                self._count(layer, output)

        # One hook for all modules: hooks of the layers themselves would be compiled with them.
        handle = register_module_forward_hook(count)
        self._is_on = True
        try:
            yield
        finally:
            self._is_on = False
            handle.remove()

    def _count(self, layer: nn.Module, output: Any) -> None:
        weights = _num_weights(layer)
        result = next((leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)), None)
        if not weights or result is None or not result.ndim:
            return
        channels = result.shape[1] if isinstance(layer, _ConvNd) else result.shape[-1]
        forward = weights * result.numel() / max(channels, 1)
        self.work += forward * (1 if forward_ad.unpack_dual(result).tangent is None else 2)
        if result.requires_grad:
            result.register_hook(lambda _: self._add(2 * forward))

    def _add(self, work: float) -> None:
        if self._is_on and not _paused:
            self.work += work


def _num_weights(layer: nn.Module) -> int:
    """Count the weights that multiply each position of an output channel of a layer."""
    own = [p for p in layer._parameters.values() if p is not None]
    if isinstance(layer, nn.Embedding):
        return 0
    if isinstance(layer, _ConvNd):
        return sum(p.numel() for p in own if p.ndim > 1)
    return sum(p.numel() for p in own if p.ndim == 2)
