"""A user's own labelled images: masks of class numbers, depth maps, or both."""

import hashlib
import io
import json
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from rich.progress import track
from torch import Tensor
from typing_extensions import override

from metavpt.cli.console import say
from metavpt.data.archives import FREE
from metavpt.data.cache import cache_folder
from metavpt.data.frames import Frame, RGBDFrames
from metavpt.data.overlap import Encoded, encoded_file
from metavpt.data.paired import find_items, split
from metavpt.data.photo import (
    Resize,
    decode,
    fit_maps,
    max_pixels,
    open_image,
    upright_size,
)
from metavpt.data.shards import in_tar, read_bytes, size_of
from metavpt.dense_tasks.segmentation import IGNORE
from metavpt.errors import MetaVPTError, check_known, reading

MIN_SIDE = 16  # pixels; less is no photograph
MAX_VALUE = 2**16  # values that a mask may have
# np.load parses the header of a file by `ast`, which fails now and then in threads of Python 3.11.
NPY_HEADER = threading.Lock()
NONE = -1  # in the table of a mask: neither a class nor ignored
SLOW = 1000  # files that take so long to check that a bar shows it
LISTED = 20  # values or names in a message

Places = str | Sequence[str]
Classes = int | Sequence[str] | Mapping[int, str]


class LabelledImages(RGBDFrames):
    """Images with a mask, a depth map, or both, in any layout of files.

    Every file is checked when the object is made: that each image has its maps, that their sizes
    agree, that masks hold known values and depth maps a valid pixel. The result is kept in the
    cache folder, so that only files that have changed are read again. Images and maps are decoded
    when they are asked for.

    Args:
        path: The folder that all places are relative to.
        images: Where the images are: a folder, a pattern, a .txt list, or several of these. See
            `paired.find_items` for what makes an image and a map belong together.
        masks: Where the masks are, files of one class number a pixel; None: there are none.
        classes: The number of classes, their names, or names by mask value.
        ignore_index: The mask value, or values, that no class is meant by.
        depths: Where the depth maps are: PNG of whole numbers, or .npy; None: there are none.
        scale: Metres in one unit of a depth map. Depth that is not positive is unknown.
        train: The images to train on; None: all that are not in `val`. See `paired.split`.
        val: The images to evaluate on, or their share.
        size: Height and width that images and maps are brought to; None: those of the first image.
        resize: "cover" scales and cuts around the centre, "stretch" keeps all of an image.

    Raises:
        MetaVPTError: A file that does not fit. The message names it.
    """

    def __init__(
        self,
        path: str | Path,
        images: Places = "images",
        masks: Places | None = None,
        classes: Classes | None = None,
        ignore_index: int | Sequence[int] | None = 255,
        depths: Places | None = None,
        scale: float | None = None,
        train: Places | None = None,
        val: float | Places | None = None,
        size: Sequence[int] | None = None,
        resize: Resize = "cover",
    ) -> None:
        check_known(resize, "data.resize", "cover", "stretch")
        self.path = Path(path)
        self.resize: Resize = resize
        self.name = self.path.resolve().name
        if not self.path.is_dir():
            raise MetaVPTError(f"data.path={path}: no such folder; name that of your images")
        places = {kind: of for kind, of in (("masks", masks), ("depths", depths)) if of is not None}
        if not places:
            raise MetaVPTError("data.masks and data.depths are null: name one of them")
        if depths is not None and not (scale and scale > 0):
            raise MetaVPTError(
                f"data.scale={scale}: give the metres in one unit of a depth map, 0.001 for "
                "millimetres"
            )
        self.scale = scale or 1.0
        items = find_items(self.path, images, places)
        splits, self.origin = split(self.path, [item.image for item in items], train, val)
        used = sorted({*splits["train"], *splits["val"]})
        position = {i: k for k, i in enumerate(used)}
        self.items = [items[i] for i in used]
        self.splits = {name: [position[i] for i in part] for name, part in splits.items()}
        self._check_complete(places)
        if masks is not None and classes is None:
            raise MetaVPTError(
                f"data.classes: give the number of classes or their names; {self._some_values()}"
            )
        self.table, self.class_names = (
            class_table(classes, ignore_index)
            if classes is not None
            else (np.full(MAX_VALUE, NONE), [])
        )
        self.size = self._find_size(size)
        present = self._check_files()
        say("data:", self._describe(present))

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Frame:
        maps = self.items[index].maps
        depth = torch.zeros(()).expand(self.size)
        label = torch.tensor(IGNORE).expand(self.size)
        if "depths" in maps:
            metres = torch.from_numpy(read_depth(maps["depths"], self.scale))
            depth = fit_maps(metres[None], self.size, self.resize, "nearest-exact")[0]
        if "masks" in maps:
            mask = torch.from_numpy(self._classes_of(maps["masks"]))
            label = fit_maps(mask[None], self.size, self.resize, "nearest-exact")[0].long()
        return Frame(self.image(index), depth, label)

    @override
    def image(self, index: int) -> Tensor:
        file = self.items[index].image
        image = decode(_bytes(file), str(file))
        return fit_maps(image, self.size, self.resize, "bilinear")

    def encoded(self, index: int) -> Encoded:
        """Return the encoded file of an image, see `overlap`."""
        return encoded_file(self.items[index].image)

    def _classes_of(self, file: Path) -> np.ndarray:
        """Classes of a mask, uint8 (H, W)."""
        mask = read_mask(file)
        found = self.table[mask]
        if (found == NONE).any():
            value = int(mask[found == NONE].min())
            raise MetaVPTError(
                f"{file}: has the value {value}, which is neither a class "
                f"({self._known('classes')}) nor ignored ({self._known('ignored')}); mend the "
                "mask, or set data.classes or data.ignore_index"
            )
        return found.astype(np.uint8)

    def _known(self, which: Literal["classes", "ignored"]) -> str:
        counted = self.table == IGNORE if which == "ignored" else (self.table >= 0)
        if which == "classes":
            counted &= self.table != IGNORE
        values = np.flatnonzero(counted)
        if len(values) > 1 and values[-1] - values[0] == len(values) - 1:
            return f"{values[0]} to {values[-1]}"
        return ", ".join(map(str, values[:LISTED])) or "none"

    def _check_complete(self, places: Mapping[str, Places]) -> None:
        for kind, of_kind in places.items():
            lacking = [item.image for item in self.items if kind not in item.maps]
            if lacking:
                others = f", and {len(lacking) - 1} others have none" if lacking[1:] else ""
                raise MetaVPTError(
                    f"{lacking[0]}: has no file of its name in data.{kind}={of_kind}{others}; add "
                    "it, or leave the image out with data.train and data.val"
                )

    def _some_values(self) -> str:
        """What the first masks hold, for a user who has not named the classes."""
        files = [item.maps["masks"] for item in self.items[:LISTED]]
        values = np.unique(np.concatenate([np.unique(read_mask(file)) for file in files]))
        shown = ", ".join(map(str, values[:LISTED])) + (", ..." if len(values) > LISTED else "")
        return f"the first {len(files)} masks hold {shown}"

    def _find_size(self, size: Sequence[int] | None) -> tuple[int, int]:
        if size is None:
            return _size_of(self.items[self.splits["train"][0]].image)
        if len(size) != 2 or min(size) < 1:
            raise MetaVPTError(f"data.size={list(size)}: must be a height and a width")
        return int(size[0]), int(size[1])

    def _check_files(self) -> dict[str, list[int]]:
        """Check every file, once; returns the classes that the masks of each split hold."""
        stamp = cache_folder() / "checked" / f"{self._fingerprint()}.json"
        if stamp.is_file():
            with reading(f"{stamp}: not readable", "remove it"):
                return json.loads(stamp.read_text())
        counted = range(len(self.items))
        pool = ThreadPoolExecutor()
        try:
            checked = track(
                pool.map(self._check_item, counted),
                f"checking {len(counted)} images and their labels (once)",
                total=len(counted),
                transient=True,
                disable=len(counted) < SLOW,
            )
            found = list(checked)
        finally:
            pool.shutdown(cancel_futures=True)  # of an error; the rest need not be read
        present = {
            name: sorted(set().union(*(found[i] for i in part)))
            for name, part in self.splits.items()
        }
        try:
            stamp.parent.mkdir(parents=True, exist_ok=True)
            stamp.write_text(json.dumps(present))
        except OSError:  # then they are checked again next time
            pass
        return present

    def _check_item(self, index: int) -> set[int]:
        """Check an image and its maps; returns the classes of its mask."""
        item, classes = self.items[index], set[int]()
        size = _size_of(item.image)
        for kind, file in item.maps.items():
            if kind == "masks":
                labels = self._classes_of(file)
                classes = set(np.unique(labels).tolist()) - {IGNORE}
            else:
                labels = read_depth(file, self.scale)
                if not labels.any():
                    raise MetaVPTError(f"{file}: no pixel has a depth above 0; remove the image")
            if labels.shape != size:
                raise MetaVPTError(
                    f"{file}: is {labels.shape[0]}x{labels.shape[1]} pixels, but {item.image} is "
                    f"{size[0]}x{size[1]}; a label map has the size of its image"
                )
        return classes

    def _fingerprint(self) -> str:
        """Of all that a check depends on."""
        options = [self.scale, self.splits, self.table.tolist()]
        digest = hashlib.sha256(json.dumps(options).encode())
        for item in self.items:
            for file in (item.image, *item.maps.values()):
                tar, name = in_tar(file) or (file, "")
                stat = tar.stat()
                told = f"{tar.resolve()} {name} {stat.st_size} {stat.st_mtime_ns}\n"
                digest.update(told.encode())
        return digest.hexdigest()[:32]

    def _describe(self, present: Mapping[str, list[int]]) -> str:
        train, val = (len(self.splits[name]) for name in ("train", "val"))
        told = f"{self.name}: {train} images to train on, {val} to evaluate on ({self.origin})"
        if self.class_names:
            told += f", {len(self.class_names)} classes"
        for name, of_split in present.items():
            absent = [c for i, c in enumerate(self.class_names) if i not in of_split]
            if absent:
                told += f"; in no mask of {name}: {', '.join(absent[:LISTED])}"
        return told


def class_table(
    classes: Classes, ignore_index: int | Sequence[int] | None
) -> tuple[np.ndarray, list[str]]:
    """The class of each mask value, and the names of the classes.

    Args:
        classes: Their number, or names, for the values 0, 1, 2, ...; or names by value.
        ignore_index: Values that are ignored.

    Returns:
        int64 (65536,): the class, 255 for ignored values, -1 for others; and the names.
    """
    num_classes = classes if isinstance(classes, int) else len(classes)
    if not 2 <= num_classes <= IGNORE:  # before a name is made for each
        raise MetaVPTError(f"data.classes: {num_classes} classes; there must be 2 to {IGNORE}")
    if isinstance(classes, int):
        names = {value: str(value) for value in range(classes)}
    elif isinstance(classes, Mapping):
        names = {int(value): str(name) for value, name in sorted(classes.items())}
    else:
        names = dict(enumerate(map(str, classes)))
    ignored = [] if ignore_index is None else np.atleast_1d(np.asarray(ignore_index)).tolist()
    # A class of that number would be ignored without a word.
    if both := names.keys() & set(ignored):
        raise MetaVPTError(
            f"data.ignore_index={ignore_index}: {min(both)} is the value of a class as well, "
            f"{names[min(both)]!r} of {len(names)}; with data.classes={len(names)} masks hold 0 to "
            f"{len(names) - 1}. Give names by value, as in data.classes={{1:road,2:car}}, if they "
            "hold others"
        )
    table = np.full(MAX_VALUE, NONE)
    for value, is_class in [*((v, True) for v in names), *((v, False) for v in ignored)]:
        if not 0 <= value < MAX_VALUE:
            key = "classes" if is_class else "ignore_index"
            raise MetaVPTError(f"data.{key}: the value {value} must lie in 0..{MAX_VALUE - 1}")
        table[value] = list(names).index(value) if is_class else IGNORE
    return table, list(names.values())


def read_mask(file: Path) -> np.ndarray:
    """The numbers of a mask, as they stand, (H, W); a palette's colours are not read."""
    mask = _read_map(file)
    if mask.ndim != 2 or mask.dtype.kind not in "biu":
        raise MetaVPTError(
            f"{file}: holds {'colours' if mask.ndim == 3 else mask.dtype}; a mask holds one whole "
            "number a pixel, its class (save colours as class numbers first)"
        )
    if mask.size and not 0 <= int(mask.min()) <= int(mask.max()) < MAX_VALUE:
        raise MetaVPTError(f"{file}: has values outside 0..{MAX_VALUE - 1}")
    return mask.astype(np.int64)


def read_depth(file: Path, scale: float) -> np.ndarray:
    """Depth in metres, float32 (H, W), 0 where it is unknown."""
    depth = _read_map(file)
    if depth.ndim != 2 or depth.dtype.kind not in "fiu":
        raise MetaVPTError(f"{file}: is {depth.dtype} {depth.shape}; a depth map is numbers (H, W)")
    metres = depth.astype(np.float32) * np.float32(scale)
    return np.where(np.isfinite(metres) & (metres > 0), metres, np.float32(0))


def _read_map(file: Path) -> np.ndarray:
    """The array in a PNG, BMP or .npy."""
    with reading(f"{file}: not a readable label map", "remove or replace it"):
        content = io.BytesIO(read_bytes(file)) if in_tar(file) else file
        if file.suffix != ".npy":
            return np.asarray(open_image(content))
        mode = "r" if content is file else None
        with NPY_HEADER:
            array = np.load(content, mmap_mode=mode, allow_pickle=False)
        if array.size > max(FREE, max_pixels(size_of(file))):
            raise ValueError(f"{array.size} values")
        return np.ascontiguousarray(array)


def _size_of(file: Path) -> tuple[int, int]:
    """Height and width, of the header alone."""
    with reading(f"{file}: not a readable image", "remove or replace it"):
        content = io.BytesIO(read_bytes(file)) if in_tar(file) else file
        height, width = upright_size(content)
    if min(height, width) < MIN_SIDE:
        raise MetaVPTError(
            f"{file}: is {height}x{width} pixels, below {MIN_SIDE} a side; remove it or get it "
            "again"
        )
    return height, width


def _bytes(file: Path) -> bytes:
    with reading(f"{file}: cannot be read", "remove or replace it"):
        return read_bytes(file)
