"""NYU Depth v2, labelled set: the official MATLAB file, and a zip of half-resolution frames."""

import io
import json
import math
import os
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

import h5py
import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from metavpt.data.frames import Frame, RGBDFrames, make_frame
from metavpt.data.images import Archive
from metavpt.data.overlap import Encoded
from metavpt.data.photo import decode, max_pixels, open_image
from metavpt.data.rooms import CLASS_NAMES as ROOM_CLASSES
from metavpt.data.rooms import rooms_file
from metavpt.dense_tasks.segmentation import IGNORE
from metavpt.errors import MetaVPTError, reading

ZIP_NAME, MAT_NAME = "nyuv2_labeled_240x320.zip", "nyu_depth_v2_labeled.mat"
NUM_OFFICIAL_FRAMES, NUM_RAW_CLASSES = 1449, 894
METRES_PER_CODE = 9.99547 / 255  # of the zip's 8-bit depth
MAX_NAMES, MAX_LETTERS = 2**16, 2**10  # of classes, and in the name of one
SPARE = 2**26  # bytes of a dataset that need not be held, and of a chunk, which is read as a whole
DEFLATE = 1032  # times that deflate can shrink at most
CLASSES: dict[str, Any] = json.loads((files("metavpt.data") / "nyuv2_classes.json").read_text())


def open_nyuv2(
    path: str | Path | None, num_classes: int = 13, rooms: Mapping[str, Any] | None = None
) -> RGBDFrames:
    """Open nyu_depth_v2_labeled.mat, the zip of 240x320 frames, or the folder of either.

    Args:
        path: The file or folder. None: generated rooms.
        num_classes: 13 or 40 of NYUv2. Generated rooms keep their own 13 classes.
        rooms: Any of folder, num_frames, size and seed, see `rooms_file`.
    """
    if num_classes not in (13, 40):
        raise MetaVPTError(f"data.num_classes={num_classes}: NYUv2 has 13 or 40")
    if path is None:
        keys = ("folder", "num_frames", "size", "seed")
        for key in rooms or {}:
            if key not in keys:
                raise MetaVPTError(f"data.rooms.{key}: no such key; known are {', '.join(keys)}")
        return NYUv2Mat(rooms_file(**(rooms or {})), num_classes)
    path = Path(path)
    if not path.exists():
        raise MetaVPTError(
            f"data.path={path}: no such file; give {MAT_NAME}, {ZIP_NAME} or their folder, or null "
            "for generated rooms"
        )
    if path.is_dir():
        folder, path = (
            path,
            next((path / name for name in (ZIP_NAME, MAT_NAME) if (path / name).is_file()), path),
        )
        if path == folder:
            raise MetaVPTError(
                f"data.path={folder}: the folder holds neither {ZIP_NAME} nor {MAT_NAME}"
            )
    return NYUv2Zip(path, num_classes) if path.suffix == ".zip" else NYUv2Mat(path, num_classes)


class NYUv2Mat(RGBDFrames):
    """The official file: MATLAB 7.3, which is HDF5, stored transposed and read frame by frame.

    Images are N x 3 x W x H, depths and labels N x W x H. The split is the file's own (`trainNdxs`,
    `testNdxs`, from 1), else the official 795 / 654. `class_table` maps raw labels to classes.
    """

    def __init__(self, path: Path, num_classes: int = 13) -> None:
        self.path, self.name = path, path.name
        self._file: h5py.File | None = None
        self._process = 0
        with reading(
            f"{path}: its HDF5 structure cannot be read", "the file is damaged, get it again"
        ):
            self._read_layout(self._open(), num_classes)
        self.close()

    def _read_layout(self, file: h5py.File, num_classes: int) -> None:
        """What all frames share."""
        path = self.path
        for name in ("images", "depths", "labels", "names"):
            if name not in file:
                raise MetaVPTError(
                    f"{path}: lacks the dataset {name!r}; it is not {MAT_NAME}, or not all of it"
                )
            self._check_held(file, name)
        shape = self._array("images").shape
        if len(shape) != 4 or shape[1] != 3 or self._array("images").dtype != np.uint8:
            kind = self._array("images").dtype
            raise MetaVPTError(f"{path}: images is {kind} {shape}; it must be uint8 (N,3,W,H)")
        if min(shape) < 1:
            raise MetaVPTError(f"{path}: images is {shape}; a frame has at least one pixel")
        self.num_frames, _, width, height = shape
        self.size = (height, width)
        for dataset, kinds in (("depths", "fiu"), ("labels", "iu")):
            array = self._array(dataset)
            if array.shape != (self.num_frames, width, height):
                expected = (self.num_frames, width, height)
                raise MetaVPTError(
                    f"{path}: {dataset} is {array.shape}, not {expected} like images"
                )
            if array.dtype.kind not in kinds:
                numbers = "numbers" if "f" in kinds else "whole numbers"
                raise MetaVPTError(f"{path}: {dataset} is {array.dtype}; it must hold {numbers}")
        for name in ("images", "depths", "labels"):
            held = self._array(name).id.get_storage_size() / self.num_frames
            if width * height > max_pixels(held):
                raise MetaVPTError(
                    f"{path}: {name} has frames of {height}x{width} pixels in {held:.0f} bytes each"
                )
        self.class_names, self._classes = class_table(self._read_names(file), num_classes)
        self.splits = self._read_splits(file)

    def __len__(self) -> int:
        return self.num_frames

    def __getitem__(self, index: int) -> Frame:
        image, depth, label = (self._read(name, index) for name in ("images", "depths", "labels"))
        for extreme in (label.min(), label.max()):
            if not 0 <= int(extreme) < len(self._classes):
                raise MetaVPTError(
                    f"{self.path}: frame {index} has label {extreme}; labels are 0 (unlabelled) "
                    f"and 1 to {len(self._classes) - 1}"
                )
        return make_frame(
            image.transpose(2, 1, 0), depth.T, self._classes[label.T], f"{self.path}: frame {index}"
        )

    @override
    def image(self, index: int) -> Tensor:
        return torch.from_numpy(
            np.ascontiguousarray(self._read("images", index).transpose(0, 2, 1))
        )

    def close(self) -> None:
        """Let go of the file; it opens again when read, once in each process."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _read(self, dataset: str, index: int) -> np.ndarray:
        with reading(
            f"{self.path}: frame {index} cannot be read", "the file is damaged, get it again"
        ):
            return self._array(dataset)[index]

    def _array(self, name: str) -> h5py.Dataset:
        return cast(h5py.Dataset, self._open()[name])

    def _open(self) -> h5py.File:
        if self._process != os.getpid():  # a fork shares the position in the file with its parent
            self.close()
        if self._file is None:
            with reading(
                f"{self.path}: not a MATLAB 7.3 (HDF5) file, or cut off", "download it again"
            ):
                self._file, self._process = h5py.File(self.path, "r"), os.getpid()
        return self._file

    def _check_held(self, file: h5py.File, name: str) -> None:
        """Check that a dataset lies in this file and is no larger than its bytes.

        HDF5 can link to other files, and store values in them. It can declare any size without
        data.

        Raises:
            MetaVPTError: It is elsewhere, or larger than the file.
        """
        link = file.get(name, getlink=True)
        if not isinstance(link, h5py.HardLink):
            raise MetaVPTError(f"{self.path}: {name} is a link, which may lead to other files")
        self._check_values(file[name], name)

    def _check_values(self, dataset: Any, name: str, most: float = math.inf) -> None:
        """The same for what a link or a reference leads to; `most` values are expected."""
        if not isinstance(dataset, h5py.Dataset):
            raise MetaVPTError(f"{self.path}: {name} is no dataset")
        if dataset.external or dataset.is_virtual:
            raise MetaVPTError(f"{self.path}: {name} has its values in other files")
        held = min(dataset.id.get_storage_size(), self.path.stat().st_size)
        chunk = math.prod(dataset.chunks or ()) * dataset.dtype.itemsize
        if dataset.nbytes > max(SPARE, DEFLATE * held) or chunk > SPARE:
            raise MetaVPTError(
                f"{self.path}: {name} is declared with {dataset.nbytes:,} bytes, "
                f"{chunk:,} in a chunk, of which the file holds {held:,}; get it again"
            )
        if (dataset.size or 0) > most:
            raise MetaVPTError(f"{self.path}: {name} has {dataset.size} values, not {most} at most")

    def _read_names(self, file: h5py.File) -> list[str]:
        """MATLAB's cell array: references to the character codes of each name."""
        with reading(f"{self.path}: names is not a cell array of strings"):
            self._check_values(file["names"], "names", MAX_NAMES)
            names = []
            for reference in np.asarray(file["names"]).ravel():
                letters = file[reference]
                self._check_values(letters, "a name", MAX_LETTERS)
                names.append("".join(map(chr, np.asarray(letters).ravel())))
            return names

    def _read_splits(self, file: h5py.File) -> dict[str, list[int]]:
        if "trainNdxs" in file and "testNdxs" in file:
            with reading(f"{self.path}: trainNdxs and testNdxs hold no rows"):
                for name in ("trainNdxs", "testNdxs"):
                    self._check_held(file, name)
                    self._check_values(file[name], name, self.num_frames)
                train, val = (
                    (np.asarray(file[name]).astype(int).ravel() - 1).tolist()
                    for name in ("trainNdxs", "testNdxs")
                )
        elif self.num_frames == NUM_OFFICIAL_FRAMES:
            train = official_train_rows()
            val = sorted(set(range(NUM_OFFICIAL_FRAMES)) - set(train))
        else:
            raise MetaVPTError(
                f"{self.path}: has {self.num_frames} frames, not the official "
                f"{NUM_OFFICIAL_FRAMES}, and no trainNdxs, testNdxs of its own"
            )
        if set(train) & set(val) or not set(train) | set(val) <= set(range(self.num_frames)):
            raise MetaVPTError(
                f"{self.path}: trainNdxs and testNdxs must be disjoint rows from 1 to "
                f"{self.num_frames}"
            )
        return {"train": train, "val": val}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}


class NYUv2Zip(RGBDFrames):
    """The zip of rgb/i.jpg, depth/i.png (8-bit codes) and label40/i.png for i = 0000..1448.

    The rows are the official ones; `splits.json` lies beside the zip. Frame k is the row `rows[k]`.
    otherprop is ignored like unlabelled pixels, as the zip does not distinguish them.
    """

    def __init__(self, path: Path, num_classes: int = 13) -> None:
        self.path, self.name = path, path.name
        self.archive = Archive(path)
        split_rows = _read_split_rows(path.with_name("splits.json"))
        self.rows = sorted(row for rows in split_rows.values() for row in rows)
        position = {row: k for k, row in enumerate(self.rows)}
        self.splits = {split: [position[row] for row in rows] for split, rows in split_rows.items()}
        self.class_names, self._classes = class_table(CLASSES["names40"][1:], num_classes)
        for row in self.rows:
            for member in (f"rgb/{row:04d}.jpg", f"depth/{row:04d}.png", f"label40/{row:04d}.png"):
                if member not in self.archive.names:
                    raise MetaVPTError(f"{path}: the zip lacks {member}; get the whole file again")
        height, width = self._map("depth", self.rows[0]).shape
        self.size = (int(height), int(width))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Frame:
        row = self.rows[index]
        image = self.image(index).permute(1, 2, 0).numpy()
        codes, label = self._map("depth", row), self._map("label40", row)
        for kind, array in (("depth", codes), ("label40", label)):
            self._check_size(kind, row, array.shape)
        if int(label.max()) >= len(self._classes):
            raise MetaVPTError(
                f"{self.path}: label40/{row:04d}.png has label {label.max()}, the classes end at "
                f"{len(self._classes) - 1}"
            )
        depth = (codes.astype(np.float32) + 0.5) * METRES_PER_CODE
        return make_frame(image, depth, self._classes[label], f"{self.path}: row {row:04d}")

    def encoded(self, index: int) -> Encoded:
        """Return the encoded member of an image, see `overlap`."""
        return self.archive.encoded(f"rgb/{self.rows[index]:04d}.jpg")

    @override
    def image(self, index: int) -> Tensor:
        row = self.rows[index]
        image = decode(self.archive.read(f"rgb/{row:04d}.jpg"), f"{self.path}: rgb/{row:04d}.jpg")
        self._check_size("rgb", row, image.shape[1:])
        return image

    def _check_size(self, kind: str, row: int, size: tuple[int, ...]) -> None:
        if tuple(size) != self.size:
            raise MetaVPTError(
                f"{self.path}: {kind}/{row:04d} is {size[0]}x{size[1]}, the others are "
                f"{self.size[0]}x{self.size[1]}"
            )

    def _map(self, kind: str, row: int) -> np.ndarray:
        member = f"{kind}/{row:04d}.png"
        with reading(f"{self.path}: {member} is not a readable image"):
            array = np.asarray(open_image(io.BytesIO(self.archive.read(member))))
        if array.ndim != 2 or array.dtype.kind not in "biu":
            raise MetaVPTError(
                f"{self.path}: {member} has {array.ndim} dimensions; it must hold one value a pixel"
            )
        return array


def class_table(names: list[str], num_classes: int) -> tuple[list[str], np.ndarray]:
    """Return the names of the classes 0..C-1, and the table from raw label to class.

    Raw label k is called `names[k - 1]`, 0 is unlabelled, 255 ignored. A raw class with the name of
    an NYU-40 class is that class. Of the official list of 894, the others are otherstructure,
    otherfurniture or otherprop, as in classMapping40.mat; of any other list they are ignored. Names
    of the generated rooms or of the 13 classes, or a list without any of the 40 names, are classes
    themselves.
    """
    names40, names13 = CLASSES["names40"], CLASSES["names13"]
    if names in (ROOM_CLASSES, names13[1:]) or not set(names) & set(names40[1:]):
        return list(names), np.array([IGNORE, *range(len(names))])
    to40 = [0] + [names40.index(name, 1) if name in names40[1:] else 0 for name in names]
    if len(names) == NUM_RAW_CLASSES:
        others = {
            raw: names40.index(name)
            for name in ("otherstructure", "otherfurniture")
            for raw in CLASSES[f"raw_{name}"]
        }
        to40 = [0] + [
            to40[raw] or others.get(raw, names40.index("otherprop"))
            for raw in range(1, NUM_RAW_CLASSES + 1)
        ]
    if num_classes == 40:
        return names40[1:], np.array([label - 1 if label else IGNORE for label in to40])
    to13 = [CLASSES["to13"][label] for label in to40]
    return names13[1:], np.array([label - 1 if label else IGNORE for label in to13])


def official_train_rows() -> list[int]:
    """Return the 795 rows, from 0, of the official training split. The other 654 are for tests."""
    return json.loads((files("metavpt.data") / "nyuv2_split.json").read_text())["train"]


def _read_split_rows(path: Path) -> dict[str, list[int]]:
    """The rows, from 0, of "train" and "val"."""
    with reading(f"{path}: must list the rows of 'train' and 'val'", "write it anew"):
        splits = {
            split: [int(row) for row in json.loads(path.read_text())[split]]
            for split in ("train", "val")
        }
    if not splits["train"] or not splits["val"] or set(splits["train"]) & set(splits["val"]):
        raise MetaVPTError(f"{path}: 'train' and 'val' must both hold rows, and share none")
    return splits
