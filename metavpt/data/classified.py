"""Classified images: a folder for each class, as ImageNet has them."""

import copy
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from metavpt.data.archives import load_npz
from metavpt.data.images import FolderImages, NpzImages
from metavpt.data.photo import SUFFIXES
from metavpt.errors import MetaVPTError, reading


class ClassifiedImages(NamedTuple):
    """Images uint8 (3, *size), and the class of each, int64 (N,) in 0..C-1."""

    images: Dataset[Tensor]
    labels: Tensor


class ClassifiedSet(NamedTuple):
    """Labelled images, split for training and validation."""

    train: ClassifiedImages
    val: ClassifiedImages
    num_classes: int


def open_classified(path: Path, size: tuple[int, int]) -> ClassifiedSet:
    """Open classified images, cropped around the centre.

    Args:
        path: A folder with train/<class>/ and val/<class>/, with images at any depth (ImageNet). A
            val_annotations.txt with lines `file <tab> class ...` may replace the second, its images
            in val/images/ (Tiny ImageNet). Or an npz of `images` (N, H, W, 3) or of `jpeg` with
            `offsets`, with `label` (N,) and `split` (N,), 0 for training and 1 for validation, or
            the folder of one such file.
        size: (H, W) of the crops.
    """
    if path.is_dir() and not (path / "train").is_dir():
        archives = sorted(path.glob("*.npz"))
        if len(archives) != 1:
            raise MetaVPTError(
                f"{path}: needs folders train and val with one folder a class, or exactly one npz"
            )
        path = archives[0]
    if path.is_dir():
        return _open_folder(path, size)
    if not path.is_file() or path.suffix != ".npz":
        raise MetaVPTError(
            f"{path}: is neither a folder with train and val nor an npz of classified images"
        )
    return _open_npz(path, size)


def _open_folder(path: Path, size: tuple[int, int]) -> ClassifiedSet:
    classes = sorted(folder.name for folder in (path / "train").iterdir() if folder.is_dir())
    index = {name: k for k, name in enumerate(classes)}
    train = [(file, name) for name in classes for file in _images_below(path / "train" / name)]
    listing = path / "val" / "val_annotations.txt"
    if listing.is_file():
        with reading(f"{listing}: not a readable text"):
            rows = [
                line.split("\t")
                for line in listing.read_text(encoding="utf-8").splitlines()
                if line.strip()
            ]
        if any(len(row) < 2 for row in rows):
            raise MetaVPTError(
                f"{listing}: each line must hold the name of a file, a tab and its class"
            )
        val = [(path / "val" / "images" / file, name) for file, name, *_ in rows]
    elif (path / "val").is_dir():
        val = [
            (file, folder.name)
            for folder in sorted((path / "val").iterdir())
            if folder.is_dir()
            for file in _images_below(folder)
        ]
    else:
        raise MetaVPTError(f"{path}: lacks the folder val")
    if not train or not val:
        raise MetaVPTError(
            f"{path / ('val' if train else 'train')}: holds no image in a folder of its class"
        )
    if unknown := sorted({name for _, name in val} - index.keys()):
        raise MetaVPTError(f"{path / 'val'}: class {unknown[0]} has no folder in {path / 'train'}")
    parts = [
        ClassifiedImages(
            FolderImages([file for file, _ in part], size),
            torch.tensor([index[name] for _, name in part]),
        )
        for part in (train, val)
    ]
    return ClassifiedSet(parts[0], parts[1], len(classes))


def _images_below(folder: Path) -> list[Path]:
    return sorted(
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")
    )


def _open_npz(path: Path, size: tuple[int, int]) -> ClassifiedSet:
    images = NpzImages(path, size)
    total = len(images.arrays.get("images", images.arrays.get("offsets", [0])[1:]))
    found = load_npz(path, ("label", "split"))
    if len(found) < 2:
        raise MetaVPTError(
            f"{path}: needs arrays `label` and `split` beside the images, one number an image"
        )
    labels, split = found["label"], found["split"]
    if (
        labels.shape != (total,)
        or split.shape != (total,)
        or labels.dtype.kind not in "iu"
        or int(labels.min(initial=0)) < 0
    ):
        raise MetaVPTError(
            f"{path}: label and split must hold a whole number from 0 for each of the {total} "
            "images"
        )
    if int(labels.max(initial=0)) >= total:
        raise MetaVPTError(
            f"{path}: has label {labels.max()}; {total} images have at most {total} classes, "
            "numbered from 0"
        )
    parts = []
    for k in (0, 1):
        part = copy.copy(images)
        part.indices = np.flatnonzero(split == k)
        if not len(part):
            raise MetaVPTError(
                f"{path}: no image has split {k}; 0 is for training, 1 for validation"
            )
        parts.append(
            ClassifiedImages(part, torch.from_numpy(labels[part.indices].astype(np.int64)))
        )
    return ClassifiedSet(parts[0], parts[1], int(labels.max()) + 1)
