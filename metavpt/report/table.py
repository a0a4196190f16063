"""One table of many runs, learners one below the other: `python -m metavpt.report --table`."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from metavpt.cli.formatting import number, with_error
from metavpt.cli.yaml_size import check_yaml
from metavpt.compare import results
from metavpt.compare.paired_statistics import mean_se
from metavpt.compare.table import STEP0
from metavpt.errors import MetaVPTError, reading
from metavpt.problem import Direction, sign
from metavpt.report.logs import directions_of, read_log, series_of

ARROWS = {-1: " ↓", 0: "", 1: " ↑"}


@dataclass(frozen=True)
class Outcome:
    """One strategy on one learner and seed.

    Attributes:
        learner: The name of the backbone or language model.
        row: The strategy, or the row of a comparison.
        seed: The seed.
        step0: Metrics before training.
        metrics: Metrics after training.
        directions: The better direction of each metric.
    """

    learner: str
    row: str
    seed: int
    step0: Mapping[str, float]
    metrics: Mapping[str, float]
    directions: Mapping[str, Direction]


def read_outcomes(folder: Path) -> list[Outcome]:
    """Read what a run or a comparison has measured.

    Raises:
        MetaVPTError: `folder` holds neither, or no finished run.
    """
    learner = _learner(_mapping(folder / "config.yaml"))
    if (folder / results.FILE).is_file():
        stated = results.read_directions(folder)
        found = [
            Outcome(
                learner, one.row, one.seed, one.step0, one.metrics, {**one.directions, **stated}
            )
            for one in results.read(folder)
            if one.error is None
        ]
        if not found:
            raise MetaVPTError(f"{folder}: no row of this comparison has finished")
        return found
    records = read_log(folder / "metrics.jsonl")
    environment = _mapping(folder / "environment.json")
    series = series_of(records, "probe")
    steps = {step for values in series.values() for step in values}
    if len(steps) < 2:
        raise MetaVPTError(f"{folder}: was measured at {len(steps)} steps; the run has not ended")
    first, last = (
        {name: values[step] for name, values in series.items() if step in values}
        for step in (min(steps), max(steps))
    )
    row, seed = str(environment.get("strategy", "run")), int(environment.get("seed") or 0)
    return [Outcome(learner, row, seed, first, last, directions_of(records))]


def table(folders: Sequence[Path], metrics: Sequence[str] = ()) -> str:
    """Return Markdown: a table for each set of metrics, a line for each learner and strategy.

    Values are means over seeds with their standard error. Step 0 is that of all runs of a learner.

    Args:
        folders: Of runs and comparisons.
        metrics: The columns. Empty: all.

    Raises:
        MetaVPTError: A folder cannot be read, a metric is unknown, or two runs are the same one.
    """
    found = [outcome for folder in folders for outcome in read_outcomes(folder)]
    _check_distinct(found)
    known = list(dict.fromkeys(name for outcome in found for name in outcome.metrics))
    unknown = [name for name in metrics if name not in known]
    if unknown:
        raise MetaVPTError(f"--metrics {unknown[0]}: no run has it; known: {', '.join(known)}")
    groups: dict[tuple[str, ...], list[Outcome]] = {}
    for outcome in found:
        own = tuple(name for name in metrics or known if name in outcome.metrics)
        groups.setdefault(own, []).append(outcome)
    return "\n".join("\n".join(_lines(own, group)) + "\n" for own, group in groups.items() if own)


def _lines(metrics: Sequence[str], outcomes: Sequence[Outcome]) -> Iterator[str]:
    directions: dict[str, Direction] = {}
    for outcome in outcomes:
        directions |= outcome.directions
    titles = [f"{name}{ARROWS[sign(name, directions)]}" for name in metrics]
    yield _line(["learner", "row", "seeds", *titles])
    yield _line(["---", "---", *["---:"] * (1 + len(metrics))])
    for learner in dict.fromkeys(outcome.learner for outcome in outcomes):
        own = [outcome for outcome in outcomes if outcome.learner == learner]
        before = {outcome.seed: outcome.step0 for outcome in own}
        yield _row(learner, STEP0, list(before.values()), metrics)
        for row in dict.fromkeys(outcome.row for outcome in own):
            yield _row(learner, row, [one.metrics for one in own if one.row == row], metrics)


def _row(
    learner: str, row: str, values: Sequence[Mapping[str, float]], metrics: Sequence[str]
) -> str:
    cells = []
    for name in metrics:
        finite = [one[name] for one in values if math.isfinite(one.get(name, math.nan))]
        mean = mean_se(finite) if finite else None
        cells.append(with_error(mean.value, mean.se) if mean else number(None))
    return _line([learner, row, str(len(values)), *cells])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _check_distinct(outcomes: Sequence[Outcome]) -> None:
    seen: set[tuple[str, str, int, tuple[str, ...]]] = set()
    for one in outcomes:
        key = (one.learner, one.row, one.seed, tuple(one.metrics))
        if key in seen:
            raise MetaVPTError(
                f"two folders hold {one.row} on {one.learner} with seed {one.seed}; leave one out"
            )
        seen.add(key)


def _learner(config: Mapping[str, Any]) -> str:
    """Name the learner of a configuration: its architecture, hub name or folder."""
    backbone, learner = (config.get(key) or {} for key in ("backbone", "learner"))
    if backbone:
        return str(backbone.get("name", "backbone"))
    source = learner.get("source") or learner.get("model_type") or "learner"
    name = PurePosixPath(str(source)).name
    return f"{name}, LoRA" if learner.get("lora") else name


def _mapping(file: Path) -> dict[str, Any]:
    """Read config.yaml or environment.json; empty where there is none."""
    if not file.is_file():
        return {}
    with reading(f"{file}: cannot be read", "restore the file that the run wrote"):
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".yaml":
            check_yaml(text)
        found = yaml.safe_load(text) if file.suffix == ".yaml" else json.loads(text)
    return found if isinstance(found, dict) else {}
