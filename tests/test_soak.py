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
    """400 MB that fill in the first fifth, then 2.5 MB, one file and no thread more in 1,000 steps."""
    steps = range(0, 10_000, 100)
    samples = [soak.Sample(k, 400 * min(1.0, k / 1900) + 2.5 * k / 1000, 10 + k // 1000, 3, 0) for k in steps]
    slopes = soak.slopes(samples)
    assert slopes["memory"] == pytest.approx(2.5, abs=1e-6)
    assert slopes["files"] == pytest.approx(1.0, abs=0.05)
    assert slopes["threads"] == pytest.approx(0.0, abs=1e-9)


def test_too_few_samples_are_refused():
    with pytest.raises(ValueError, match="too few samples"):
        soak.slopes([soak.Sample(1, 1.0, 1, 1, 0)] * 3)


def test_a_sample_sees_memory_and_files():
    gc.collect()  # what earlier tests left must not be freed in between
    before = soak.sample(0)
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(5)]
    block = mmap.mmap(-1, 50_000_000)
    block.write(b"x" * len(block))
    after = soak.sample(1)
    for descriptor in held:
        os.close(descriptor)
    assert after.files - before.files == 5
    assert after.memory - before.memory > 0.8 * len(block) / 1e6
