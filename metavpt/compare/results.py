"""Results of a comparison: one for each row and seed, stored as lines of rows.jsonl."""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from metavpt.cli.yaml_size import check_yaml
from metavpt.errors import MetaVPTError, reading, writing
from metavpt.problem import Direction, Directions, check_directions
from metavpt.training.disk import locked, write_text

FILE = "rows.jsonl"
DIRECTIONS = "metrics.yaml"  # what the configuration of the comparison states


@dataclass(frozen=True)
class Result:
    """One strategy on one seed, from the shared warm start to the end of its budget.

    Attributes:
        row: The row's name.
        seed: The seed.
        error: One line if the row failed. Then the other fields are empty.
        step0: Probe metrics before training.
        metrics: Probe metrics after training.
        steps: Optimizer steps of the learner.
        samples: Unlabelled samples seen.
        grad_evals: Gradient evaluations.
        seconds: Wall-clock time.
        times: Seconds by purpose.
        peak_memory: The peak of training alone, in bytes.
        steered: The target metrics. None: all metrics.
        trivial: Metrics of predictions that ignore the input, by the name of the predictor.
        steered_steps: Steps on a task that feedback shaped. None: the strategy has no such tasks.
        labelled_steps: Steps with a loss on labels, as some controls take.
        directions: The better direction of each metric, as the problem states it.
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
        """Return the throughput."""
        return self.samples / max(self.seconds, 1e-9)


def append(folder: Path, result: Result) -> None:
    """Append a line to rows.jsonl, whole or not at all. Several processes may append at once.

    A last line that a crash cut short is removed first.

    Raises:
        MetaVPTError: The disk is full, or the file cannot be written.
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
    """Read the results in `folder`, the last one for each row and seed.

    Args:
        folder: The folder of a comparison.
        warn: Called with a line of text for each line of rows.jsonl that is not a result. The row
            of such a line runs again. A last line that a crash cut short is skipped without a
            warning.
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
                warn(f"{path} line {number}: not a result ({error}); skipped, its row runs again")
            continue
        found[result.row, result.seed] = result
    return list(found.values())


def write_directions(folder: Path, directions: Directions) -> None:
    """Save the directions that the configuration states, for the table and the report."""
    if directions:
        write_text(folder / DIRECTIONS, yaml.safe_dump(dict(directions)))


def read_directions(folder: Path) -> dict[str, Direction]:
    """Read what `write_directions` saved. Empty if there is no file.

    Raises:
        MetaVPTError: The file is damaged.
    """
    path = folder / DIRECTIONS
    if not path.is_file():
        return {}
    text = path.read_text(errors="replace")
    with reading(f"{path}: not a readable mapping of metrics", "fix or delete it"):
        check_yaml(text)
        stated = yaml.safe_load(text)
    if not isinstance(stated, dict):
        raise MetaVPTError(f"{path}: not a mapping of metrics to lower or higher; fix or delete it")
    return check_directions(stated, str(path))


def _parse(record: Mapping[str, Any]) -> Result:
    """Parse a line.

    Raises:
        ValueError: A field has the wrong type or value.
        TypeError: A required field is missing.
        AttributeError: It is not a result.
    """
    known = {f.name for f in fields(Result)}
    result = Result(**{name: value for name, value in record.items() if name in known})
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
        and type(result.seed) is int  # not a bool
    ):
        raise ValueError("a field is of the wrong type")
    if not set(result.directions.values()) <= {"lower", "higher"}:
        raise ValueError("a direction is neither lower nor higher")
    return result
