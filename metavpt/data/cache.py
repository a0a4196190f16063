"""Decoded items kept in memory, and the folder on disk for what is generated once."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import Dataset

from metavpt.data.frames import RGBDFrames

Item = TypeVar("Item")


def cache_folder(chosen: str | Path | None = None) -> Path:
    """The folder for files that are made once: `chosen`, METAVPT_CACHE, or ~/.cache/metavpt."""
    return Path(chosen or os.environ.get("METAVPT_CACHE") or Path.home() / ".cache" / "metavpt")


class Cache(Generic[Item]):
    """Caches `load(index)` while `max_bytes` last.

    Cached items stay: a set that is read in random order and is larger than the limit would only
    evict itself. Copies and other processes begin with an empty cache. Items are shared and must
    not be changed.

    Args:
        load: Loads an item.
        max_bytes: The limit, in bytes.
    """

    def __init__(self, load: Callable[[int], Item], max_bytes: int) -> None:
        self.load, self.max_bytes = load, max_bytes
        self._kept: dict[int, Item] = {}
        self._free = max_bytes

    def __call__(self, index: int) -> Item:
        """Return the item, from the cache if it is there."""
        if index in self._kept:
            return self._kept[index]
        item = self.load(index)
        num_bytes = sum(tensor.untyped_storage().nbytes() for tensor in tree_leaves(item))
        if num_bytes <= self._free:
            self._kept[index] = item
            self._free -= num_bytes
        return item

    def __contains__(self, index: int) -> bool:
        return index in self._kept

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}, "_free": self.max_bytes}


class CachedFrames(RGBDFrames):
    """`frames`, of which up to `max_bytes` stay decoded; classes take one byte there."""

    def __init__(self, frames: RGBDFrames, max_bytes: int) -> None:
        self.frames, self.cache = frames, Cache(self._load, max_bytes)
        self.name, self.size, self.class_names, self.splits = (
            frames.name,
            frames.size,
            frames.class_names,
            frames.splits,
        )

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: int) -> Any:
        frame = self.cache(index)
        image, *labels = frame
        return frame._make([image, *(m.long() if m.dtype == torch.uint8 else m for m in labels)])

    def image(self, index: int) -> Tensor:
        """Labels are not decoded for it, so an image alone is not kept."""
        return self.cache(index).image if index in self.cache else self.frames.image(index)

    def _load(self, index: int) -> Any:
        frame = self.frames[index]
        return frame._make(m.byte() if m.dtype == torch.int64 else m for m in frame)


class CachedImages(Dataset[Tensor]):
    """`images`, of which up to `max_bytes` stay decoded."""

    def __init__(self, images: Dataset[Tensor], max_bytes: int) -> None:
        self.images, self.cache = images, Cache(images.__getitem__, max_bytes)

    def __len__(self) -> int:
        return len(self.images)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Tensor:
        return self.cache(index)
