"""What a run leaves behind while it goes: metrics.jsonl, figures, and a progress bar for whoever watches."""

import json
import math
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
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
    """A problem with metrics by class, which the report shows in tables of their own."""

    def class_metrics(self) -> dict[str, list[tuple[str, float | None]]]:
        """Return metrics by class of the last `evaluate`: metric to (class, value) in order.

        None: the class occurs neither in the truth nor in the prediction.
        """
        ...


class KnowsTargets(Protocol):
    """A problem that knows which metrics its feedback is about; the others are side effects."""

    def is_target_metric(self, metric: str) -> bool:
        """Return whether the feedback is about this metric of `evaluate`."""
        ...


def target_metrics(problem: Problem, metrics: Iterable[str]) -> list[str]:
    """Return the metrics that the feedback is about: by default all of them."""
    known = problem if supports(problem, KnowsTargets) else None
    return [name for name in metrics if known is None or known.is_target_metric(name)]


class RunLog:
    """Appends one JSON object a line to `folder`/metrics.jsonl, shows progress on `console`, passes numbers and figures on to `trackers`.

    A checkpoint holds length and CRC of the file; a resumed run cuts off what came later, so that
    every step is logged once. A tracker that fails is left out from then on, with a warning: the
    run is worth more.
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
        """Raises MetaVPTError where one does not start: a server or an account is then better mended before the run than after it."""
        for name, tracker in self.trackers.items():
            try:
                tracker.start(config, self.folder)
            except Exception as error:
                raise MetaVPTError(
                    f"tracker={name}: does not start ({brief(error, named=True)})"
                ) from error

    def write(self, kind: str, step: int, **values: Any) -> None:
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
        self.write("warning", step, message=message)
        self.console.print(f"step {step}: {message}", style="yellow")

    def records(self) -> list[dict[str, Any]]:
        """Everything written so far."""
        return [json.loads(line) for line in self.path.read_text().splitlines()]

    def save_figures(self, step: int, figures: dict[str, np.ndarray]) -> None:
        """One PNG each: figures/<name>-step<NNNNNN>.png."""
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
        """texts/step<NNNNNN>.json, where there are any."""
        if any(texts):
            path = self.folder / "texts" / f"step{step:06d}.json"
            with writing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(texts._asdict(), ensure_ascii=False))

    def discard(self) -> None:
        """Forget what was written."""
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Let the trackers finish what they hold back; nothing is tracked after it."""
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
                    f"tracker {name} failed and is left out from here on "
                    f"({brief(error, named=True)})",
                )

    @contextmanager
    def progress(self, budget: Budget) -> Iterator[None]:
        """A bar over the budget for as long as the block runs."""
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
        """Length and CRC-32 of the file as it is."""
        data = self._data()
        return {"bytes": len(data), "crc": zlib.crc32(data)}

    def rewind(self, state: Mapping[str, int], step: int) -> list[str]:
        """Cut off what was logged after a checkpoint.

        Args:
            state: The log's `state_dict` in the checkpoint.
            step: The step of the checkpoint.

        Returns:
            A line of warning if the file is no longer the one that the checkpoint knew. Of such a
            file the whole lines up to `step` stay.
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
        what = (
            "is shorter than when the checkpoint was saved"
            if len(data) < expected
            else "was changed after the checkpoint was saved"
        )
        return [f"{self.path.name} {what}; its {len(kept)} whole lines up to step {step} are kept"]

    def _data(self) -> bytes:
        return self.path.read_bytes() if self.path.is_file() else b""


class UnwrittenLog(RunLog):
    """Writes nothing: that of every process but the first."""

    def write(self, kind: str, step: int, **values: Any) -> None:
        pass

    def save_figures(self, step: int, figures: dict[str, np.ndarray]) -> None:
        pass

    def save_texts(self, step: int, texts: Texts) -> None:
        pass

    def discard(self) -> None:
        pass

    def state_dict(self) -> dict[str, int]:
        return {}

    def rewind(self, state: Mapping[str, int], step: int) -> list[str]:
        return []


def _jsonable(value: Any) -> Any:
    """Convert numbers of NumPy and torch to those of Python; null stands for NaN and infinity, which JSON lacks."""
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
    """<kind>/<name> of every finite number, also of those a level down: the metrics of a probe, the seconds of each purpose."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _numbers(kind, value)
        elif (
            isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        ):
            yield f"{kind}/{name}", float(value)
