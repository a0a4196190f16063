"""Checkpoints that are whole or absent, and that resume a run exactly."""

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

STATE = "state.pt"  # in the folder of a checkpoint: all but the shards, which meta tensors stand for, and the sums of their files
SHARD_FILES = "*.safetensors"  # not DCP's own format, whose index is a pickle that could run code


class Saved(NamedTuple):
    """The state in a checkpoint, its path, and a line for each newer one that could not be read."""

    state: dict[str, Any]
    path: Path
    unreadable: list[str]


class Checkpoints:
    """The `keep` newest states of a run in `folder`: a file `step-00000123.pt` each, or a folder `step-00000123` where tensors are sharded.

    Either is written beside its place, flushed to the disk and then moved there, so a run killed at any moment leaves only whole ones.
    Reading never runs code from it (`weights_only=True`, safetensors), and one that is damaged is passed over for the one before it.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Every rank calls it: shards are written by who holds them, all else by the first rank."""
        is_sharded = any(isinstance(leaf, DTensor) for leaf in tree_leaves(state))
        path = self.folder / (f"step-{step:08d}" if is_sharded else f"step-{step:08d}.pt")
        state = {"step": step, "random": random_state(), **state}
        state["digest"] = None if is_sharded else digest(state)
        if collectives.rank() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            for torn in self.folder.glob("*.partial"):  # of a run that was killed while it wrote
                _remove(torn)
        if is_sharded:
            _write_folder(path, state)
        elif collectives.rank() == 0:
            write(path, state)
        if collectives.rank() == 0:
            before = [other for other in self.paths() if other.stem < path.stem]
            for other in {*self.paths()} - {path, *before[max(0, len(before) + 1 - self.keep) :]}:
                _remove(
                    other
                )  # those of later steps too: they could not be read, the run went on from before them
        return path

    def paths(self) -> list[Path]:
        """All checkpoints, oldest first."""
        return sorted(
            path
            for path in self.folder.glob("step-*")
            if re.fullmatch(r"step-\d{8}(\.pt)?", path.name)
        )

    def newest(self, like: Any = None) -> Saved:
        """The newest checkpoint that every rank can read, `like` as in `read`. Raises MetaVPTError, the newest one's fault, for none."""
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
        """The same; also sets the random number generators as they were."""
        saved = self.newest(like)
        if not {"random", "digest"} <= saved.state.keys():
            raise MetaVPTError(f"{saved.path}: not a checkpoint of a metavpt run of this version")
        expected = saved.state.pop("digest")
        if saved.path.is_file() and expected != digest(saved.state):
            raise MetaVPTError(
                f"{saved.path}: was changed since it was saved; delete it to resume from an earlier one"
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
        MetaVPTError: There is no room for it.
    """
    with replacing(path) as file:
        _save(state, file)


def _write_folder(path: Path, state: dict[str, Any]) -> None:
    """`state` in the folder `path`, whole or not at all, by all ranks together. Raises MetaVPTError on each where one has no room."""
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
                    _remove(path)  # it could not be read: the run went on from before it
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
    """A folder loses its name first, so that half of it is never taken for a checkpoint."""
    if path.is_dir():
        shutil.rmtree(
            path if path.suffix == ".partial" else path.rename(path.with_suffix(".old.partial"))
        )
    else:
        path.unlink()


def _save(state: dict[str, Any], file: Any) -> None:
    """torch.save, with the OSError that its writer hides behind a RuntimeError of its own."""
    try:
        torch.save(state, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def read(path: Path, like: Any = None) -> dict[str, Any]:
    """The checkpoint in `path` on the CPU; data only, no code. A file that has changed since it was written is refused.

    like   a structure as that of the state, where only parts of it matter: shards are read into shards where it has them, in the layout of
           today's ranks, and into whole tensors elsewhere. A tensor stands for all below it, as a parameter for its moments
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
    """An empty tensor for the one of `outline`, sharded as its counterpart in `like` is."""
    for key in keys:
        if isinstance(like, Mapping):
            like = like.get(getattr(key, "key", None))
    if isinstance(like, DTensor) and like.shape == outline.shape:
        return torch.empty_like(like, dtype=outline.dtype, requires_grad=False)
    return torch.empty_like(outline, device="cpu")


def _name(keys: tuple[Any, ...]) -> str:
    return "/".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in keys)


def digest(state: Any) -> int:
    """CRC-32 of the names, types and values of all entries of a state."""
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
    """Raise BadZipFile for a flipped bit: torch.load does not check the sums that it writes."""
    check_stored(path)
    with zipfile.ZipFile(path) as archive:
        if archive.testzip() is not None:
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
    """This rank's shards in a file of its own, flushed to the disk; the CRC-32 of every rank's file by name. All ranks call it."""
    with _plain_errors():
        save(tensors, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    own = {
        path.name: _crc(path)
        for path in folder.glob(f"shard-{collectives.rank() + 1:05d}-{SHARD_FILES}")
    }
    return {name: crc for sums in collectives.every(own) for name, crc in sums.items()}


def _read_shards(folder: Path, sums: Mapping[str, int], into: dict[str, Tensor]) -> None:
    """Fill tensors, whole or sharded over any number of ranks, by their names. Raises MetaVPTError where a file is not what was written.

    Of several ranks each looks at the sums of some of the files: only together do they know, see `Checkpoints.newest`.
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
        warnings.filterwarnings(
            "ignore", message="torch.distributed is disabled"
        )  # each rank reads for itself, on purpose
        load(into, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)  # type: ignore[arg-type]


@contextmanager
def _plain_errors() -> Iterator[None]:
    """DCP's own is no Exception, and hides what went wrong; saving raises it on every rank, whichever of them failed."""
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
