"""Peak memory of this process, with what is paused left out."""

import sys

import pytest
import torch

from metavpt.profiling.memory import PeakMemory

MIB = 2**20


def take(mebibytes):
    torch.ones(mebibytes * MIB // 4)  # written to, hence resident; freed at once


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux can set the mark back")
def test_what_is_needed_for_a_moment_counts_and_what_is_paused_does_not():
    memory = PeakMemory()
    memory.restart()
    idle = memory.peak
    with memory.paused():
        take(400)
    assert memory.peak < idle + 100 * MIB
    take(200)
    peak = memory.peak
    assert idle + 150 * MIB < peak < idle + 350 * MIB
    with memory.paused():
        take(400)
    assert peak <= memory.peak < peak + 50 * MIB


def test_a_resumed_run_keeps_the_earlier_peak():
    memory = PeakMemory()
    memory.earlier = 10**15
    assert memory.peak == 10**15
