"""`python -m metavpt.bench problem=dino_nyuv2 [strategy=...]`: where the time of a step goes."""

import json
from pathlib import Path

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict

from metavpt.bench import step_profile
from metavpt.cli.configuration import command
from metavpt.cli.console import Console
from metavpt.training import run_folder
from metavpt.training.build import build
from metavpt.training.disk import write_text


def bench(cfg: DictConfig) -> None:
    """Print the time profile of the configured run's steps, and write it to `step.json`."""
    console = Console()
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    choices = HydraConfig.get().runtime.choices
    folder = run_folder.create(
        Path(cfg.output) if cfg.output else None,
        Path(cfg.runs),
        f"bench-{choices['problem']}-{choices['strategy']}",
    )
    write_text(folder / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
    run_folder.write_environment(folder, cfg.seed, command="bench")
    with open_dict(cfg):  # whatever limit the run would have, its steps are what is measured
        cfg.budget = {"_target_": cfg.budget._target_, "steps": 10**9}
    trainer = build(cfg, folder, console)
    now = step_profile.synchronized
    steps = step_profile.num_steps(cfg.measure.steps, trainer.strategy)
    measured = step_profile.measure(trainer, cfg.measure.warmup, steps, now, cfg.measure.flops)
    card = torch.cuda.get_device_name() if torch.cuda.is_initialized() else None
    found = step_profile.report(measured, step_profile.lower_bound(trainer, now), card)
    write_text(folder / "step.json", json.dumps(found, indent=1) + "\n")
    console.print(step_profile.table(measured))
    for line in step_profile.lines(found):
        console.print(line, soft_wrap=True, highlight=False)
    console.print(f"{folder / 'step.json'}", soft_wrap=True, highlight=False)
    trainer.log.close()


@command("bench")
def main(cfg: DictConfig) -> None:
    """Entry point of `python -m metavpt.bench`."""
    bench(cfg)
