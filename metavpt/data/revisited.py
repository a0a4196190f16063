"""Revisited Oxford and Paris: landmark photos and the matches of each query (arXiv 1803.11285)."""

import pickle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from metavpt.errors import MetaVPTError, reading

SAFE = {  # what the protocols of pickle need to rebuild bytes, arrays and numbers
    ("__builtin__", "bytes"), ("builtins", "bytes"), ("_codecs", "encode"), ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy._core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "scalar"),
    ("numpy._core.numeric", "_frombuffer"),
}  # fmt: skip


class Query(NamedTuple):
    """A query. box: x1, y1, x2, y2 in pixels, or None; easy, hard, junk: rows of the image list."""

    name: str
    box: tuple[float, float, float, float] | None
    easy: np.ndarray
    hard: np.ndarray
    junk: np.ndarray


class Revisited(NamedTuple):
    """The ground truth of one set; the image called `x` is the file `folder / x.jpg`."""

    name: str
    folder: Path
    images: list[str]
    queries: list[Query]


def open_revisited(path: Path) -> Revisited:
    """The official layout: a folder with gnd_<name>.pkl and jpg/<image>.jpg."""
    found = sorted(path.glob("gnd_*.pkl")) if path.is_dir() else []
    if len(found) != 1:
        raise MetaVPTError(
            f"{path}: must be a folder with exactly one gnd_<name>.pkl and a folder jpg beside "
            f"it; it has {len(found)}"
        )
    file = found[0]
    truth = read_plain_pickle(file)
    with reading(
        f"{file}: is no ground truth with imlist, qimlist and gnd of bbx, easy, hard, junk"
    ):
        images, names, gnd = (
            [str(name) for name in truth["imlist"]],
            [str(name) for name in truth["qimlist"]],
            truth["gnd"],
        )
        queries = [_query(name, entry, len(images)) for name, entry in zip(names, gnd, strict=True)]
    if not images or not queries:
        raise MetaVPTError(f"{file}: lists no image or no query")
    return Revisited(file.stem.removeprefix("gnd_"), path / "jpg", images, queries)


def _query(name: str, entry: dict[str, Any], num_images: int) -> Query:
    rows = [np.asarray(entry[kind]).ravel().astype(np.int64) for kind in ("easy", "hard", "junk")]
    if any(len(part) and not 0 <= part.min() <= part.max() < num_images for part in rows):
        raise ValueError(f"{name} names images beyond the {num_images} listed")
    box = entry.get("bbx")
    if box is None:
        return Query(name, None, *rows)
    x1, y1, x2, y2 = (float(value) for value in box)
    return Query(name, (x1, y1, x2, y2), *rows)


def read_plain_pickle(file: Path) -> Any:
    """Lists, dicts, numbers, strings and numpy arrays.

    A pickle may run anything when read, so one that asks for more is refused.
    """
    with (
        reading(f"{file}: cannot be read as a pickle of lists, dicts and arrays"),
        file.open("rb") as opened,
    ):
        return _PlainUnpickler(opened, encoding="latin1").load()


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy.core.", "numpy._core.")  # the name before numpy 2
        if (module, name) not in SAFE:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}, which is refused: it could run code"
            )
        return super().find_class(module, name)
