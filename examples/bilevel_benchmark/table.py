"""A table and a figure of the rows: how soon each solver reaches which suboptimality."""

from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

Row = dict[str, Any]
THRESHOLDS = (0.1, 0.01, 0.001)


def gaps(rows: list[Row]) -> dict[tuple[int, str], np.ndarray]:
    """Return the relative suboptimality of each run of one problem, the best so far.

    (value - least) / (start - least), where `least` is the lowest value that any solver reached
    from this seed.
    """
    least: dict[int, float] = {}
    for row in rows:
        values = [value for value in _values(row) if value is not None]
        least[row["seed"]] = min(least.get(row["seed"], np.inf), *values)
    found = {}
    for row in rows:
        low = least[row["seed"]]
        values = np.array([np.inf if v is None else v for v in _values(row)])
        found[row["seed"], row["solver"]] = np.minimum.accumulate(values - low) / (values[0] - low)
    return found


def _values(row: Row) -> list[float | None]:
    return [each["value"] for each in row["curve"]]


def reached(row: Row, gap: np.ndarray, threshold: float, unit: str) -> float | None:
    """Return the seconds or evaluations after which `gap` is at most `threshold`."""
    below = np.flatnonzero(gap <= threshold)
    return row["curve"][below[0]][unit] if len(below) else None


def table(rows: list[Row]) -> str:
    """Return one table a problem: medians over seeds; "-" where a seed does not get there."""
    lines = [
        "CPU seconds (one thread) and gradients of one sample's loss until the value function, "
        "with the inner problem solved to optimality, is within 10 %, 1 % and 0.1 % of the way "
        "from its start to the lowest value that any solver reached. Medians over the seeds; "
        "`-`: not reached on most of them. Sorted by seconds to 1 %, to 10 %, then by the gap.",
    ]
    problems = defaultdict[str, list[Row]](list)
    for row in rows:
        problems[row["problem"]].append(row)
    for problem, of_problem in problems.items():
        has_test = of_problem[0]["curve"][0]["test_error"] is not None
        heads = ["solver", "seconds to 10 %", "1 %", "0.1 %"]
        heads += ["evaluations to 10 %", "1 %", "gap at the end"] + ["test error"] * has_test
        lines += ["", f"## {problem}", "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        lines += [f"| {' | '.join(cells)} |" for _, cells in sorted(_cells(of_problem, has_test))]
    return "\n".join(lines) + "\n"


def _cells(rows: list[Row], has_test: bool) -> list[tuple[tuple[float, ...], list[str]]]:
    """Return a sort key and the cells of each solver."""
    relative = gaps(rows)
    by_solver = defaultdict[str, list[Row]](list)
    for row in rows:
        by_solver[row["solver"]].append(row)
    found = []
    for solver, runs in by_solver.items():

        def middle(threshold: float, unit: str, runs: list[Row] = runs) -> float:
            times = [
                reached(run, relative[run["seed"], run["solver"]], threshold, unit) for run in runs
            ]
            return median(np.inf if each is None else each for each in times)

        seconds = [middle(threshold, "seconds") for threshold in THRESHOLDS]
        evaluations = [middle(threshold, "evaluations") for threshold in THRESHOLDS[:2]]
        end = median(float(relative[run["seed"], run["solver"]][-1]) for run in runs)
        cells = [f"**{solver}**" if solver.startswith("metavpt") else solver]
        cells += ["-" if np.isinf(each) else f"{each:.3f}" for each in seconds]
        cells += ["-" if np.isinf(each) else f"{each:,.0f}" for each in evaluations]
        cells += [f"{end:.1e}"]
        if has_test:
            errors = [_last(run["curve"], "test_error") for run in runs]
            cells.append(f"{median(errors):.3f}")
        found.append(((seconds[1], seconds[0], end), cells))
    return found


def _last(curve: list[Row], key: str) -> float:
    """Return the last value of `key` that is known."""
    return next(each[key] for each in reversed(curve) if each[key] is not None)


def figure(rows: list[Row], path: Path) -> None:
    """Draw the median gap against CPU seconds, one panel a problem."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    mpl.rcParams.update({"svg.hashsalt": "metavpt", "font.size": 8, "svg.fonttype": "none"})
    problems = list(dict.fromkeys(row["problem"] for row in rows))
    solvers = list(dict.fromkeys(row["solver"] for row in rows))
    fig, panels = plt.subplots(1, len(problems), figsize=(3 * len(problems), 3), squeeze=False)
    grid = np.geomspace(1e-3, max(row["curve"][-1]["seconds"] for row in rows), 60)
    for panel, problem in zip(panels[0], problems, strict=True):
        of_problem = [row for row in rows if row["problem"] == problem]
        relative = gaps(of_problem)
        for place, solver in enumerate(solvers):
            runs = [row for row in of_problem if row["solver"] == solver]
            if not runs:
                continue
            curves = []
            for run in runs:
                seconds = np.array([each["seconds"] for each in run["curve"]])
                at = np.searchsorted(seconds, grid, side="right") - 1
                curves.append(relative[run["seed"], solver][np.maximum(at, 0)])
            style = "-" if solver.startswith("metavpt") else "--"
            panel.loglog(grid, np.median(curves, 0), style, color=f"C{place}", label=solver, lw=1.2)
        panel.set(title=problem, xlabel="CPU seconds", ylim=(1e-5, 1.5))
    panels[0, 0].set_ylabel("relative suboptimality")
    panels[0, -1].legend(fontsize=6)
    fig.tight_layout()
    fig.savefig(path, metadata={"Date": None})
