"""Time and memory of a designer update by size, with fitted exponents: `make bench`, part 4.

    python benchmarks/scaling.py [--rounds 2] [--threads 2] [--rows batch/4 batch/8 ...]
    python benchmarks/scaling.py --print --rounds 1 --rows num_steps/1    a quick look

Writes benchmarks/results/scaling.json and its section of docs/benchmarks.md.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from rounds import Part, Row, machine
from vision import Bench, Shape, Vision, tiny

from metavpt.compare.paired_statistics import power_law
from metavpt.hypergradients.estimators import OneStep, Unrolled
from metavpt.strategies.learned import Learned

BATCH, DEPTH, TAIL = 8, 12, 2
LIMIT = 1.1  # an exponent up to which growth counts as linear


class Axis(NamedTuple):
    """What is doubled: its title, the values, and value -> what to time."""

    title: str
    values: tuple[int, ...]
    prepare: Callable[[int], Callable[[], Any]]


def update(shape: Shape, num_steps: int = 0) -> Callable[[], None]:
    """A one-step update by differences, or one through so many steps of the learner's optimizer."""
    bench, estimator = Bench(Vision(shape)), Unrolled(num_steps) if num_steps else OneStep()
    strategy = Learned(estimator)
    return lambda: bench.update(strategy)


def score(num_candidates: int) -> Callable[[], None]:
    bench = Bench(Vision(tiny(BATCH)))
    return lambda: bench.score(num_candidates)


AXES = {
    "batch": Axis(
        "batch of the update and of its feedback, one_step", (4, 8, 16), lambda n: update(tiny(n))
    ),
    "depth": Axis(
        f"blocks, the last {TAIL} of them S, one_step",
        (6, 12, 24),
        lambda n: update(tiny(BATCH, depth=n)),
    ),
    "tail": Axis(
        f"blocks of S, of {DEPTH}, one_step",
        (1, 2, 4),
        lambda n: update(tiny(BATCH, tail_blocks=n)),
    ),
    "num_steps": Axis(
        "num_steps of unrolled", (1, 2, 4), lambda n: update(tiny(BATCH), num_steps=n)
    ),
    "candidates": Axis("K, candidates of greedy", (2, 4, 8), score),
    "feedbacks": Axis(
        "feedbacks, two for each labelled set, one_step",
        (2, 4, 8),
        lambda n: update(tiny(BATCH, num_sets=n // 2)),
    ),
}
ROWS = {
    f"{name}/{value}": Row(
        f"{axis.title}: {value}",
        lambda axis=axis, value=value: axis.prepare(value),
        least=2,
        most=2,
    )
    for name, axis in AXES.items()
    for value in axis.values
}


def exponents(sizes: list[int], rows: list[dict[str, Any]]) -> tuple[float, float]:
    """Of the seconds, and of the memory above what the process held before its first update."""
    grown = [max(row["peak_mib"] - row["mib_before"], 1.0) for row in rows]
    return power_law(sizes, [row["seconds"] for row in rows]), power_law(sizes, grown)


def section(report: dict[str, Any]) -> list[str]:
    environment, measured = report["environment"], report["rows"]
    lines = [
        "## Cost against size",
        "",
        ". ".join(environment["setting"].values()) + ".",
        "",
        machine(environment),
        "",
    ]
    lines += [
        "One size is doubled at a time. Exponents are least-squares slopes on logarithms: "
        "1 is linear, 0 no growth. Memory is the growth "
        "of the peak resident size above what the process held before its first update. "
        f"At most {LIMIT:g} counts as no more than linear.",
        "",
        "| size | values | seconds | exponent | MiB | exponent | |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, axis in AXES.items():
        known = [value for value in axis.values if "seconds" in measured.get(f"{name}/{value}", {})]
        errors = [
            row["error"]
            for key, row in measured.items()
            if key.startswith(f"{name}/") and "error" in row
        ]
        if errors or len(known) < 2:
            lines.append(
                f"| {axis.title} | not measured{f': {errors[0]}' if errors else ''} | | | | | |"
            )
            continue
        rows = [measured[f"{name}/{value}"] for value in known]
        time, memory = exponents(known, rows)
        seconds = ", ".join(f"{row['seconds']:.3g}" for row in rows)
        grown = ", ".join(f"{row['peak_mib'] - row['mib_before']:.0f}" for row in rows)
        verdict = "met" if max(time, memory) <= LIMIT else "**superlinear**"
        values = ", ".join(map(str, known))
        costs = f"{seconds} | {time:.2f} | {grown} | {memory:.2f}"
        lines.append(f"| {axis.title} | {values} | {costs} | {verdict} |")
    return lines


PART = Part(
    "scaling",
    ROWS,
    default=list(ROWS),
    rounds=2,
    packages=("torch", "timm", "numpy"),
    setting={
        "base": f"ViT-Ti as in part 3, batch {BATCH} (unlabelled and labelled alike), "
        f"{DEPTH} blocks, "
        f"S = last {TAIL} and final norm, "
        "two feedbacks",
        "update": "A designer update alone: task, g_down and product; heads are fitted beforehand",
    },
    section=section,
)

if __name__ == "__main__":
    PART.main(__doc__)
