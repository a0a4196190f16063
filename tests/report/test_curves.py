import math
import re

import numpy as np
import pytest

from metavpt.report.curves import Band, bands, curve
from metavpt.report.svg import NUM_COLOURS


@pytest.mark.parametrize(
    "values",
    [
        [1.0],
        [math.nan, math.nan],
        [1e-9, 2e-9],
        [1e12, -1e12],
        [0.0] * 1000,
        [math.nan, *range(999)],
    ],
)
@pytest.mark.filterwarnings("error")
def test_every_series_can_be_drawn(values: list[float]) -> None:
    svg = str(curve(dict(enumerate(values)), "k"))
    assert svg.startswith("<svg")
    assert "#0" not in svg.replace("#k-", "")  # no colour of its own: all follow the page
    assert len(svg) < 40_000


@pytest.mark.filterwarnings("error")
def test_every_row_has_its_colour_and_then_its_dashes() -> None:
    x = np.arange(3.0)
    svg = str(
        bands([Band(row, x, x + row, 0.1 * x) for row in range(NUM_COLOURS + 2)], "k", "samples")
    )
    assert set(re.findall(r"var\(--r(\d+)\)", svg)) == {str(i) for i in range(NUM_COLOURS)}
    assert "#0" not in svg.replace("#k-", "")
    assert svg.count("stroke-dasharray") == 2  # of the rows that have a colour again
    assert ">samples<" in svg


def test_numbers_on_the_left_are_inside_the_chart() -> None:
    svg = str(curve({0: 1.23456e-7, 1: 1.23457e-7}, "k"))
    labels = re.findall(
        r"font-size: ([\d.]+)px; +text-anchor: end[^>]*? x=\"([\d.]+)\"[^>]*>([^<]*)<", svg
    )
    assert len({text for *_, text in labels}) == len(labels) > 1
    for size, right, text in labels:
        assert float(right) - 0.56 * float(size) * len(text) > 0
    assert "font-family" not in svg
