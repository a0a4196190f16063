"""Runs every row of every seed from a shared warm start, each in its own process."""

import multiprocessing as mp
import os
import shutil
import sys
import threading
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Protocol, cast

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from metavpt import report
from metavpt.cli.console import Console
from metavpt.cli.one_line_errors import reason
from metavpt.compare import results
from metavpt.compare.results import Result
from metavpt.errors import MetaVPTError
from metavpt.problem import supports
from metavpt.training import checkpoint, run_folder
from metavpt.training.first_order import head_names
from metavpt.training.run_log import target_metrics
from metavpt.training.trainer import Trainer

STATE, OUTPUT = "state.pt", "output.txt"


@dataclass(frozen=True)
class Job:
    """One training run: a row on a seed, or the warm start that all rows of a seed share.

    Attributes:
        row: The row's name.
        seed: The seed.
        folder: The folder of the run.
        build: Builds the trainer from the folder. It must pickle, since another process calls it.
        warm: The folder of the warm start. None: this job is one.
        untrained: Whether the warm start has no steps. Then it measures the initial weights.
    """

    row: str
    seed: int
    folder: Path
    build: Callable[[Path], Trainer]
    warm: Path | None = None  # the folder of its warm start; None: this is one
    untrained: bool = False  # a warm start of no steps: the initial weights, measured

    @property
    def title(self) -> str:
        """Return the row and the seed, for messages."""
        return f"{self.row}, seed {self.seed}"


class Comparison:
    """Runs the jobs that are not finished yet, warm starts first.

    A failed row is stored as a result with its error, and the others continue. Interrupted jobs
    resume from their checkpoints.

    Args:
        folder: The folder of the comparison.
        jobs: All jobs.
        num_processes: Jobs that run at the same time.
        console: Shows the progress. None: nothing is shown.
    """

    def __init__(
        self,
        folder: Path,
        jobs: Iterable[Job],
        num_processes: int = 1,
        console: Console | None = None,
    ) -> None:
        self.folder, self.jobs, self.num_processes = folder, list(jobs), num_processes
        self.console = console or Console(quiet=True)
        self.context = cast(Any, mp).get_context(
            "forkserver" if "forkserver" in mp.get_all_start_methods() else "spawn"
        )
        # Modules that every job imports; optimizers import the second.
        self.context.set_forkserver_preload(["metavpt.run.command", "torch._dynamo"])

    def run(self) -> list[Result]:
        """Run the jobs and return the results in the order of the jobs.

        Raises:
            MetaVPTError: A warm start failed.
        """
        results.read(self.folder, warn=self._warn)
        columns = (
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.description}", markup=False),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self.console) as progress:
            bar = progress.add_task("", total=len(self.jobs))
            waiting = [job for job in self.jobs if not self._is_done(job)]
            running: dict[int, tuple[Job, Any]] = {}
            try:
                while waiting or running:
                    for job in self._ready(waiting, running):
                        waiting.remove(job)
                        process = self.context.Process(
                            target=work, args=(job, self.folder, mp.get_start_method())
                        )
                        process.start()
                        running[process.sentinel] = (job, process)
                        self._note(f"{job.title}: started")
                    progress.update(
                        bar,
                        completed=len(self.jobs) - len(waiting) - len(running),
                        description=_titles(running),
                    )
                    for sentinel in wait(list(running)):
                        job, process = running.pop(sentinel)  # type: ignore[arg-type]
                        process.join()
                        self._finish(job, process.exitcode)
                        done = len(self.jobs) - len(waiting) - len(running)
                        self._note(f"{job.title}: ended, {done} of {len(self.jobs)}")
                progress.update(bar, completed=len(self.jobs), description="")
            finally:
                for _, process in running.values():
                    process.terminate()
        return self.results()

    def results(self) -> list[Result]:
        """Return the results so far, in the order of the jobs."""
        found = {(result.row, result.seed): result for result in results.read(self.folder)}
        return [found[job.row, job.seed] for job in self.jobs if (job.row, job.seed) in found]

    def _warn(self, line: str) -> None:
        self.console.print(line, style="yellow", soft_wrap=True)

    def _note(self, line: str) -> None:
        """Say what happens where the bar is not shown, as in a file."""
        if not self.console.is_terminal:
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _ready(self, waiting: list[Job], running: dict[int, tuple[Job, Any]]) -> list[Job]:
        """Return the jobs to start now."""
        free = self.num_processes - len(running)
        return [job for job in waiting if job.warm is None or (job.warm / STATE).exists()][:free]

    def _is_done(self, job: Job) -> bool:
        if job.warm is None:
            return (job.folder / STATE).exists()
        return any(
            result.row == job.row and result.seed == job.seed and result.error is None
            for result in results.read(self.folder)
        )

    def _finish(self, job: Job, exitcode: int | None) -> None:
        if exitcode == 0:
            return
        # A job that could not be unpickled in its process has no output.
        path = job.folder / OUTPUT
        output = path.read_text(errors="replace").splitlines() if path.exists() else []
        why = f"its process ended with status {exitcode}"
        if exitcode == 1 and output:
            why = output[-1]
        if job.warm is None:
            raise MetaVPTError(f"{job.title}: {why}")
        self._warn(f"{job.title} failed: {why}")
        results.append(self.folder, Result(job.row, job.seed, error=why))


def work(job: Job, folder: Path, start_method: str) -> None:
    """Run a job. This is the target of its process.

    Output goes to output.txt. If the job fails, the last line is the reason and the status is 1.

    Args:
        job: The job.
        folder: The folder of the comparison.
        start_method: How data workers start, the default of a single run. The start method of this
            process would import every module again in each worker.
    """
    mp.set_start_method(start_method, force=True)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    job.folder.mkdir(parents=True, exist_ok=True)
    with (job.folder / OUTPUT).open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        try:
            run_folder.lock(job.folder)  # held to the end of this process
            if job.warm is None:
                warm_start(job)
            else:
                results.append(folder, train(job, job.warm))
        except BaseException as error:
            output.write(f"{traceback.format_exc()}\n{reason(error)}\n")
            sys.exit(1)


def warm_start(job: Job) -> None:
    """Train on the ordinary recipe, and save the state and the metrics for all rows of the seed."""
    trainer = _begin(job)
    if job.untrained:
        trainer.measure()
    else:
        trainer.run()
    # The recipe does not change them, and a row may have others.
    untouched = {"designer", *head_names(trainer.problem)}
    state = {
        name: value for name, value in trainer.problem.state_dict().items() if name not in untouched
    }
    trivial: dict[str, dict[str, float]] = {}
    if supports(trainer.problem, TrivialPredictors):
        trivial = trainer.problem.trivial_metrics()
    checkpoint.write(
        job.folder / STATE, {"problem": state, "metrics": trainer.metrics, "trivial": trivial}
    )


def train(job: Job, warm: Path) -> Result:
    """Run a row from its warm start to the end of its budget, and write the report of the run.

    Raises:
        MetaVPTError: The state of the warm start is damaged.
    """
    trainer = _begin(job)
    state = checkpoint.read(warm / STATE)
    if not {"problem", "metrics"} <= state.keys():
        raise MetaVPTError(f"{warm / STATE}: not the state of a warm start; delete it")
    if trainer.budget.steps == 0:
        _copy_last_step(warm, job.folder)
        trainer.start_from(state["problem"], state["metrics"])
    trainer.run()
    trainer.log.close()
    report.write_report(job.folder)
    budget = trainer.budget
    return Result(
        job.row,
        job.seed,
        step0=state["metrics"],
        metrics=trainer.metrics,
        steps=budget.steps,
        samples=budget.samples,
        grad_evals=budget.grad_evals,
        seconds=budget.seconds,
        times=dict(budget.times),
        peak_memory=budget.memory.peak,
        steered=target_metrics(trainer.problem, trainer.metrics),
        trivial=state.get("trivial", {}),
        steered_steps=trainer.steered.steered,
        labelled_steps=trainer.steered.labelled,
        directions=dict(trainer.problem.metric_directions),
    )


def _begin(job: Job) -> Trainer:
    """Build the trainer and resume its newest checkpoint, or start a new log."""
    trainer = job.build(job.folder)
    if trainer.checkpoints and trainer.checkpoints.paths():
        trainer.resume()
    else:
        trainer.log.discard()
    return trainer


def _end_with_parent() -> None:
    """Exit with the parent process.

    Otherwise jobs of a killed comparison would write beside those of the resumed one.
    """
    parent = mp.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _copy_last_step(warm: Path, row: Path) -> None:
    """Copy figures and texts of the warm start's last step as step 0 of the row."""
    for pattern in ("figures/*-step*.png", "texts/step*.json"):
        newest = {path.stem.rpartition("step")[0]: path for path in sorted(warm.glob(pattern))}
        for name, path in newest.items():
            copy = row / path.parent.name / f"{name}step000000{path.suffix}"
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)


def _titles(running: dict[int, tuple[Job, Any]]) -> str:
    return " | ".join(job.title for job, _ in running.values())


class TrivialPredictors(Protocol):
    """A problem that can score predictions which ignore the input, to compare rows with."""

    def trivial_metrics(self) -> dict[str, dict[str, float]]:
        """Return metrics as `evaluate` names them, by the name of the predictor."""
        ...
