"""The examples run offline, in cells, and come to what they say."""

import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOKS = ("own_vision.py", "own_language.py", "ridge.py")


@pytest.fixture(autouse=True)
def _default_dtype() -> Iterator[None]:
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)


def run(name: str) -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / name))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_open_with_words_and_consist_of_cells(name: str) -> None:
    text = (EXAMPLES / name).read_text()
    assert text.startswith("# %% [markdown]\n# # ")
    assert text.count("\n# %%") >= 6


def test_the_vision_problem_is_solved_by_steering_alone() -> None:
    found = run("own_vision.py")
    assert found["plain"] < 0.4  # a guess is right in a quarter of the cases
    assert found["steered"] > 0.9
    weights = found["patch_weights"]
    assert weights[:2, :2].sum() > 0.9 * weights.sum()  # the quarter that holds the bar


def test_the_language_problem_learns_its_answers_sooner_by_steering() -> None:
    found = run("own_language.py")
    assert found["steered"] < found["plain"] - 0.2
    weights = found["log_weight"]
    assert min(weights[digit] for digit in "01234") > max(
        weights[letter] for letter in "abcdefghij ;+="
    )


def test_ridge_agrees_with_its_closed_form() -> None:
    found = run("ridge.py")
    errors = found["errors"]
    assert errors["Implicit(CG)"] < 1e-9
    assert errors["Unrolled(300)"] < 1e-6
    assert errors["Unrolled(10)"] == pytest.approx(errors["Implicit(Neumann(10))"], rel=1e-9)
    assert errors["OneStep"] > errors["Unrolled(10)"]
    assert found["after"] < found["before"]
    assert found["penalties"][4:].log().mean() > found["penalties"][:4].log().mean()
