"""`python -m metavpt.check problem=dino_masks`: whether hypergradients can be trusted."""

import sys
from collections import Counter

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.table import Table
from rich.text import Text

from metavpt.check import Finding, check
from metavpt.cli.configuration import command
from metavpt.cli.console import Console
from metavpt.problem import move_to_device
from metavpt.training.build import check_option_types
from metavpt.training.engine import check_device

COLOURS = {"ok": "green", "warning": "yellow", "failed": "bold red"}


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


@command("run")
def main(cfg: DictConfig) -> None:
    """Entry point of `python -m metavpt.check`."""
    check_option_types(cfg)
    check_device(cfg.device)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    torch.manual_seed(cfg.seed)
    console = Console()
    problem = instantiate(cfg.problem)
    move_to_device(problem, cfg.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    estimator = getattr(instantiate(cfg.strategy), "estimator", None)
    with console.status("checking"):
        findings = check(
            problem,
            estimator=estimator,
            optimizer=instantiate(cfg.trainer.optimizer),
            clip_norm=cfg.trainer.clip_norm,
            seed=cfg.seed,
        )
    console.print(table(findings))
    console.print(verdict(findings), soft_wrap=True, highlight=False)
    if any(finding.verdict == "failed" for finding in findings):
        sys.exit(1)
