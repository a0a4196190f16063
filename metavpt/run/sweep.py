"""The result of a sweep: a table of its jobs, and the best configuration as an experiment file."""

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from rich.table import Table

from hydra_plugins.metavpt_optuna_sweeper import OptunaSweeper
from metavpt.cli.console import Console
from metavpt.cli.formatting import number
from metavpt.report import read_log, series_of
from metavpt.training.disk import write_text

# Hydra does not find the plugins of an editable install by itself.
Plugins.instance().register(OptunaSweeper)

# Options that do not change the result of a run.
NOT_WHAT_RAN = {
    *("runs", "output", "resume", "minimise", "tracker", "device", "devices", "nodes", "parallel")
}

Row = dict[str, str | float | None]


@dataclass(frozen=True)
class Job:
    """One run of a sweep, stored as job.json in its folder, since jobs may run on other machines.

    Attributes:
        number: The number of the job.
        overrides: Its overrides.
        groups: The configuration groups. The overrides alone do not tell groups from keys.
        value: The objective. None: there is none, or it is not finite.
        failed: Whether the run diverged or ran out of memory. Then only its first metrics are
            known.
    """

    number: int
    overrides: list[str]
    groups: list[str]
    value: float | None
    failed: bool = False

    def write(self, folder: Path) -> None:
        """Write job.json."""
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "job.json", json.dumps(asdict(self)) + "\n")


class Sweep(Callback):
    """Writes table.md, table.csv and experiment/best.yaml into the folder of a finished sweep."""

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Store the job and its objective."""
        hydra = config.hydra
        if hydra.mode is RunMode.MULTIRUN:
            value = job_return._return_value  # the property would raise what the job raised
            finite = isinstance(value, float) and math.isfinite(value)
            groups = [str(group) for group in hydra.runtime.choices]
            job = Job(
                hydra.job.num,
                list(hydra.overrides.task),
                groups,
                value if finite else None,
                failed=value == math.inf,
            )
            job.write(Path(hydra.runtime.output_dir))

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Write the table and the best configuration."""
        folder = Path(config.hydra.sweep.dir)
        jobs = [
            (Job(**json.loads(path.read_text())), path.parent) for path in folder.glob("*/job.json")
        ]
        jobs.sort(
            key=lambda pair: (math.inf if pair[0].value is None else pair[0].value, pair[0].number)
        )
        rows = _rows(jobs)
        write_table(folder, rows)
        console = Console()
        console.print(rich_table(rows))
        console.print(f"table: {folder / 'table.md'}")
        if jobs and jobs[0][0].value is not None:
            path = folder / "experiment" / "best.yaml"
            path.parent.mkdir(exist_ok=True)
            write_text(path, experiment(jobs[0][0]))
            console.print(f"best:  {path}", soft_wrap=True)


def write_table(folder: Path, rows: Sequence[Row]) -> None:
    """Write table.csv with all digits, and table.md for reading."""
    names = _names(rows)
    table = io.StringIO()
    writer = csv.DictWriter(table, names)
    writer.writeheader()
    writer.writerows(rows)
    write_text(folder / "table.csv", table.getvalue())
    lines = [
        names,
        ["---"] * len(names),
        *([_cell(row.get(name)) for name in names] for row in rows),
    ]
    write_text(
        folder / "table.md",
        "".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |\n" for line in lines),
    )


def rich_table(rows: Sequence[Row]) -> Table:
    """Render for a terminal: up to the objective if there is one, else all metrics."""
    names = _names(rows)
    if any(row["objective"] is not None for row in rows):
        names = names[: names.index("objective") + 1]
    table = Table(box=None, header_style="dim")
    for name in names:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(_cell(row.get(name)) for name in names))
    return table


def experiment(job: Job) -> str:
    """Write the overrides of `job` as an experiment file.

    Choices of groups go into its defaults list, everything else below it.
    """
    parents: list[Any] = []
    chosen: list[Any] = []
    values = OmegaConf.create()
    left_out = []
    for override in OverridesParser.create().parse_overrides(job.overrides):
        key = override.key_or_group + (f"@{override.package}" if override.package else "")
        value = override.value()
        if key in NOT_WHAT_RAN:
            continue
        if key == "experiment":
            parents += value if isinstance(value, list) else [value]
        elif key in job.groups:
            (parents if override.is_add() else chosen).append(
                {f"/{key}" if override.is_add() else f"override /{key}": value}
            )
        elif override.is_delete():
            left_out.append(override.input_line)
        else:
            OmegaConf.update(values, key, value, force_add=True)
    lines = [
        "# @package _global_",
        f"# Job {job.number} of a sweep, objective {job.value}. Run it with experiment=best and "
        "the folder above `experiment`",
        "# as --config-dir, or beside another one as 'hydra.searchpath=[file://<folder>]'.",
    ]
    lines += [f"# and {line} on the command line, which a file cannot set" for line in left_out]
    defaults = yaml.safe_dump({"defaults": [*parents, "_self_", *chosen]}, sort_keys=False)
    return "\n".join(lines) + "\n" + defaults + (OmegaConf.to_yaml(values) if values else "")


def _rows(jobs: Sequence[tuple[Job, Path]]) -> list[Row]:
    """Return job number, swept options, objective and last metrics of each job."""
    settings = [_setting(job) for job, _ in jobs]
    keys = list(dict.fromkeys(key for setting in settings for key in setting))
    swept = [key for key in keys if len({setting.get(key) for setting in settings}) > 1]
    return [
        {
            "job": job.number,
            **{key: setting.get(key) for key in swept},
            "objective": job.value,
            **_outcome(job, folder),
        }
        for (job, folder), setting in zip(jobs, settings, strict=True)
    ]


def _setting(job: Job) -> dict[str, str]:
    pairs = (override.partition("=") for override in job.overrides)
    return {key: value for key, _, value in pairs}


def _outcome(job: Job, folder: Path) -> Row:
    """Return the metrics of the last probe."""
    path = folder / "metrics.jsonl"
    if job.failed or not path.is_file():
        return {"objective": "failed"}
    series = series_of(read_log(path), "probe")
    return {name: values[max(values)] for name, values in series.items()}


def _names(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def _cell(value: str | float | None) -> str:
    return value if isinstance(value, str) else number(value)
