"""`python -m metavpt.check problem=dino_masks`: whether hypergradients can be trusted."""

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from metavpt.check import Finding, check
from metavpt.cli.configuration import command
from metavpt.cli.console import Console
from metavpt.problem import move_to_device
from metavpt.training.build import check_option_types
from metavpt.training.engine import pick_device

COLOURS = {"ok": "green", "warning": "yellow", "failed": "bold red"}
# Samples of a batch, at most. The formulas are the same for any number, and the checks evaluate the
# losses hundreds of times.
SAMPLES = {"feedback_batch_size": 64, "meta_batch_size": 4}


def table(findings: list[Finding]) -> Table:
    """One row for each finding, what to do below what was measured."""
    rows = Table("check", "verdict", "measured")
    for finding in findings:
        colour = COLOURS[finding.verdict]
        measured = Text(finding.measured)
        if finding.advice:
            measured.append("\n").append("->", colour).append(f" {finding.advice}")
        rows.add_row(Text(finding.name), Text(finding.verdict, colour), measured)
    return rows


def verdict(findings: list[Finding]) -> str:
    """The last line: `verdict: failed (2 failed, 1 warning, 9 ok): tail, compile`."""
    counts = Counter(finding.verdict for finding in findings)
    worst = next(level for level in ("failed", "warning", "ok") if counts[level] or level == "ok")
    said = ", ".join(
        f"{counts[level]} {level}" for level in ("failed", "warning", "ok") if counts[level]
    )
    names = (
        ", ".join(finding.name for finding in findings if finding.verdict == worst)
        if worst != "ok"
        else ""
    )
    return f"verdict: {worst} ({said})" + (f": {names}" if names else "")


@contextmanager
def progress(console: Console) -> Iterator[Callable[[str], None]]:
    """Yield a function that shows what starts now.

    On a terminal each start is a line whose seconds run; the lines give way to what is printed
    after the block. Elsewhere it is a plain line with the seconds since the first.
    """
    began = time.monotonic()
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    live = console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=not live) as bar:

        def started(name: str) -> None:
            for task in bar.task_ids:
                bar.update(task, total=1, completed=1)
            bar.add_task(name, total=None)
            if not live:
                console.print(f"{time.monotonic() - began:4.0f} s  {name}", highlight=False)

        yield started


def fewer_samples(problem: DictConfig) -> str:
    """Lower the sizes of batches to `SAMPLES`, and return what was changed."""
    changed = []
    for key, most in SAMPLES.items():
        size = problem.get(key, most)
        if size is None or size > most:  # None: all
            problem[key] = most
            changed.append(f"problem.{key}={most}")
    return ", ".join(changed)


@command("run")
def main(cfg: DictConfig) -> None:
    """Entry point of `python -m metavpt.check`."""
    check_option_types(cfg)
    device = pick_device(cfg.device)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    torch.manual_seed(cfg.seed)
    console = Console()
    if fewer := fewer_samples(cfg.problem):
        console.print(f"checking with smaller batches: {fewer}", soft_wrap=True, highlight=False)
    with progress(console) as started:
        started("making the problem")
        problem = instantiate(cfg.problem)
        move_to_device(problem, device)
        findings = check(
            problem,
            estimator=getattr(instantiate(cfg.strategy), "estimator", None),
            optimizer=instantiate(cfg.trainer.optimizer),
            clip_norm=cfg.trainer.clip_norm,
            seed=cfg.seed,
            started=started,
        )
    console.print(table(findings))
    console.print(verdict(findings), soft_wrap=True, highlight=False)
    if any(finding.verdict == "failed" for finding in findings):
        sys.exit(1)
