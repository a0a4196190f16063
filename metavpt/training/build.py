"""Builds a trainer from a configuration."""

from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from lightning_fabric import Fabric
from omegaconf import DictConfig, OmegaConf

from metavpt.cli.console import Console
from metavpt.distributed import collectives
from metavpt.metrics import check_directions
from metavpt.problem import move_to_device
from metavpt.training import run_options
from metavpt.training.checkpoint import Checkpoints, seed_generators
from metavpt.training.engine import make_fabric
from metavpt.training.run_log import RunLog, UnwrittenLog
from metavpt.training.trainer import Trainer


def build(cfg: DictConfig, folder: Path, console: Console, fabric: Fabric | None = None) -> Trainer:
    """Build the trainer of a configuration. `cfg.seed` sets all randomness.

    Args:
        cfg: The resolved configuration of a run.
        folder: Where the log and the checkpoints go.
        console: Where the log shows the progress.
        fabric: Device, precision and processes. None: one process.
    """
    fabric = fabric or make_fabric(cfg.device, cfg.precision)
    log: RunLog = UnwrittenLog(folder)
    if collectives.rank() == 0:
        log = RunLog(
            folder,
            console,
            {name: instantiate(tracker) for name, tracker in (cfg.get("tracker") or {}).items()},
        )
    seed_generators(cfg.seed)
    problem = instantiate(cfg.problem, _convert_="all")
    if stated := check_directions(cfg.get("metrics") or {}, "metrics"):
        problem.metric_directions = {**problem.metric_directions, **stated}
    move_to_device(problem, "meta" if cfg.device == "meta" else fabric.device)
    trainer = instantiate(
        cfg.trainer,
        problem=problem,
        strategy=instantiate(cfg.strategy),
        budget=instantiate(cfg.budget),
        log=log,
        checkpoints=Checkpoints(folder / "checkpoints"),
        seed=cfg.seed,
        fabric=fabric,
    )
    config: Any = OmegaConf.to_container(cfg, resolve=True)
    trainer.options |= run_options.significant(config)
    log.start_trackers(config)
    return trainer
