"""The log of a run, read from its metrics.jsonl."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import numpy as np

from metavpt.errors import MetaVPTError
from metavpt.problem import Direction

Record = dict[str, Any]
Series = dict[str, dict[int, float]]  # name -> step -> value

# Totals of a train record. As curves they are straight lines.
COUNTERS = ("samples", "grad_evals", "seconds", "steered_steps", "labelled_steps")
MAX_WARNINGS = 50


class Warnings(NamedTuple):
    """Distinct warnings of a log.

    Attributes:
        groups: Tuples (message, count, places), oldest first.
        num_left_out: The number of further distinct warnings.
    """

    groups: list[tuple[str, int, str]]
    num_left_out: int


def read_log(path: Path) -> list[Record]:
    """Read the records of metrics.jsonl.

    The last line may be cut off by a killed run and is skipped. Any other bad line becomes a
    warning.

    Args:
        path: The file.

    Raises:
        MetaVPTError: There is no such file.
    """
    if not path.is_file():
        raise MetaVPTError(
            f"{path}: no such log; give the folder of a run (it holds metrics.jsonl)"
        )
    lines = path.read_text(errors="replace").splitlines()
    records: list[Record] = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        # ValueError: not JSON, or a number of thousands of digits. RecursionError: too deep.
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict):
            records.append(record)
        elif line.strip() and number < len(lines):
            message = f"{path.name} line {number} cannot be read and was left out"
            records.append({"kind": "warning", "message": message})
    return records


def series_of(records: list[Record], kind: str) -> Series:
    """Return every number in the records of `kind`, by name and step.

    If a step was logged twice, the later record counts.
    """
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
    """Return the better direction of each metric, as the last probe record states it."""
    stated: Any = {}
    for record in records:
        if record.get("kind") == "probe":
            stated = record.get("directions", stated)
    if not isinstance(stated, dict):
        return {}
    return {name: which for name, which in stated.items() if which in ("lower", "higher")}


def samples_at(records: list[Record], steps: Iterable[int]) -> np.ndarray:
    """Return the samples seen by each of `steps`, linearly interpolated between records."""
    logged = {0: 0.0} | series_of(records, "train").get("samples", {})
    known = sorted(logged)
    return np.interp(list(steps), known, [logged[step] for step in known])


def spent(records: list[Record]) -> dict[str, float]:
    """Return the last step, and the totals of the last train record."""
    steps = float(max((r["step"] for r in records if _is_step(r.get("step"))), default=0))
    last = next((record for record in reversed(records) if record.get("kind") == "train"), {})
    return {"steps": steps} | {
        name: float(last[name]) for name in COUNTERS if is_number(last.get(name))
    }


def times(records: list[Record]) -> dict[str, float]:
    """Return seconds by purpose. The last time record holds the totals."""
    last = next((record for record in reversed(records) if record.get("kind") == "time"), {})
    seconds = last.get("seconds")
    return (
        {name: float(value) for name, value in seconds.items() if is_number(value)}
        if isinstance(seconds, dict)
        else {}
    )


def warnings(records_by_place: dict[str, list[Record]]) -> Warnings:
    """Group the warnings of one run (with place "") or of several runs by message."""
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


def is_number(value: Any) -> TypeGuard[float]:
    """Return whether a JSON value is a number that fits into a float. Booleans are not numbers."""
    return isinstance(value, float) or (
        isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**1023
    )


def _is_step(value: Any) -> bool:
    return is_number(value) and math.isfinite(value)


def _place(place: str, steps: list[Any]) -> str:
    ends = dict.fromkeys(str(step) for step in (steps[0], steps[-1]) if step is not None)
    return ", ".join(filter(None, (place, f"step {' to '.join(ends)}" if ends else "")))
