"""ADE20K scene parsing (SceneParse150): photographs with one of 150 classes a pixel."""

import json
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from metavpt.cli.console import say
from metavpt.data.frames import Frame, RGBDFrames
from metavpt.data.overlap import Encoded, encoded_file
from metavpt.data.photo import SUFFIXES, Resize, decode, fit_maps, open_image
from metavpt.dense_tasks.segmentation import IGNORE
from metavpt.errors import MetaVPTError, check_known, reading

FOLDERS = {"train": "training", "val": "validation"}
CLASS_NAMES: list[str] = json.loads((files("metavpt.data") / "ade20k_classes.json").read_text())
MIN_SIDE = 16  # pixels; less is no photograph


class ADE20K(RGBDFrames):
    """ADEChallengeData2016: images and annotations of the same names, for training and validation.

    The files are images/{training,validation}/*.jpg and annotations/{training,validation}/*.png. An
    annotation holds 0 for ignored pixels and 1..150 for the classes, which become 255 and 0..149.
    There is no depth. An image without annotation, or an annotation without image, is left out; a
    visible line counts them. Frames are decoded when they are read.

    Args:
        path: The folder.
        size: (H, W) of the frames.
        resize: "cover" scales an image to cover `size` and crops its centre. "stretch" keeps the
            whole image and changes its aspect ratio.
    """

    def __init__(self, path: str | Path, size: tuple[int, int], resize: Resize = "cover") -> None:
        check_known(resize, "data.resize", "cover", "stretch")
        if min(size) < 1:
            raise MetaVPTError(f"data.size={size[0]}x{size[1]}: both sides must be positive")
        self.path, self.size = Path(path), size
        self.resize: Resize = resize
        self.name, self.class_names = self.path.name, CLASS_NAMES
        self.pairs: list[tuple[Path, Path]] = []
        self.splits = {}
        for split, folder in FOLDERS.items():
            found = self._find_pairs(folder)
            self.splits[split] = list(range(len(self.pairs), len(self.pairs) + len(found)))
            self.pairs += found

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Frame:
        file, annotation = self.pairs[index]
        image, label = self._decode(index), read_annotation(annotation)
        if image.shape[1:] != label.shape:
            (height, width), (rows, columns) = image.shape[1:], label.shape
            raise MetaVPTError(
                f"{annotation}: is {rows}x{columns}, but {file.name} is {height}x{width}; download "
                "both again"
            )
        unknown = torch.zeros(()).expand(self.size)
        return Frame(
            fit_maps(image, self.size, self.resize, "bilinear"),
            unknown,
            fit_maps(label[None], self.size, self.resize, "nearest-exact")[0].long(),
        )

    @override
    def image(self, index: int) -> Tensor:
        return fit_maps(self._decode(index), self.size, self.resize, "bilinear")

    def encoded(self, index: int) -> Encoded:
        """Return the encoded file of an image, see `overlap`."""
        return encoded_file(self.pairs[index][0])

    def _find_pairs(self, folder: str) -> list[tuple[Path, Path]]:
        images, annotations = self.path / "images" / folder, self.path / "annotations" / folder
        for place in (images, annotations):
            if not place.is_dir():
                raise MetaVPTError(
                    f"{self.path}: lacks the folder {place.relative_to(self.path)}; data.path must "
                    "be ADEChallengeData2016"
                )
        named = {
            file.stem: file
            for file in images.iterdir()
            if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")
        }
        labels = {
            file.stem: file
            for file in annotations.iterdir()
            if file.suffix.lower() == ".png" and not file.name.startswith(".")
        }
        for have, lack, what in (
            (named, labels, "images without annotation"),
            (labels, named, "annotations without image"),
        ):
            if single := sorted(have.keys() - lack.keys()):
                say(
                    "data:",
                    f"{len(single)} {what} in {self.path}/*/{folder} are left out, the first is "
                    f"{single[0]}",
                )
        if not named.keys() & labels.keys():
            raise MetaVPTError(
                f"{images}: holds no image with an annotation of the same name in {annotations}"
            )
        return [(named[stem], labels[stem]) for stem in sorted(named.keys() & labels.keys())]

    def _decode(self, index: int) -> Tensor:
        file = self.pairs[index][0]
        image = decode(file.read_bytes(), str(file))
        height, width = image.shape[1:]
        if min(height, width) < MIN_SIDE:
            raise MetaVPTError(
                f"{file}: is {height}x{width} pixels, below {MIN_SIDE} a side; remove it or "
                "download it again"
            )
        return image


def read_annotation(file: Path) -> Tensor:
    """Read classes uint8 (H, W) in 0..149, 255 where ignored.

    The numbers of a palette or 16-bit PNG are used unchanged.
    """
    with reading(f"{file}: not a readable image", "get it again"):
        array = np.asarray(open_image(file))
    if array.ndim != 2 or array.dtype.kind not in "biu":
        raise MetaVPTError(
            f"{file}: holds colours; a SceneParse150 annotation holds one class number per pixel "
            "(not the full ADE20K's)"
        )
    if int(array.max()) > len(CLASS_NAMES) or int(array.min()) < 0:
        raise MetaVPTError(
            f"{file}: has label {array.max()}; labels are 0 (ignored) and 1 to {len(CLASS_NAMES)}"
        )
    return torch.from_numpy(
        np.where(array == 0, IGNORE, array.astype(np.int64) - 1).astype(np.uint8)
    )
