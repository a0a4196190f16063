"""Unlabelled images: folders, zips, npz files, Hugging Face data sets, and labelled frames."""

import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from metavpt.data import shards
from metavpt.data.archives import check_unpacked, load_npz
from metavpt.data.frames import RGBDFrames
from metavpt.data.overlap import Encoded, encoded_file
from metavpt.data.photo import SUFFIXES, decode, fit, is_image
from metavpt.errors import MetaVPTError, brief, reading

MAX_MEMBER = 2**28  # bytes that an encoded image may take
HUB_PREFIX = "hf:"
SAVED_BY_DATASETS = ("dataset_dict.json", "state.json")  # in a folder of save_to_disk


def open_images(path: Path, size: tuple[int, int]) -> Dataset[Tensor]:
    """Open the images of a folder (any depth), a zip, an npz or tar shards: uint8 (3, *size).

    Or those of a Hugging Face data set, see `HubImages`.

    A folder that holds one zip or npz stands for it, and one with shards for all of them. A path
    that ends in .tar may be a pattern, or an address, see `shards.find_shards`. Images are scaled
    to cover `size` and cropped around the centre.
    """
    if path.suffix == ".tar":
        return shards.Shards(shards.find_shards(str(path)), size)
    if str(path).startswith(HUB_PREFIX) or _is_saved_by_datasets(path):
        return HubImages(str(path), size)
    if not path.exists():
        raise MetaVPTError(
            f"data.unlabelled: {path} does not exist; set it to a folder, zip, npz or tar shards "
            "of images, hf:owner/name, or 'frames'"
        )
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
    raise MetaVPTError(
        f"{path}: holds no image ({', '.join(sorted(SUFFIXES))}), no tar and not exactly one zip "
        "or npz"
    )


class FolderImages(Dataset[Tensor]):
    """Image files, decoded when they are indexed: uint8 (3, *size)."""

    def __init__(self, files: Sequence[Path], size: tuple[int, int]) -> None:
        self.files, self.size = list(files), size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        return fit(decode(_read(self.files[index]), str(self.files[index])), self.size)

    def encoded(self, index: int) -> Encoded:
        """Return the encoded file of an image, see `overlap`."""
        return encoded_file(self.files[index])


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

    def encoded(self, index: int) -> Encoded:
        """Return the encoded member of an image, see `overlap`."""
        return self.archive.encoded(self.members[index])


class NpzImages(Dataset[Tensor]):
    """`images` uint8 (N, H, W, 3), or joined `jpeg` bytes with `offsets` (N + 1).

    An optional `split` is 0 for training.
    """

    def __init__(self, path: Path, size: tuple[int, int]) -> None:
        self.path, self.size = path, size
        self.arrays = load_npz(path, ("images", "jpeg", "offsets", "split"))
        if "images" not in self.arrays and not {"jpeg", "offsets"} <= self.arrays.keys():
            raise MetaVPTError(
                f"{path}: needs an array `images` (N,H,W,3), or `jpeg` with `offsets`"
            )
        images = self.arrays.get("images")
        if images is not None and (
            images.dtype != np.uint8
            or images.ndim != 4
            or images.shape[3] != 3
            or min(images.shape[1:3]) < 1
        ):
            raise MetaVPTError(
                f"{path}: images is {images.dtype} {images.shape}; it must be uint8 (N,H,W,3), "
                "with H and W at least 1"
            )
        if images is None:
            _check_joined(path, self.arrays["jpeg"], self.arrays["offsets"])
        total = len(images) if images is not None else len(self.arrays["offsets"]) - 1
        split = self.arrays.get("split", np.zeros(total))
        if split.shape != (total,):
            raise MetaVPTError(
                f"{path}: split is {split.shape}; it must hold one number for each of the {total} "
                "images"
            )
        self.indices = np.flatnonzero(split == 0)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Tensor:
        k = int(self.indices[index])
        if "images" in self.arrays:
            return fit(torch.from_numpy(self.arrays["images"][k]).permute(2, 0, 1), self.size)
        first, last = self.arrays["offsets"][k : k + 2]
        return fit(
            decode(self.arrays["jpeg"][first:last].tobytes(), f"{self.path}: image {k}"), self.size
        )


class HubImages(Dataset[Tensor]):
    """The images of a Hugging Face data set: uint8 (3, *size). Labels are not read.

    The data set is mapped into memory, so every image is one read away. A set of the hub is
    downloaded once into the cache of `datasets`: a true stream would have a shuffle buffer that no
    checkpoint holds.

    Args:
        source: A folder of `save_to_disk`, or hf:owner/name or hf:owner/name:split for a set of the
            hub. The split is `train`, unless it is named or the only one.
        size: (H, W). Images are scaled to cover it and cropped around the centre.

    Raises:
        MetaVPTError: The package datasets is missing, or the set cannot be had, or has no images.
    """

    def __init__(self, source: str, size: tuple[int, int]) -> None:
        try:
            import datasets
        except ImportError:
            raise MetaVPTError(
                f"data.unlabelled: {source}: Hugging Face data sets need the package datasets: pip "
                "install datasets"
            ) from None
        self.source, self.size = source, size
        found = _load_data_set(datasets, source)
        columns = [
            name for name, kind in found.features.items() if isinstance(kind, datasets.Image)
        ]
        if not columns:
            raise MetaVPTError(
                f"data.unlabelled: {source}: has no column of images (it has "
                f"{', '.join(found.features)})"
            )
        self.column = columns[0]
        self.folders = _own_folders(datasets, source)
        as_bytes = datasets.Image(decode=False)
        self.rows = found.select_columns([self.column]).cast_column(self.column, as_bytes)
        if not len(self.rows):
            raise MetaVPTError(f"data.unlabelled: {source}: holds no image")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Tensor:
        name = f"{self.source}: image {index}"
        image: Any = self.rows[index][self.column]
        try:
            data = image["bytes"] or self._own_file(image["path"]).read_bytes()
        except (OSError, TypeError) as error:
            raise MetaVPTError(f"{name}: cannot be read ({brief(error)})") from None
        return fit(decode(data, name), self.size)

    def _own_file(self, path: str) -> Path:
        """Return a file that a row names in place of its bytes."""
        file = Path(os.path.realpath(path))
        if not any(folder in file.parents for folder in self.folders):
            raise OSError(f"the row names {path}, which lies outside of the data set")
        if not file.is_file():  # a device never ends
            raise OSError(f"{path} is no file")
        return file


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
        """Read a member.

        Raises:
            MetaVPTError: It is missing, too large or damaged.
        """
        with reading(f"{self.path}: {member} cannot be read"):
            if member not in self.names:
                raise MetaVPTError(f"{self.path}: the zip lacks {member}; get the whole file again")
            entry = self._open().getinfo(member)
            if entry.file_size > MAX_MEMBER:
                raise MetaVPTError(
                    f"{self.path}: {member} unpacks to {entry.file_size / 2**20:.0f} MiB, too "
                    "large for an image; download the file again"
                )
            check_unpacked([entry], f"{self.path}: {member}")
            return self._open().read(member)

    def encoded(self, member: str) -> Encoded:
        """By the table of contents alone."""
        entry = self._open().getinfo(member)
        return Encoded(f"{self.path}: {member}", entry.file_size, lambda: entry.CRC)

    def _open(self) -> zipfile.ZipFile:
        if (
            self._handle is None or self._process != os.getpid()
        ):  # a fork shares the position in the file with its parent
            with reading(f"{self.path}: not a readable zip"):
                self._handle, self._process = zipfile.ZipFile(self.path), os.getpid()
        return self._handle

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handle": None}


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise MetaVPTError(
            f"{file}: cannot be read ({error.strerror}); remove or replace it"
        ) from None


def _check_joined(path: Path, jpeg: np.ndarray, offsets: np.ndarray) -> None:
    """Encoded images one after the other, and where each begins."""
    whole = offsets.ndim == 1 and offsets.dtype.kind in "iu" and len(offsets) > 0
    if not whole or jpeg.dtype != np.uint8 or jpeg.ndim != 1:
        raise MetaVPTError(f"{path}: jpeg must be uint8 (bytes,) and offsets whole numbers (N+1,)")
    if (offsets[1:] < offsets[:-1]).any() or int(offsets[0]) < 0 or int(offsets[-1]) > len(jpeg):
        raise MetaVPTError(
            f"{path}: offsets must rise from 0 to at most the {len(jpeg)} bytes of jpeg"
        )


def _is_saved_by_datasets(folder: Path) -> bool:
    """Return whether `save_to_disk` wrote this folder."""
    return any((folder / name).is_file() for name in SAVED_BY_DATASETS)


def _own_folders(datasets: Any, source: str) -> list[Path]:
    """The folders that may hold the images of a data set: its own, and the caches of the hub."""
    if not source.startswith(HUB_PREFIX):
        return [Path(os.path.realpath(source))]
    import huggingface_hub.constants  # datasets needs it

    caches = (datasets.config.HF_DATASETS_CACHE, datasets.config.HF_CACHE_HOME)
    name = source.removeprefix(HUB_PREFIX).partition(":")[0]
    places = (*caches, huggingface_hub.constants.HF_HUB_CACHE, name)
    return [Path(os.path.realpath(place)) for place in places]


def _load_data_set(datasets: Any, source: str) -> Any:
    name, _, split = source.removeprefix(HUB_PREFIX).partition(":")
    try:
        if not source.startswith(HUB_PREFIX):
            found = datasets.load_from_disk(source)
        else:
            found = datasets.load_dataset(name, split=split or None)
    except Exception as error:  # of several libraries: no network, no such name, a damaged file
        raise MetaVPTError(
            f"data.unlabelled: {source}: the data set cannot be had ({brief(error)}); check its "
            "name and split"
        ) from error
    if not isinstance(found, dict):
        return found
    if len(found) > 1 and "train" not in found:
        raise MetaVPTError(
            f"data.unlabelled: {source}: has no split train, but {', '.join(found)}; name one, as "
            "in hf:owner/name:split, or the folder of one"
        )
    return found["train"] if "train" in found else next(iter(found.values()))
