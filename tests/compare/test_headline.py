import re

import pytest

from metavpt.compare import rendering
from metavpt.compare.headline import headline
from metavpt.compare.results import Result
from metavpt.compare.table import Table
from metavpt.problem import Direction

NONE = "No row beats fixed on a steered metric by an interval that excludes zero."

DIRECTIONS: dict[str, Direction] = {
    "depth_rmse": "lower",
    "seg_miou": "higher",
    "imagenet_acc": "higher",
}
Gains = dict[str, tuple[int, int, int]]


def table(gains: Gains, num_seeds: int = 6, steered: list[str] | None = None) -> Table:
    """Rows with these gains; the noise of a seed is small and differs from row to row."""
    made = []
    for i, (row, (depth, segmentation, accuracy)) in enumerate(gains.items()):
        for seed in range(num_seeds):
            noise = 0.01 * i * (-1) ** seed
            metrics = {
                "depth_rmse": 1.0 - depth + noise,
                "seg_miou": 0.2 + segmentation + noise,
                "imagenet_acc": 0.5 + accuracy + noise,
            }
            made.append(
                Result(
                    row,
                    seed,
                    step0={"depth_rmse": 1.1},
                    metrics=metrics,
                    steered=steered,
                    directions=DIRECTIONS,
                )
            )
    return Table(made)


@pytest.mark.parametrize(
    ("gains", "said"),
    [
        (
            {"fixed": (0, 0, 0), "one_step": (1, 1, 1), "greedy": (1, 0, 0), "implicit": (1, 1, 1)},
            "one_step and implicit beat fixed on all 3 metrics; greedy beats fixed on depth_rmse.",
        ),
        (
            {"fixed": (0, 0, 0), "one_step": (0, 0, 0), "uniform": (-1, -1, 0)},
            f"{NONE} uniform is worse than fixed on depth_rmse and seg_miou.",
        ),
        ({"fixed": (0, 0, 0), "one_step": (0, 0, 0)}, NONE),
        ({"fixed": (0, 0, 0)}, "No row finished beside fixed, so there is nothing to compare."),
        ({"one_step": (0, 0, 0)}, "No finished row fixed, so there is nothing to compare with."),
    ],
)
def test_the_headline_says_what_the_intervals_say(gains: Gains, said: str) -> None:
    assert headline(table(gains)) == said


def test_side_effects_are_no_headline() -> None:
    gains: Gains = {"fixed": (0, 0, 0), "one_step": (1, 1, 0), "greedy": (0, 0, 1)}
    assert (
        headline(table(gains, steered=["depth_rmse", "seg_miou"]))
        == "one_step beats fixed on all 2 steered metrics."
    )


@pytest.mark.parametrize("num_seeds", [1, 2, 3, 4])
def test_too_few_seeds_have_no_verdict_however_large_the_gain(num_seeds: int) -> None:
    gains: Gains = {"fixed": (0, 0, 0), "one_step": (1, 1, 1), "uniform": (-1, -1, -1)}
    said = headline(table(gains, num_seeds))
    assert said.startswith(f"Too few seeds in common with fixed ({num_seeds})")
    assert "beat" not in said


def test_rows_with_too_few_seeds_are_named_beside_the_others() -> None:
    gains: Gains = {"fixed": (0, 0, 0), "one_step": (1, 1, 1), "uniform": (-1, -1, -1)}
    results = [
        result for result in table(gains).results if result.row != "uniform" or result.seed < 3
    ]
    assert headline(Table(results)) == (
        "one_step beats fixed on all 3 metrics. Too few seeds (3) for a verdict on uniform."
    )


TARGET = {"rmse": "lower", "miou": "higher"}


def controlled(ends: dict[str, float], num_seeds: int = 5, mean_image: float = 2.0) -> Table:
    """Rows with this final rmse. one_step is steered, labels_only and direct train on labels."""
    roles: dict[str, dict[str, int]] = {
        "one_step": {"steered_steps": 9},
        "labels_only": {"labelled_steps": 9},
        "direct": {"labelled_steps": 9},
    }
    made: list[Result] = []
    for i, (row, end) in enumerate(ends.items()):
        for seed in range(num_seeds):
            rmse = end + 0.01 * i * (seed % 3 - 1)
            made.append(
                Result(
                    row,
                    seed,
                    step0={"rmse": 1.5, "miou": 0.2},
                    metrics={"rmse": rmse, "miou": 0.3 - 0.01 * i - 0.001 * seed * i},
                    trivial={"mean depth image": {"rmse": mean_image}},
                    directions=TARGET,  # type: ignore[arg-type]
                    **roles.get(row, {}),  # type: ignore[arg-type]
                )
            )
    return Table(made)


ENDS = {"fixed": 1.4, "one_step": 1.3, "labels_only": 1.35, "direct": 1.2}


def test_headline_begins_with_what_steering_did_to_the_target() -> None:
    assert headline(controlled(ENDS)).startswith("one_step is better than fixed on rmse: ")
    worse = headline(controlled({**ENDS, "one_step": 1.45}))
    assert worse.startswith("Every steered row is worse than fixed on rmse; the best, one_step: ")
    alike = headline(controlled({**ENDS, "one_step": 1.4}))
    assert alike.startswith("No steered row is better than fixed on rmse by an interval")
    few = headline(controlled(ENDS, num_seeds=3))
    assert few.startswith(
        "Too few seeds for a verdict, 3 of at least 5: the best steered row, one_step, is ahead of"
    )


def test_headline_says_when_labels_alone_are_better_than_every_steered_row() -> None:
    assert "Labels alone" not in headline(controlled(ENDS))
    better = headline(controlled({**ENDS, "labels_only": 1.1}))
    assert re.search(
        r"Labels alone are better than every .* on rmse: 1\.096 against 1\.298 of", better
    )
    assert "too few seeds" not in better
    few = headline(controlled({**ENDS, "labels_only": 1.1}, num_seeds=3))
    assert "Labels alone" in few
    assert few.count("oo few seeds") == 1


def test_headline_says_when_step_0_is_better_than_every_steered_row() -> None:
    ends = {**ENDS, "fixed": 1.7, "one_step": 1.6, "direct": 1.55}
    assert "The learner at step 0 is better than every steered row" in headline(controlled(ends))


def test_headline_names_rows_that_lose_to_a_trivial_predictor() -> None:
    assert "mean depth image" not in headline(controlled(ENDS))
    assert "No row is better than the mean depth image (1)." in headline(controlled(ENDS, 5, 1.0))
    some = headline(controlled(ENDS, mean_image=1.32))
    assert "fixed and labels_only are no better than the mean depth image (1.32)." in some


def test_share_of_direct_is_the_ratio_of_the_gains_over_fixed() -> None:
    table = controlled(ENDS)
    assert table.share_of_direct("one_step", "rmse") == pytest.approx(0.5, abs=0.03)
    assert table.share_of_direct("direct", "rmse") == pytest.approx(1.0)
    assert "has 50% of the gain of direct" in headline(table)
    useless = controlled({**ENDS, "direct": 1.4})
    assert useless.share_of_direct("one_step", "rmse") is None  # a gain within its interval
    assert "gain of direct" not in headline(useless)
    assert controlled({**ENDS, "direct": 1.5}).share_of_direct("one_step", "rmse") is None


def test_summary_puts_side_effects_beside_the_gain() -> None:
    table = controlled(ENDS)
    section = table.summary()
    assert section is not None
    lines = {line[0]: line for line in section.lines}
    assert list(lines) == ["step 0", "mean depth image", *ENDS]
    assert lines["one_step"][3:] == ["50%", "1 worse: miou"]
    assert lines["mean depth image"][3] == lines["step 0"][3] == "\N{EN DASH}"
    assert lines["fixed"][2:] == ["\N{EN DASH}"] * 3
    few = controlled(ENDS, num_seeds=2).summary()
    assert few is not None
    assert {line[4] for line in few.lines if line[0] == "one_step"} == {"too few seeds"}


def test_trivial_predictors_are_rows_without_costs() -> None:
    table = controlled(ENDS)
    assert table.rows == ["step 0", "mean depth image", *ENDS]
    assert table.cells["mean depth image", "rmse"].mean == (2.0, 0.0, 5)
    assert table.cells["mean depth image", "miou"].mean is None
    *_, cost = table.sections()
    assert [line[0] for line in cost.lines] == list(ENDS)
    assert "mean depth image" in rendering.markdown(table)
