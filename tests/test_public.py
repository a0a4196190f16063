"""What `import metavpt` gives: every name that it lists, documented, and fast."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import metavpt

ROOT = Path(__file__).parents[1]


def test_every_name_is_there_once_in_order_and_documented() -> None:
    assert sorted(set(metavpt.__all__)) == sorted(metavpt.__all__)
    for name in metavpt.__all__:
        thing = getattr(metavpt, name)
        assert name == "Params" or inspect.getdoc(thing), name


def test_what_the_pages_import_from_the_top_is_public() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.py")]
    asked = {
        name.strip()
        for page in pages
        for names in re.findall(r"^from metavpt import (.+)$", page.read_text(), re.MULTILINE)
        for name in names.split(",")
    }
    assert len(asked) > 10
    assert asked <= set(metavpt.__all__)


def test_importing_it_takes_little_beyond_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU seconds, and none of the heavy libraries that only some problems need."""
    monkeypatch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)  # to be measured takes longer
    code = (
        "import time, torch; t = time.process_time(); import metavpt, sys; "
        "print(time.process_time() - t, *sorted({m.partition('.')[0] for m in sys.modules}))"
    )
    seconds, *modules = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT
    ).stdout.split()
    assert float(seconds) < 1.5
    assert not {
        "hydra",
        "timm",
        "kornia",
        "transformers",
        "torchvision",
        "matplotlib",
        "h5py",
        "scipy",
    } & set(modules)
