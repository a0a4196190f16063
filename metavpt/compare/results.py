"""What a comparison measured: one result for each row and seed, kept as lines of rows.jsonl."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from metavpt.errors import MetaVPTError

FILE = "rows.jsonl"


@dataclass(frozen=True)
class Result:
    """One strategy on one seed, from the shared warm start to the end of its budget.

    step0, metrics   probe metrics before and after
    peak_memory      bytes, of training alone
    steered          the metrics that the feedback is about; None: all of them
    error            one line where the row failed; then nothing else is known
    """

    row: str
    seed: int
    error: str | None = None
    step0: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    steps: int = 0
    samples: int = 0
    grad_evals: int = 0
    seconds: float = 0.0
    times: dict[str, float] = field(default_factory=dict)
    peak_memory: int = 0
    steered: list[str] | None = None

    @property
    def samples_per_s(self) -> float:
        return self.samples / max(self.seconds, 1e-9)


def append(folder: Path, result: Result) -> None:
    """Add a line to the rows.jsonl in `folder`."""
    with (folder / FILE).open("a") as file:
        file.write(json.dumps(asdict(result)) + "\n")


def read(folder: Path) -> list[Result]:
    """The results in `folder`, the last one for each row and seed; a last line cut short by a kill is left out."""
    path = folder / FILE
    if not path.is_file():
        return []
    lines = path.read_text(errors="replace").splitlines()
    found: dict[tuple[str, int], Result] = {}
    for number, line in enumerate(lines, start=1):
        try:
            result = _parse(json.loads(line))
        except (ValueError, TypeError, AttributeError) as error:
            if number == len(lines):
                continue
            raise MetaVPTError(
                f"{path} line {number}: not the result of a comparison ({error}); delete the line to run that row again"
            ) from None
        found[result.row, result.seed] = result
    return list(found.values())


def _parse(record: Mapping[str, object]) -> Result:
    return Result(
        **{name: record[name] for name in (f.name for f in fields(Result)) if name in record}
    )  # type: ignore[arg-type]
