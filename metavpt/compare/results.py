"""What a comparison measured: one result for each row and seed, kept as lines of rows.jsonl."""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from metavpt.errors import MetaVPTError, reading, writing
from metavpt.metrics import Direction, Directions, check_directions
from metavpt.training.disk import locked, write_text

FILE = "rows.jsonl"
DIRECTIONS = "metrics.yaml"  # what the configuration of the comparison states


@dataclass(frozen=True)
class Result:
    """One strategy on one seed, from the shared warm start to the end of its budget.

    step0, metrics   probe metrics before and after
    peak_memory      bytes, of training alone
    steered          the metrics that the feedback is about; None: all of them
    trivial          metrics of predictions that ignore the input, by the name of the predictor
    steered_steps    steps on a task that feedback shaped; None where the strategy uses no feedback for tasks
    labelled_steps   steps with a loss on labels, which controls take on purpose
    directions       metric to "lower" or "higher", whichever is better, as the problem states it
    error            one line where the row failed; then nothing else is known
    """

    row: str
    seed: int
    error: str | None = None
    step0: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    steps: int = 0
    samples: int = 0
    grad_evals: float = 0.0
    seconds: float = 0.0
    times: dict[str, float] = field(default_factory=dict)
    peak_memory: int = 0
    steered: list[str] | None = None
    trivial: dict[str, dict[str, float]] = field(default_factory=dict)
    steered_steps: int | None = None
    labelled_steps: int = 0
    directions: dict[str, Direction] = field(default_factory=dict)

    @property
    def samples_per_s(self) -> float:
        return self.samples / max(self.seconds, 1e-9)


def append(folder: Path, result: Result) -> None:
    """Add a line to rows.jsonl, whole or not at all; a last line that a crash cut short goes first.

    Several processes may append at once.

    Raises:
        MetaVPTError: There is no room for it.
    """
    path = folder / FILE
    line = (json.dumps(asdict(result)) + "\n").encode()
    with writing(path), path.open("a+b") as file, locked(file):
        file.seek(0)
        whole = file.read().rfind(b"\n") + 1
        file.truncate(whole)
        try:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        except OSError:
            os.truncate(path, whole)
            raise


def read(folder: Path, warn: Callable[[str], None] = lambda line: None) -> list[Result]:
    """The results in `folder`, the last one for each row and seed.

    Args:
        folder: The folder of a comparison.
        warn: Called with a line of text for each line of rows.jsonl that is no result. Such a line is
            left out, so that its row runs again. A last line that a crash cut short is left out silently.
    """
    path = folder / FILE
    if not path.is_file():
        return []
    with reading(f"{path}: cannot be read"):
        text = path.read_text(encoding="utf-8", errors="replace")
    found: dict[tuple[str, int], Result] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            result = _parse(json.loads(line))
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            if number <= text.count("\n"):
                warn(
                    f"{path} line {number}: not the result of a comparison ({error}); it is left out and its row runs again"
                )
            continue
        found[result.row, result.seed] = result
    return list(found.values())


def write_directions(folder: Path, directions: Directions) -> None:
    """Keep the directions that the configuration states, for the table and the report."""
    if directions:
        write_text(folder / DIRECTIONS, yaml.safe_dump(dict(directions)))


def read_directions(folder: Path) -> dict[str, Direction]:
    """The directions that `write_directions` kept; empty where there are none."""
    path = folder / DIRECTIONS
    if not path.is_file():
        return {}
    try:
        stated = yaml.safe_load(path.read_text(errors="replace"))
    except yaml.YAMLError:
        stated = None
    if not isinstance(stated, dict):
        raise MetaVPTError(f"{path}: no mapping from metrics to lower or higher; mend or delete it")
    return check_directions(stated, str(path))


def _parse(record: Mapping[str, Any]) -> Result:
    """Raises ValueError, TypeError or AttributeError for what is no result."""
    result = Result(
        **{name: record[name] for name in (f.name for f in fields(Result)) if name in record}
    )
    texts: list[Any] = [
        result.row,
        *(result.steered or []),
        *([] if result.error is None else [result.error]),
    ]
    numbers: list[Any] = [
        result.steps,
        result.samples,
        result.grad_evals,
        result.seconds,
        result.peak_memory,
    ]
    for part in (result.step0, result.metrics, result.times, *result.trivial.values()):
        numbers += part.values()
    if not (
        all(isinstance(text, str) for text in texts)
        and all(type(number) in (int, float) for number in numbers)
        and type(result.seed) is int  # a truth value is none
    ):
        raise ValueError("a field is of the wrong type")
    if not set(result.directions.values()) <= {"lower", "higher"}:
        raise ValueError("a direction is neither lower nor higher")
    return result
