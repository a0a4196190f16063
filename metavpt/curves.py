"""Small line charts as inline SVG: no script, no font file, and colours that follow the page into dark mode."""

import io
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

MAX_POINTS = 200  # a longer series is drawn as the mean of half as many stretches of steps, with their range behind it
INK, LINE = "#010101", "#020202"  # stand-ins, since matplotlib knows no currentColor
MARKED = 12  # a series of at most so many points shows each of them
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 7.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.edgecolor": INK,
    "axes.formatter.limits": (-9, 9),
    "axes.formatter.useoffset": False,
}


def curve(series: Mapping[int, float], key: str) -> Markup:
    """Step to value as an `<svg>` that fills its container; `key` keeps its ids apart from those of the other curves on the page."""
    points = np.array(sorted(series.items()), dtype=float)  # (N, 2)
    points[~np.isfinite(points)] = np.nan
    with rc_context({**STYLE, "svg.hashsalt": key}):
        figure = Figure(figsize=(3.1, 1.45))
        axes = figure.add_axes((0.13, 0.16, 0.84, 0.76))
        _draw(axes, points)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.spines["bottom"].set_alpha(0.4)
        axes.tick_params(length=0, pad=4)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        if not 1e-2 <= np.nanmax(np.abs(points[:, 1]), initial=0) < 1e5:
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}".replace("e-0", "e-").replace("-", "\N{MINUS SIGN}"))
        axes.grid(axis="y", color=INK, alpha=0.13, linewidth=0.6)
        axes.margins(x=0.02, y=0.1)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True)
    return _inline(buffer.getvalue(), key)


def _draw(axes: Axes, points: np.ndarray) -> None:
    if len(points) > MAX_POINTS:
        bins = [block[np.isfinite(block[:, 1])] for block in np.array_split(points, MAX_POINTS // 2)]
        bins = [block for block in bins if len(block)]
        steps = [block[:, 0].mean() for block in bins]
        low, high = [block[:, 1].min() for block in bins], [block[:, 1].max() for block in bins]
        axes.fill_between(steps, low, high, color=LINE, alpha=0.18, linewidth=0)
        axes.plot(steps, [block[:, 1].mean() for block in bins], color=LINE, linewidth=1.3)
        return
    first = points[0, 1]
    axes.plot(*points.T, color=LINE, linewidth=1.4, marker="o" if len(points) <= MARKED else None, markersize=2.8)
    if len(points) <= MARKED and np.isfinite(first):
        axes.axhline(first, color=INK, alpha=0.45, linewidth=0.7, dashes=(3, 3))  # where it started


def _inline(svg: str, key: str) -> Markup:
    """matplotlib's file as an element of an HTML page: no prologue, namespace or size of its own, page colours and font, unique ids."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{key}-", svg)
    svg = svg.replace(INK, "currentColor").replace(LINE, "var(--line)")
    return Markup(svg)
