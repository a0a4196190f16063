"""What a run logged, read back from its metrics.jsonl."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from metavpt.errors import MetaVPTError
from metavpt.metrics import Direction

Record = dict[str, Any]
Series = dict[str, dict[int, float]]  # name -> step -> value

COUNTERS = (
    "samples",
    "grad_evals",
    "seconds",
    "steered_steps",
    "labelled_steps",
)  # of a train record: totals, which as a curve are a straight line
MAX_WARNINGS = 50


class Warnings(NamedTuple):
    """The different warnings as (message, how often, where), oldest first, and how many more there were."""

    groups: list[tuple[str, int, str]]
    num_left_out: int


def read_log(path: Path) -> list[Record]:
    """The records of metrics.jsonl. The last line of a killed run is cut short and skipped; any other bad line becomes a warning."""
    if not path.is_file():
        raise MetaVPTError(
            f"{path}: no such log; give the folder of a run (it holds metrics.jsonl)"
        )
    lines = path.read_text(errors="replace").splitlines()
    records: list[Record] = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except (
            ValueError,
            RecursionError,
        ):  # broken, a number of thousands of digits, nested without end
            record = None
        if isinstance(record, dict):
            records.append(record)
        elif line.strip() and number < len(lines):
            records.append(
                {
                    "kind": "warning",
                    "message": f"{path.name} line {number} cannot be read and was left out",
                }
            )
    return records


def series_of(records: list[Record], kind: str) -> Series:
    """Every number of the records of `kind` by name and step; where a step was logged twice the later record holds."""
    series: Series = {}
    for record in records:
        values = record.get("metrics") if kind == "probe" else record
        if (
            record.get("kind") != kind
            or not _is_step(record.get("step"))
            or not isinstance(values, dict)
        ):
            continue
        for name, value in values.items():
            if is_number(value) and name != "step":
                series.setdefault(name, {})[int(record["step"])] = float(value)
    return series


def directions_of(records: list[Record]) -> dict[str, Direction]:
    """Metric to "lower" or "higher", whichever is better, as the last probe record states it."""
    stated: Any = {}
    for record in records:
        if record.get("kind") == "probe":
            stated = record.get("directions", stated)
    if not isinstance(stated, dict):
        return {}
    return {name: which for name, which in stated.items() if which in ("lower", "higher")}


def samples_at(records: list[Record], steps: Iterable[int]) -> np.ndarray:
    """Samples that the learner had seen by each of `steps`, straight lines between what was logged."""
    logged = {0: 0.0} | series_of(records, "train").get("samples", {})
    known = sorted(logged)
    return np.interp(list(steps), known, [logged[step] for step in known])


def spent(records: list[Record]) -> dict[str, float]:
    """Steps of the last record that has one, and the totals of the last train record."""
    steps = float(max((r["step"] for r in records if _is_step(r.get("step"))), default=0))
    last = next((record for record in reversed(records) if record.get("kind") == "train"), {})
    return {"steps": steps} | {
        name: float(last[name]) for name in COUNTERS if is_number(last.get(name))
    }


def times(records: list[Record]) -> dict[str, float]:
    """Seconds by purpose, from the last time record, which holds totals."""
    last = next((record for record in reversed(records) if record.get("kind") == "time"), {})
    seconds = last.get("seconds")
    return (
        {name: float(value) for name, value in seconds.items() if is_number(value)}
        if isinstance(seconds, dict)
        else {}
    )


def warnings(records_by_place: dict[str, list[Record]]) -> Warnings:
    """The warnings of one run, whose place is "", or of several, each with the places and the steps that it came from."""
    found: dict[str, dict[str, list[Any]]] = {}
    for place, records in records_by_place.items():
        for record in records:
            if record.get("kind") == "warning":
                found.setdefault(str(record.get("message", "")), {}).setdefault(place, []).append(
                    record.get("step")
                )
    groups = [
        (
            message,
            sum(map(len, places.values())),
            "; ".join(filter(None, (_place(*item) for item in places.items()))),
        )
        for message, places in found.items()
    ]
    return Warnings(groups[:MAX_WARNINGS], max(0, len(groups) - MAX_WARNINGS))


def is_number(value: Any) -> bool:
    """Of what JSON can hold: no truth value, and no integer beyond every float."""
    return isinstance(value, float) or (
        isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**1023
    )


def _is_step(value: Any) -> bool:
    return is_number(value) and math.isfinite(value)


def _place(place: str, steps: list[Any]) -> str:
    ends = dict.fromkeys(str(step) for step in (steps[0], steps[-1]) if step is not None)
    return ", ".join(filter(None, (place, f"step {' to '.join(ends)}" if ends else "")))
