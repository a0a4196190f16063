"""Peak memory of training."""

import re
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


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
