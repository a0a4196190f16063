"""Every benchmark runs on the smallest of its settings."""

import math
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))
language, steady = import_module("language"), import_module("steady")
TINY = {
    name: row
    for part in (language.PART, steady.PART)
    for name, row in part.rows.items()
    if name.startswith("tiny")
}


@pytest.mark.parametrize("name", TINY)
def test_a_row_runs(name: str):
    call = TINY[name].prepare()
    for _ in range(TINY[name].cycle):
        call()
    figures = call.figures() if hasattr(call, "figures") else {}
    assert all(math.isfinite(value) and value > 0 for value in figures.values())
    assert figures.keys() == ({"lower_bound"} if isinstance(call, steady.Training) else set())
