"""What `import metavpt` gives: every name that it lists, documented, without heavy libraries."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

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
        name
        for page in pages
        for names in re.findall(
            r"^from metavpt import (\([^)]+\)|.+)$", page.read_text(), re.MULTILINE
        )
        for name in re.findall(r"\w+", names)
    }
    assert asked
    assert asked <= set(metavpt.__all__)


def test_import_leaves_out_the_libraries_that_only_some_problems_need() -> None:
    code = "import metavpt, sys; print(*sorted({m.partition('.')[0] for m in sys.modules}))"
    modules = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT
    ).stdout.split()
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
