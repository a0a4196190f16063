import re
from itertools import combinations

import numpy as np
import pytest

from metavpt.report.pareto import Point, front, pareto_axes, pareto_chart


def points(values: np.ndarray) -> list[Point]:
    return [Point(i, f"row{i}", x, y, 0.01, 0.02) for i, (x, y) in enumerate(values.tolist())]


@pytest.mark.parametrize("x_sign", [-1, 1])
@pytest.mark.parametrize("y_sign", [-1, 1])
def test_the_front_is_what_no_other_point_beats(x_sign: int, y_sign: int) -> None:
    everything = points(
        np.random.default_rng(0).integers(0, 6, (30, 2)).astype(float)
    )  # integers: ties are many
    kept = front(everything, x_sign, y_sign)
    for a, b in combinations(kept, 2):
        assert (x_sign * (a.x - b.x)) * (y_sign * (a.y - b.y)) < 0 or (a.x, a.y) == (b.x, b.y)
    for point in everything:
        as_good = [
            x_sign * (best.x - point.x) >= 0 and y_sign * (best.y - point.y) >= 0 for best in kept
        ]
        assert any(as_good)
        assert (point in kept) == all(
            (best.x, best.y) == (point.x, point.y)
            for best, good in zip(kept, as_good, strict=True)
            if good
        )
    assert [point.x for point in kept] == sorted(point.x for point in kept)


def test_the_axes_are_two_tasks_where_there_are_two() -> None:
    assert pareto_axes(["ridge/depth_rmse", "ridge/depth_delta1", "ridge/seg_miou"]) == (
        "ridge/depth_rmse",
        "ridge/seg_miou",
    )
    assert pareto_axes(["ridge/depth_rmse", "ridge/depth_delta1"]) == (
        "ridge/depth_rmse",
        "ridge/depth_delta1",
    )
    assert pareto_axes(["ridge/depth_delta1"]) is None


def test_the_chart_names_every_row_and_the_better_side() -> None:
    rows = points(np.array([[0.1, 0.5], [0.2, 0.6], [0.1, 0.5]]))
    rows[0] = rows[0]._replace(name="one_step feedback.depth_weight=4")
    svg = str(pareto_chart(rows, ("depth_rmse", -1), ("seg_miou", 1), "k"))
    texts = [text.strip() for text in re.findall(r">([^<>]+)</text>", svg)]
    assert {"one_step depth_weight=4", "row1", "row2"} <= set(texts)
    assert any(re.fullmatch(r"← better\s+depth_rmse", text) for text in texts)
    assert any(re.fullmatch(r"seg_miou\s+better →", text) for text in texts)
