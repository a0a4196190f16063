"""python -m metavpt.bench step problem=dino_nyuv2 [strategy=...]: where the time of a step goes, and what it must take."""

import json
import sys
from pathlib import Path

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict
from rich.console import Console

from metavpt import breakdown, runfolder
from metavpt.command import reporting, run_command
from metavpt.errors import MetaVPTError
from metavpt.run import build

WHAT = ("step",)


def bench(cfg: DictConfig) -> None:
    """Print the breakdown of the configured run's steps, and leave it in `step.json` of a new folder."""
    console = Console()
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    choices = HydraConfig.get().runtime.choices
    folder = runfolder.create(
        Path(cfg.output) if cfg.output else None,
        Path(cfg.runs),
        f"bench-{choices['problem']}-{choices['strategy']}",
    )
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=True))
    runfolder.write_environment(folder, cfg.seed, command="bench step")
    with open_dict(cfg):  # whatever limit the run would have, its steps are what is measured
        cfg.budget = {"_target_": cfg.budget._target_, "steps": 10**9}
    trainer = build(cfg, folder, console)
    now = breakdown.synchronized
    steps = breakdown.num_steps(cfg.measure.steps, trainer.strategy)
    measured = breakdown.measure(trainer, cfg.measure.warmup, steps, now, cfg.measure.flops)
    card = torch.cuda.get_device_name() if torch.cuda.is_initialized() else None
    found = breakdown.report(measured, breakdown.floor(trainer, now), card)
    (folder / "step.json").write_text(json.dumps(found, indent=1) + "\n")
    console.print(breakdown.table(measured))
    for line in breakdown.lines(found):
        console.print(line, soft_wrap=True, highlight=False)
    console.print(f"{folder / 'step.json'}", soft_wrap=True, highlight=False)
    trainer.log.close()


@hydra.main(version_base="1.3", config_path="pkg://metavpt.configs", config_name="bench")
def main(cfg: DictConfig) -> None:
    with reporting():
        bench(cfg)


def _take_what(arguments: list[str]) -> None:
    """The word after the command, which Hydra does not know, is taken out of its arguments."""
    word = arguments[1] if len(arguments) > 1 else "..."
    if word not in WHAT:
        raise MetaVPTError(
            f"python -m metavpt.bench {word}: say first what to measure; known: {', '.join(WHAT)}"
        )
    del arguments[1]


if __name__ == "__main__":
    with reporting():
        _take_what(sys.argv)
    run_command(main)
