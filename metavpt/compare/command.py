"""`python -m metavpt.compare problem=...`: strategies at equal cost.

For example `strategies=[fixed,greedy,one_step] seeds=[0,1,2] match=steps`.
"""

import itertools
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import cast

import torch
from hydra import compose
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict

from metavpt import report
from metavpt.cli.configuration import check, command
from metavpt.cli.console import Console
from metavpt.compare import rendering, results
from metavpt.compare.runner import Comparison, Job
from metavpt.compare.table import Table
from metavpt.errors import MetaVPTError, check_known, writing
from metavpt.problem import check_directions
from metavpt.report.rows import run_folder as row_folder
from metavpt.training import run_folder
from metavpt.training.budget import UNITS
from metavpt.training.build import build as build_trainer
from metavpt.training.build import check_option_types
from metavpt.training.disk import write_text
from metavpt.training.engine import pick_device
from metavpt.training.signals import Stopped, StopRequest
from metavpt.training.trainer import Trainer

WARM_START = "warm start"
# Options of a comparison that a single run does not have.
OWN = {"strategies", "controls", "vary", "seeds", "match", "warm_start", "jobs", "metrics"}
# Options that may change when a comparison is resumed.
GROWS = {"strategies", "controls", "vary", "seeds", "jobs", "strategy", "seed", "metrics"}
PLACE = {"resume", "output", "runs", "allow_targets", "allow_env"}

Row = tuple[str, list[str]]  # a name and the overrides that make it

# strategy.<option>=... of the command line, for every row that has the option
shared: list[str] = []


def rows(cfg: DictConfig) -> list[Row]:
    """List the controls, then the strategies, each of these repeated over the values of `vary`.

    Raises:
        MetaVPTError: Two rows share a name, or there is no row.
    """
    found: dict[str, list[str]] = {}
    for entry in cfg.controls or []:
        found |= dict([_row(entry)])
    for entry in cfg.strategies:
        name, overrides = _row(entry)
        if found.get(name, overrides) != overrides:
            raise MetaVPTError(f"strategies: two rows have the name {name}; rename one of them")
        for values in _combinations(cfg.vary) if name not in found else [[]]:
            found[" ".join([name, *values])] = overrides + values
    if not found:
        raise MetaVPTError("strategies=[]: give at least one row")
    return list(found.items())


def compositions(cfg: DictConfig) -> dict[str, DictConfig]:
    """Compose the configuration of each row and of the warm start, by name.

    Raises:
        MetaVPTError: A row has another budget than the others, or no row has an option.
    """
    words = HydraConfig.get().overrides.task
    command_line = [o for o in words if o.partition("=")[0].lstrip("+") not in OWN | PLACE]
    made = {
        name: _compose(command_line, overrides)
        for name, overrides in [(WARM_START, ["strategy=fixed"]), *rows(cfg)]
    }
    for name, row in made.items():
        check(row)
        check_option_types(row)
        for unit in UNITS:
            if unit != cfg.match and row.budget[unit] != cfg.budget[unit]:
                raise MetaVPTError(
                    f"{name}: budget.{unit}={row.budget[unit]}: rows are matched by {cfg.match}; "
                    f"set budget.{cfg.match}"
                )
    for option in shared:
        if not any(_has(row, option) for row in made.values()):
            raise MetaVPTError(f"{option}: no row has this option")
    return made


def jobs(cfg: DictConfig, made: dict[str, DictConfig], folder: Path) -> Iterator[Job]:
    """Yield the warm start and the rows of each seed, and write the configuration of each job."""
    for seed in cfg.seeds:
        warm = folder / "warm" / f"seed{seed}"
        for name, row in made.items():
            if name == WARM_START:
                row.trainer.first_order_every = 0  # a warm start has no designer updates
                build = _prepare(name, row, seed, cfg, warm, {"steps": cfg.warm_start or 1})
                yield Job(name, seed, warm, build, untrained=not cfg.warm_start)
            else:
                place = row_folder(folder, name, seed)
                if cfg.warm_start:
                    row.trainer.head_warmup_steps = 0  # part of the warm start
                limits = {cfg.match: row.budget[cfg.match]}
                yield Job(name, seed, place, _prepare(name, row, seed, cfg, place, limits), warm)


def build(cfg: DictConfig, folder: Path) -> Trainer:
    """Build the trainer of one job, in the process of the job."""
    torch.set_num_threads(cfg.threads)
    return build_trainer(cfg, folder, Console(quiet=True))


def compare(cfg: DictConfig) -> Path:
    """Run the missing jobs, print the table, and write the table and the report.

    Returns:
        The folder of the comparison.

    Raises:
        MetaVPTError: The configuration is wrong, or a row failed.
    """
    _validate(cfg)
    made = compositions(cfg)
    console = Console()
    output, parent = Path(str(cfg.output)) if cfg.output else None, Path(str(cfg.runs))
    config = OmegaConf.to_yaml(
        OmegaConf.masked_copy(cfg, [str(k) for k in cfg if k not in GROWS | PLACE]), resolve=True
    )
    if cfg.resume:
        folder = run_folder.find(output, parent, config)
    else:
        folder = run_folder.create(
            output, parent, f"compare-{HydraConfig.get().runtime.choices['problem']}"
        )
        write_text(folder / "config.yaml", config)
        run_folder.write_environment(folder, command="compare", also=shared, threads=cfg.threads)
    results.write_directions(folder, check_directions(cfg.metrics or {}, "metrics"))
    comparison = Comparison(folder, jobs(cfg, made, folder), cfg.jobs, console)
    try:
        with StopRequest().listening():
            found = comparison.run()
    except Stopped as stopped:
        again = run_folder.resume_command("compare", f"output={folder}", shared)
        console.print(
            f"stopped by {stopped.signal.name}; resume with\n{again}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        sys.exit(stopped.status)
    table = Table(found, directions=results.read_directions(folder))
    rendering.write(table, folder)
    console.print(rendering.rich(table))
    console.print(f"report: {report.write_comparison_report(folder)}")
    failed = [result for result in found if result.error]
    if failed:
        first = failed[0]
        raise MetaVPTError(
            f"{len(failed)} of {len(found)} rows failed; {first.row} on seed {first.seed}: "
            f"{first.error}"
        )
    return folder


def _validate(cfg: DictConfig) -> None:
    _check_lists(cfg)
    check_option_types(cfg)
    pick_device(cfg.device)
    seeds = list(cfg.seeds)
    if not seeds or len(set(seeds)) < len(seeds):
        raise MetaVPTError(f"seeds={seeds}: list each seed once, and at least one")
    check_known(cfg.match, "match", *UNITS)
    if not cfg.budget[cfg.match]:
        raise MetaVPTError(f"match={cfg.match}: set the budget of a row with budget.{cfg.match}=N")
    if cfg.jobs < 1:
        raise MetaVPTError(f"jobs={cfg.jobs} must be at least 1")
    check_directions(cfg.metrics or {}, "metrics")
    if cfg.warm_start < 0:
        raise MetaVPTError(f"warm_start={cfg.warm_start}: the number of steps must not be negative")


def _check_lists(cfg: DictConfig) -> None:
    """Check that what is a list holds one: of text the letters would be taken for its entries."""
    for name in ("strategies", "controls", "seeds"):
        if not OmegaConf.is_list(cfg[name]) and not (name == "controls" and cfg[name] is None):
            raise MetaVPTError(f"{name}={cfg[name]}: must be a list, as in {name}=[{cfg[name]}]")
    if cfg.vary is not None and not OmegaConf.is_dict(cfg.vary):
        raise MetaVPTError(f"vary={cfg.vary}: must be a mapping of keys to lists")
    for key, values in (cfg.vary or {}).items():
        if not OmegaConf.is_list(values):
            raise MetaVPTError(f"vary.{key}={values}: must be a list of values")
    for seed in cfg.seeds:
        if type(seed) is not int:
            raise MetaVPTError(f"seeds={list(cfg.seeds)}: must be whole numbers")


def _row(entry: str | DictConfig) -> Row:
    """Parse `one_step`, `one_step strategy.every=4` or {name: 'one_step ...'}."""
    if OmegaConf.is_dict(entry):
        ((name, text),) = entry.items()  # type: ignore[union-attr]
    else:
        name = text = entry
    choice, *options = shlex.split(str(text))
    return str(name), [f"strategy={choice}", *options]


def _combinations(vary: DictConfig | None) -> list[list[str]]:
    if not vary:
        return [[]]
    return [
        list(values)
        for values in itertools.product(
            *([f"{key}={value}" for value in values] for key, values in vary.items())
        )
    ]


def _compose(command_line: Sequence[str], overrides: Sequence[str]) -> DictConfig:
    """Compose the configuration of one row.

    Options on the command line that apply to strategies are used where the row has them. The row's
    own `overrides` come last.
    """
    for option in overrides:  # a file may hold them
        if option.lstrip("+~").startswith("hydra"):
            raise MetaVPTError(f"{option}: set Hydra's options on the command line, not in a row")
    plain = compose("compare", overrides=[*command_line, *overrides])
    applying = [option for option in shared if _has(plain, option)]
    return (
        compose("compare", overrides=[*command_line, *applying, *overrides]) if applying else plain
    )


def _has(cfg: DictConfig, option: str) -> bool:
    node = cfg
    for key in option.partition("=")[0].split("."):
        if not OmegaConf.is_dict(node) or key not in node:
            return False
        node = node[key]
    return True


def _prepare(
    name: str, row: DictConfig, seed: int, cfg: DictConfig, folder: Path, limits: dict[str, float]
) -> partial[Trainer]:
    """Write the row's configuration to its folder and return the constructor of its trainer."""
    row = OmegaConf.masked_copy(row, [str(key) for key in row if key not in OWN | PLACE])
    with open_dict(row):
        row.seed, row.threads = seed, cfg.threads or max(1, (os.cpu_count() or 1) // cfg.jobs)
        row.budget = {"_target_": row.budget._target_, **dict.fromkeys(UNITS), **limits}
    check(row)
    text, file = OmegaConf.to_yaml(row, resolve=True), folder / "config.yaml"
    if file.is_file() and file.read_text() != text:
        raise MetaVPTError(
            f"{folder}: holds this row with another configuration; rename the row, or "
            "choose another output="
        )
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_text(file, text)
    if not (folder / "environment.json").is_file():
        choices = {"problem": HydraConfig.get().runtime.choices["problem"], "strategy": name}
        run_folder.write_environment(folder, seed, "compare", shared, choices, row.threads)
    return partial(build, cast(DictConfig, OmegaConf.create(text)))


@command("compare")
def _main(cfg: DictConfig) -> None:
    compare(cfg)


def main() -> None:
    """Entry point of `python -m metavpt.compare`: takes `shared` out before Hydra sees it."""
    shared.extend(option for option in sys.argv[1:] if option.startswith("strategy."))
    sys.argv = [sys.argv[0], *(option for option in sys.argv[1:] if option not in shared)]
    _main()
