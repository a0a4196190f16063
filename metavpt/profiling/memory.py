"""The most memory that training takes."""

import re
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """Bytes at the peak since `restart`, with what happens inside `paused` left out; `earlier` is the peak before a run was resumed.

    The GPU's allocations where one is in use, else the process's resident memory. Outside Linux the latter has no mark that can be
    set back, so there probes count as well.
    """

    def __init__(self) -> None:
        self.earlier = 0

    @property
    def peak(self) -> int:
        return max(self.earlier, _high_water())

    def restart(self) -> None:
        """From here on: building the problem is no training."""
        _reset()

    @contextmanager
    def paused(self) -> Iterator[None]:
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
