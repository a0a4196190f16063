import pytest

from metavpt.compare.results import Result
from metavpt.compare.table import Table
from metavpt.metrics import Direction
from metavpt.report.headline import headline

NONE = "No row beats fixed on a steered metric by an interval that excludes zero."

DIRECTIONS: dict[str, Direction] = {
    "depth_rmse": "lower",
    "seg_miou": "higher",
    "imagenet_acc": "higher",
}
Gains = dict[str, tuple[int, int, int]]


def table(gains: Gains, num_seeds: int = 6, steered: list[str] | None = None) -> Table:
    """Rows that gain so much of depth_rmse, seg_miou and imagenet_acc; the noise of a seed is small and differs from row to row."""
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
