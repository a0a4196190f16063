"""The folder of a run: never shared with another one, and found again to resume."""

import json
import os
import platform
import sys
from collections.abc import Sequence
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from metavpt.cli.console import say
from metavpt.errors import MetaVPTError, reading
from metavpt.training.checkpoint import Checkpoints

PACKAGES = ("metavpt", "torch", "torchvision", "timm", "kornia", "hydra-core", "numpy")


def create(folder: Path | None, parent: Path, name: str) -> Path:
    """A new empty folder: `folder` itself, or `parent`/<name>-<time>, numbered where that is taken."""
    if folder is not None:
        if folder.exists() and any(folder.iterdir()):
            raise MetaVPTError(
                f"output={folder}: the folder is not empty; choose another one, or continue that run with resume=true"
            )
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    stem = f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
    for attempt in range(1000):
        path = parent / (stem if attempt == 0 else f"{stem}-{attempt + 1}")
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        return path
    raise MetaVPTError(f"{parent}: could not make a new folder for {stem}")


def find(folder: Path | None, parent: Path, config: str) -> Path:
    """The folder to resume: `folder`, or the newest one under `parent` that was made by the same configuration."""
    candidates = (
        [folder]
        if folder is not None
        else sorted(parent.glob("*/"), key=lambda path: path.stat().st_mtime, reverse=True)
    )
    for path in candidates:
        file = path / "config.yaml"
        if file.is_file() and file.read_bytes() == config.encode():
            return path
        if folder is not None:
            reason = (
                "was made by another configuration"
                if file.is_file()
                else "holds no run (config.yaml is missing)"
            )
            raise MetaVPTError(
                f"resume=true output={folder}: the folder {reason}; repeat the options of that run"
            )
    raise MetaVPTError(
        f"resume=true: no run under {parent} has this configuration; repeat its options, or name its folder with output="
    )


def newest_state(run: Path) -> tuple[dict[str, Any], Path]:
    """What the newest checkpoint of `run` that can be read holds of the problem, and its file. What is passed over is said on stderr."""
    state, path, unreadable = Checkpoints(run / "checkpoints").newest()
    for line in unreadable:
        say("warning:", f"{line}; {path.name} is taken", "yellow")
    return state.get("problem", {}), path


def read_config(folder: Path) -> DictConfig:
    """What config.yaml of a run says, whoever wrote it: see `metavpt.cli.allowed_targets` before anything of it is called."""
    file = folder / "config.yaml"
    if not file.is_file():
        raise MetaVPTError(f"run={folder}: holds no run (config.yaml is missing)")
    with reading(f"{file}: not a readable configuration", "restore the file that the run wrote"):
        config = OmegaConf.load(file)
        if not isinstance(config, DictConfig):
            raise MetaVPTError(f"{file}: not a configuration of a run, which is a mapping")
        OmegaConf.resolve(config)
        return config


def write_environment(
    folder: Path, seed: int | None = None, command: str = "run", also: Sequence[str] = ()
) -> None:
    """environment.json: versions, machine, threads, and the command with the arguments `also` that were taken out of it."""
    environment = {
        "command": " ".join(["python", "-m", f"metavpt.{command}", *sys.argv[1:], *also]),
        "seed": seed,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        **{package: _version(package) for package in PACKAGES},
    }
    (folder / "environment.json").write_text(json.dumps(environment, indent=2) + "\n")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
