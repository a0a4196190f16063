"""Images in tar shards, as webdataset writes them, read in place.

The contents of each shard are indexed once, so every image is one read away. Order, exact
resumption and sharing among processes are therefore those of any other image set. A sequential
reader, such as webdataset's own, would have a shuffle buffer that no checkpoint holds; and
webdataset starts a shell for a name such as `pipe:command`. A shard of an address is downloaded
once, by fsspec.

A tar also counts as a folder: a path that leads through one, `train-000.tar/a.jpg`, names a member.
"""

import glob
import hashlib
import itertools
import math
import os
import re
import shutil
import tarfile
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from rich.progress import track
from torch import Tensor
from torch.utils.data import Dataset

from metavpt.cli.console import Console, say
from metavpt.data.cache import cache_folder
from metavpt.data.photo import decode, fit, is_image
from metavpt.errors import MetaVPTError, brief, reading

MAX_NAMES = 2**27  # characters that the names of one pattern may have together
ADDRESSES = ("https", "http", "s3", "gs", "hf")
ADDRESS = re.compile(r"(\w+):/{1,2}(?=[^/])")  # Path makes one slash of two


def find_shards(pattern: str, option: str = "data.unlabelled") -> list[Path]:
    """Expand `train-{000..099}.tar` (numbers keep zeros), `{a,b}.tar` and `*.tar`, stars sorted.

    Args:
        pattern: Of paths, or of addresses, which have no stars.
        option: Who asks, for errors.

    Returns:
        The files. Those of addresses lie in the cache folder, downloaded if need be.
    """
    found: list[str] = []
    for name in expand(pattern, option):
        if address := ADDRESS.match(name):
            found.append(str(download(f"{address[1]}://{name[address.end() :]}", option)))
            continue
        files = sorted(glob.glob(name)) if glob.has_magic(name) else [name] * os.path.isfile(name)
        if not files:
            raise MetaVPTError(
                f"{option}: there is no shard {name}; give files, as in train-{{000..099}}.tar or "
                "*.tar"
            )
        found += files
    return [Path(name) for name in found]


def download(address: str, option: str = "data.unlabelled") -> Path:
    """Return the copy of a shard in the cache folder; the address is read once.

    Raises:
        MetaVPTError: It is no address of a known kind, or cannot be read.
    """
    kind, _, place = address.partition("://")
    if kind not in ADDRESSES or "::" in address:  # fsspec's :: would chain other file systems
        raise MetaVPTError(f"{option}: {address}: known addresses are {', '.join(ADDRESSES)}")
    key = hashlib.sha256(address.encode()).hexdigest()[:16]
    file = cache_folder() / "shards" / f"{key}-{PurePosixPath(place).name}"
    if file.is_file():
        return file
    say("data:", f"downloading {address}")
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    try:
        import fsspec  # comes with torch

        file.parent.mkdir(parents=True, exist_ok=True)
        opened: Any = fsspec.open(address, "rb")
        with opened as source, part.open("wb") as copy:
            shutil.copyfileobj(source, copy, 2**20)
        part.replace(file)
    except Exception as error:  # of several libraries: no network, no such file, no access
        raise MetaVPTError(
            f"{option}: {address} cannot be downloaded ({brief(error, named=True)}); check the "
            "address, or download it and name the file"
        ) from error
    finally:
        part.unlink(missing_ok=True)
    return file


def expand(pattern: str, option: str = "data.unlabelled") -> list[str]:
    """The names that the braces of `pattern` stand for, in their order."""
    options: list[list[str]] = []
    for text, braces in re.findall(r"([^{]*)(?:\{([^{}]*)\})?", pattern):
        options.append([text])
        if ".." in braces:
            first, _, last = braces.partition("..")
            if not (first.isdecimal() and last.isdecimal() and len(first + last) < 40):
                raise MetaVPTError(
                    f"{option}: {{{braces}}} in {pattern} must be two numbers, as in {{000..099}}"
                )
            _check_count(int(last) - int(first) + 1, pattern, option)
            options.append([f"{k:0{len(first)}d}" for k in range(int(first), int(last) + 1)])
        elif braces:
            options.append(braces.split(","))
    _check_count(math.prod(map(len, options)), pattern, option)
    return ["".join(parts) for parts in itertools.product(*options)]


def _check_count(count: int, pattern: str, option: str) -> None:
    if count * len(pattern) > MAX_NAMES:
        raise MetaVPTError(f"{option}: {pattern} stands for {count:,} shards; name fewer")


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


class Member(NamedTuple):
    """Where a member of a tar begins, and its length in bytes."""

    start: int
    length: int


@cache
def members(tar: Path) -> dict[str, Member]:
    """Return the files of a tar by name, in their order.

    Names that would lead out of the tar, were it a folder, are left out.
    """
    num_bytes = tar.stat().st_size
    found: dict[str, Member] = {}
    for info in _files(tar, num_bytes):
        name = PurePosixPath(info.name)
        if not name.is_absolute() and ".." not in name.parts:
            found[str(name)] = Member(info.offset_data, info.size)
    return found


def in_tar(path: Path) -> tuple[Path, str] | None:
    """Return the tar that `path` leads through, and the name of the member; None: through none."""
    for folder in path.parents:
        if folder.suffix == ".tar" and folder.is_file():
            return folder, str(path.relative_to(folder).as_posix())
    return None


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of a member of a tar."""
    inside = in_tar(path)
    return path.stat().st_size if inside is None else members(inside[0])[inside[1]].length


def read_bytes(path: Path) -> bytes:
    """Read a file, or a member of a tar."""
    inside = in_tar(path)
    if inside is None:
        return path.read_bytes()
    tar, name = inside
    start, length = members(tar)[name]
    with tar.open("rb") as file:
        file.seek(start)
        return file.read(length)


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
    found = [
        (info.offset_data, info.size)
        for info in _files(path, num_bytes)
        if is_image(Path(info.name).name)
    ]
    if not found:
        raise MetaVPTError(f"{path}: the shard holds no image")
    return np.array(found, dtype=np.int64)


def _files(path: Path, num_bytes: int) -> list[tarfile.TarInfo]:
    """The headers of a tar's files, whose contents lie within its `num_bytes`."""
    found: list[tarfile.TarInfo] = []
    with (
        reading(
            f"{path}: not a readable, uncompressed tar", "get it again, or unpack .tar.gz to .tar"
        ),
        tarfile.open(path, "r:") as tar,
    ):
        for member in tar:
            if member.size < 0:  # the next member would be this one again, without end
                raise MetaVPTError(f"{path}: {member.name} has a negative size; get it again")
            if member.isfile():
                found.append(member)
    if any(
        not 0 <= info.offset_data <= info.offset_data + info.size <= num_bytes for info in found
    ):
        raise MetaVPTError(f"{path}: the shard is cut short; get it again")
    return found
