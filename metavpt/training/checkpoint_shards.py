"""Tensors that every process holds a part of, in a folder: each writes its own, any number of them reads. By torch.distributed.checkpoint.

The files are safetensors. DCP's own format keeps its index in a pickle, which torch reads without limits: a checkpoint from others could
then run code.
"""

import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from metavpt.distributed import collectives
from metavpt.errors import MetaVPTError

FILES = "*.safetensors"


def write(folder: Path, tensors: dict[str, DTensor]) -> dict[str, int]:
    """This rank's shards in a file of its own, flushed to the disk; the CRC-32 of every rank's file by name. All ranks call it."""
    with _plain_errors():
        save(tensors, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    own = {
        path.name: _crc(path) for path in folder.glob(f"shard-{collectives.rank() + 1:05d}-{FILES}")
    }
    return {name: crc for sums in collectives.every(own) for name, crc in sums.items()}


def read(folder: Path, sums: Mapping[str, int], into: dict[str, Tensor]) -> None:
    """Fill tensors, whole or sharded over any number of ranks, by their names. Raises MetaVPTError where a file is not what was written.

    Of several ranks each looks at the sums of some of the files: only together do they know, see `Checkpoints.newest`.
    """
    names = sorted(path.name for path in folder.glob(FILES))
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
