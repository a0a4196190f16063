"""The page of a comparison, from folders as one leaves them."""

import json
import re
import shutil
from pathlib import Path

import pytest
from helpers import example_folders as example
from helpers.html_page import HOSTILE, Page, assert_self_contained

from metavpt.compare import results
from metavpt.compare.results import Result
from metavpt.compare.table import Table
from metavpt.errors import MetaVPTError
from metavpt.report.comparison import write_comparison_report
from metavpt.report.rows import read_rows, run_folder

ROWS = ("fixed", "uniform", "one_step", "unrolled")
MAX_PAGE_BYTES = 15_000_000


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = example.write_comparison(tmp_path_factory.mktemp("made") / "comparison", ROWS)
    write_comparison_report(folder)
    return folder


@pytest.fixture
def html(comparison: Path) -> str:
    return (comparison / "report.html").read_text()


def sections(html: str) -> dict[str, str]:
    """The text of each section by its heading, as one line."""
    parts = re.findall(r"<section>\s*<h2>(.*?)</h2>(.*?)</section>", html, re.DOTALL)
    return {heading: " ".join(Page(f"<div>{body}</div>").text.split()) for heading, body in parts}


def test_every_part_is_there_in_order(html: str) -> None:
    assert list(sections(html)) == [
        "Results",
        "Differences to fixed",
        "Side effects",
        "Rows that failed",
        "Metrics against samples",
        "Samples to the final score of fixed",
        "Pareto front",
        "Predicted to first order",
        "Value that the designer expects",
        "Cost",
        "Pictures",
        "Warnings",
        "To run it again",
    ]
    page = Page(html)
    assert (
        page.tags.count("svg") == 3 * 4 + 4 + 1 + 4 + 2
    )  # intervals of 3 rows, curves, front, first order, values
    assert page.tags.count("img") == 2 * 4 * 3
    assert "4 rows at equal steps, seeds 0, 1, 2, 3, 4, 5." in page.text


def test_the_numbers_are_those_of_the_table(comparison: Path, html: str) -> None:
    shown = sections(html)
    table = Table(results.read(comparison))
    for section, name in zip(table.sections(), (*table.metrics, *table.side_effects), strict=False):
        for _, _, *texts in (line for line in section.lines if line[0] != "fixed"):
            assert all(
                text
                in shown["Side effects" if name in table.side_effects else "Differences to fixed"]
                for text in texts
            )
    assert shown["Results"].index("step 0") < shown["Results"].index("fixed 1.29")
    assert "25,600" in shown["Results"]
    for warning in table.warnings:
        assert warning.removeprefix("side effect: ") in shown["Side effects"]
    assert table.warnings
    assert "unrolled, seed 5NonFiniteError: not finite" in shown["Rows that failed"]
    assert "failed on seed" not in shown["Differences to fixed"]
    assert "one_step, seed 0, step 40; unrolled, seed 0, step 40, 2 times" in shown["Warnings"]
    assert "(5 of 6 seeds)" in shown["Metrics against samples"]


def test_too_few_seeds_have_no_colour(tmp_path: Path, html: str) -> None:
    coloured = re.compile(r'class="(?:interval )?(?:better|worse)"')
    assert coloured.search(html)
    few = example.write_comparison(tmp_path / "few", ROWS, range(3), figures=False)
    text = write_comparison_report(few).read_text()
    assert not coloured.search(text)
    assert "too few seeds" in sections(text)["Differences to fixed"]


def test_the_page_needs_no_network_and_runs_nothing(html: str) -> None:
    assert_self_contained(html)
    assert len(html) < MAX_PAGE_BYTES


def test_the_page_is_the_same_every_time(comparison: Path, html: str) -> None:
    assert write_comparison_report(comparison).read_text() == html


def test_curves_begin_at_step_0_and_end_with_the_result(comparison: Path) -> None:
    found = results.read(comparison)
    fixed = next(row for row in read_rows(comparison, found, "fixed") if row.name == "fixed")
    assert fixed.colour == 0
    course = fixed.course("ridge/depth_rmse")
    assert course is not None
    assert course.samples.tolist() == [
        step * example.BATCH for step in range(0, example.STEPS + 1, example.EVERY)
    ]
    table = Table(found)
    for at, name in ((0, "step 0"), (-1, "fixed")):
        mean = table.cells[name, "ridge/depth_rmse"].mean
        assert mean is not None
        assert (course.mean[at], course.error[at]) == (
            pytest.approx(mean.value),
            pytest.approx(mean.se),
        )


@pytest.mark.parametrize("probed", [True, False])
def test_a_row_is_compared_on_the_seeds_that_it_has(tmp_path: Path, probed: bool) -> None:
    """A row without its hard seed does not reach the reference by that alone.

    Without a measurement between start and end there is no course to compare.
    """
    for row, seed, start, end in (
        ("fixed", 0, 4.0, 3.0),
        ("fixed", 1, 2.0, 1.0),
        ("one_step", 1, 2.0, 1.5),
        ("one_step", 0, None, None),
    ):
        known = (
            {}
            if start is None
            else {
                "step0": {"loss": start},
                "metrics": {"loss": end},
                "samples": 100,
                "directions": {"loss": "lower"},
            }
        )
        results.append(tmp_path, Result(row, seed, error=None if known else "lost", **known))
        if known and probed:
            log = [
                {"kind": "probe", "step": 1, "metrics": {"loss": start}},
                {"kind": "train", "step": 1, "samples": 50},
            ]
            example.write_run(run_folder(tmp_path, row, seed), log)
    shown = sections(write_comparison_report(tmp_path).read_text())
    reached = shown.get("Samples to the final score of fixed", "")
    assert reached.endswith("fixed 100 1.00× one_step not reached" if probed else "")
    assert bool(reached) == probed


def test_hostile_strings_stay_text(tmp_path: Path) -> None:
    name = f"a{HOSTILE}"
    for row in ("fixed", name):
        for seed in (0, 1):
            log = [
                {"kind": "warning", "step": 1, "message": f"w{HOSTILE}"},
                {"kind": "designer", "step": 1, "value": 1.0},
            ]
            example.write_run(run_folder(tmp_path, row, seed), log)
            results.append(
                tmp_path,
                Result(
                    row,
                    seed,
                    None,
                    {f"m{HOSTILE}": 1.0, "loss": 2.0},
                    {f"m{HOSTILE}": 2.0, "loss": 1.0},
                    samples=8,
                ),
            )
    results.append(tmp_path, Result(name, 2, error=f"e{HOSTILE}"))
    (tmp_path / "config.yaml").write_text(f"problem: 'p{HOSTILE}'\nmatch: 'u{HOSTILE}'\n")
    (tmp_path / "environment.json").write_text(json.dumps({"command": f"c{HOSTILE}"}))
    page = Page(write_comparison_report(tmp_path).read_text())
    assert "script" not in page.tags
    for mark in "amwepuc":
        assert mark + HOSTILE in page.text


@pytest.mark.parametrize(
    ("rows", "seeds"),
    [(("fixed",), (0,)), (("fixed", "one_step"), (3,)), (("one_step", "uniform"), (0, 1))],
)
def test_small_comparisons_have_a_page_too(
    tmp_path: Path, rows: tuple[str, ...], seeds: tuple[int, ...]
) -> None:
    example.write_comparison(tmp_path, rows, seeds, figures=False)
    assert_self_contained(write_comparison_report(tmp_path).read_text())


def test_results_alone_are_enough(comparison: Path, tmp_path: Path) -> None:
    shutil.copy(comparison / "rows.jsonl", tmp_path)
    shown = sections(write_comparison_report(tmp_path).read_text())
    assert {"Results", "Differences to fixed", "Metrics against samples", "Cost"} <= set(shown)
    assert not {"Pictures", "Warnings", "Predicted to first order"} & set(shown)


def test_without_results_there_is_an_error_and_without_success_a_page(tmp_path: Path) -> None:
    with pytest.raises(MetaVPTError, match="no row of the comparison has finished"):
        write_comparison_report(tmp_path)
    results.append(tmp_path, Result("fixed", 0, error="lost"))
    page = Page(write_comparison_report(tmp_path).read_text())
    assert "No finished row fixed" in page.text
    assert "lost" in page.text


def test_pictures_stay_within_the_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sizes() -> list[float]:
        sources = re.findall(
            r'src="data:image/\w+;base64,([^"]*)"', write_comparison_report(tmp_path).read_text()
        )
        return [len(source) * 3 / 4 for source in sources]

    example.write_comparison(tmp_path, ROWS[:2], (0,))
    full = sizes()
    bound = 0.9 * sum(full)
    monkeypatch.setattr("metavpt.report.comparison.MAX_BYTES", bound)
    less = sizes()
    assert len(full) == 2 * 2 * 3
    assert len(less) == 2 * 2 * 2  # the middle steps go
    assert sum(less) <= bound
