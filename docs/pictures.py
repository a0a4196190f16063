"""Draws the pictures of the documentation from docs/results: `python docs/pictures.py`; with the name of a browser, the report too.

python docs/pictures.py             docs/results.svg, the README's picture
python docs/pictures.py chromium    docs/report.png besides, the top of a report as the browser shows it
"""

import sys
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from metavpt import results

DOCS = Path(__file__).parent
ROWS = ["fixed", "random_feedback", "uniform", "greedy", "one_step", "unrolled", "implicit"]
LEARNED = ("one_step", "unrolled", "implicit")
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "metavpt", "font.family": "sans-serif", "font.size": 10, "axes.spines.top": False}


def by_row(folder: Path, metric: str) -> dict[str, list[float]]:
    """Row -> the metric in the end, a value for each seed; step 0 beside them."""
    found: dict[str, list[float]] = defaultdict(list)
    for result in sorted(results.read(folder), key=lambda result: result.seed):
        found[result.row].append(result.metrics[metric])
        if result.row == "fixed":
            found["step 0"].append(result.step0[metric])
    return found


def draw(axes: Axes, values: dict[str, list[float]], title: str, label: str, digits: int) -> None:
    """A dot for each seed, a bar for their mean, and the mean in words."""
    rows = ["step 0", *ROWS]
    right = max(max(values[row]) for row in rows)
    for y, row in enumerate(rows):
        colour = "#c2410c" if row in LEARNED else "#5b6470"
        mean = sum(values[row]) / len(values[row])
        axes.plot(values[row], [y] * len(values[row]), "o", color=colour, alpha=0.55, markersize=5, markeredgewidth=0)
        axes.plot([mean], [y], "|", color=colour, markersize=15, markeredgewidth=2)
        axes.annotate(f"{mean:.{digits}f}", (right, y), xytext=(8, 0), textcoords="offset points", va="center", color=colour)
    axes.set_yticks(range(len(rows)), rows)
    axes.invert_yaxis()
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel(label)
    axes.spines["right"].set_visible(False)
    axes.grid(axis="x", color="#e4e7eb")
    axes.set_axisbelow(True)


def results_picture(path: Path) -> None:
    """Where the answer is known, and on real frames."""
    with plt.rc_context(STYLE):
        figure, (toy, real) = plt.subplots(1, 2, figsize=(9.6, 3.6), layout="constrained", gridspec_kw={"wspace": 0.12})
        draw(toy, by_row(DOCS / "results" / "toy_sources", "error"), "Toy: one of four sources is useful", "error on it (5 seeds)", 2)
        real_title = "NYUv2, masks: no gain over fixed"
        draw(real, by_row(DOCS / "results" / "nyuv2_pretrained", "ridge/depth_rmse"), real_title, "depth RMSE in m (3 seeds)", 4)
        figure.savefig(path, format="svg", metadata={"Date": None}, facecolor="white")
        plt.close(figure)
    path.write_text("".join(line.rstrip() + "\n" for line in path.read_text().splitlines()))


def report_picture(path: Path, browser: str) -> None:
    """The top of a comparison's report, in 256 colours."""
    from PIL import Image
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        page = playwright.chromium.launch(executable_path=browser, chromium_sandbox=False).new_page(viewport={"width": 1000, "height": 900})
        page.goto((DOCS / "results" / "toy_sources" / "report.html").as_uri())
        page.screenshot(path=path)
    Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)


if __name__ == "__main__":
    results_picture(DOCS / "results.svg")
    if sys.argv[1:]:
        report_picture(DOCS / "report.png", sys.argv[1])
