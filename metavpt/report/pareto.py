"""Two metrics of every row against each other, and the Pareto front."""

import re
from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.transforms import Affine2D, Bbox

from metavpt.report.svg import (
    FONT_SIZE,
    INK,
    LETTER,
    chart,
    make_room,
    row_colour,
    short_numbers,
    turn,
)


class Point(NamedTuple):
    """The mean of a row in two metrics, with standard errors (0 for one seed)."""

    row: int
    name: str
    x: float
    y: float
    x_error: float
    y_error: float


def pareto_axes(metrics: Sequence[str]) -> tuple[str, str] | None:
    """Choose two metrics of different tasks, by the first word of their names.

    If all are of one task, the first two are chosen.

    Returns:
        The two metrics. None: there are fewer than two.
    """
    pairs = list(combinations(metrics, 2))
    tasks = [[name.rsplit("/")[-1].split("_")[0] for name in pair] for pair in pairs]
    return next(
        (pair for pair, (a, b) in zip(pairs, tasks, strict=True) if a != b),
        pairs[0] if pairs else None,
    )


def front(points: Sequence[Point], x_sign: int, y_sign: int) -> list[Point]:
    """Return the Pareto front from left to right.

    A point is dropped if another one is as good in both metrics and better in one.

    Args:
        points: One per row.
        x_sign: +1 if higher x is better, -1 if lower.
        y_sign: The same for y.
    """

    def beaten(point: Point) -> bool:
        gains = [(x_sign * (other.x - point.x), y_sign * (other.y - point.y)) for other in points]
        return any(min(gain) >= 0 and max(gain) > 0 for gain in gains)

    return sorted((point for point in points if not beaten(point)), key=lambda point: point.x)


def pareto_chart(
    points: Sequence[Point], x_metric: tuple[str, int], y_metric: tuple[str, int], key: str
) -> Markup:
    """Plot every row with error bars and its name. A line joins the Pareto front.

    Args:
        points: One per row.
        x_metric: The metric on the x axis, and +1 if higher is better, -1 if lower.
        y_metric: The same for the y axis.
        key: A prefix for the ids of the chart, unique on the page.
    """

    def paint(axes: Axes) -> None:
        best = front(points, x_metric[1], y_metric[1])
        axes.plot(
            [point.x for point in best],
            [point.y for point in best],
            color=INK,
            alpha=0.5,
            linewidth=0.9,
        )
        for point in points:
            mark = {
                "color": row_colour(point.row),
                "markersize": 4,
                "linewidth": 0.9,
                "fillstyle": "none" if turn(point.row) else "full",
            }
            axes.errorbar(*point[2:4], point.y_error, point.x_error, "o", **mark)
        axes.margins(x=0.14, y=0.14)
        axes.grid(axis="x", color=INK, alpha=0.13, linewidth=0.6)
        axes.set(xlabel=_directed(*x_metric), ylabel=_directed(*y_metric))
        short_numbers(axes.xaxis, np.array([point.x for point in points]))
        short_numbers(axes.yaxis, np.array([point.y for point in points]))
        make_room(axes)
        _label(axes, points)

    return chart(paint, key, (4.2, 3.0))


def _directed(metric: str, sign: int) -> str:
    """Return the label of an axis, with an arrow towards better values."""
    return f"{metric}   better →" if sign > 0 else f"← better   {metric}"


def _label(axes: Axes, points: Sequence[Point]) -> None:
    """Write the names beside their points.

    Each name takes the first place that no error bar or name occupies. A name without a free place
    is left out.
    """
    to_points = axes.transData + Affine2D().scale(72 / axes.figure.dpi)
    frame = axes.bbox.transformed(Affine2D().scale(72 / axes.figure.dpi))
    taken: list[Bbox] = []
    for point in points:
        ends = [(point.x + i * point.x_error, point.y + i * point.y_error) for i in (-1, 0, 1)]
        (x0, y0), (x, y), (x1, y1) = to_points.transform(ends)
        taken += [
            Bbox.from_extents(x0 - 2, y - 2, x1 + 2, y + 2),
            Bbox.from_extents(x - 2, y0 - 2, x + 2, y1 + 2),
        ]
    for point in points:
        name = re.sub(r"\S+\.(\w+=)", r"\1", point.name)  # an option without its path
        x, y = to_points.transform((point.x, point.y))
        width, height = 72 * LETTER * len(name), 1.1 * FONT_SIZE
        places = [
            (dx, dy)
            for gap in range(3, 40, 9)
            for dy in (gap, -gap - height)
            for dx in (4, -4 - width)
        ]
        boxes = [Bbox.from_bounds(x + dx, y + dy, width, height) for dx, dy in places]
        fits = [
            frame.x0 <= box.x0
            and box.x1 <= frame.x1
            and not any(box.overlaps(other) for other in taken)
            for box in boxes
        ]
        if not any(fits):
            continue
        taken.append(boxes[fits.index(True)])
        dx, dy = places[fits.index(True)]
        axes.annotate(
            name,
            (point.x, point.y),
            (dx, dy + 0.25 * height),
            textcoords="offset points",
            color=row_colour(point.row),
        )
