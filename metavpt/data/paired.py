"""Files named by folder, pattern or list, paired by name and split into train and val."""

import glob
import os
import re
from collections.abc import Iterable, Mapping, Sequence, Set
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch

from metavpt.data import shards
from metavpt.data.photo import SUFFIXES
from metavpt.errors import MetaVPTError, reading

MAPS = {".png", ".bmp", ".npy"}  # formats that keep the numbers of a label map
EVALUATION = ("val", "valid", "validation", "test")  # folders, the first that is there counts
TAR = re.compile(r"\.tar(?:/|$)")
WILD = re.compile(r"(\*\*/|\*\*|\*|\?|\[[^\]]+\])")
NAMING = "name a folder, a pattern such as images/*.png, or a .txt list of files"


class Item(NamedTuple):
    """An image, and its label map of each kind."""

    image: Path
    maps: dict[str, Path]


def find_items(
    root: Path, images: str | Sequence[str], maps: Mapping[str, str | Sequence[str]]
) -> list[Item]:
    """Pair images with their label maps.

    A place is a folder, searched at any depth, a pattern, a .txt list of files, or a file. Tars
    count as folders, and may be a pattern of shards, as in train-{000..099}.tar/*.jpg. Two files of
    folders belong together if their paths within agree, apart from the suffix; two files of
    patterns, if the wildcards stand for the same; two files of lists, if their lines do.

    Args:
        root: What places are relative to.
        images: One place or several.
        maps: Kind of label map ("masks") to as many places.

    Returns:
        The images in the order of their names. An image without a map lacks the kind in `maps`.
    """
    places = _listed(images)
    found: dict[str, Path] = {}
    labels: dict[str, dict[str, Path]] = {kind: {} for kind in maps}
    for kind, of_kind in maps.items():
        if len(_listed(of_kind)) != len(places):
            raise MetaVPTError(
                f"data.images names {len(places)} places and data.{kind} "
                f"{len(_listed(of_kind))}; name as many, in the same order"
            )
    for k, place in enumerate(places):
        own = find_files(root, place, "data.images", SUFFIXES)
        found |= {f"{k}/{key}": file for key, file in own.items()}
        for kind, of_kind in maps.items():
            of_place = find_files(root, _listed(of_kind)[k], f"data.{kind}", MAPS)
            labels[kind] |= {f"{k}/{key}": file for key, file in of_place.items()}
    for kind, files in labels.items():
        if not found.keys() & files.keys():
            raise MetaVPTError(
                f"data.{kind}: none of {len(files)} files has the name of one of the {len(found)} "
                f"images, the first are {_shown(root, files)} and {_shown(root, found)}; name "
                "patterns whose wildcards stand for what both have in common, as in "
                f'data.images="a/*.png" data.{kind}="b/*_label.png"'
            )
    return [
        Item(found[key], {kind: files[key] for kind, files in labels.items() if key in files})
        for key in sorted(found)
    ]


def find_files(root: Path, place: str, option: str, suffixes: set[str]) -> dict[str, Path]:
    """Find the files of a place, keyed by the part of their path that differs.

    Args:
        root: What `place` is relative to.
        place: See `find_items`.
        option: Who asks, for errors.
        suffixes: Of the files that a folder or a pattern is searched for.
    """
    path = root / place
    if TAR.search(place):
        found = _in_tars(root, place, option, suffixes)
    elif path.is_dir():
        found = {
            str(file.relative_to(path).with_suffix("")): file
            for file in _kept(path.rglob("*"), suffixes, option)
        }
    elif path.is_file():
        if path.suffix != ".txt":
            return {"": path}
        found = {str(k): root / line for k, line in enumerate(read_lines(path))}
        for file in found.values():
            if not file.is_file():
                raise MetaVPTError(f"{path}: lists {file}, which does not exist")
    elif WILD.search(place):
        pattern = os.path.join(glob.escape(str(root)), place)
        files = (Path(name) for name in glob.glob(pattern, recursive=True))
        wanted, is_open = _wildcards(place), place[-1] in "*?]"  # no suffix is asked for
        found = {}
        for file in _kept(files, suffixes, option):
            match = wanted.search((file.with_suffix("") if is_open else file).as_posix())
            found["/".join(match.groups()) if match else str(file)] = file
    else:
        raise MetaVPTError(f"{option}={place}: {path} does not exist; {NAMING}")
    if not found:
        raise MetaVPTError(
            f"{option}={place}: no file ({', '.join(sorted(suffixes))}) at {path}; {NAMING}"
        )
    return found


def _in_tars(root: Path, place: str, option: str, suffixes: set[str]) -> dict[str, Path]:
    """Find members of tars, keyed by their tar and by what the wildcards stand for."""
    cut = next(TAR.finditer(place))
    shard, inner = place[: cut.start()] + ".tar", place[cut.end() :] or "**"
    named = shard if shards.ADDRESS.match(shard) else str(root / shard)
    wanted = _wildcards(f"/{inner}")
    found: dict[str, Path] = {}
    for k, tar in enumerate(shards.find_shards(named, option)):
        for name in shards.members(tar):
            path = tar / name
            of_place = path.with_suffix("") if inner[-1] in "*?]" else path
            match = wanted.search("/" + of_place.relative_to(tar).as_posix())
            if not match or path.suffix.lower() not in suffixes or path.name.startswith("."):
                continue
            key = "/".join([str(k), *match.groups()])
            if key in found:
                raise MetaVPTError(
                    f"{option}: {found[key]} and {path} have one name; name a pattern that only "
                    "one of them has, as in *.jpg"
                )
            found[key] = path
    return found


def split(
    root: Path,
    images: Sequence[Path],
    train: str | Sequence[str] | None,
    val: float | str | Sequence[str] | None,
) -> tuple[dict[str, list[int]], str]:
    """Split images into train and val.

    Args:
        root: What places are relative to.
        images: All of them.
        train: Places or lists of names that the train images are at; None: all that are not in val.
        val: The same for val; or the share of the images, drawn at random; None: folders called
            val, valid, validation or test, or else a fifth of the images.

    Returns:
        Indices of train and val, and a phrase that says where val comes from.
    """
    by_folder = _evaluation_folders(root, images) if val is None else []
    if by_folder:
        (name, chosen), *others = by_folder
        left_out = set[int]().union(*(indices for _, indices in others))
        return _checked(root, images, train, chosen, left_out), f"of the folder {name}"
    share = 0.2 if val is None else val
    if isinstance(share, (int, float)):
        if not 0 < share < 1:
            raise MetaVPTError(f"data.val={share}: a share of the images lies between 0 and 1")
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).tolist()
        chosen = set(order[: max(1, round(share * len(images)))])
        return _checked(root, images, train, chosen), f"{share:.0%}, drawn at random"
    chosen = _select(root, images, share, "data.val")
    return _checked(root, images, train, chosen), f"chosen by data.val={share}"


def _evaluation_folders(root: Path, images: Sequence[Path]) -> list[tuple[str, set[int]]]:
    """The folders of EVALUATION that there are, with the indices of their images."""
    found: list[tuple[str, set[int]]] = []
    for name in EVALUATION:
        indices = {
            i
            for i, image in enumerate(images)
            if image.is_relative_to(root) and name in image.relative_to(root).parts[:-1]
        }
        if indices:
            found.append((name, indices))
    return found


def read_lines(path: Path) -> list[str]:
    """The lines of a list that are not empty."""
    with reading(f"{path}: not a readable list", "write one file a line"):
        text = path.read_text(encoding="utf-8")
    return [line for line in map(str.strip, text.splitlines()) if line]


def _checked(
    root: Path,
    images: Sequence[Path],
    train: str | Sequence[str] | None,
    val: set[int],
    left_out: Set[int] = frozenset(),
) -> dict[str, list[int]]:
    """The two splits, disjoint and not empty."""
    rest = set(range(len(images))) - val - left_out
    chosen = rest if train is None else _select(root, images, train, "data.train")
    if both := chosen & val:
        raise MetaVPTError(
            f"{images[min(both)]}: is in data.train and in data.val, with {len(both) - 1} others"
        )
    for name, of_split in (("train", chosen), ("val", val)):
        if not of_split:
            raise MetaVPTError(
                f"{root}: no image of {len(images)} is left for {name}; set data.{name}"
            )
    return {"train": sorted(chosen), "val": sorted(val)}


def _select(
    root: Path, images: Sequence[Path], places: str | Sequence[str], option: str
) -> set[int]:
    """The indices of the images at `places`; a list may name files, paths or stems."""
    at = {image: i for i, image in enumerate(images)}
    by_stem: dict[str, list[int]] = {}
    for image, i in at.items():
        by_stem.setdefault(image.stem, []).append(i)
    chosen: set[int] = set()
    for place in _listed(places):
        path = root / place
        if path.suffix != ".txt" or not path.is_file():
            found = find_files(root, place, option, SUFFIXES).values()
            chosen |= {at[file] for file in found if file in at}
            continue
        for line in read_lines(path):
            of_line = (
                [at[root / line]]
                if root / line in at
                else by_stem.get(line, by_stem.get(Path(line).stem, []))
            )
            if len(of_line) != 1:
                what = "no image" if not of_line else f"{len(of_line)} images"
                raise MetaVPTError(
                    f"{path}: the line {line!r} is the name of {what} in data.images"
                )
            chosen |= set(of_line)
    return chosen


def _wildcards(pattern: str) -> re.Pattern[str]:
    """A group for what each wildcard of a pattern stands for."""
    stands_for = {"**/": "((?:.*/)?)", "**": "(.*)", "*": "([^/]*)", "?": "([^/])"}
    parts = (
        stands_for.get(part, f"({part.replace('[!', '[^')})")
        if WILD.fullmatch(part)
        else re.escape(part)
        for part in WILD.split(pattern)
    )
    return re.compile(f"(?:^|/){''.join(parts)}$")


def _kept(files: Iterable[Path], suffixes: set[str], option: str) -> list[Path]:
    """Those of a format that is read, of each name one."""
    kept = sorted(
        file
        for file in files
        if file.suffix.lower() in suffixes and not file.name.startswith(".") and file.is_file()
    )
    for before, after in pairwise(kept):
        if before.with_suffix("") == after.with_suffix(""):
            raise MetaVPTError(f"{option}: {before} and {after} have one name; remove one of them")
    return kept


def _listed(places: str | Sequence[str]) -> list[str]:
    return [places] if isinstance(places, str) else [str(place) for place in places]


def _shown(root: Path, files: Mapping[str, Path]) -> str:
    file = next(iter(files.values()))
    return str(file.relative_to(root)) if file.is_relative_to(root) else str(file)
