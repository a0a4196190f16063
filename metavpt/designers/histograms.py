"""Histograms as a picture of small panels."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

Pair = tuple[Tensor, Tensor]  # what it was, and what it is now; any shape


def histograms(rows: Mapping[str, Mapping[str, Pair]], num_bins: int = 30) -> np.ndarray:
    """Draw a panel for each row and column with values: before in grey, now in colour.

    The panels of a column share their bins. Returns uint8 of shape (H, W, 3).
    """
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    height = 1.1 * len(rows)
    figure = Figure(figsize=(1.25 * len(columns), height), dpi=100)
    axes = figure.subplots(len(rows), len(columns), squeeze=False)
    figure.subplots_adjust(
        left=0.01, right=0.99, bottom=0.25 / height, top=1 - 0.2 / height, wspace=0.15, hspace=0.75
    )
    for j, column in enumerate(columns):
        bins = _bins([pair for row in rows.values() if (pair := row.get(column))], num_bins)
        for i, (name, row) in enumerate(rows.items()):
            panel = axes[i, j]
            panel.set_yticks([])
            panel.tick_params(labelsize=6, length=2)
            panel.set_title(f"{name} {column}".strip(), fontsize=6.5)
            was, now = (_array(values) for values in row.get(column, ((), ())))
            panel.hist(was, bins, histtype="stepfilled", color="0.75")
            panel.hist(now, bins, histtype="step", color="tab:blue")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _bins(pairs: Sequence[Pair], num_bins: int) -> np.ndarray:
    values = np.concatenate([_array(part) for pair in pairs for part in pair])
    low, high = (values.min(), values.max()) if len(values) else (0.0, 1.0)
    return np.linspace(low, max(high, low + 1e-6), num_bins + 1)


def _array(values: Tensor | tuple[()]) -> np.ndarray:
    return (
        np.empty(0) if isinstance(values, tuple) else values.detach().double().cpu().numpy().ravel()
    )
