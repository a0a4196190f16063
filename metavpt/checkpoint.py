"""Checkpoints that are whole or absent, and that resume a run exactly."""

import os
import random
import re
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from metavpt.disk import writing
from metavpt.errors import MetaVPTError


class Saved(NamedTuple):
    """The state in a checkpoint, its file, and a line for each newer one that could not be read."""

    state: dict[str, Any]
    path: Path
    unreadable: list[str]


class Checkpoints:
    """The `keep` newest states of a run in `folder`, one file `step-00000123.pt` each.

    A file is written beside its place, flushed to the disk and then moved there, so a run killed at any moment leaves only whole ones.
    Reading never runs code from the file (`weights_only=True`), and one that is damaged is passed over for the one before it.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep

    def save(self, step: int, state: dict[str, Any]) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        for torn in self.folder.glob("*.partial"):  # of a run that was killed while it wrote
            torn.unlink()
        path = self.folder / f"step-{step:08d}.pt"
        write(path, {"step": step, "random": random_state(), **state})
        paths = self.paths()
        at = paths.index(path) + 1
        for other in paths[: max(0, at - self.keep)] + paths[at:]:  # what is later could not be read: the run went on from before it
            other.unlink()
        return path

    def paths(self) -> list[Path]:
        """All checkpoints, oldest first."""
        return sorted(path for path in self.folder.glob("step-*.pt") if re.fullmatch(r"step-\d{8}\.pt", path.name))

    def newest(self) -> Saved:
        """The newest checkpoint that can be read. Raises MetaVPTError, the newest one's fault, where none can."""
        unreadable: list[str] = []
        for path in reversed(self.paths()):
            try:
                return Saved(read(path), path, unreadable)
            except MetaVPTError as error:
                unreadable.append(str(error))
        raise MetaVPTError(unreadable[0] if unreadable else f"{self.folder}: no checkpoint here to resume from")

    def load(self) -> Saved:
        """The same; also sets the random number generators as they were."""
        saved = self.newest()
        if "random" not in saved.state:
            raise MetaVPTError(f"{saved.path}: not a checkpoint of a metavpt run")
        set_random_state(saved.state.pop("random"))
        return saved


def write(path: Path, state: dict[str, Any]) -> None:
    """`state` in `path`, whole or not at all. Raises MetaVPTError where there is no room for it."""
    partial = path.with_suffix(".partial")
    try:
        with writing(path), partial.open("wb") as file:
            _save(state, file)
            file.flush()
            os.fsync(file.fileno())
        with writing(path):
            os.replace(partial, path)
            _sync_folder(path.parent)
    except MetaVPTError:
        partial.unlink(missing_ok=True)
        raise


def _save(state: dict[str, Any], file: Any) -> None:
    """torch.save, with the OSError that its writer hides behind a RuntimeError of its own."""
    try:
        torch.save(state, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def _sync_folder(folder: Path) -> None:
    """Flush the new name as well: without it a power cut may bring the old ones back, of which some are deleted next."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(path: Path) -> dict[str, Any]:
    """The checkpoint in `path` on the CPU; data only, no code. A file that has changed since it was written is refused."""
    try:
        _check_sums(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise MetaVPTError(f"{path}: no such checkpoint") from None
    except Exception as error:
        raise MetaVPTError(f"{path}: not a readable checkpoint ({type(error).__name__}); delete it to resume from an earlier one") from None
    if not isinstance(state, dict):
        raise MetaVPTError(f"{path}: not a checkpoint of a metavpt run")
    return state


def _check_sums(path: Path) -> None:
    """Raises BadZipFile for a flipped bit: torch.load has no eye for the sums that torch.save writes."""
    with zipfile.ZipFile(path) as archive:
        packed = any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist())  # not ours, and may unpack to anything
        if packed or archive.testzip() is not None:
            raise zipfile.BadZipFile(path.name)


def seed_generators(seed: int) -> None:
    """Every global generator that user code may draw from."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


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
