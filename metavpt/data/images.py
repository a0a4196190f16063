"""Unlabelled images from a folder, a zip, an npz, or labelled frames without their labels."""

import os
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from metavpt.data import shards
from metavpt.data.frames import RGBDFrames
from metavpt.data.photo import SUFFIXES, decode, fit, is_image
from metavpt.errors import MetaVPTError


def open_images(path: Path, size: tuple[int, int]) -> Dataset[Tensor]:
    """Images uint8 (3, *size) of a folder (any depth), a zip, an npz or tar shards; a folder that holds just one zip or npz stands for it,
    and one with shards for all of them. A path in .tar may be a pattern, see `shards.find_shards`.

    They are shrunk or enlarged to cover `size` and cut to it around the centre.
    """
    if path.suffix == ".tar":
        return shards.Shards(shards.find_shards(str(path)), size)
    if not path.exists():
        raise MetaVPTError(f"data.unlabelled: {path} does not exist; name a folder, zip, npz or tar shards of images, or 'frames'")
    if path.is_file():
        if path.suffix == ".npz":
            return NpzImages(path, size)
        if zipfile.is_zipfile(path):
            return ZipImages(path, size)
        raise MetaVPTError(f"{path}: neither a folder nor a readable zip or npz of images")
    files = sorted(file for file in path.rglob("*") if is_image(file.name))
    if files:
        return FolderImages(files, size)
    if tars := sorted(path.glob("*.tar")):
        return shards.Shards(tars, size)
    archives = sorted(file for file in path.iterdir() if file.suffix in (".npz", ".zip"))
    if len(archives) == 1:
        return open_images(archives[0], size)
    raise MetaVPTError(f"{path}: holds no image ({', '.join(sorted(SUFFIXES))}), no tar and not exactly one zip or npz")


class FolderImages(Dataset[Tensor]):
    def __init__(self, files: Sequence[Path], size: tuple[int, int]) -> None:
        self.files, self.size = list(files), size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        return fit(decode(self.files[index].read_bytes(), str(self.files[index])), self.size)


class ZipImages(Dataset[Tensor]):
    """Members are read in place; nothing is extracted."""

    def __init__(self, path: Path, size: tuple[int, int]) -> None:
        self.archive, self.size = Archive(path), size
        self.members = sorted(name for name in self.archive.names if is_image(Path(name).name))
        if not self.members:
            raise MetaVPTError(f"{path}: the zip holds no image ({', '.join(sorted(SUFFIXES))})")

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, index: int) -> Tensor:
        member = self.members[index]
        return fit(decode(self.archive.read(member), f"{self.archive.path}: {member}"), self.size)


class NpzImages(Dataset[Tensor]):
    """Either `images` uint8 (N,H,W,3), or `jpeg` bytes joined with `offsets` (N+1); a `split`, where there is one, is 0 for training."""

    def __init__(self, path: Path, size: tuple[int, int]) -> None:
        self.path, self.size = path, size
        try:
            with np.load(path, allow_pickle=False) as file:
                self.arrays = {name: file[name] for name in ("images", "jpeg", "offsets", "split") if name in file.files}
        except (OSError, ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise MetaVPTError(f"{path}: not a readable npz ({error}); get the file again") from None
        if "images" not in self.arrays and not {"jpeg", "offsets"} <= self.arrays.keys():
            raise MetaVPTError(f"{path}: needs an array `images` (N,H,W,3), or `jpeg` with `offsets`")
        images = self.arrays.get("images")
        if images is not None and (images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3):
            raise MetaVPTError(f"{path}: images is {images.dtype} {images.shape}; it must be uint8 (N,H,W,3)")
        total = len(self.arrays["images"]) if "images" in self.arrays else len(self.arrays["offsets"]) - 1
        split = self.arrays.get("split", np.zeros(total))
        self.indices = np.flatnonzero(split == 0)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Tensor:
        k = int(self.indices[index])
        if "images" in self.arrays:
            return fit(torch.from_numpy(self.arrays["images"][k]).permute(2, 0, 1), self.size)
        first, last = self.arrays["offsets"][k : k + 2]
        return fit(decode(self.arrays["jpeg"][first:last].tobytes(), f"{self.path}: image {k}"), self.size)


class FrameImages(Dataset[Tensor]):
    """The images of labelled frames, without their labels."""

    def __init__(self, frames: RGBDFrames, indices: Sequence[int], size: tuple[int, int]) -> None:
        self.frames, self.indices, self.size = frames, list(indices), size

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Tensor:
        return fit(self.frames.image(self.indices[index]), self.size)


class Archive:
    """A zip that is opened once in each process: a handle must not be shared with workers."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle: zipfile.ZipFile | None = None
        self._process = 0
        self.names = set(self._open().namelist())

    def read(self, member: str) -> bytes:
        try:
            return self._open().read(member)
        except KeyError:
            raise MetaVPTError(f"{self.path}: the zip lacks {member}; get the whole file again") from None
        except (zipfile.BadZipFile, zlib.error, OSError, EOFError) as error:
            raise MetaVPTError(f"{self.path}: {member} cannot be read ({error}); get the file again") from None

    def _open(self) -> zipfile.ZipFile:
        if self._handle is None or self._process != os.getpid():  # a fork shares the position in the file with its parent
            try:
                self._handle, self._process = zipfile.ZipFile(self.path), os.getpid()
            except (zipfile.BadZipFile, OSError) as error:
                raise MetaVPTError(f"{self.path}: not a readable zip ({error}); get the file again") from None
        return self._handle

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handle": None}
