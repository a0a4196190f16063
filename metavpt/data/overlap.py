"""Unlabelled images that are also evaluation images, recognised by size and CRC of their files."""

import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from torch.utils.data import ConcatDataset

from metavpt.data.shards import read_bytes, size_of


class Encoded(NamedTuple):
    """An encoded image: its name, its length in bytes, and its CRC-32, which may read it."""

    name: str
    size: int
    crc: Callable[[], int]


def encoded_file(path: Path) -> Encoded:
    """The encoded image in a file, or in a tar: its size, and a checksum when it is asked for."""
    return Encoded(str(path), size_of(path), lambda: zlib.crc32(read_bytes(path)))


def overlap(stream: Any, evaluation: Any, indices: Iterable[int]) -> list[str]:
    """Return the names of images in `stream` that equal an image at `indices` of `evaluation`.

    Both sets identify images by `encoded(index) -> Encoded`. A set without it (arrays, HDF5) is not
    compared. A file is read only if its length is that of an evaluation image. The same photo
    encoded again is not found.
    """
    parts: list[Any] = list(stream.datasets) if isinstance(stream, ConcatDataset) else [stream]
    known: dict[int, list[Encoded]] = {}
    for index in indices if hasattr(evaluation, "encoded") else ():
        image = evaluation.encoded(index)
        known.setdefault(image.size, []).append(image)
    found = []
    for part in parts:
        for index in range(len(part)) if known and hasattr(part, "encoded") else ():
            image = part.encoded(index)
            if any(image.crc() == other.crc() for other in known.get(image.size, ())):
                found.append(image.name)
    return found
