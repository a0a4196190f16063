"""How well the solves of strategy=implicit end on the shipped vision problems.

    python benchmarks/implicit_residuals.py [--problems dino_masks] [--seeds 0 1] [key=value ...]

Trains each problem with strategy=implicit and prints, per problem, the residuals of all solves:
the share below 0.5, the largest, and the damping that they took. The solver measures its residual
by a product of its own. `key=value` overrides the configuration, for example the solver.
"""

import argparse
import tempfile
from pathlib import Path
from typing import NamedTuple

from hydra import compose, initialize_config_module

from metavpt.cli.console import Console
from metavpt.training.build import build

PROBLEMS = ("dino_masks", "data2vec_nyuv2")
GOOD = 0.5


class Solves(NamedTuple):
    """The solves of some runs.

    Attributes:
        residuals: Of the solves that steered.
        dampings: What these were solved with.
        num_unsolved: Solves that ended no better than x = 0, whose updates were skipped.
    """

    residuals: list[float]
    dampings: list[float]
    num_unsolved: int

    @property
    def share(self) -> float:
        """The share of all solves with a residual below 0.5."""
        total = len(self.residuals) + self.num_unsolved
        return sum(residual < GOOD for residual in self.residuals) / total

    def __add__(self, other: "Solves") -> "Solves":  # type: ignore[override]
        return Solves(*(a + b for a, b in zip(self, other, strict=True)))


def solves(problem: str, seed: int, steps: int, overrides: list[str]) -> Solves:
    """Train once, and read the solves from the log."""
    options = [
        f"problem={problem}",
        "strategy=implicit",
        f"seed={seed}",
        f"budget.steps={steps}",
        "trainer.probe_every=0",  # measurements that change no step
        "trainer.first_order_every=0",
    ]
    with initialize_config_module("metavpt.configs", version_base="1.3"):
        cfg = compose("run", [*options, *overrides])
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(cfg, Path(folder), Console())
        trainer.checkpoints = None
        trainer.run()
        records = [r for r in trainer.log.records() if r["kind"] == "designer"]
    solved = [record for record in records if "residual" in record]
    return Solves(
        [record["residual"] for record in solved],
        [record["damping"] for record in solved],
        sum("unsolved_updates" in record for record in records),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--problems", nargs="+", default=PROBLEMS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=136)  # 12 updates
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_args()
    for problem in given.problems:
        found = Solves([], [], 0)
        for seed in given.seeds:
            found += solves(problem, seed, given.steps, given.overrides)
        print(
            f"{problem}: {found.share:.0%} of {len(found.residuals) + found.num_unsolved} solves "
            f"below {GOOD}; {found.num_unsolved} skipped; largest residual "
            f"{max(found.residuals, default=float('nan')):.3f}; damping "
            f"{min(found.dampings, default=float('nan')):.2g} to "
            f"{max(found.dampings, default=float('nan')):.2g}",
            flush=True,
        )


if __name__ == "__main__":
    main()
