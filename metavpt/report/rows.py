"""A row of a comparison with the logs of its runs."""

import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from metavpt.compare.results import Result
from metavpt.report.first_order import FirstOrder, first_orders
from metavpt.report.logs import Record, read_log, samples_at, series_of
from metavpt.report.progress import Progress, progress


@dataclass(frozen=True)
class Row:
    """The finished results of a row, and the logs of all its seeds.

    Attributes:
        name: The row's name.
        colour: Its colour's number, 0 for the reference.
        results: The results that finished.
        logs: Records by seed.
    """

    name: str
    colour: int
    results: list[Result]
    logs: dict[int, list[Record]]

    def course(self, metric: str, only: Collection[int] | None = None) -> Progress | None:
        """Return the metric against samples: step 0, the probes on the way, and the end.

        Args:
            metric: The metric's name.
            only: The seeds to use. None: all.
        """
        seeds = []
        for result in self.results:
            if only is not None and result.seed not in only:
                continue
            log = self.logs.get(result.seed, [])
            probed = series_of(log, "probe").get(metric, {})
            seed = dict(zip(samples_at(log, probed).tolist(), probed.values(), strict=True))
            seed |= {
                float(at): known[metric]
                for at, known in ((0, result.step0), (result.samples, result.metrics))
                if metric in known
            }
            seeds.append({at: value for at, value in seed.items() if math.isfinite(value)})
        seeds = [seed for seed in seeds if seed]
        return progress(seeds) if seeds else None

    def value(self) -> Progress | None:
        """Return the first-order value of the designer's updates, against steps."""
        seeds = [
            series_of(self.logs.get(result.seed, []), "designer").get("value", {})
            for result in self.results
        ]
        seeds = [
            {float(step): value for step, value in seed.items() if math.isfinite(value)}
            for seed in seeds
        ]
        seeds = [seed for seed in seeds if seed]
        return progress(seeds) if seeds else None

    def first_orders(self) -> list[FirstOrder]:
        """Return the first-order predictions, pooled over the seeds."""
        return first_orders(
            [record for result in self.results for record in self.logs.get(result.seed, [])]
        )

    def times(self) -> dict[str, float]:
        """Return mean seconds by purpose."""
        purposes = dict.fromkeys(purpose for result in self.results for purpose in result.times)
        return {
            purpose: fmean(result.times.get(purpose, 0.0) for result in self.results)
            for purpose in purposes
        }


def read_rows(folder: Path, results: list[Result], reference: str) -> list[Row]:
    """Return the rows of `results` in their order, with the logs under `folder`/rows."""
    names = list(dict.fromkeys(result.row for result in results))
    others = [name for name in names if name != reference]
    made = []
    for name in names:
        colour = 0 if name == reference else 1 + others.index(name)
        finished = [result for result in results if result.row == name and result.error is None]
        made.append(Row(name, colour, finished, read_logs(run_folder(folder, name, 0).parent)))
    return made


def run_folder(folder: Path, row: str, seed: int) -> Path:
    """Return the folder of a row's run. Characters that a file name cannot hold are replaced."""
    return folder / "rows" / re.sub(r"[^\w.=+-]", "_", row) / f"seed{seed}"


def read_logs(folder: Path) -> dict[int, list[Record]]:
    """Read the logs in seed<k>/, by k."""
    paths = {
        path.parent.name.removeprefix("seed"): path for path in folder.glob("seed*/metrics.jsonl")
    }
    return {
        int(seed): read_log(paths[seed]) for seed in sorted(filter(str.isdecimal, paths), key=int)
    }
