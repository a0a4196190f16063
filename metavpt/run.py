"""python -m metavpt.run problem=dino_nyuv2 [strategy=...] [seed=0] [resume=true]: one run, from step 0 to its report."""

import shutil
from pathlib import Path

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from metavpt import report, runfolder, summary
from metavpt.checkpoint import Checkpoints
from metavpt.command import reporting, run_command
from metavpt.runlog import RunLog
from metavpt.trainer import Trainer


def build(cfg: DictConfig, folder: Path, console: Console) -> Trainer:
    """The trainer that `cfg` describes, with its log and checkpoints in `folder`; weights are drawn from `cfg.seed`."""
    torch.manual_seed(cfg.seed)
    problem = instantiate(cfg.problem, _convert_="all")
    problem.to(cfg.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return instantiate(
        cfg.trainer,
        problem=problem,
        strategy=instantiate(cfg.strategy),
        budget=instantiate(cfg.budget),
        log=RunLog(folder, console),
        checkpoints=Checkpoints(folder / "checkpoints"),
        seed=cfg.seed,
    )


def run(cfg: DictConfig) -> Path:
    """Train, print the table of step 0 against the end, write the report; the folder of the run."""
    console = Console()
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    output = Path(cfg.output) if cfg.output else None
    parent = Path(cfg.runs)
    config = OmegaConf.to_yaml(OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key not in ("resume", "output")]), resolve=True)
    choices = HydraConfig.get().runtime.choices
    name = f"{choices['problem']}-{choices['strategy']}-seed{cfg.seed}"
    if cfg.resume:
        folder = runfolder.find(output, parent, config)
    else:
        folder = runfolder.create(output, parent, name)
        (folder / "config.yaml").write_text(config)
        runfolder.write_environment(folder, cfg.seed)
    try:
        trainer = build(cfg, folder, console)
        if cfg.resume:
            trainer.resume()
        trainer.run()
    except BaseException:
        if not (folder / "metrics.jsonl").exists():
            shutil.rmtree(folder)  # a run that never began leaves nothing behind
        raise
    console.print(summary.table(folder))
    console.print(f"report: {report.write_report(folder)}")
    return folder


@hydra.main(version_base="1.3", config_path="pkg://metavpt.configs", config_name="run")
def main(cfg: DictConfig) -> None:
    with reporting():
        run(cfg)


if __name__ == "__main__":
    run_command(main)
