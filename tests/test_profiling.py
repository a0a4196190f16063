"""Seconds add up to the time that went by; the peak of memory leaves out what is paused."""

import sys

import pytest
import torch

from metavpt.profiling import Clock, PeakMemory, phase

MIB = 2**20


class Ticks:
    """A clock on the wall that shows one second more at each glance."""

    def __init__(self) -> None:
        self.shown = 0.0

    def __call__(self) -> float:
        self.shown += 1.0
        return self.shown


def test_an_inner_phase_stops_the_outer_clock():
    ticks = Ticks()
    clock = Clock(ticks)
    with clock.timed("designer"):  # 1
        with clock.timed("data"):  # 2 .. 3
            pass
        with clock.timed("data"):  # 4 .. 5
            pass
    assert clock.seconds == {"designer": 3.0, "data": 2.0}
    assert sum(clock.seconds.values()) == ticks.shown - 1.0


def test_phases_are_called_by_where_they_lie():
    clock = Clock(Ticks(), by_path=True)
    with clock.listen("step"):
        with phase("designer"), phase("teacher"):
            pass
        with phase("teacher"):
            pass
    assert clock.seconds == {
        "step": 3.0,
        "step/designer": 2.0,
        "step/designer/teacher": 1.0,
        "step/teacher": 1.0,
    }


def test_an_error_ends_its_phases():
    clock = Clock(Ticks())

    @phase("inner")
    def fail() -> None:
        raise ValueError

    with pytest.raises(ValueError), clock.listen("outer"):  # noqa: PT011 - whatever it is
        fail()
    with phase("unheard"):
        pass
    assert clock.seconds == {"outer": 2.0, "inner": 1.0}
    with clock.listen("outer"):
        pass
    assert clock.seconds["outer"] == 3.0


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
