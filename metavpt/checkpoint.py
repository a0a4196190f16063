"""Checkpoints that are whole or absent, and that resume a run exactly."""

import os
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from metavpt.errors import MetaVPTError


class Checkpoints:
    """The `keep` newest states of a run in `folder`, one file `step-00000123.pt` each.

    A file is written beside its place, flushed to the disk and then moved there, so a run killed at any moment leaves only whole ones.
    Reading never runs code from the file (`weights_only=True`).
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep

    def save(self, step: int, state: dict[str, Any]) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step-{step:08d}.pt"
        write(path, {"step": step, "random": random_state(), **state})
        for old in self.paths()[: -self.keep]:
            old.unlink()
        return path

    def paths(self) -> list[Path]:
        """All checkpoints, oldest first."""
        return sorted(path for path in self.folder.glob("step-*.pt") if re.fullmatch(r"step-\d{8}\.pt", path.name))

    def newest(self) -> Path:
        paths = self.paths()
        if not paths:
            raise MetaVPTError(f"{self.folder}: no checkpoint here to resume from")
        return paths[-1]

    def load(self, path: Path | None = None) -> dict[str, Any]:
        """The state in `path`, by default the newest; also sets the random number generators as they were."""
        path = path or self.newest()
        state = read(path)
        if "random" not in state:
            raise MetaVPTError(f"{path}: not a checkpoint of a metavpt run")
        set_random_state(state.pop("random"))
        return state


def write(path: Path, state: dict[str, Any]) -> None:
    """`state` in `path`, whole or not at all."""
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def read(path: Path) -> dict[str, Any]:
    """The checkpoint in `path` on the CPU; data only, no code."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise MetaVPTError(f"{path}: no such checkpoint") from None
    except Exception as error:
        raise MetaVPTError(f"{path}: not a readable checkpoint ({type(error).__name__}); delete it to resume from an earlier one") from None
    if not isinstance(state, dict):
        raise MetaVPTError(f"{path}: not a checkpoint of a metavpt run")
    return state


def random_state() -> dict[str, Any]:
    """The state of every global generator that user code may draw from, in plain types."""
    kind, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), int(position), int(has_gauss), float(cached)),
    }


def set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
