"""The table of a comparison: every number against its formula, and missing values stated."""

import csv
import io
import math
from pathlib import Path

import pytest
from rich.console import Console

from metavpt.compare import rendering
from metavpt.compare.paired_statistics import mean_se, paired
from metavpt.compare.results import Result
from metavpt.compare.table import STEP0, Cost, Table
from metavpt.errors import MetaVPTError
from metavpt.problem import Direction

RMSE, MIOU = "depth/rmse", "segmentation/miou"
STEERED = [RMSE]
DIRECTIONS: dict[str, Direction] = {RMSE: "lower", MIOU: "higher"}


def result(
    row: str,
    seed: int,
    rmse: float,
    miou: float = 0.2,
    steered: list[str] | None = STEERED,
    **costs,
) -> Result:
    costs = {
        "steps": 400,
        "samples": 25600,
        "grad_evals": 850,
        "seconds": 64.0,
        "peak_memory": 3 * 2**20,
        **costs,
    }
    step0 = {RMSE: 1.3 + seed / 10, MIOU: 0.2}
    return Result(
        row,
        seed,
        step0=step0,
        metrics={RMSE: rmse, MIOU: miou},
        steered=steered,
        directions=DIRECTIONS,
        **costs,
    )


ONE_STEP = [(1.1, 0.19), (1.25, 0.18), (1.29, 0.17), (1.4, 0.18), (1.5, 0.18)]  # seed by seed


def three_rows(num_seeds: int = 3) -> list[Result]:
    """Rows on some seeds, greedy on two. one_step wins on depth and loses on segmentation."""
    return [
        *(result("fixed", seed, 1.2 + seed / 10, 0.21) for seed in range(num_seeds)),
        *(
            result("one_step", seed, rmse, miou, seconds=80.0)
            for seed, (rmse, miou) in enumerate(ONE_STEP[:num_seeds])
        ),
        *(result("greedy", seed, 1.3, 0.3) for seed in (2, 0)),
    ]


def shown(table: Table, width: int = 100) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    console.print(rendering.rich(table))
    return console.file.getvalue().splitlines()


def csv_lines(table: Table) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(rendering.comma_separated(table))))


def test_step_0_stands_first_then_the_rows_as_they_came():
    table = Table(three_rows())
    assert table.rows == [STEP0, "fixed", "one_step", "greedy"]
    assert (table.metrics, table.side_effects) == ([RMSE], [MIOU])
    assert table.cells[STEP0, RMSE].mean == mean_se([1.3, 1.4, 1.5])


def test_a_cell_is_the_statistics_of_its_seeds():
    cell = Table(three_rows()).cells["one_step", RMSE]
    assert cell.mean == mean_se([1.1, 1.25, 1.29])
    assert cell.paired == paired([1.1, 1.25, 1.29], [1.2, 1.3, 1.4], -1)
    assert (cell.paired.wins, cell.paired.n, cell.paired.verdict) == (3.0, 3, "too few seeds")
    assert Table(three_rows(5)).cells["one_step", RMSE].paired.verdict == "better"


def test_differences_take_the_seeds_that_both_have_in_any_order():
    compared = Table(three_rows()).cells["greedy", RMSE].paired
    assert compared == paired([1.3, 1.3], [1.2, 1.4], -1)
    assert (compared.wins, compared.n) == (1.0, 2)


def test_two_copies_of_the_reference_differ_by_nothing():
    copies = [
        result(row, seed, 1.2 + seed / 7) for row in ("fixed", "fixed_again") for seed in range(3)
    ]
    compared = Table(copies).cells["fixed_again", RMSE].paired
    assert compared == (0.0, 0.0, 0.0, 1.0, 1.5, 3, -1)


def test_costs_are_means_and_throughput_is_relative_to_the_reference_on_its_seeds():
    table = Table(three_rows())
    assert table.cost("one_step") == Cost(3, 400, 25600, 850, 80.0, 3.0, pytest.approx(0.8))
    assert table.cost("fixed").throughput == 1.0
    assert Table([*three_rows(), result("lone", 7, 1.0, peak_memory=0)]).cost("lone") == Cost(
        1, 400, 25600, 850, 64.0, None, None
    )


def test_a_side_effect_that_falls_by_more_than_its_interval_is_a_warning():
    table = Table(three_rows(5))
    assert [warning.split(" by more")[0] for warning in table.warnings] == [
        f"side effect: one_step is worse than step 0 on {MIOU}",
        f"side effect: one_step is worse than fixed on {MIOU}",
    ]
    assert table.warnings[0].endswith(", 5 seeds")
    mixed = [result("fixed", seed, 1.2, 0.2) for seed in range(5)]
    mixed += [
        result("one_step", seed, 1.2, miou)
        for seed, miou in enumerate((0.1, 0.1, 0.21, 0.22, 0.23))
    ]
    assert Table(mixed).warnings == []


def test_too_few_seeds_have_neither_verdict_nor_colour_nor_warning():
    for num_seeds in (1, 2, 3, 4):
        table = Table(three_rows(num_seeds)[: 2 * num_seeds])
        assert table.warnings == []
        assert set(table.sections()[0].verdicts[1:]) <= {"unclear", "too few seeds"}
        text = Console(file=io.StringIO(), width=100, force_terminal=True, color_system="standard")
        text.print(rendering.rich(table))
        shown_text = text.file.getvalue()
        assert "\x1b[32m" not in shown_text
        assert "\x1b[31m" not in shown_text
        line = next(line for line in table.sections()[0].lines if line[0] == "one_step")
        assert line[4] == "too few seeds"
        assert {row["verdict"] for row in csv_lines(table)} == {"", "too few seeds"}


def test_a_metric_is_a_side_effect_of_the_rows_that_do_not_steer_it():
    rows = [result("fixed", seed, 1.2, 0.21, steered=None) for seed in range(5)]
    rows += [result("depth", seed, 1.1, 0.15 + seed / 100, steered=[RMSE]) for seed in range(5)]
    rows += [
        result("segmentation", seed, 1.75 + seed / 100, 0.19 - seed / 100, steered=[MIOU])
        for seed in range(5)
    ]
    table = Table(rows)
    assert table.side_effects == []
    assert {
        (warning.split()[2], warning.split(" on ")[1].split()[0]) for warning in table.warnings
    } == {
        ("depth", MIOU),
        ("segmentation", RMSE),
    }


def test_without_steered_every_metric_is_steered_and_with_none_of_them_none():
    assert Table([result("fixed", 0, 1.2, steered=None)]).metrics == [RMSE, MIOU]
    assert Table([result("fixed", 0, 1.2, steered=[])]).side_effects == [RMSE, MIOU]


def test_failed_rows_are_listed_with_their_error():
    table = Table(
        [
            *three_rows(),
            Result("unrolled", 1, error="MetaVPTError: no <room>\nfor | it"),
            Result("greedy", 1, error="killed"),
        ]
    )
    assert "unrolled failed on seed 1: MetaVPTError: no <room> for | it" in table.notes
    assert "greedy failed on seed 1: killed" in table.notes
    assert table.cells["unrolled", RMSE] == (None, None)
    assert (table.cost("unrolled").seeds, table.cost("greedy").seeds) == (0, 2)
    assert "no \\<room\\> for \\| it" in rendering.markdown(table)
    assert any(line.split() == ["unrolled", *"–––––"] for line in shown(table))


def test_without_the_reference_there_are_no_differences_and_a_line_says_so():
    for rows in (three_rows(5)[5:], [Result("fixed", 0, error="killed"), *three_rows(5)[5:]]):
        table = Table(rows)
        assert any(note.startswith("No differences") and "fixed" in note for note in table.notes)
        assert all(cell.paired is None for cell in table.cells.values())
        assert "minus" not in rendering.markdown(table)
        assert "throughput" not in rendering.markdown(table)
        assert [warning.split(" on ")[0] for warning in table.warnings] == [
            "side effect: one_step is worse than step 0"
        ]
    assert Table(three_rows(), reference="greedy").cells["fixed", RMSE].paired == paired(
        [1.2, 1.4], [1.3, 1.3], -1
    )


def test_one_seed_has_dashes_and_never_a_nan():
    table = Table([result("fixed", 0, 1.2), result("one_step", 0, 1.1, 0.1)])
    line = next(line for line in shown(table) if line.startswith("one_step"))
    assert line.split() == ["one_step", "1.1", "−0.1", "–", "too", "few", "seeds", "1/1"]
    assert "nan" not in (rendering.markdown(table) + rendering.comma_separated(table)).lower()
    assert table.warnings == []
    assert any(note.startswith("One seed has no standard error") for note in table.notes)


def test_values_that_are_not_finite_are_left_out_and_named():
    rows = [*three_rows()[:-1], result("greedy", 0, math.nan, math.inf)]
    table = Table(rows)
    assert (
        "greedy, seed 0: left out, since depth/rmse is nan, segmentation/miou is inf" in table.notes
    )
    assert table.cells["greedy", RMSE].mean == (1.3, None, 1)
    assert table.cells["greedy", RMSE].paired == paired([1.3], [1.4], -1)
    assert {"nan", "inf"}.isdisjoint(value for line in csv_lines(table) for value in line.values())


def test_a_step_0_that_is_not_finite_is_named_once():
    rows = three_rows()
    for each in rows:
        if each.seed == 1:
            each.step0[MIOU] = math.nan
    table = Table(rows)
    assert table.notes.count(f"step 0, seed 1: left out, since {MIOU} is nan") == 1
    assert table.cells[STEP0, MIOU].mean == (0.2, 0.0, 2)


def test_rows_that_did_not_start_at_the_same_learner_are_named():
    rows = three_rows()
    rows[3].step0[RMSE] = 1.31
    assert (
        "one_step, seed 0: depth/rmse starts at 1.31, the first row of that seed at 1.3"
        in Table(rows).notes
    )
    assert not any("starts at" in note for note in Table(three_rows()).notes)


def test_what_few_seeds_can_show_is_said():
    notes = {note.partition(" seeds ")[0]: note for note in Table(three_rows()).notes}
    for seeds, p_value, coverage in (
        ("With 2", "below 0.5,", "50.0%"),
        ("With 3", "0.25", "75.0%"),
    ):
        assert p_value in notes[seeds]
        assert coverage in notes[seeds]
    many = "\n".join(
        Table(
            [result(row, seed, 1.2 + seed) for row in ("fixed", "copy") for seed in range(6)]
        ).notes
    )
    assert "With 6 seeds no p-value is below 0.03125." in many


def test_a_metric_of_unknown_direction_has_no_wins():
    rows = three_rows()
    for each in rows:
        each.metrics["odd"] = 1.0 + each.seed * (each.row != "fixed")
    table = Table(rows)
    assert table.cells["one_step", "odd"].paired.wins is None
    assert any(note.startswith("No wins and no warnings on odd") for note in table.notes)


def test_table_takes_directions_from_the_configuration_over_those_of_the_problem():
    rows = three_rows()
    for each in rows:
        each.metrics["odd"] = 1.0 + (each.row != "fixed")
    table = Table(rows, directions={"odd": "higher", "rmse": "higher", RMSE: "higher"})
    assert table.cells["one_step", "odd"].paired.wins == 3.0
    assert table.cells["one_step", RMSE].paired.wins == 0.0  # lower, but higher was stated
    assert table.sections()[0].title == f"{RMSE} (higher is better)"
    assert not any("No wins" in note for note in table.notes)


def test_the_terminal_holds_every_number_at_100_columns():
    long = "unrolled[strategy.estimator.num_steps=10,lr=1e-4]"
    rows = [
        *three_rows(),
        *(
            result(long, seed, -1.23456e-5 * (seed + 1), 1.23456e-5 / (seed + 1))
            for seed in range(3)
        ),
    ]
    table = Table(rows)
    lines = shown(table)
    assert max(map(len, lines)) <= 100
    assert "…" not in "\n".join(lines)
    words = {word for line in lines for word in line.split()}
    for section in table.sections():
        for line in section.lines:
            assert {word for text in line[1:] for word in text.split()} <= words


def test_markdown_tables_are_whole():
    text = rendering.markdown(Table([*three_rows(5), result("a|b", 0, 1.0)]))
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert [lines[0].count("|") for lines in tables] == [7, 7, 9]
    assert all(
        line.replace("\\|", "").count("|") == lines[0].count("|")
        for lines in tables
        for line in lines
    )
    assert "| one_step | 1.308 ± 0.068 | −0.092 | [−0.108, −0.06] | 0.0625 | 5/5 |" in text
    assert "| a\\|b | 1 | −0.2 | – | too few seeds | 1/1 |" in text
    assert "| one_step | 5 | 400 | 25,600 | 850 | 80.0 | 3 | 0.8 |" in text
    assert text.index(f"side effect: {MIOU}") > text.index(RMSE)
    assert "- **Warning:** side effect: one_step is worse than step 0" in text


def test_the_csv_holds_every_row_and_metric_in_full():
    table = Table(three_rows(5))
    lines = csv_lines(table)
    assert [(line["row"], line["metric"]) for line in lines] == [
        (row, metric) for metric in (RMSE, MIOU) for row in table.rows
    ]
    line = next(line for line in lines if (line["row"], line["metric"]) == ("one_step", RMSE))
    rmse = [rmse for rmse, _ in ONE_STEP]
    compared = paired(rmse, [1.2, 1.3, 1.4, 1.5, 1.6], -1)
    names = (
        "mean",
        "se",
        "difference",
        "low",
        "high",
        "p",
        "wins",
        "n",
        "steps",
        "grad_evals",
        "peak_mib",
    )
    assert [float(line[name]) for name in names] == [
        *mean_se(rmse)[:2],
        *compared[:6],
        400,
        850,
        3.0,
    ]
    assert float(line["throughput"]) == pytest.approx(0.8)
    assert (line["block"], line["verdict"], lines[0]["steps"], lines[1]["p"]) == (
        "steered",
        "better",
        "",
        "",
    )


def test_written_files_are_never_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    table = Table(three_rows())
    rendering.write(table, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"table.md", "table.csv"}
    assert (tmp_path / "table.md").read_text(encoding="utf-8") == rendering.markdown(table)
    assert (tmp_path / "table.csv").read_text(encoding="utf-8") == rendering.comma_separated(table)

    def killed(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        rendering.write(Table(three_rows()[:3]), tmp_path)
    assert (tmp_path / "table.md").read_text(encoding="utf-8") == rendering.markdown(table)


def test_a_comparison_without_results_has_no_table():
    with pytest.raises(MetaVPTError, match="no row of the comparison has finished"):
        Table([])
    table = Table([Result("fixed", 0, error="killed")])
    assert table.metrics == []
    assert "fixed failed on seed 0: killed" in rendering.markdown(table)
