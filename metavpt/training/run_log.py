"""The log of a run: metrics.jsonl, figures, texts, and a progress bar."""

import json
import math
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from metavpt.cli.console import Console
from metavpt.errors import MetaVPTError, brief, writing
from metavpt.probes.samples import Texts
from metavpt.problem import Problem, supports
from metavpt.training.budget import Budget
from metavpt.training.disk import replacing, write_text
from metavpt.training.trackers import Tracker


class Reportable(Protocol):
    """A problem that shows more than metrics in the report.

    A problem that inherits from this class defines what it has and leaves the rest empty.
    """

    def figures(self) -> dict[str, np.ndarray]:
        """Return pictures for the report by name, uint8 of shape (H, W, 3)."""
        return {}

    def texts(self) -> Texts:
        """Return text samples for the report: answers, and tokens with their targets."""
        return Texts([], [])

    def counters(self) -> dict[str, float]:
        """Return totals for the log that grow with the steps, such as images that were skipped."""
        return {}


class ReportsClasses(Protocol):
    """A problem with metrics by class, which the report shows in their own tables."""

    def class_metrics(self) -> dict[str, list[tuple[str, float | None]]]:
        """Return metrics by class of the last `evaluate`: metric to (class, value) in order.

        None: the class occurs neither in the truth nor in the prediction.
        """
        ...


class KnowsTargets(Protocol):
    """A problem that knows its target metrics. The other metrics are side effects."""

    def is_target_metric(self, metric: str) -> bool:
        """Return whether the feedback steers towards this metric of `evaluate`."""
        ...


def target_metrics(problem: Problem, metrics: Iterable[str]) -> list[str]:
    """Return the target metrics. Default: all."""
    known = problem if supports(problem, KnowsTargets) else None
    return [name for name in metrics if known is None or known.is_target_metric(name)]


class RunLog:
    """Appends one JSON object per line to metrics.jsonl and shows the progress.

    A checkpoint holds the length and the CRC of the file. A resumed run cuts off later lines, so
    every step is logged once. If a tracker fails, it is dropped with a warning, and the run
    continues.

    Args:
        folder: The folder of the run.
        console: Where the progress is shown. None: nothing is shown.
        trackers: Trackers by name, which also get numbers and figures.
    """

    def __init__(
        self,
        folder: Path,
        console: Console | None = None,
        trackers: Mapping[str, Tracker] | None = None,
    ) -> None:
        self.folder = folder
        self.path = folder / "metrics.jsonl"
        self.console = console or Console(quiet=True)
        self.trackers = dict(trackers or {})
        self._step = 0
        self._bar: Progress | None = None
        self._shown: dict[str, float] = {}

    def start_trackers(self, config: dict[str, Any]) -> None:
        """Start the trackers.

        Raises:
            MetaVPTError: A tracker does not start. It is better to fix this before the run.
        """
        for name, tracker in self.trackers.items():
            try:
                tracker.start(config, self.folder)
            except Exception as error:
                raise MetaVPTError(
                    f"tracker={name}: does not start ({brief(error, named=True)})"
                ) from error

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Append a record.

        Args:
            kind: The kind of record, such as "train" or "probe".
            step: The training step.
            values: Numbers, arrays and mappings.
        """
        plain = _jsonable(values)
        with writing(self.path):
            self.folder.mkdir(parents=True, exist_ok=True)
        with writing(self.path), self.path.open("a") as file:
            file.write(json.dumps({"kind": kind, "step": step, **plain}) + "\n")
        self._shown.update({name: values[name] for name in ("loss", "value") if name in values})
        self._step = step
        numbers = dict(_numbers(kind, plain))
        if numbers:
            self._track(lambda tracker: tracker.log(step, numbers))

    def warn(self, step: int, message: str) -> None:
        """Log a warning and print it."""
        self.write("warning", step, message=message)
        self.console.print(f"step {step}: {message}", style="yellow")

    def records(self) -> list[dict[str, Any]]:
        """Return all records."""
        return [json.loads(line) for line in self.path.read_text().splitlines()]

    def save_figures(self, step: int, figures: dict[str, np.ndarray]) -> None:
        """Write figures/<name>-step<NNNNNN>.png for each figure."""
        from PIL import Image  # of the extra `run`, which those do not need who log no pictures

        for name, pixels in figures.items():
            path = self.folder / "figures" / f"{name}-step{step:06d}.png"
            with writing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
        for name, pixels in figures.items():
            self._track(
                lambda tracker, name=name, pixels=pixels: tracker.figure(name, step, pixels)
            )

    def save_texts(self, step: int, texts: Texts) -> None:
        """Write texts/step<NNNNNN>.json if there are any texts."""
        if any(texts):
            path = self.folder / "texts" / f"step{step:06d}.json"
            with writing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(texts._asdict(), ensure_ascii=False))

    def discard(self) -> None:
        """Delete the log."""
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the trackers. Nothing is tracked afterwards."""
        self._track(lambda tracker: tracker.close())
        self.trackers.clear()

    def _track(self, send: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self.trackers.items()):
            try:
                send(tracker)
            except Exception as error:
                del self.trackers[name]
                self.warn(
                    self._step,
                    f"tracker {name} failed and is dropped ({brief(error, named=True)})",
                )

    @contextmanager
    def progress(self, budget: Budget) -> Iterator[None]:
        """Show a progress bar over the budget inside the block."""
        columns = (
            BarColumn(),
            TextColumn("{task.percentage:3.0f}%"),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console) as self._bar:
            self._bar.add_task("", total=1.0)
            yield
        self._bar = None

    def advance(self, budget: Budget) -> None:
        """Update the progress bar."""
        if self._bar is None:
            return
        loss, value = self._shown.get("loss"), self._shown.get("value")
        parts = [
            f"step {budget.steps}",
            f"{budget.samples / max(budget.seconds, 1e-9):.0f} samples/s",
        ]
        parts += [f"loss {loss:.4f}"] if loss is not None else []
        parts += [f"V {value:+.3g}"] if value is not None else []
        self._bar.update(
            self._bar.task_ids[0], completed=budget.progress, description="  ".join(parts)
        )

    def state_dict(self) -> dict[str, int]:
        """Return length and CRC-32 of the file."""
        data = self._data()
        return {"bytes": len(data), "crc": zlib.crc32(data)}

    def rewind(self, state: Mapping[str, int], step: int) -> list[str]:
        """Cut off what was logged after a checkpoint.

        Args:
            state: The log's `state_dict` in the checkpoint.
            step: The step of the checkpoint.

        Returns:
            A warning if the file is not the one of the checkpoint. Then its whole lines up to
            `step` are
            kept.
        """
        data, expected = self._data(), state["bytes"]
        if len(data) >= expected and zlib.crc32(data[:expected]) == state["crc"]:
            if data:
                os.truncate(self.path, expected)
            return []
        kept = [line for line in data.splitlines(keepends=True) if _is_record(line, step)]
        if data:
            with replacing(self.path) as file:
                file.writelines(kept)
        what = "was changed after the checkpoint was saved"
        if len(data) < expected:
            what = "is shorter than when the checkpoint was saved"
        return [f"{self.path.name} {what}; its {len(kept)} whole lines up to step {step} are kept"]

    def _data(self) -> bytes:
        return self.path.read_bytes() if self.path.is_file() else b""


class UnwrittenLog(RunLog):
    """A log that writes nothing, for every process but the first."""

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Write nothing."""
        pass

    def save_figures(self, step: int, figures: dict[str, np.ndarray]) -> None:
        """Write nothing."""
        pass

    def save_texts(self, step: int, texts: Texts) -> None:
        """Write nothing."""
        pass

    def discard(self) -> None:
        """Delete nothing."""
        pass

    def state_dict(self) -> dict[str, int]:
        """Return nothing."""
        return {}

    def rewind(self, state: Mapping[str, int], step: int) -> list[str]:
        """Cut off nothing."""
        return []


def _jsonable(value: Any) -> Any:
    """Convert numbers of NumPy and torch to those of Python. NaN and infinity become null."""
    if isinstance(value, Mapping):
        return {str(name): _jsonable(item) for name, item in value.items()}
    if isinstance(value, Tensor | np.ndarray | np.generic):
        return _jsonable(value.tolist())
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_record(line: bytes, step: int) -> bool:
    """Return whether `line` is a whole record of `step` or before."""
    try:
        record = json.loads(line)
        return line.endswith(b"\n") and record["step"] <= step
    except (ValueError, TypeError, KeyError, RecursionError):
        return False


def _numbers(kind: str, values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield `<kind>/<name>` of every finite number, also of those one level down."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _numbers(kind, value)
        elif (
            isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        ):
            yield f"{kind}/{name}", float(value)
