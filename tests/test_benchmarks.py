"""Every benchmark still runs, on the smallest of its settings; and docs/benchmarks.md says what the kept results say."""

import json
import math
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))
language, steady, designer_update, scaling, decode, soak = (
    import_module(name)
    for name in ("language", "steady", "designer_update", "scaling", "decode", "soak")
)
SECTIONS = {
    part.name: part.section
    for part in (language.PART, steady.PART, designer_update.PART, scaling.PART, decode.PART)
}
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
    assert figures.keys() == ({"floor"} if isinstance(call, steady.Training) else set())


@pytest.mark.parametrize(
    "name", sorted(path.stem for path in (ROOT / "benchmarks" / "results").glob("*.json"))
)
def test_the_document_holds_the_section_of_the_results(name: str):
    report = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    section = SECTIONS | {"soak": soak.section}
    assert "\n".join(section[name](report)) in (ROOT / "docs" / "benchmarks.md").read_text()
