"""The table of a comparison: metrics of every row, differences to the reference, and costs."""

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

from metavpt.cli.formatting import number, with_error
from metavpt.compare.paired_statistics import (
    LEVEL,
    MIN_SEEDS,
    Mean,
    Paired,
    mean_se,
    paired,
    range_coverage,
    smallest_p,
)
from metavpt.compare.results import Result
from metavpt.errors import MetaVPTError
from metavpt.problem import Direction, Directions, sign

STEP0 = "step 0"
LABELS_ONLY, DIRECT = "labels_only", "direct"  # the rows that train the learner on labels
MIB = 2**20
Values = dict[str, dict[str, dict[int, float]]]  # row -> metric -> seed -> value


class Cell(NamedTuple):
    """One row on one metric. A part is None without a finite value or a common seed.

    Attributes:
        mean: Over the row's seeds.
        paired: Against the reference.
    """

    mean: Mean | None
    paired: Paired | None


class Cost(NamedTuple):
    """Means over the finished seeds. Throughput is relative to the reference."""

    seeds: int
    steps: float | None = None
    samples: float | None = None
    grad_evals: float | None = None
    seconds: float | None = None
    peak_mib: float | None = None
    throughput: float | None = None


class Section(NamedTuple):
    """A part of the table as text, with one verdict per line."""

    title: str
    header: list[str]
    lines: list[list[str]]
    verdicts: list[str]


class Table:
    """Results by row and metric, and step 0: the warm start that the rows of a seed share.

    Args:
        results: The results of the comparison.
        reference: The row that differences are taken to.
        directions: Directions of the configuration. They override those of the problem.

    Attributes:
        rows: Step 0, the trivial predictors, then the trained rows in their order.
        trivial: Predictors that ignore the input.
        trained: The rows that were trained.
        designed: The trained rows whose tasks feedback shapes. Empty if the results do not state
            it.
        target: The first target metric with a stated direction.
        metrics: The target metrics.
        side_effects: The other metrics.
        warnings: Side-effect metrics on which a row is worse than step 0 or the reference, by an
            interval that excludes zero, with MIN_SEEDS seeds or more.
        notes: Failed rows, missing values, and the resolution of so few seeds.

    Raises:
        MetaVPTError: There is no result.
    """

    def __init__(
        self,
        results: Sequence[Result],
        reference: str = "fixed",
        directions: Directions | None = None,
    ) -> None:
        if not results:
            raise MetaVPTError("no row of the comparison has finished, so there is no table yet")
        self.results = list(results)
        self.reference = reference
        self.directions: dict[str, Direction] = {}
        for result in results:
            self.directions |= result.directions
        self.directions |= directions or {}
        self.trivial = list(dict.fromkeys(name for result in results for name in result.trivial))
        self.trained = list(dict.fromkeys(result.row for result in results))
        self.rows = [STEP0, *self.trivial, *self.trained]
        steering = {result.row for result in results if result.steered_steps is not None}
        self.designed = [row for row in self.trained if row in steering]
        self.values = _values(results)
        self.has_reference = any(self.values.get(reference, {}).values())
        names = list(
            dict.fromkeys(name for by_metric in self.values.values() for name in by_metric)
        )
        self.steered = _steered(results, names)
        everywhere = set().union(*self.steered.values())
        self.metrics = [name for name in names if name in everywhere]
        self.target = next((name for name in self.metrics if self.sign(name)), None)
        self.side_effects = [name for name in names if name not in everywhere]
        self.cells = {(row, name): self._cell(row, name) for row in self.rows for name in names}
        self.warnings = list(self._warnings())
        self.notes = list(dict.fromkeys(self._notes()))

    def sign(self, metric: str) -> int:
        """Return +1 if higher is better, -1 if lower, 0 if not stated."""
        return sign(metric, self.directions)

    def difference(self, row: str, other: str, metric: str) -> Paired | None:
        """Compute `row` minus `other` on the seeds that both have. None: there is none."""
        a, b = (self.values.get(name, {}).get(metric, {}) for name in (row, other))
        seeds = sorted(a.keys() & b.keys())
        if not seeds:
            return None
        return paired([a[seed] for seed in seeds], [b[seed] for seed in seeds], self.sign(metric))

    def share_of_direct(self, row: str, metric: str) -> float | None:
        """Return the gain of `row` over the reference as a share of the gain of `direct`.

        None: the interval of the gain of `direct` contains zero, or a gain is unknown.
        """
        whole = self.difference(DIRECT, self.reference, metric)
        own = self.difference(row, self.reference, metric)
        if not own or not whole or whole.low is None or whole.high is None:
            return None
        gain = self.sign(metric) * whole.difference
        if gain <= 0 or whole.low <= 0 <= whole.high:
            return None
        return self.sign(metric) * own.difference / gain

    def summary(self) -> Section | None:
        """Return the gain of each row on the target metric, and its other changes.

        None: there is no reference, or the results do not state which rows were steered.
        """
        target = self.target
        if target is None or not self.has_reference or not self._knows_roles():
            return None
        lines, verdicts = [], []
        for row in self.rows:
            mean, against = self.cells[row, target]
            gain = self.sign(target) * against.difference if against else None
            shares = row in self.trained and row != self.reference
            share = self.share_of_direct(row, target) if shares else None
            percent = number(None) if share is None else f"{number(round(100 * share))}%"
            of_direct = [percent] if DIRECT in self.trained else []
            lines.append([row, _mean(mean), number(gain, sign=True), *of_direct, self._others(row)])
            verdicts.append(against.verdict if against else "unclear")
        of_direct = [f"share of {DIRECT}"] if DIRECT in self.trained else []
        header = ["row", "mean ± s.e.", "gain", *of_direct, "other metrics"]
        return Section(f"gain over {self.reference} on {target}", header, lines, verdicts)

    def _knows_roles(self) -> bool:
        return bool(self.designed) or any(result.labelled_steps for result in self.results)

    def _others(self, row: str) -> str:
        """Summarise the changes of the other metrics, and list the worse ones."""
        changes = {
            name: against.verdict
            for name in (*self.metrics, *self.side_effects)
            if name != self.target and (against := self.cells[row, name].paired)
        }
        if not changes:
            return number(None)
        if set(changes.values()) == {"too few seeds"}:
            return "too few seeds"
        better = sum(verdict == "better" for verdict in changes.values())
        worse = [name for name, verdict in changes.items() if verdict == "worse"]
        parts = [f"{better} better"] if better else []
        parts += [f"{len(worse)} worse: {', '.join(worse)}"] if worse else []
        return ", ".join(parts) or "none beyond the interval"

    def cost(self, row: str) -> Cost:
        """Return the costs of a row."""
        finished = {
            result.seed: result
            for result in self.results
            if result.row == row and result.error is None
        }
        if not finished:
            return Cost(0)
        steps, samples, grad_evals, seconds, memory = (
            fmean(getattr(result, unit) for result in finished.values())
            for unit in ("steps", "samples", "grad_evals", "seconds", "peak_memory")
        )
        others = {
            result.seed: result
            for result in self.results
            if result.row == self.reference and result.error is None
        }
        ratios = [
            finished[seed].samples_per_s / others[seed].samples_per_s
            for seed in finished.keys() & others
            if others[seed].samples
        ]
        return Cost(
            len(finished),
            steps,
            samples,
            grad_evals,
            seconds,
            memory / MIB or None,
            fmean(ratios) if ratios else None,
        )

    def sections(self) -> list[Section]:
        """Return target metrics, side effects and costs. A line begins with the name of its row."""
        steered = [self._metric_section(name) for name in self.metrics]
        return [
            *steered,
            *(self._metric_section(name, "side effect: ") for name in self.side_effects),
            self._cost_section(),
        ]

    def _cell(self, row: str, metric: str) -> Cell:
        values = self.values.get(row, {}).get(metric, {})
        compared = self.difference(row, self.reference, metric) if row != self.reference else None
        return Cell(mean_se(list(values.values())) if values else None, compared)

    def _metric_section(self, metric: str, prefix: str = "") -> Section:
        direction = {
            -1: "lower is better",
            1: "higher is better",
            0: "lower or higher may be better",
        }[self.sign(metric)]
        pairs = [pair for row in self.rows if (pair := self.cells[row, metric].paired)]
        few = pairs and all(pair.n < MIN_SEEDS for pair in pairs)
        interval = "range" if few else f"{LEVEL:.0%} interval"
        against = [f"minus {self.reference}", interval, "p", "wins"] if self.has_reference else []
        lines, verdicts = [], []
        for row in self.rows:
            mean, compared = self.cells[row, metric]
            lines.append([row, _mean(mean), *(_compared(compared) if against else [])])
            verdicts.append(compared.verdict if compared else "unclear")
        return Section(
            f"{prefix}{metric} ({direction})", ["row", "mean ± s.e.", *against], lines, verdicts
        )

    def _cost_section(self) -> Section:
        relative = f", throughput relative to {self.reference}" if self.has_reference else ""
        header = [
            "row",
            "seeds",
            "steps",
            "samples",
            "grad. evals",
            "seconds",
            "peak MiB",
            *(["throughput"] if relative else []),
        ]
        lines = []
        for row in self.trained:
            cost = self.cost(row)
            counts = [_count(value) for value in (cost.steps, cost.samples, cost.grad_evals)]
            throughput = [number(cost.throughput)] if relative else []
            lines.append(
                [
                    row,
                    str(cost.seeds),
                    *counts,
                    _count(cost.seconds, 1),
                    _count(cost.peak_mib),
                    *throughput,
                ]
            )
        return Section(f"cost (mean over seeds{relative})", header, lines, ["unclear"] * len(lines))

    def _warnings(self) -> Iterator[str]:
        for metric in (*self.metrics, *self.side_effects):
            for row in self.trained:
                if metric in self.steered[row]:
                    continue
                for other in dict.fromkeys((STEP0, self.reference)):
                    change = self.difference(row, other, metric) if row != other else None
                    if change and change.verdict == "worse":
                        by = f"{number(change.difference, sign=True)} {_interval(change)}"
                        yield (
                            f"side effect: {row} is worse than {other} on {metric} by more than "
                            f"the interval: {by}, {change.n} seeds"
                        )

    def _notes(self) -> Iterator[str]:
        for result in self.results:
            if result.error is not None:
                yield f"{result.row} failed on seed {result.seed}: {' '.join(result.error.split())}"
            for row, values in ((STEP0, result.step0), (result.row, result.metrics)):
                lost = [
                    f"{name} is {value}"
                    for name, value in values.items()
                    if not math.isfinite(value)
                ]
                if lost:
                    yield f"{row}, seed {result.seed}: left out, since {', '.join(lost)}"
        yield from self._uneven_starts()
        unknown = [name for name in (*self.metrics, *self.side_effects) if not self.sign(name)]
        if unknown:
            yield (
                f"No wins and no warnings on {', '.join(unknown)}: state which way is better with "
                "metrics={<metric>: lower} or higher, or in the problem's metric_directions."
            )
        if any(cell.mean and cell.mean.n == 1 for cell in self.cells.values()):
            yield (
                "One seed has no standard error, interval or p-value, so its noise is unknown. "
                f"A verdict needs {MIN_SEEDS} seeds."
            )
        if not self.has_reference:
            yield f"No differences: there is no finished row {self.reference} to compare with."
            return
        yield (
            f"Differences are to {self.reference} on the seeds that both have: "
            f"{LEVEL:.0%} bootstrap interval, two-sided sign-flip test, "
            "not corrected for the number of rows and metrics; a tie is half a win."
        )
        yield from map(
            _strength, sorted({cell.paired.n for cell in self.cells.values() if cell.paired} - {1})
        )

    def _uneven_starts(self) -> Iterator[str]:
        """Check that the rows of a seed have the same metrics at step 0."""
        for result in self.results:
            for name, value in result.step0.items():
                first = self.values[STEP0].get(name, {}).get(result.seed, value)
                if math.isfinite(value) and not math.isclose(first, value, rel_tol=1e-6):
                    who = f"{result.row}, seed {result.seed}"
                    starts = f"{name} starts at {number(value)}, the first row of that seed at"
                    yield f"{who}: {starts} {number(first)}"


def _values(results: Sequence[Result]) -> Values:
    """Collect the finite metrics of the rows. Step 0 of a seed is that of its first result."""
    values: Values = {STEP0: {}}
    for result in results:
        for name, value in result.step0.items():
            if math.isfinite(value):
                values[STEP0].setdefault(name, {}).setdefault(result.seed, value)
        for predictor, metrics in result.trivial.items():
            for name, value in metrics.items():
                if math.isfinite(value):
                    values.setdefault(predictor, {}).setdefault(name, {})[result.seed] = value
    for result in results:
        for name, value in result.metrics.items():
            if math.isfinite(value):
                values.setdefault(result.row, {}).setdefault(name, {})[result.seed] = value
    return values


def _steered(results: Sequence[Result], names: Sequence[str]) -> Mapping[str, set[str]]:
    """Return the target metrics of each row.

    A row that states none has those of all other rows, or all metrics.
    """
    said: dict[str, set[str]] = {}
    for result in results:
        if result.steered is not None:
            said.setdefault(result.row, set()).update(result.steered)
    rest = set().union(*said.values()) if said else set(names)
    return {result.row: said.get(result.row, rest) for result in results}


def _strength(n: int) -> str:
    """State what n > 1 seeds can show at most."""
    least = f"With {n} seeds no p-value is below {number(smallest_p(n))}"
    if n >= MIN_SEEDS:
        return f"{least}."
    return (
        f"{least}, and the interval is the range of the differences, which contains the truth "
        f"{range_coverage(n):.1%} of the time at best: too few seeds for a verdict, "
        f"which needs {MIN_SEEDS}."
    )


def _mean(mean: Mean | None) -> str:
    return number(None) if mean is None else with_error(mean.value, mean.se)


def _compared(against: Paired | None) -> list[str]:
    """Format difference, interval, p-value ("too few seeds" without one) and wins."""
    if against is None:
        return [number(None)] * 4
    wins = number(None) if against.wins is None else f"{against.wins:g}/{against.n}"
    p = against.verdict if against.n < MIN_SEEDS else number(against.p)
    return [number(against.difference, sign=True), _interval(against), p, wins]


def _interval(against: Paired) -> str:
    if against.low is None or against.high is None:
        return number(None)
    return f"[{number(against.low, sign=True)}, {number(against.high, sign=True)}]"


def _count(value: float | None, digits: int = 0) -> str:
    return number(None) if value is None else f"{value:,.{digits}f}"
