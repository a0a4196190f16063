"""Zip files, and what builds on them (.npz, .pt): how much they may unpack to.

Deflate makes a thousand bytes of one. What a set of images or a model needs is close to random, so
an archive that grows by more than `RATIO` was made to exhaust the memory.
"""

import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from metavpt.errors import MetaVPTError, reading

FREE = 2**26  # bytes that a file may always unpack to
RATIO = 20


def check_unpacked(members: Iterable[zipfile.ZipInfo], source: str) -> None:
    """Raise MetaVPTError if `members` of a zip together unpack to far more than they hold.

    Args:
        members: Those that are read into memory at once.
        source: What the message names.
    """
    members = list(members)
    size, packed = (
        sum(getattr(m, kind) for m in members) for kind in ("file_size", "compress_size")
    )
    if size > max(FREE, RATIO * packed):
        raise MetaVPTError(
            f"{source}: unpacks to {size / 2**20:.0f} MiB from {packed / 2**20:.1f}; store it "
            "uncompressed if you trust it"
        )


def check_stored(path: Path) -> None:
    """Raise ValueError for a zip larger than its bytes: torch neither compresses nor shares any."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    is_packed = any(member.compress_type != zipfile.ZIP_STORED for member in members)
    if is_packed or sum(member.file_size for member in members) > path.stat().st_size:
        raise ValueError("its members are compressed, or overlap")


def load_npz(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """The arrays of a .npz that are among `names`."""
    with reading(f"{path}: not a readable npz"):
        with zipfile.ZipFile(path) as archive:
            asked = {f"{name}.npy" for name in names}
            check_unpacked((m for m in archive.infolist() if m.filename in asked), str(path))
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in names if name in file.files}
