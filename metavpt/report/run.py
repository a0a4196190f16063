"""The page of a run: metrics before and after, health, curves and pictures."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

from metavpt.cli.formatting import number
from metavpt.errors import MetaVPTError
from metavpt.problem import sign
from metavpt.report import page
from metavpt.report.curves import curve
from metavpt.report.first_order import PREDICTIONS, first_order_chart, first_orders
from metavpt.report.gallery import gallery
from metavpt.report.logs import (
    COUNTERS,
    Record,
    directions_of,
    is_number,
    read_log,
    series_of,
    spent,
    times,
    warnings,
)
from metavpt.report.texts import read_texts


class SummaryRow(NamedTuple):
    """A probe metric at the first and the last step that has it.

    Attributes:
        name: The metric.
        first_step: The first step.
        first: The value there.
        last_step: The last step.
        last: The value there. None: the same step as the first.
        sign: +1 if higher is better, -1 if lower, 0 if not stated.
    """

    name: str
    first_step: int
    first: float
    last_step: int
    last: float | None
    sign: int = 0  # -1 lower is better, +1 higher is better, 0 nobody said

    @property
    def change(self) -> float | None:
        """Return the change from the first to the last step."""
        return None if self.last is None else self.last - self.first

    @property
    def percent(self) -> float | None:
        """Return the change in percent of the first value."""
        return None if not self.change or not self.first else 100 * self.change / abs(self.first)

    @property
    def better(self) -> bool | None:
        """Return whether the change is good. None: no finite change, or no stated direction."""
        if not self.change or not math.isfinite(self.change) or not self.sign:
            return None
        return self.sign * self.change > 0


def summary_rows(records: list[Record]) -> list[SummaryRow]:
    """Compare step 0 with the last step for every probe metric, in the order of the log."""
    rows, directions = [], directions_of(records)
    for name, values in series_of(records, "probe").items():
        first, last = min(values), max(values)
        end = values[last] if last > first else None
        rows.append(SummaryRow(name, first, values[first], last, end, sign(name, directions)))
    return rows


class Health(NamedTuple):
    """A health metric at the first and the last probe.

    `verdict` is None where no range is stated; `healthy` says the range in words.
    """

    name: str
    first: float
    last: float
    healthy: str
    verdict: bool | None


class ClassTable(NamedTuple):
    """A metric by class: (class, first, last) in order; None: the class does not occur."""

    metric: str
    steps: tuple[int, int]
    rows: list[tuple[str, float | None, float | None]]


def lead(records: list[Record], strategy: str, seed: Any) -> str:
    """Say in a sentence or two what happened to the first metric that the feedback is about."""
    targets: Any = next((r.get("targets") for r in records if r.get("kind") == "probe"), None)
    rows = [row for row in summary_rows(records) if row.last is not None]
    wanted = [row for row in rows if not isinstance(targets, list) or row.name in targets]
    row = next((row for row in wanted if row.sign), None) or next(iter(wanted), None)
    if row is None:
        return "Nothing has been measured after step 0 yet."
    way = {True: " (better)", False: " (worse)", None: ""}[row.better]
    who = ", ".join(
        part
        for part in (
            f"strategy {strategy}" if strategy else "",
            "" if seed is None else f"seed {seed}",
        )
        if part
    )
    end = f"to {number(row.last)} after {row.last_step:,} steps{way}{f', {who}' if who else ''}"
    return (
        f"{row.name} went from {number(row.first)} at step {row.first_step} {end}. One run cannot "
        "tell a gain from noise: python -m metavpt.compare runs the same beside strategy=fixed on "
        "several seeds."
    )


def steering(records: list[Record]) -> list[str]:
    """Say how many steps feedback shaped, and on how many labels trained the learner."""
    train = [record for record in records if record.get("kind") == "train"]
    last: Record = train[-1] if train else {}
    done, said = spent(records)["steps"], []
    if is_number(last.get("steered_steps")):
        said.append(f"{last['steered_steps']:,} of {done:,.0f} steps were steered")
    if is_number(last.get("labelled_steps")):
        said.append(f"labels trained the learner itself on {last['labelled_steps']:,} steps")
    return said


def health(records: list[Record]) -> list[Health]:
    """Return the health metrics with the verdict of the last probe."""
    watched = [record for record in records if record.get("kind") == "watch"]
    bounds: Any = watched[-1].get("bounds") if watched else None
    if not isinstance(bounds, dict):
        return []
    found = []
    for name, values in series_of(records, "watch").items():
        ends = bounds.get(name)
        if not isinstance(ends, list) or len(ends) != 2:
            continue
        low, high = (float(end) if is_number(end) else None for end in ends)
        first, last = values[min(values)], values[max(values)]
        said = [f"at least {number(low)}"] if low is not None else []
        said += [f"at most {number(high)}"] if high is not None else []
        inside = (low is None or last >= low) and (high is None or last <= high)
        found.append(Health(name, first, last, " and ".join(said), inside if said else None))
    return found


def class_tables(records: list[Record]) -> list[ClassTable]:
    """Return each metric by class at the first and the last probe."""
    by_metric: dict[str, dict[int, dict[str, float | None]]] = {}
    for record in records:
        pairs, step = record.get("values"), record.get("step")
        if record.get("kind") != "classes" or not isinstance(pairs, list) or not is_number(step):
            continue
        values = {
            str(pair[0]): float(pair[1]) if is_number(pair[1]) else None
            for pair in pairs
            if isinstance(pair, list) and len(pair) == 2
        }
        by_metric.setdefault(str(record.get("metric", "")), {})[int(step)] = values
    tables = []
    for metric, at in by_metric.items():
        first, last = min(at), max(at)
        rows = [(name, at[first].get(name), value) for name, value in at[last].items()]
        tables.append(ClassTable(metric, (first, last), rows))
    return tables


def write_report(run_folder: Path) -> Path:
    """Write `run_folder`/report.html, one file without scripts or links.

    It is made from metrics.jsonl, figures/, texts/, config.yaml and environment.json.

    Returns:
        The path of the report.

    Raises:
        MetaVPTError: The folder has no log, or the log has no record.
    """
    records = read_log(run_folder / "metrics.jsonl")
    if not records:
        raise MetaVPTError(f"{run_folder / 'metrics.jsonl'}: nothing has been logged yet")
    config, typed = page.configuration(run_folder), page.environment(run_folder)
    problem, strategy = (
        str(typed.get(axis) or page.choice(config, axis)) for axis in ("problem", "strategy")
    )
    return page.write(
        run_folder / "report.html",
        "run.html.jinja",
        title=" · ".join(filter(None, (problem, strategy))) or run_folder.resolve().name,
        lead=lead(records, strategy, typed.get("seed")),
        steering=steering(records),
        health=health(records),
        class_tables=class_tables(records),
        status=_status(records, config),
        spent=spent(records),
        rows=summary_rows(records),
        curves=list(_curves(records)),
        first_orders=[
            (PREDICTIONS[one.name], one.fit, first_order_chart(one, one.name))
            for one in first_orders(records)
        ],
        texts=read_texts(run_folder / "texts"),
        pictures=gallery(run_folder / "figures"),
        times=_shares(times(records)),
        warnings=warnings({"": records}),
    )


def _status(records: list[Record], config: Mapping[str, Any]) -> str:
    """Return `finished` once a limit of the budget is reached, else the step and the share."""
    done, budget = spent(records), config.get("budget")
    limits = (
        {unit: limit for unit, limit in budget.items() if is_number(limit)}
        if isinstance(budget, dict)
        else {}
    )
    if any(unit in done and done[unit] >= limit for unit, limit in limits.items()):
        return "finished"
    share = max(
        (done.get(unit, 0.0) / limit for unit, limit in limits.items() if limit), default=None
    )
    return f"step {done['steps']:,.0f}" + (
        f", {share:.0%} of the budget" if share is not None else ""
    )


def _curves(records: list[Record]) -> Iterator[tuple[str, list[tuple[str, float, Markup]]]]:
    """Return heading and curves (name, last value, SVG) of each group that has any."""
    headings = {"probe": "Probes", "designer": "Task designer", "train": "Pretraining"}
    for kind, heading in headings.items():
        series = {
            name: values
            for name, values in series_of(records, kind).items()
            if kind != "train" or name not in COUNTERS
        }
        if series:
            curves = [
                (name, values[max(values)], curve(values, f"{kind}{i}"))
                for i, (name, values) in enumerate(series.items())
            ]
            yield heading, curves


def _shares(seconds: Mapping[str, float]) -> list[tuple[str, float, float]]:
    """Return (purpose, seconds, share), largest first."""
    total = sum(seconds.values())
    return (
        [
            (name, value, value / total)
            for name, value in sorted(seconds.items(), key=lambda item: -item[1])
        ]
        if total > 0
        else []
    )
