"""Two metrics of every row against each other, and the rows that no other one beats in both."""

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
    """The mean of a row in two metrics with its standard errors, 0 for one seed; `row` chooses the colour."""

    row: int
    name: str
    x: float
    y: float
    x_error: float
    y_error: float


def pareto_axes(metrics: Sequence[str]) -> tuple[str, str] | None:
    """Two metrics of different tasks, by the first word of their names, or else the first two.

    None where there are not two.
    """
    pairs = list(combinations(metrics, 2))
    tasks = [[name.rsplit("/")[-1].split("_")[0] for name in pair] for pair in pairs]
    return next(
        (pair for pair, (a, b) in zip(pairs, tasks, strict=True) if a != b),
        pairs[0] if pairs else None,
    )


def front(points: Sequence[Point], x_sign: int, y_sign: int) -> list[Point]:
    """The points that no other one beats, from left to right: none is as good in both metrics and better in one."""

    def beaten(point: Point) -> bool:
        gains = [(x_sign * (other.x - point.x), y_sign * (other.y - point.y)) for other in points]
        return any(min(gain) >= 0 and max(gain) > 0 for gain in gains)

    return sorted((point for point in points if not beaten(point)), key=lambda point: point.x)


def pareto_chart(
    points: Sequence[Point], x_metric: tuple[str, int], y_metric: tuple[str, int], key: str
) -> Markup:
    """Every row with its error bars and name, the rows of the front joined by a line.

    Args:
        points: one for each row.
        x_metric: name of the metric on the x axis, and -1 where lower is better, +1 where higher
            is.
        y_metric: the same of the y axis.
        key: keeps the ids of this chart apart from those of others on the page.
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
    """The name of an axis, with an arrow to where the metric is better."""
    return f"{metric}   better →" if sign > 0 else f"← better   {metric}"


def _label(axes: Axes, points: Sequence[Point]) -> None:
    """The names beside their points, each at the first place in the chart that no error bar and no name has taken, if there is one."""
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
