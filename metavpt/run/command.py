"""`python -m metavpt.run problem=dino_nyuv2`: one run and its report; with -m a sweep.

For example `strategy=one_step seed=0`, or `resume=true` to continue a run.
"""

import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from signal import Signals
from statistics import fmean

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning_fabric import Fabric
from omegaconf import DictConfig, OmegaConf
from rich.table import Table
from rich.text import Text

from metavpt import report
from metavpt.cli.configuration import command
from metavpt.cli.console import Console, say
from metavpt.cli.formatting import number
from metavpt.cli.one_line_errors import dead_worker
from metavpt.distributed import collectives
from metavpt.errors import MetaVPTError, NonFiniteError
from metavpt.problem import Directions, sign
from metavpt.report import Record, read_log, series_of, summary_rows
from metavpt.report.logs import times
from metavpt.report.run import steering
from metavpt.run import dry_run
from metavpt.training import health, run_folder
from metavpt.training.budget import UNCOUNTED
from metavpt.training.build import build, check_option_types
from metavpt.training.checkpoint import Checkpoints
from metavpt.training.disk import write_text
from metavpt.training.engine import make_fabric
from metavpt.training.signals import Stopped, StopRequest
from metavpt.training.trainer import Trainer

DATA_SHARE, LEAST_SECONDS = 0.2, 10.0  # of the training time, from which on data is worth a hint
# Options that do not change the result of a run.
NOT_CONFIGURATION = (
    *("resume", "output", "minimise", "metrics", "tracker", "allow_targets", "allow_env"),
    *("devices", "nodes", "parallel"),
)


@dataclass(frozen=True)
class Objective:
    """The metric of the last probe that a sweep minimises, times `factor` (1 or -1)."""

    metric: str
    factor: int = 1

    @classmethod
    def parse(cls, text: str | None) -> "Objective | None":
        """Parse `ridge/depth_rmse` or `-ridge/seg_miou`. None for None."""
        if text is None:
            return None
        return cls(text.removeprefix("-"), -1 if text.startswith("-") else 1)

    def check(self, directions: Directions) -> None:
        """Check that the sign fits the direction of the metric.

        Args:
            directions: The better direction of each metric, as the problem states it.

        Raises:
            MetaVPTError: The sweep would look for the worst run.
        """
        if sign(self.metric, directions) == self.factor:
            ours, right = ("-", "") if self.factor < 0 else ("", "-")
            raise MetaVPTError(
                f"minimise={ours}{self.metric} would look for the worst run; "
                f"write minimise={right}{self.metric}"
            )

    def __call__(self, metrics: Mapping[str, float]) -> float:
        """Return the value to minimise.

        Raises:
            MetaVPTError: There is no such metric.
        """
        if self.metric not in metrics:
            raise MetaVPTError(
                f"minimise={self.metric}: no such metric; known: {', '.join(metrics)}"
            )
        return self.factor * metrics[self.metric]


def run(cfg: DictConfig) -> float | None:
    """Train, print the metrics before and after, and write the report.

    Returns:
        The value of `cfg.minimise`. None without one.
    """
    console = Console()
    check_option_types(cfg)
    if cfg.trainer.get("dry_run"):
        return describe(cfg, console)
    objective = Objective.parse(cfg.minimise)
    if cfg.threads is not None and cfg.threads < 1:
        raise MetaVPTError(f"threads={cfg.threads}: must be at least 1, or null")
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    fabric = make_fabric(cfg.device, cfg.precision, cfg.devices, cfg.nodes, cfg.parallel)
    folder, resume = collectives.first(_folder(cfg) if collectives.rank() == 0 else None)
    try:
        metrics = _train_and_report(cfg, folder, resume, objective, console, fabric)
    finally:
        run_folder.unlock(folder)
    return objective(metrics) if objective else None


def describe(cfg: DictConfig, console: Console) -> None:
    """Print parameters, memory and schedule of a run. No data and no weights are read."""
    with torch.device("meta"):
        trainer = build(dry_run.without_files(cfg), Path(str(cfg.runs)), console)
    console.print(dry_run.plan(trainer, cfg.precision))


def _train_and_report(
    cfg: DictConfig,
    folder: Path,
    resume: bool,
    objective: Objective | None,
    console: Console,
    fabric: Fabric,
) -> dict[str, float]:
    """Train, print the table, write the report, and return the final metrics."""
    stop = StopRequest()
    try:
        with stop.listening():
            metrics = _train(cfg, folder, resume, objective, console, fabric, stop)
    except Stopped as stopped:
        if collectives.rank() == 0:
            console.print(_how_it_goes_on(folder, stopped.signal), soft_wrap=True, highlight=False)
        sys.exit(stopped.status)
    if collectives.rank() == 0:
        console.print(summary(folder))
        if hint := data_hint(read_log(folder / "metrics.jsonl"), cfg.problem.get("num_workers")):
            console.print(hint, soft_wrap=True, highlight=False)
        console.print(f"report: {report.write_report(folder)}")
    return metrics


def _train(
    cfg: DictConfig,
    folder: Path,
    resume: bool,
    objective: Objective | None,
    console: Console,
    fabric: Fabric,
    stop: StopRequest,
) -> dict[str, float]:
    """Train and return the final metrics.

    A run that fails before its first step leaves no folder.
    """
    trainer: Trainer | None = None
    try:
        trainer = build(cfg, folder, console, fabric)
        trainer.stop = stop
        if objective:
            objective.check(trainer.problem.metric_directions)
        if trainer.checkpoints and trainer.checkpoints.paths():
            trainer.resume()
        else:
            trainer.log.discard()  # from an attempt that ended before a checkpoint
            trainer.check()
            trainer.measure()
        # An unknown metric name is an error before the training.
        if objective and trainer.metrics:
            objective(trainer.metrics)
        trainer.run()
        return trainer.metrics
    except RuntimeError as error:
        if stop.signal is None or not dead_worker(str(error)):
            raise
        # The signal reached the data workers too, and they exited first.
        raise Stopped(stop.signal) from error
    except BaseException:
        nothing = (
            not resume
            and (trainer is None or not trainer.budget.steps)
            and not (folder / health.FAILURE_FILE).exists()
        )
        if collectives.rank() == 0 and nothing:
            run_folder.remove(folder)
        raise
    finally:
        if trainer is not None:
            trainer.log.close()


def _how_it_goes_on(folder: Path, signal: Signals) -> str:
    """Return the line that explains how to resume a stopped run."""
    saved = Checkpoints(folder / "checkpoints").paths()
    if not saved:
        return f"stopped by {signal.name} before the first checkpoint; nothing was saved"
    multirun = HydraConfig.get().mode is RunMode.MULTIRUN
    place = f"hydra.sweep.dir={folder.parent}" if multirun else f"output={folder}"
    command = run_folder.resume_command("run", place)
    return f"stopped by {signal.name}, saved in {saved[-1]}; resume with\n{command}"


def _folder(cfg: DictConfig) -> tuple[Path, bool]:
    """Return the folder of the run, and whether the run is resumed.

    A job of a sweep has its own folder inside the sweep's.
    """
    hydra_cfg = HydraConfig.get()
    output = Path(str(cfg.output)) if cfg.output else None
    resume = cfg.resume or _is_restarted()
    if hydra_cfg.mode is RunMode.MULTIRUN:
        if output:
            raise MetaVPTError(
                f"output={output}: the runs of a sweep cannot share a folder; set the folder of "
                "the sweep with hydra.sweep.dir="
            )
        if not cfg.minimise and not hydra_cfg.sweeper._target_.endswith(".BasicSweeper"):
            raise MetaVPTError(
                "minimise=null: this sweeper minimises a metric; set it, for example "
                "minimise=ridge/depth_rmse"
            )
        output = Path(hydra_cfg.runtime.output_dir)
        # Jobs that an interrupted sweep did not reach start anew.
        resume = resume and (output / "config.yaml").is_file()
    config = OmegaConf.to_yaml(
        OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key not in NOT_CONFIGURATION]),
        resolve=True,
    )
    if resume:
        folder = run_folder.find(output, Path(str(cfg.runs)), config, may_change=["budget"])
        write_text(folder / "config.yaml", config)  # its budget may be longer now
        return folder, True
    chosen = hydra_cfg.runtime.choices
    name = f"{chosen['problem']}-{chosen['strategy']}-seed{cfg.seed}"
    folder = run_folder.create(output, Path(str(cfg.runs)), name)
    try:
        write_text(folder / "config.yaml", config)
        choices = {axis: chosen[axis] for axis in ("problem", "strategy")}
        run_folder.write_environment(folder, cfg.seed, choices=choices)
    except BaseException:
        run_folder.remove(folder)
        raise
    return folder, False


def _is_restarted() -> bool:
    """Return whether torchrun restarted the processes after a failure (--max-restarts)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def summary(folder: Path) -> Table:
    """Compare step 0 with the last step for every metric of the run in `folder`."""
    records = read_log(folder / "metrics.jsonl")
    rows = summary_rows(records)
    first = min((row.first_step for row in rows), default=0)
    last = max((row.last_step for row in rows), default=0)
    made = Table(
        "metric",
        box=None,
        header_style="dim",
        caption=Text("\n".join(spending(records))),
        caption_justify="left",
    )
    for title in (f"step {first}", f"step {last}", "change", ""):
        made.add_column(title, justify="right")
    for row in rows:
        verdict = Text({True: "better", False: "worse", None: ""}[row.better])
        made.add_row(
            Text(row.name),
            number(row.first),
            number(row.last),
            number(row.change, sign=True),
            verdict,
        )
    return made


def spending(records: list[Record]) -> list[str]:
    """Describe steering, the value V, throughput and time shares, one line each.

    V is the mean over the first and over the last quarter of the designer's updates.
    """
    lines = [f"steering: {line}" for line in steering(records)]
    values = list(series_of(records, "designer").get("value", {}).values())
    if values:
        quarter = max(1, len(values) // 4)
        lines.append(
            f"value V: {fmean(values[:quarter]):+.3g} -> {fmean(values[-quarter:]):+.3g} over "
            f"{len(values)} designer updates"
        )
    throughput = list(series_of(records, "train").get("samples_per_s", {}).values())
    if throughput:
        lines.append(f"throughput: {throughput[-1]:.0f} samples/s")
    training = _training_seconds(records)
    total = sum(training.values())
    if total:
        shares = sorted(training.items(), key=lambda item: -item[1])
        names = {"designer": "designer updates", "task": "task construction"}
        lines.append(
            "training time: "
            + ", ".join(
                f"{names.get(purpose, purpose)} {seconds / total:.0%}"
                for purpose, seconds in shares
            )
        )
    return lines


def data_hint(records: list[Record], num_workers: int | None) -> str | None:
    """Return the option that helps a run that waits for its data.

    Args:
        records: The log of the run.
        num_workers: `problem.num_workers`; None if the problem has no such option.
    """
    training = _training_seconds(records)
    waiting, total = training.get("data", 0.0), sum(training.values())
    if num_workers is None or total < LEAST_SECONDS or waiting < DATA_SHARE * total:
        return None
    return (
        f"data took {waiting / total:.0%} of the training time: problem.num_workers="
        f"{num_workers + 2} reads it in processes of their own, beside the training"
    )


def _training_seconds(records: list[Record]) -> dict[str, float]:
    """Return the seconds of each purpose that count as training."""
    return {
        purpose: seconds for purpose, seconds in times(records).items() if purpose not in UNCOUNTED
    }


@command("run")
def main(cfg: DictConfig) -> float | None:
    """Run the command and return the value that a sweep minimises."""
    try:
        return run(cfg)
    except (NonFiniteError, torch.OutOfMemoryError) as error:
        if HydraConfig.get().mode is not RunMode.MULTIRUN:
            raise
        say("warning:", f"this job of the sweep failed: {error}", "yellow")
        return math.inf  # a result of the sampled values, so the sweep continues
