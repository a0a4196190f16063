"""Checkpoints that are written whole or not at all, and that resume a run bit for bit."""

import os
import random
import re
import shutil
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_flatten_with_path, tree_leaves, tree_map_only, tree_unflatten

from metavpt.data.archives import check_stored
from metavpt.distributed import collectives
from metavpt.errors import MetaVPTError, reading, writing
from metavpt.training.disk import replacing, sync_folder

# In the folder of a checkpoint: the sums of the shard files, and the state with meta tensors in
# place of the shards.
STATE = "state.pt"
# Not DCP's own format: its index is a pickle, which could run code.
SHARD_FILES = "*.safetensors"


class Saved(NamedTuple):
    """The state in a checkpoint, its path, and a line for each newer one that cannot be read."""

    state: dict[str, Any]
    path: Path
    unreadable: list[str]


class Checkpoints:
    """The newest states of a run: a file `step-00000123.pt`, or a folder if tensors are sharded.

    A checkpoint is written beside its place, flushed to the disk and then renamed, so a killed run
    leaves only whole ones. Reading never runs code (`weights_only=True`, safetensors). A damaged
    checkpoint is skipped, and the one before it is used.

    Args:
        folder: The folder of the checkpoints.
        keep: How many are kept.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Save the state of a step. Every rank calls it.

        Each rank writes its own shards, and the first rank everything else.

        Returns:
            The path of the checkpoint.

        Raises:
            MetaVPTError: The disk is full.
        """
        is_sharded = any(isinstance(leaf, DTensor) for leaf in tree_leaves(state))
        path = self.folder / (f"step-{step:08d}" if is_sharded else f"step-{step:08d}.pt")
        state = {"step": step, "random": random_state(), **state}
        state["digest"] = None if is_sharded else digest(state)
        if collectives.rank() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            for torn in self.folder.glob("*.partial"):  # from a run that was killed while writing
                _remove(torn)
        if is_sharded:
            _write_folder(path, state)
        elif collectives.rank() == 0:
            write(path, state)
        if collectives.rank() == 0:
            before = [other for other in self.paths() if other.stem < path.stem]
            # Later checkpoints could not be read: the run resumed from an earlier one.
            for other in {*self.paths()} - {path, *before[max(0, len(before) + 1 - self.keep) :]}:
                _remove(other)
        return path

    def paths(self) -> list[Path]:
        """Return all checkpoints, oldest first."""
        return sorted(
            path
            for path in self.folder.glob("step-*")
            if re.fullmatch(r"step-\d{8}(\.pt)?", path.name)
        )

    def newest(self, like: Any = None) -> Saved:
        """Read the newest checkpoint that every rank can read.

        Args:
            like: See `read`.

        Raises:
            MetaVPTError: There is none. The message states what is wrong with the newest one.
        """
        unreadable: list[str] = []
        for path in reversed(collectives.first(self.paths())):
            state, fault = {}, None
            try:
                state = read(path, like)
            except MetaVPTError as error:
                fault = str(error)
            fault = collectives.any_of(fault)
            if fault is None:
                return Saved(state, path, unreadable)
            unreadable.append(fault)
        raise MetaVPTError(
            unreadable[0] if unreadable else f"{self.folder}: no checkpoint here to resume from"
        )

    def load(self, like: Any = None) -> Saved:
        """Read the newest checkpoint and restore the random number generators.

        Args:
            like: See `read`.

        Raises:
            MetaVPTError: There is none, or it was changed.
        """
        saved = self.newest(like)
        if not {"random", "digest"} <= saved.state.keys():
            raise MetaVPTError(f"{saved.path}: not a checkpoint of a metavpt run of this version")
        expected, name = saved.state.pop("digest"), saved.path
        if name.is_file() and expected != digest(saved.state):
            raise MetaVPTError(
                f"{name}: was changed since it was saved; delete it to resume from an earlier one"
            )
        with reading(
            f"{saved.path}: its random states cannot be read",
            "delete it to resume from an earlier one",
        ):
            set_random_state(saved.state.pop("random"))
        return saved


def write(path: Path, state: dict[str, Any]) -> None:
    """Write `state` to `path`, whole or not at all.

    Raises:
        MetaVPTError: The disk is full.
    """
    with replacing(path) as file:
        _save(state, file)


def _write_folder(path: Path, state: dict[str, Any]) -> None:
    """Write `state` to the folder `path`, whole or not at all. All ranks call it.

    Raises:
        MetaVPTError: A disk is full. Every rank raises it.
    """
    partial, fault = path.with_suffix(".partial"), None
    sharded = {
        _name(keys): leaf
        for keys, leaf in tree_flatten_with_path(state)[0]
        if isinstance(leaf, DTensor)
    }
    outline = tree_map_only(
        DTensor, lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"), state
    )
    try:
        with writing(path):
            sums = _write_shards(partial, sharded)
        if collectives.rank() == 0:
            write(partial / STATE, {"sums": sums, "state": outline})
            with writing(path):
                if path.exists():
                    _remove(path)  # it could not be read: the run resumed from an earlier one
                os.rename(partial, path)
                sync_folder(path.parent)
    except MetaVPTError as error:
        fault = str(error)
    fault = collectives.any_of(fault)
    if fault is not None:
        if collectives.rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise MetaVPTError(fault)


def _remove(path: Path) -> None:
    """Delete a checkpoint.

    A folder is renamed first, so that half of it never counts as a checkpoint.
    """
    if path.is_dir():
        shutil.rmtree(
            path if path.suffix == ".partial" else path.rename(path.with_suffix(".old.partial"))
        )
    else:
        path.unlink()


def _save(state: dict[str, Any], file: Any) -> None:
    """Call torch.save, and raise the OSError that torch hides behind a RuntimeError."""
    try:
        torch.save(state, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def read(path: Path, like: Any = None) -> dict[str, Any]:
    """Read a checkpoint to the CPU, without running code from it. A changed file is refused.

    Args:
        path: The file or folder of the checkpoint.
        like: A structure like the state, which may be partial. Where it holds sharded tensors,
            shards are read in that layout. Elsewhere tensors are read whole. A tensor stands for
            everything below it, as a parameter for its moments.

    Raises:
        MetaVPTError: There is no such checkpoint, or it is damaged.
    """
    try:
        state = _read_folder(path, like) if path.is_dir() else _read_file(path)
    except FileNotFoundError:
        raise MetaVPTError(f"{path}: no such checkpoint") from None
    except Exception as error:
        reason = str(error) if isinstance(error, MetaVPTError) else type(error).__name__
        raise MetaVPTError(
            f"{path}: not a readable checkpoint ({reason}); delete it to resume from an earlier one"
        ) from None
    if not isinstance(state, dict):
        raise MetaVPTError(f"{path}: not a checkpoint of a metavpt run")
    return state


def _read_file(path: Path) -> Any:
    _check_sums(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def _read_folder(path: Path, like: Any) -> Any:
    outline = _read_file(path / STATE)
    leaves, structure = tree_flatten_with_path(outline["state"])
    into = {
        _name(keys): _place(leaf, like, keys)
        for keys, leaf in leaves
        if isinstance(leaf, Tensor) and leaf.is_meta
    }
    _read_shards(path, outline["sums"], into)
    return tree_unflatten([into.get(_name(keys), leaf) for keys, leaf in leaves], structure)


def _place(outline: Tensor, like: Any, keys: tuple[Any, ...]) -> Tensor:
    """Create an empty tensor for `outline`, sharded as its counterpart in `like`."""
    for key in keys:
        if isinstance(like, Mapping):
            like = like.get(getattr(key, "key", None))
    if isinstance(like, DTensor) and like.shape == outline.shape:
        return torch.empty_like(like, dtype=outline.dtype, requires_grad=False)
    return torch.empty_like(outline, device="cpu")


def _name(keys: tuple[Any, ...]) -> str:
    return "/".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in keys)


def digest(state: Any) -> int:
    """Return the CRC-32 of the names, types and values of all entries of a state."""
    crc = 0
    for keys, leaf in tree_flatten_with_path(state)[0]:
        described = leaf
        if isinstance(leaf, Tensor):
            described = (str(leaf.dtype), tuple(leaf.shape))
        crc = zlib.crc32(f"{_name(keys)}={described!r};".encode(errors="replace"), crc)
        if isinstance(leaf, Tensor) and leaf.numel():
            data = leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            crc = zlib.crc32(data.numpy().data, crc)
    return crc


def _check_sums(path: Path) -> None:
    """Check the sums in a file of torch.save, which torch.load does not.

    Raises:
        BadZipFile: A bit has flipped.
    """
    check_stored(path)
    with zipfile.ZipFile(path) as archive:
        if archive.testzip() is not None:
            raise zipfile.BadZipFile(path.name)


def seed_generators(seed: int) -> None:
    """Seed every global generator that user code may use."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def random_state() -> dict[str, Any]:
    """Return the state of every global generator that user code may use, in plain types."""
    kind, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "numpy": (
            kind,
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            int(position),
            int(has_gauss),
            float(cached),
        ),
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Set the random generators of torch, Python and NumPy."""
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))


def _write_shards(folder: Path, tensors: dict[str, DTensor]) -> dict[str, int]:
    """Write this rank's shards to a file and flush it. All ranks call it.

    Returns:
        The CRC-32 of every rank's file by name.
    """
    with _plain_errors():
        save(tensors, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    own = {
        path.name: _crc(path)
        for path in folder.glob(f"shard-{collectives.rank() + 1:05d}-{SHARD_FILES}")
    }
    return {name: crc for sums in collectives.every(own) for name, crc in sums.items()}


def _read_shards(folder: Path, sums: Mapping[str, int], into: dict[str, Tensor]) -> None:
    """Fill tensors by their names. They may be whole, or sharded over any number of ranks.

    Each rank checks the sums of some of the files, so only all ranks together know the result, see
    `Checkpoints.newest`.

    Raises:
        MetaVPTError: A file is missing or has changed.
    """
    names = sorted(path.name for path in folder.glob(SHARD_FILES))
    if names != sorted(sums):
        raise MetaVPTError(
            f"{folder}: holds {len(names)} files of shards where {len(sums)} were written"
        )
    for name in names[collectives.rank() :: collectives.size()]:
        if _crc(folder / name) != sums[name]:
            raise MetaVPTError(f"{folder / name}: has changed since it was written")
    with _plain_errors(), warnings.catch_warnings():
        # Each rank reads by itself, on purpose.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        reader: Any = HuggingFaceStorageReader(str(folder))
        load(into, storage_reader=reader, no_dist=True)


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Raise the cause of a CheckpointException, which is not an Exception and hides the cause.

    Saving raises it on every rank, whichever rank failed.
    """
    try:
        yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from None


def _crc(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            crc = zlib.crc32(part, crc)
    return crc
