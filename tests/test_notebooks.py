"""The notebooks of the gallery run from top to bottom, and measure what their tables state."""

import re
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "docs" / "notebooks"
PAGES = sorted(page for page in FOLDER.glob("*.md") if page.stem != "index")
CELL = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
ROW = re.compile(r"^\| ([^|]+?) \| \*{0,2}([\d.]+)\*{0,2} \|", re.MULTILINE)
LOWER_IS_BETTER = ("error", "NLL")


def run(page: Path) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in CELL.findall(page.read_text()):
        exec(compile(cell, str(page), "exec"), names)
    return names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_notebook_measures_what_its_table_states(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = {name: mean(values) for name, values in run(page)["results"].items()}
    finally:
        torch.set_num_threads(threads)
    text = page.read_text()
    stated = {name: float(value) for name, value in ROW.findall(text)}
    assert stated.keys() == found.keys()
    for name, value in stated.items():
        assert found[name] == pytest.approx(value, rel=0.2), (
            name
        )  # other processors round otherwise
    (header,) = re.findall(r"^\| \| (.*?) \|", text, re.MULTILINE)
    better = min if header.startswith(LOWER_IS_BETTER) else max
    fixed = next(value for name, value in found.items() if name.startswith("fixed"))
    control = next(value for name, value in found.items() if name.startswith("control"))
    for other in (fixed, control):
        assert better(found["steered"], other) == found["steered"]
        assert abs(found["steered"] - other) > 0.05 * other


def test_the_gallery_lists_every_notebook() -> None:
    listed = re.findall(r"\]\((\w+)\.md\)", (FOLDER / "index.md").read_text())
    assert sorted(listed) == [page.stem for page in PAGES]
    assert len(PAGES) >= 6


def test_the_pages_and_the_tutorial_are_notebooks(tmp_path: Path) -> None:
    """One source is the page and the notebook: cells in the order of the page's blocks."""
    jupytext = pytest.importorskip("jupytext")
    for page in [*PAGES, FOLDER.parent / "tutorial.md"]:
        notebook = jupytext.read(page)
        code = [cell.source.strip() for cell in notebook.cells if cell.cell_type == "code"]
        blocks = re.findall(r"^```(python|sh)\n(.*?)^```$", page.read_text(), re.DOTALL | re.M)
        expected = [("%%sh\n" if kind == "sh" else "") + text.strip() for kind, text in blocks]
        assert code == expected
