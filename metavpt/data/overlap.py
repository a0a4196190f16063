"""Whether images that the learner trains on are images that it is measured on, told by size and sum of the encoded files."""

import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from torch.utils.data import ConcatDataset


class Encoded(NamedTuple):
    """An image as it lies in its file: its name, its length in bytes, and its CRC-32, which may take reading it."""

    name: str
    size: int
    crc: Callable[[], int]


def encoded_file(path: Path) -> Encoded:
    """The encoded image in a file: its size, and a checksum when it is asked for."""
    return Encoded(str(path), path.stat().st_size, lambda: zlib.crc32(path.read_bytes()))


def overlap(stream: Any, evaluation: Any, indices: Iterable[int]) -> list[str]:
    """Names of the images of `stream` that are, byte for byte, one of those at `indices` of `evaluation`.

    Both tell their images by a method `encoded(index) -> Encoded`; of a set without one (arrays,
    HDF5) nothing can be said, and nothing is. A file is read only where its length is that of an
    image of the evaluation. The same photograph encoded anew is not found.
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
