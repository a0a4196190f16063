"""Draw the pictures of the documentation from docs/results.

python docs/pictures.py             docs/results.svg, the README's picture
python docs/pictures.py chromium    also docs/report.png, the top of a report in this browser
"""

import sys
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from metavpt.compare import results
from metavpt.report import command

DOCS = Path(__file__).parent
MASKS = ("fixed", "random_feedback", "uniform", "greedy", "one_step", "unrolled", "implicit")
TARGETS = ("fixed", "fixed_3e4", "random_amortized", "greedy", "amortized", "tilt")
ROOMS = (
    *(
        "fixed",
        "fixed_150",
        "uniform",
        "uniform_gate_1",
        "greedy",
        "random_functional",
        "random_gate_1",
    ),
    *("functional_gate_1", "gate_1_annealed", "functional"),
)
FRAMES = (
    *("fixed", "uniform_patches", "hardest_patches", "greedy_selection"),
    *("unrolled_patches", "implicit_patches", "implicit_features", "patches", "features"),
    *("targets", "labels_only", "direct"),
)
STEERED = (
    *("one_step", "unrolled", "implicit", "amortized", "tilt", "functional"),
    *("functional_gate_1", "gate_1_annealed", "patches", "features", "targets"),
    *("unrolled_patches", "implicit_patches", "implicit_features"),
)


class Panel(NamedTuple):
    """A comparison in docs/results and the metric of it that is drawn, with so many digits."""

    folder: str
    metric: str
    digits: int
    rows: tuple[str, ...]
    title: str
    label: str


PANELS = (
    Panel(
        "toy_sources",
        "error",
        2,
        MASKS,
        "Toy: one of four sources is useful",
        "error on it (5 seeds)",
    ),
    Panel(
        "gsm8k_retention",
        "gsm8k/nll",
        2,
        TARGETS,
        "Language: a stream about other things",
        "NLL of GSM8K answers (5 seeds)",
    ),
    Panel(
        "rooms_functional",
        "ridge/depth_rmse",
        3,
        ROOMS,
        "Generated rooms, from random weights",
        "depth RMSE in m (5 seeds)",
    ),
    Panel(
        "nyuv2_gpu_policies",
        "ridge/depth_rmse",
        3,
        FRAMES,
        "NYUv2 at equal seconds, every row tuned",
        "depth RMSE in m (5 seeds)",
    ),
)
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "metavpt",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
}


def by_row(folder: Path, metric: str) -> dict[str, list[float]]:
    """Row -> the metric in the end, a value for each seed; step 0 beside them."""
    found: dict[str, list[float]] = defaultdict(list)
    for result in sorted(results.read(folder), key=lambda result: result.seed):
        found[result.row].append(result.metrics[metric])
        if result.row == "fixed":
            found["step 0"].append(result.step0[metric])
    return found


def draw(axes: Axes, panel: Panel) -> None:
    """A dot for each seed, a bar for their mean, and the mean in words."""
    values = by_row(DOCS / "results" / panel.folder, panel.metric)
    rows = ["step 0", *panel.rows]
    right = max(max(values[row]) for row in rows)
    for y, row in enumerate(rows):
        colour = "#c2410c" if row in STEERED else "#5b6470"
        mean = sum(values[row]) / len(values[row])
        axes.plot(
            values[row],
            [y] * len(values[row]),
            "o",
            color=colour,
            alpha=0.55,
            markersize=5,
            markeredgewidth=0,
        )
        axes.plot([mean], [y], "|", color=colour, markersize=15, markeredgewidth=2)
        axes.annotate(
            f"{mean:.{panel.digits}f}",
            (right, y),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            color=colour,
        )
    axes.set_yticks(range(len(rows)), rows)
    axes.invert_yaxis()
    axes.set_title(panel.title, loc="left", fontsize=11)
    axes.set_xlabel(panel.label)
    axes.spines["right"].set_visible(False)
    axes.grid(axis="x", color="#e4e7eb")
    axes.set_axisbelow(True)


def results_picture(path: Path) -> None:
    """Draw the toy, the off-topic stream, the saturated recipe and real frames side by side."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            2,
            len(PANELS) // 2,
            figsize=(10.5, 7.2),
            layout="constrained",
            gridspec_kw={"wspace": 0.1},
        )
        for ax, panel in zip(axes.flat, PANELS, strict=True):
            draw(ax, panel)
        figure.savefig(path, format="svg", metadata={"Date": None}, facecolor="white")
        plt.close(figure)
    path.write_text("".join(line.rstrip() + "\n" for line in path.read_text().splitlines()))


def report_picture(path: Path, browser: str) -> None:
    """The top of a comparison's report, in 256 colours."""
    from PIL import Image
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        page = playwright.chromium.launch(executable_path=browser, chromium_sandbox=False).new_page(
            viewport={"width": 1000, "height": 900}
        )
        page.goto(command.write(DOCS / "results" / "toy_sources").as_uri())
        page.screenshot(path=path)
    Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)


if __name__ == "__main__":
    results_picture(DOCS / "results.svg")
    if sys.argv[1:]:
        report_picture(DOCS / "report.png", sys.argv[1])
