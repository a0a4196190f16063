"""What training spends: seconds by phase, peak memory, and passes through the learner."""

import re
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ContextDecorator, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._pytree import tree_leaves

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")

_listening: list["Clock"] = []
_paused: list[None] = []  # an entry for each `uncounted` that is open


class Clock:
    """Seconds by phase. An inner phase stops the outer one, so seconds add up to the elapsed time.

    Args:
        now: Returns seconds from any origin. On a GPU it waits for the device first.
        by_path: Whether phases are named by their path, such as `designer/product/teacher`.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter, by_path: bool = False) -> None:
        self.now, self.by_path = now, by_path
        self.seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Count the seconds inside the block for a phase."""
        self.start(name)
        try:
            yield
        finally:
            self.stop()

    def start(self, name: str) -> None:
        """Begin a phase."""
        now = self.now()
        self._count(now)
        self._open.append(f"{self._open[-1]}/{name}" if self.by_path and self._open else name)
        self._since = now

    def stop(self) -> None:
        """End the innermost phase."""
        now = self.now()
        self._count(now)
        self._open.pop()
        self._since = now

    @contextmanager
    def listen(self, name: str) -> Iterator[None]:
        """Count what runs inside as the phase `name`, except inner phases."""
        _listening.append(self)
        try:
            with self.timed(name):
                yield
        finally:
            _listening.pop()

    def _count(self, now: float) -> None:
        if self._open:
            self.seconds[self._open[-1]] = self.seconds.get(self._open[-1], 0.0) + now - self._since


class phase(ContextDecorator):
    """Count the seconds inside `with phase("teacher"):` or `@phase("teacher")`, for a clock."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        if _listening:
            _listening[-1].start(self.name)

    def __exit__(self, *error: object) -> None:
        if _listening:
            _listening[-1].stop()


class PeakMemory:
    """Bytes at the peak since `restart`, without what happens inside `paused`.

    Allocations of the GPU if one is in use, else the resident memory of the process. Outside Linux
    the latter cannot be reset, so probes count too. `earlier` is the peak before a run was resumed.
    """

    def __init__(self) -> None:
        self.earlier = 0

    @property
    def peak(self) -> int:
        """Return the peak in bytes."""
        return max(self.earlier, _high_water())

    def restart(self) -> None:
        """Start measuring, after the problem was built."""
        _reset()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the memory inside the block."""
        self.earlier = self.peak
        try:
            yield
        finally:
            _reset()


def _high_water() -> int:
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    if STATUS.is_file() and (match := re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text())):
        return int(match[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def _reset() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    elif CLEAR.exists():
        CLEAR.write_text("5")  # sets VmHWM back to what is resident now, see proc(5)


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
