"""The page of a run: what the learner was worth before and after, and how it got there."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

from metavpt.errors import MetaVPTError
from metavpt.metrics import sign
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
    """One probe metric at the first and at the last step that has it; `last` is None where that is the same step."""

    name: str
    first_step: int
    first: float
    last_step: int
    last: float | None
    sign: int = 0  # -1 lower is better, +1 higher is better, 0 nobody said

    @property
    def change(self) -> float | None:
        return None if self.last is None else self.last - self.first

    @property
    def percent(self) -> float | None:
        return None if not self.change or not self.first else 100 * self.change / abs(self.first)

    @property
    def better(self) -> bool | None:
        """None: no change, not finite, or nobody said which way is good."""
        if not self.change or not math.isfinite(self.change) or not self.sign:
            return None
        return self.sign * self.change > 0


def summary_rows(records: list[Record]) -> list[SummaryRow]:
    """Step 0 against the last step for every probe metric, in the order of the log."""
    rows, directions = [], directions_of(records)
    for name, values in series_of(records, "probe").items():
        first, last = min(values), max(values)
        end = values[last] if last > first else None
        rows.append(SummaryRow(name, first, values[first], last, end, sign(name, directions)))
    return rows


def write_report(run_folder: Path) -> Path:
    """`run_folder`/report.html: one file without scripts or links, made of metrics.jsonl, figures/, texts/ and what describes the run.

    Raises MetaVPTError where the folder has no log or the log no record.
    """
    records = read_log(run_folder / "metrics.jsonl")
    if not records:
        raise MetaVPTError(
            f"{run_folder / 'metrics.jsonl'}: nothing has been logged yet, so there is nothing to "
            "report"
        )
    config = page.configuration(run_folder)
    return page.write(
        run_folder / "report.html",
        "run.html.jinja",
        title=" · ".join(
            filter(None, (page.choice(config, axis) for axis in ("problem", "strategy")))
        )
        or run_folder.resolve().name,
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
    """`finished` once a limit of the budget is reached, else how far the run has come."""
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
    """Heading and curves (name, last value, svg) of each group that has any."""
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
    """(purpose, seconds, share), largest first."""
    total = sum(seconds.values())
    return (
        [
            (name, value, value / total)
            for name, value in sorted(seconds.items(), key=lambda item: -item[1])
        ]
        if total > 0
        else []
    )
