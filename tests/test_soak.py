"""The arithmetic of benchmarks/soak.py."""

import gc
import mmap
import os
import sys
from importlib import import_module
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
soak = import_module("soak")


def test_slopes_are_those_after_the_warm_up():
    """400 MB that fill in the first fifth, then 2.5 MB, one file and no thread per 1,000 steps."""
    steps = range(0, 10_000, 100)
    samples = [
        soak.Sample(k, 400 * min(1.0, k / 1900) + 2.5 * k / 1000, 10 + k // 1000, 3, 0)
        for k in steps
    ]
    slopes = soak.slopes(samples)
    assert slopes["memory"] == pytest.approx(2.5, abs=1e-6)
    assert slopes["files"] == pytest.approx(1.0, abs=0.05)
    assert slopes["threads"] == pytest.approx(0.0, abs=1e-9)


def test_the_section_says_what_is_not_met():
    samples = [soak.Sample(k, 400 + 1.5 * k / 1000, 10, 3, 6) for k in range(0, 10_000, 100)]
    report = {"samples": samples, "seconds": 90.0, "per_1000_steps": soak.slopes(samples)}
    facts = {
        "workers": 2,
        "threads": 1,
        "cpu": "a CPU",
        "torch": "2",
        "date": "today",
        "command": "python benchmarks/soak.py",
    }
    lines = soak.section(report | facts)
    assert (
        "| memory with its loading processes, MB | 403 | 415 | +1.500 | 1 | **not met** |" in lines
    )
    assert "| child processes | 6 | 6 | +0.000 | 0.1 | met |" in lines


def test_too_few_samples_are_refused():
    with pytest.raises(ValueError, match="too few samples"):
        soak.slopes([soak.Sample(1, 1.0, 1, 1, 0)] * 3)


def test_a_sample_sees_memory_and_files():
    gc.collect()  # what earlier tests left must not be freed in between
    before = soak.sample(0)
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(5)]
    block = mmap.mmap(-1, 200_000_000)
    block.write(b"x" * len(block))
    after = soak.sample(1)
    for descriptor in held:
        os.close(descriptor)
    assert after.files - before.files == 5
    assert after.memory - before.memory > 0.8 * len(block) / 1e6
