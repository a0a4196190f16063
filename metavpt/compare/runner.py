"""Strategies against each other: every row of every seed from the same warm start, each in a process of its own."""

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
    """One training run of a comparison: a row on a seed, or the warm start that all rows of a seed share.

    build   (run folder) -> the trainer; it must pickle, since it is called in another process
    """

    row: str
    seed: int
    folder: Path
    build: Callable[[Path], Trainer]
    warm: Path | None = None  # the folder of its warm start; None: this is one
    untrained: bool = False  # a warm start of no steps: the initial weights, measured

    @property
    def title(self) -> str:
        return f"{self.row}, seed {self.seed}"


class Comparison:
    """Runs the jobs that `folder` does not hold yet, `num_processes` at once, warm starts first.

    A row that fails is kept as a result with its error, and the others go on. What was interrupted goes on from its checkpoint.
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
        self.context.set_forkserver_preload(
            ["metavpt.run.command", "torch._dynamo"]
        )  # what every job imports; optimizers bring the second

    def run(self) -> list[Result]:
        """Results in the order of the jobs."""
        results.read(self.folder, warn=self._warn)
        columns = (
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.description}", markup=False),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self.console) as progress:
            bar = progress.add_task("", total=len(self.jobs))
            waiting, running = (
                [job for job in self.jobs if not self._is_done(job)],
                dict[int, tuple[Job, Any]](),
            )
            try:
                while waiting or running:
                    for job in self._ready(waiting, running):
                        waiting.remove(job)
                        process = self.context.Process(
                            target=work, args=(job, self.folder, mp.get_start_method())
                        )
                        process.start()
                        running[process.sentinel] = (job, process)
                    progress.update(
                        bar,
                        completed=len(self.jobs) - len(waiting) - len(running),
                        description=_titles(running),
                    )
                    for sentinel in wait(list(running)):
                        job, process = running.pop(sentinel)  # type: ignore[arg-type]
                        process.join()
                        self._finish(job, process.exitcode)
                progress.update(bar, completed=len(self.jobs), description="")
            finally:
                for _, process in running.values():
                    process.terminate()
        return self.results()

    def results(self) -> list[Result]:
        """What is known so far, in the order of the jobs."""
        found = {(result.row, result.seed): result for result in results.read(self.folder)}
        return [found[job.row, job.seed] for job in self.jobs if (job.row, job.seed) in found]

    def _warn(self, line: str) -> None:
        self.console.print(line, style="yellow", soft_wrap=True)

    def _ready(self, waiting: list[Job], running: dict[int, tuple[Job, Any]]) -> list[Job]:
        """The jobs to start now."""
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
        path = (
            job.folder / OUTPUT
        )  # there is none where what it is to build is not found in another process
        output = path.read_text(errors="replace").splitlines() if path.exists() else []
        why = (
            output[-1] if exitcode == 1 and output else f"its process ended with status {exitcode}"
        )
        if job.warm is None:
            raise MetaVPTError(f"{job.title}: {why}")
        self._warn(f"{job.title} failed: {why}")
        results.append(self.folder, Result(job.row, job.seed, error=why))


def work(job: Job, folder: Path, start_method: str) -> None:
    """What the process of `job` does; what it prints goes to output.txt, and its last line is the reason where it failed (status 1).

    Loading processes of its own start as they do in a run, by `start_method`: one made as this one was would import everything anew.
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
    """Train the ordinary recipe and keep the problem's state with its metrics, from which every row of the seed begins."""
    trainer = _begin(job)
    if job.untrained:
        trainer.measure()
    else:
        trainer.run()
    untouched = {"designer", *head_names(trainer.problem)}  # by the recipe; a row may have others
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
    """The row from its warm start to the end of its budget, with the report of its run."""
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
    """The trainer, from the job's newest checkpoint where it has one, else with a log of its own."""
    trainer = job.build(job.folder)
    if trainer.checkpoints and trainer.checkpoints.paths():
        trainer.resume()
    else:
        trainer.log.discard()
    return trainer


def _end_with_parent() -> None:
    """A killed comparison leaves no process behind that would write beside the resumed one's."""
    parent = mp.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _copy_last_step(warm: Path, row: Path) -> None:
    """Figures and texts of the warm start's last step, as step 0 of the row."""
    for pattern in ("figures/*-step*.png", "texts/step*.json"):
        newest = {path.stem.rpartition("step")[0]: path for path in sorted(warm.glob(pattern))}
        for name, path in newest.items():
            copy = row / path.parent.name / f"{name}step000000{path.suffix}"
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)


def _titles(running: dict[int, tuple[Job, Any]]) -> str:
    return " | ".join(job.title for job, _ in running.values())


class TrivialPredictors(Protocol):
    """A problem that scores predictions which ignore the input, as rows to compare with."""

    def trivial_metrics(self) -> dict[str, dict[str, float]]:
        """Return metrics as `evaluate` names them, by the name of the predictor."""
        ...
