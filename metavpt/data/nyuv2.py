"""NYU Depth v2, labelled set: the official MATLAB file, and a zip of half-resolution frames."""

import io
import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from metavpt.data.frames import IGNORE, Frame, RGBDFrames, make_frame
from metavpt.data.images import Archive, decode
from metavpt.data.rooms import rooms_file
from metavpt.errors import MetaVPTError

ZIP_NAME = "nyuv2_labeled_240x320.zip"
METRES_PER_CODE = 9.99547 / 255  # of the zip's 8-bit depth
CLASSES: dict[str, Any] = json.loads((files("metavpt.data") / "nyuv2_classes.json").read_text())


def open_nyuv2(path: str | Path | None, num_classes: int = 13, rooms: Mapping[str, Any] | None = None) -> RGBDFrames:
    """The frames at `path`: nyu_depth_v2_labeled.mat, the zip of 240x320 frames or its folder; None: rooms generated with `rooms`."""
    if num_classes not in (13, 40):
        raise MetaVPTError(f"data.num_classes={num_classes}: NYUv2 has 13 or 40")
    if path is None:
        return NYUv2Mat(rooms_file(**(rooms or {})), num_classes)
    path = Path(path)
    if path.is_dir() and (path / ZIP_NAME).is_file():
        path = path / ZIP_NAME
    if not path.is_file():
        raise MetaVPTError(f"data.path={path}: no such file; name nyu_depth_v2_labeled.mat or the folder that holds {ZIP_NAME}")
    return NYUv2Zip(path, num_classes) if path.suffix == ".zip" else NYUv2Mat(path, num_classes)


class NYUv2Mat(RGBDFrames):
    """The official file (MATLAB 7.3, which is HDF5, stored transposed): images N x 3 x W x H, depths and labels N x W x H, read one by one.

    The split is the file's own (`trainNdxs`, `testNdxs`, from 1), else the official 795 / 654. Raw labels are classes by `names`: one that
    is among the NYU-40 names is that class, any other is ignored; a file whose names are few (rooms) is taken as it is.
    """

    def __init__(self, path: Path, num_classes: int = 13) -> None:
        self.path, self.name = path, path.name
        self._file: h5py.File | None = None
        file = self._open()
        for dataset in ("images", "depths", "labels", "names"):
            if dataset not in file:
                raise MetaVPTError(f"{path}: lacks the dataset {dataset!r}; it is not nyu_depth_v2_labeled.mat, or not all of it")
        num_frames, _, width, height = file["images"].shape
        self.size = (height, width)
        for dataset in ("depths", "labels"):
            if file[dataset].shape != (num_frames, width, height):
                raise MetaVPTError(f"{path}: {dataset} is {file[dataset].shape}, not {(num_frames, width, height)} like images")
        self.num_frames = num_frames
        names = ["".join(map(chr, np.asarray(file[reference]).ravel())) for reference in np.asarray(file["names"]).ravel()]
        self.class_names, self._classes = class_table(names, num_classes)
        self.splits = self._read_splits(file)
        self.close()

    def __len__(self) -> int:
        return self.num_frames

    def __getitem__(self, index: int) -> Frame:
        image, depth, label = (self._read(name, index) for name in ("images", "depths", "labels"))
        if int(label.max(initial=0)) >= len(self._classes):
            raise MetaVPTError(f"{self.path}: frame {index} has label {label.max()}, but there are only {len(self._classes) - 1} names")
        return make_frame(image.transpose(2, 1, 0), depth.T, self._classes[label.T], f"{self.path}: frame {index}")

    def image(self, index: int) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(self._read("images", index).transpose(0, 2, 1)))

    def close(self) -> None:
        """Let go of the file; it opens again when read, once in each process."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _read(self, dataset: str, index: int) -> np.ndarray:
        try:
            return self._open()[dataset][index]
        except OSError as error:
            raise MetaVPTError(f"{self.path}: frame {index} cannot be read ({error}); the file is damaged, get it again") from None

    def _open(self) -> h5py.File:
        if self._file is None:
            try:
                self._file = h5py.File(self.path, "r")
            except OSError as error:
                raise MetaVPTError(f"{self.path}: not a MATLAB 7.3 (HDF5) file, or cut off ({error}); download it again") from None
        return self._file

    def _read_splits(self, file: h5py.File) -> dict[str, list[int]]:
        if "trainNdxs" in file and "testNdxs" in file:
            train, val = (np.asarray(file[name]).astype(int).ravel() - 1 for name in ("trainNdxs", "testNdxs"))
            return {"train": train.tolist(), "val": val.tolist()}
        train = official_train_rows()
        if self.num_frames != 1449:
            raise MetaVPTError(f"{self.path}: has {self.num_frames} frames, not the official 1449, and no split (trainNdxs, testNdxs) of its own")
        return {"train": train, "val": sorted(set(range(1449)) - set(train))}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}


class NYUv2Zip(RGBDFrames):
    """rgb/i.jpg, depth/i.png (8-bit codes) and label40/i.png for i = 0000..1448, the official rows; `splits.json` lies beside the zip."""

    def __init__(self, path: Path, num_classes: int = 13) -> None:
        self.path, self.name = path, path.name
        self.archive = Archive(path)
        splits = path.with_name("splits.json")
        try:
            self.splits = {split: list(json.loads(splits.read_text())[split]) for split in ("train", "val")}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise MetaVPTError(f"{splits}: must list the rows of 'train' and 'val' ({error!r})") from None
        self.class_names, self._classes = class_table(CLASSES["names40"][1:], num_classes)
        rows = self.splits["train"] + self.splits["val"]
        members = (f"{kind}/{row:04d}.{suffix}" for row in rows for kind, suffix in (("rgb", "jpg"), ("depth", "png"), ("label40", "png")))
        for member in members:
            if member not in self.archive.names:
                raise MetaVPTError(f"{path}: the zip lacks {member}; get the whole file again")
        self.size = (int(self._map("depth", rows[0]).shape[0]), int(self._map("depth", rows[0]).shape[1]))

    def __len__(self) -> int:
        return len(self.splits["train"]) + len(self.splits["val"])

    def __getitem__(self, index: int) -> Frame:
        codes, label = self._map("depth", index), self._map("label40", index)
        depth = (codes.astype(np.float32) + 0.5) * METRES_PER_CODE
        image = self.image(index).permute(1, 2, 0).numpy()
        for what, array in (("rgb", image), ("depth", codes), ("label40", label)):
            self._check_size(what, index, array.shape[:2])
        if int(label.max()) >= len(self._classes):
            raise MetaVPTError(f"{self.path}: label40/{index:04d}.png has label {label.max()}, the classes end at {len(self._classes) - 1}")
        return make_frame(image, depth, self._classes[label], f"{self.path}: frame {index:04d}")

    def image(self, index: int) -> Tensor:
        image = decode(self.archive.read(f"rgb/{index:04d}.jpg"), f"{self.path}: rgb/{index:04d}.jpg")
        self._check_size("rgb", index, (image.shape[1], image.shape[2]))
        return image

    def _check_size(self, what: str, index: int, size: tuple[int, ...]) -> None:
        if tuple(size) != self.size:
            raise MetaVPTError(f"{self.path}: {what}/{index:04d} is {size[0]}x{size[1]}, the others are {self.size[0]}x{self.size[1]}")

    def _map(self, kind: str, index: int) -> np.ndarray:
        member = f"{kind}/{index:04d}.png"
        try:
            array = np.asarray(Image.open(io.BytesIO(self.archive.read(member))))
        except (OSError, ValueError, SyntaxError) as error:
            raise MetaVPTError(f"{self.path}: {member} is not a readable image ({error})") from None
        if array.ndim != 2:
            raise MetaVPTError(f"{self.path}: {member} has {array.ndim} dimensions; it must hold one value a pixel")
        return array


def class_table(names: list[str], num_classes: int) -> tuple[list[str], np.ndarray]:
    """(class names, raw label -> class), for raw labels 1.. called `names` and 0 unlabelled; 255 is ignored."""
    if names and names[0] == "unlabelled":  # a list that names label 0 as well
        names = names[1:]
    known40: list[str] = CLASSES["names40"][1:]
    if not set(names) & set(known40) or len(names) <= 20:
        return list(names), np.array([IGNORE, *range(len(names))])
    index40 = {name: i for i, name in enumerate(known40, start=1)}
    to40 = [0, *(index40.get(name, 0) for name in names)]
    if num_classes == 40:
        return known40, np.array([i - 1 if i else IGNORE for i in to40])
    to13 = CLASSES["to13"]
    return CLASSES["names13"][1:], np.array([to13[i] - 1 if to13[i] else IGNORE for i in to40])


def official_train_rows() -> list[int]:
    """The 795 rows, from 0, of the official training split; the other 654 of 1449 are for testing."""
    return json.loads((files("metavpt.data") / "nyuv2_split.json").read_text())["train"]
