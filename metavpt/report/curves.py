"""Line charts: a series of one run, or a metric of several rows with bands over their seeds."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, MaxNLocator

from metavpt.report.svg import INK, LARGE, LINE, SMALL, chart, row_colour, row_dashes, short_numbers

# A longer series is drawn as the mean and range of MAX_POINTS / 2 blocks of steps.
MAX_POINTS = 200
MARKED = 12  # a series of at most this many points shows each point


class Band(NamedTuple):
    """The mean over a row's seeds and its spread.

    Attributes:
        row: The row's number, which selects the colour.
        x: (P,).
        mean: (P,).
        error: (P,), half of the band's width.
    """

    row: int
    x: np.ndarray
    mean: np.ndarray
    error: np.ndarray


def curve(series: Mapping[int, float], key: str) -> Markup:
    """Plot values against steps."""
    points = np.array(sorted(series.items()), dtype=float)  # (N, 2)
    points[~np.isfinite(points)] = np.nan

    def paint(axes: Axes) -> None:
        _draw(axes, points)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.set_xlabel("step")
        short_numbers(axes.yaxis, points[:, 1])

    return chart(paint, key)


def bands(rows: Sequence[Band], key: str, x_name: str, small: bool = False) -> Markup:
    """Plot mean +- error of every row. Short series show their points."""

    def paint(axes: Axes) -> None:
        for band in rows:
            colour = row_colour(band.row)
            axes.fill_between(
                band.x,
                band.mean - band.error,
                band.mean + band.error,
                color=colour,
                alpha=0.16,
                linewidth=0,
            )
            marker = "o" if len(band.x) <= MARKED else None
            axes.plot(
                band.x,
                band.mean,
                row_dashes(band.row),
                color=colour,
                linewidth=1.4,
                marker=marker,
                markersize=2.6,
            )
        axes.set_xlabel(x_name)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        short_numbers(axes.yaxis, np.concatenate([band.mean for band in rows]))

    return chart(paint, key, SMALL if small else LARGE)


def _draw(axes: Axes, points: np.ndarray) -> None:
    if len(points) > MAX_POINTS:
        bins = [
            block[np.isfinite(block[:, 1])] for block in np.array_split(points, MAX_POINTS // 2)
        ]
        bins = [block for block in bins if len(block)]
        steps = [block[:, 0].mean() for block in bins]
        low, high = [block[:, 1].min() for block in bins], [block[:, 1].max() for block in bins]
        axes.fill_between(steps, low, high, color=LINE, alpha=0.18, linewidth=0)
        axes.plot(steps, [block[:, 1].mean() for block in bins], color=LINE, linewidth=1.3)
        return
    first = points[0, 1]
    axes.plot(
        *points.T,
        color=LINE,
        linewidth=1.4,
        marker="o" if len(points) <= MARKED else None,
        markersize=2.8,
    )
    if len(points) <= MARKED and np.isfinite(first):
        axes.axhline(first, color=INK, alpha=0.45, linewidth=0.7, dashes=(3, 3))  # where it started
