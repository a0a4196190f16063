"""Charts of matplotlib as inline SVG, without scripts and fonts, for light and dark pages."""

import io
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from metavpt.cli.formatting import short

INK, LINE = "#010101", "#020202"  # stand-ins, since matplotlib knows no currentColor
NUM_COLOURS = 9  # of rows, --r0 to --r8 on the page; the reference has the first
SMALL, LARGE = (3.1, 1.45), (4.2, 2.3)  # inches
FONT_SIZE = 7.5  # points
LETTER = 0.56 * FONT_SIZE / 72  # inches that a digit takes
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": FONT_SIZE,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.edgecolor": INK,
    "axes.formatter.limits": (-9, 9),
    "axes.formatter.useoffset": False,
}


def hue(row: int) -> int:
    """Return the number of a row's colour. Only the reference, row 0, has colour 0."""
    return 0 if row == 0 else 1 + (row - 1) % (NUM_COLOURS - 1)


def turn(row: int) -> int:
    """Return how often the colours repeat before `row`. Rows of one colour differ in dashes."""
    return max(row - 1, 0) // (NUM_COLOURS - 1)


def row_colour(row: int) -> str:
    """Return the placeholder colour of a row, which `chart` replaces by a class."""
    return f"#0300{hue(row):02}"


def row_dashes(row: int) -> str:
    """Return the line style of a row."""
    return ("-", "--", ":", "-.")[turn(row) % 4]


def chart(paint: Callable[[Axes], Any], key: str, size: tuple[float, float] = SMALL) -> Markup:
    """Render a chart as an `<svg>` that fills its container.

    Args:
        paint: Draws on the axes.
        key: A prefix for the ids of the chart, unique on the page.
        size: (width, height) in inches.
    """
    with rc_context({**STYLE, "svg.hashsalt": key}):
        figure = Figure(figsize=size)
        axes = figure.add_axes((0, 0, 1, 1))
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.spines["bottom"].set_alpha(0.4)
        axes.tick_params(length=0, pad=4)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.grid(axis="y", color=INK, alpha=0.13, linewidth=0.6)
        axes.margins(x=0.02, y=0.1)
        paint(axes)
        make_room(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True)
    return _inline(buffer.getvalue(), key)


def short_numbers(axis: Any, values: np.ndarray) -> None:
    """Write tick labels as 1.5e-4 where plain ones would be long."""
    finite = np.abs(values[np.isfinite(values)])
    largest = finite.max(initial=0)
    if not 1e-2 <= largest < 1e5:
        spread = np.ptp(values[np.isfinite(values)]) if len(finite) else 0
        digits = 3 + math.ceil(math.log10(largest / spread)) if spread else 3
        axis.set_major_formatter(lambda value, _: short(value, min(max(digits, 3), 9)))


def make_room(axes: Axes) -> None:
    """Set the margins for tick labels and axis labels."""
    width, height = axes.get_figure().get_size_inches()  # type: ignore[union-attr]
    low, high = axes.get_ylim()
    numbers = axes.yaxis.get_major_formatter().format_ticks(
        [at for at in axes.yaxis.get_majorticklocs() if low <= at <= high]
    )
    left = max(0.4, 0.12 + LETTER * max(map(len, numbers), default=0)) + 0.17 * bool(
        axes.get_ylabel()
    )
    bottom = 0.23 + 0.15 * bool(axes.get_xlabel())
    axes.set_position(
        (left / width, bottom / height, 1 - (left + 0.1) / width, 1 - (bottom + 0.12) / height)
    )


def _inline(svg: str, key: str) -> Markup:
    """Turn matplotlib's file into an element of an HTML page.

    Drops prologue, namespaces and size. Uses the page's colours and font, and makes ids unique.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(
        r"font-family: [^;\"]*;?", "", re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    )
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{key}-", svg)
    svg = re.sub(r"#0300(\d\d)", lambda match: f"var(--r{int(match[1])})", svg)
    return Markup(svg.replace(INK, "currentColor").replace(LINE, "var(--line)"))
