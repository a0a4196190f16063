"""Labelled RGB-D frames, whatever file they come from."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from metavpt.errors import MetaVPTError


class Frame(NamedTuple):
    """A labelled frame, or a batch of them with B in front.

    A data set with other labels has a NamedTuple of its own: `image` first, then the labels.

    Attributes:
        image: uint8 (3, H, W).
        depth: float32 (H, W) in metres, 0 where unknown.
        label: int64 (H, W) in 0..C-1, 255 where ignored.
    """

    image: Tensor
    depth: Tensor
    label: Tensor


class RGBDFrames(Dataset[Any]):
    """Frames of one size; `splits` holds the indices of "train" and "val"."""

    name: str
    size: tuple[int, int]
    splits: dict[str, list[int]]
    class_names: Sequence[str] = ()  # none where no task has classes

    @property
    def num_classes(self) -> int:
        """Return C."""
        return len(self.class_names)

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Any: ...

    @abstractmethod
    def image(self, index: int) -> Tensor:
        """Return the image alone, without decoding its labels."""


def make_frame(image: np.ndarray, depth: np.ndarray, label: np.ndarray, source: str) -> Frame:
    """A frame of arrays image (H,W,3), depth and label (H,W).

    Depth that is not positive and finite in float32 is unknown and becomes 0; a frame without any
    known depth is an error.
    """
    with np.errstate(over="ignore"):
        depth = depth.astype(np.float32)
    depth = np.where(np.isfinite(depth) & (depth > 0), depth, np.float32(0))
    if not depth.any():
        raise MetaVPTError(
            f"{source}: the depth map has no valid pixel; remove the frame or repair the file"
        )
    return Frame(
        torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))),
        torch.from_numpy(np.ascontiguousarray(depth)),
        torch.from_numpy(label.astype(np.int64)),
    )
