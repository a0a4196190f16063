"""Unlabelled images in tar shards, as webdataset writes them, read in place.

The contents of each shard are indexed once, so every image is one read away. Order, exact
resumption and sharing among processes are therefore those of any other image set. A sequential
reader would have a shuffle buffer that no checkpoint holds.
"""

import glob
import hashlib
import itertools
import os
import re
import tarfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from rich.progress import track
from torch import Tensor
from torch.utils.data import Dataset

from metavpt.cli.console import Console, say
from metavpt.data.cache import cache_folder
from metavpt.data.photo import decode, fit, is_image
from metavpt.errors import MetaVPTError, reading


def find_shards(pattern: str) -> list[Path]:
    """Expand `train-{000..099}.tar` (numbers keep zeros), `{a,b}.tar` and `*.tar`, stars sorted."""
    found: list[str] = []
    for name in expand(pattern):
        files = sorted(glob.glob(name)) if glob.has_magic(name) else [name] * os.path.isfile(name)
        if not files:
            raise MetaVPTError(
                f"data.unlabelled: there is no shard {name}; give files, as in "
                "train-{000..099}.tar or *.tar"
            )
        found += files
    return [Path(name) for name in found]


def expand(pattern: str) -> list[str]:
    """The names that the braces of `pattern` stand for, in their order."""
    options: list[list[str]] = []
    for text, braces in re.findall(r"([^{]*)(?:\{([^{}]*)\})?", pattern):
        options.append([text])
        if ".." in braces:
            first, _, last = braces.partition("..")
            if not (first.isdecimal() and last.isdecimal()):
                raise MetaVPTError(
                    f"data.unlabelled: {{{braces}}} in {pattern} must be two numbers, as in "
                    "{000..099}"
                )
            options.append([f"{k:0{len(first)}d}" for k in range(int(first), int(last) + 1)])
        elif braces:
            options.append(braces.split(","))
    return ["".join(parts) for parts in itertools.product(*options)]


class Shards(Dataset[Tensor]):
    """Images uint8 (3, *size) of uncompressed tar files. Members that are not images are skipped.

    An image that cannot be read is replaced by the next one of its shard, with a visible line.
    `groups` counts the images of each shard.
    """

    def __init__(self, paths: Sequence[Path], size: tuple[int, int]) -> None:
        self.paths, self.size = list(paths), size
        quiet = len(self.paths) < 10
        contents = [
            _contents(path)
            for path in track(
                self.paths,
                "reading shards",
                console=Console(stderr=True),
                transient=True,
                disable=quiet,
            )
        ]
        self.groups = [len(members) for members in contents]
        self.members = np.concatenate(contents)  # (N, 2): where the data begins, how long it is
        self.ends = np.cumsum(self.groups)
        self.unreadable: set[int] = set()  # that this process came upon

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, index: int) -> Tensor:
        shard = int(np.searchsorted(self.ends, index, side="right"))
        last, count = int(self.ends[shard]), self.groups[shard]
        for k in range(count):
            member = last - count + (index - (last - count) + k) % count
            try:
                return fit(decode(self._read(shard, member), self.paths[shard].name), self.size)
            except MetaVPTError as error:
                self._report(shard, member, error)
        raise MetaVPTError(
            f"{self.paths[shard]}: none of its {count} images can be read; get the shard again"
        )

    def _read(self, shard: int, member: int) -> bytes:
        """Open the file for each read: workers share no handle, and none stays open."""
        start, length = map(int, self.members[member])
        try:
            with self.paths[shard].open("rb") as file:
                file.seek(start)
                return file.read(length)
        except OSError as error:
            raise MetaVPTError(f"{self.paths[shard]}: cannot be read ({error})") from None

    def _report(self, shard: int, member: int, error: MetaVPTError) -> None:
        if member not in self.unreadable:
            self.unreadable.add(member)
            place = member - int(self.ends[shard]) + self.groups[shard]
            say(
                "data:",
                f"{self.paths[shard]}: image {place} is left out for the next one: {error}",
            )


def _contents(path: Path) -> np.ndarray:
    """Return offset and size of a shard's images, int64 (n, 2), cached while it is unchanged."""
    status = path.stat()
    folder = cache_folder() / "shards"
    known = hashlib.sha256(
        f"{path.resolve()} {status.st_size} {status.st_mtime_ns}".encode()
    ).hexdigest()[:32]
    file = folder / f"{known}.npy"
    with suppress(OSError, ValueError, EOFError):  # absent, or cut short by a power cut
        return np.load(file)
    contents = _scan(path, status.st_size)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        own = folder / f"{known}-{os.getpid()}.npy"
        np.save(own, contents)
        own.replace(file)
    except OSError:
        pass  # without a cache the shard is looked through at every start
    return contents


def _scan(path: Path, num_bytes: int) -> np.ndarray:
    with (
        reading(
            f"{path}: not a readable, uncompressed tar", "get it again, or unpack .tar.gz to .tar"
        ),
        tarfile.open(path, "r:") as tar,
    ):
        members: list[tuple[int, int]] = []
        for member in tar:
            if member.size < 0:  # the next member would be this one again, without end
                raise MetaVPTError(f"{path}: {member.name} has a negative size; get it again")
            if member.isfile() and is_image(Path(member.name).name):
                members.append((member.offset_data, member.size))
    if not members:
        raise MetaVPTError(f"{path}: the shard holds no image")
    if any(not 0 <= start <= start + length <= num_bytes for start, length in members):
        raise MetaVPTError(f"{path}: the shard is cut short; get it again")
    return np.array(members, dtype=np.int64)
