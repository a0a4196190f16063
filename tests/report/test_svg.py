import re
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from metavpt.report import svg


def paint(axes: Axes) -> None:
    axes.plot([0, 1], [0, 1], color=svg.row_colour(3))
    axes.fill_between([0, 1], [0, 1], [1, 2], color=svg.row_colour(0))
    axes.set_xlabel("steps")


def test_chart_takes_its_colours_from_the_page() -> None:
    made = svg.chart(paint, "one")
    assert {"var(--r0)", "var(--r3)"} <= set(re.findall(r"var\(--r\d+\)", made))
    assert "currentColor" in made
    assert not re.search(r"#0[123]0[0-9]{3}", made)
    assert "font-family" not in made


def test_chart_ids_are_unique_on_a_page() -> None:
    ids = [set(re.findall(r'\bid="([^"]+)"', svg.chart(paint, key))) for key in ("one", "two")]
    assert ids[0]
    assert not ids[0] & ids[1]
    for key in ("one", "two"):
        made = svg.chart(paint, key)
        used = re.findall(r'(?:href="#|url\(#)([^")]+)', made)
        assert used
        assert set(used) <= set(re.findall(r'\bid="([^"]+)"', made))


def test_rows_beyond_the_colours_differ_by_their_dashes() -> None:
    styles = [(svg.row_colour(row), svg.row_dashes(row)) for row in range(20)]
    assert len(set(styles)) == 20
    assert svg.hue(0) == 0
    assert 0 not in {svg.hue(row) for row in range(1, 20)}


def test_short_numbers_replaces_long_labels() -> None:
    axis: Any = Figure().add_subplot().yaxis
    svg.short_numbers(axis, np.array([1e-4, 2e-4]))
    assert len(axis.get_major_formatter()(1.5e-4, 0)) <= 7
