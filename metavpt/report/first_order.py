"""First-order predictions of a step's effect, compared with its measured effect."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes

from metavpt.compare.paired_statistics import Correlation, pearson
from metavpt.report.logs import Record, is_number
from metavpt.report.svg import INK, LINE, chart, row_colour, short_numbers

PREDICTIONS = {"predicted": "the learner's optimizer", "predicted_plain": "the plain inner product"}
MAX_POINTS = 400  # of one chart; the numbers beside it are of all


class FirstOrder(NamedTuple):
    """Changes of the held-out feedback loss in single steps.

    Attributes:
        name: The key of the prediction, see `PREDICTIONS`.
        predicted: (N,).
        realised: (N,), the measured changes.
        fit: The regression of the realised on the predicted changes.
    """

    name: str
    predicted: np.ndarray
    realised: np.ndarray
    fit: Correlation


def first_orders(records: Sequence[Record]) -> list[FirstOrder]:
    """Collect the `first_order` records, one result for each kind of prediction."""
    logged = [
        record
        for record in records
        if record.get("kind") == "first_order" and is_number(record.get("realised"))
    ]
    found = []
    for name in PREDICTIONS:
        pairs = np.array(
            [
                (record[name], record["realised"])
                for record in logged
                if is_number(record.get(name))
            ],
            dtype=float,
        )  # (N, 2)
        pairs = pairs[np.isfinite(pairs).all(axis=1)] if len(pairs) else pairs
        if len(pairs):
            predicted, realised = pairs.T
            found.append(
                FirstOrder(
                    name, predicted, realised, pearson(predicted.tolist(), realised.tolist())
                )
            )
    return found


def first_order_chart(first_order: FirstOrder, key: str, row: int | None = None) -> Markup:
    """Plot realised against predicted changes, with the identity (dashed) and the regression line.

    Args:
        first_order: The changes.
        key: A prefix for the ids of the chart, unique on the page.
        row: The row whose colour is used. None: the colour of single runs.
    """
    x, y, fit = first_order.predicted, first_order.realised, first_order.fit
    colour = LINE if row is None else row_colour(row)
    shown = np.unique(np.linspace(0, len(x) - 1, min(len(x), MAX_POINTS)).astype(int))

    def paint(axes: Axes) -> None:
        axes.plot(
            x[shown], y[shown], "o", color=colour, alpha=0.55, markersize=2.6, markeredgewidth=0
        )
        axes.margins(0.06)
        axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())  # the lines below do not widen them
        axes.axline((0, 0), slope=1, color=INK, alpha=0.6, linewidth=0.8, dashes=(3, 3))
        if fit.slope is not None:
            axes.axline(
                (float(x.mean()), float(y.mean())), slope=fit.slope, color=colour, linewidth=1.3
            )
        axes.set(xlabel="predicted", ylabel="realised")
        short_numbers(axes.xaxis, x)
        short_numbers(axes.yaxis, y)

    return chart(paint, key, (3.1, 2.3))
