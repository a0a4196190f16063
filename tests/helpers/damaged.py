"""Damaged files: what a reader may return, how long it may take, and how much memory it may use.

METAVPT_FUZZ=400 pytest -k damaged tests      10,000 files and more; the default is few, and always
the same ones
"""

import ctypes
import os
import re
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from helpers.command_process import CONTEXT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from metavpt.errors import MetaVPTError
from metavpt.training.streams import time_limit

NUM_EXAMPLES = int(os.environ.get("METAVPT_FUZZ", "15"))
# what reading one file of a few kB may take at most, on a machine that is busy with other things
SECONDS = 60
MIB = 2**20
# Beside twice the size of the file: libraries loaded late, buffers, and images that declare
# somewhat more than they hold.
SPARE = 64 * MIB
KEYS = (
    "_target_",
    "tail_layers",
    "attention_dropout",
)  # named instead of the file, where that can be read and says what cannot be
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Reader(NamedTuple):
    """A reader of one kind of file.

    Attributes:
        file: The file's name.
        make: Writes what lies beside it, and returns the bytes of a valid file.
        read: Reads it.
        slower: How many times slower than most readers it is.
        refuses: Whether damage is an error. Otherwise it may leave a part of a page empty.
    """

    file: str
    make: Callable[[Path], bytes]
    read: Callable[[Path], Any]
    slower: int = 1
    refuses: bool = True


place = st.floats(0, 1, exclude_max=True)
KINDS = ["flip", "set", "cut", "drop", "insert", "splice", "number"]
Change = tuple[str, float, float, bytes]
changes = st.lists(
    st.tuples(st.sampled_from(KINDS), place, place, st.binary(min_size=1, max_size=8)),
    min_size=1,
    max_size=4,
)


def damage(data: bytes, change: list[Change]) -> bytes:
    for kind, first, second, junk in change:
        at, to = sorted((int(first * len(data)), int(second * len(data))))
        match kind:
            case "flip" if data:
                data = data[:at] + bytes([data[at] ^ (1 << junk[0] % 8)]) + data[at + 1 :]
            case "set":
                data = data[:at] + junk + data[at + len(junk) :]
            case "cut":
                data = data[:to]
            case "drop":
                data = data[:at] + data[min(to, at + 64) :]
            case "insert":
                data = data[:at] + junk + data[at:]
            case "splice":
                data = data[:at] + data[to:] + data[at:to]
            case "number":
                number = str(int.from_bytes(junk)).encode()
                data = data[:at] + re.sub(rb"\d+", number, data[at:], count=1)
    return data


def complaint(read: Callable[[Path], Any], path: Path) -> str:
    """The error that the user sees, none where the file could be read."""
    try:
        with time_limit(SECONDS, "HANGS"):
            read(path)
    except MetaVPTError as error:
        return str(error)
    return ""


def assert_survives(reader: Reader, folder: Path) -> None:
    """Every damaged file is read or raises a MetaVPTError with its name, in time and memory."""
    path = folder / "file" / reader.file
    path.parent.mkdir()
    whole = reader.make(path.parent)
    path.write_bytes(whole)
    reader.read(path)  # the whole file is valid, so whatever fails below fails by the damage

    complaints: list[str] = []

    @given(change=changes)
    @settings(
        max_examples=max(2, NUM_EXAMPLES // reader.slower),
        deadline=None,
        derandomize=NUM_EXAMPLES < 100,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    def fuzz(change: list[Change]) -> None:
        path.write_bytes(damage(whole, change))
        grown = growth(lambda: complaints.append(complaint(reader.read, path)))
        assert "HANGS" not in complaints[-1]
        assert not complaints[-1] or any(
            name in complaints[-1] for name in (path.name, str(path.parent), *KEYS)
        ), complaints[-1]
        assert grown < SPARE, f"{grown / MIB:.0f} MiB"

    fuzz()
    assert any(complaints) or not reader.refuses


def growth(call: Callable[[], Any]) -> int:
    """The growth of the resident memory while `call` runs, in bytes. 0: the system cannot tell."""
    if not RESET.exists():
        call()
        return 0
    RESET.write_text("5")  # the peak becomes what is resident now
    before = status("VmRSS")
    call()
    return status("VmHWM") - before


def growth_alone(imports: str, read: str, path: Path) -> tuple[int, int]:
    """`growth` in an expression `read` of `path`, and what it then holds, in bytes.

    In a process of its own: with the small holes that other tests leave in the heap, the same call
    takes up to twice as much.
    """
    receive, send = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_measure, args=(imports, read, path, send))
    process.start()
    send.close()
    grown, holds = receive.recv()
    process.join()
    return grown, holds


def _measure(imports: str, read: str, path: Path, send: Connection) -> None:
    names: dict[str, Any] = {"path": path}
    exec(imports, names)
    eval(read, names)  # libraries loaded late, pages of code: no part of what it takes
    ctypes.CDLL(None).malloc_trim(0)  # what that freed would be used again unseen
    found: list[Any] = []
    grown = growth(lambda: found.append(eval(read, names)))
    send.send((grown, held(found)))


def held(item: Any) -> int:
    """Bytes that what was read takes by itself."""
    if isinstance(item, Tensor):
        return item.nbytes
    if isinstance(item, np.ndarray):
        return item.nbytes
    inside = (
        item.values() if isinstance(item, dict) else item if isinstance(item, (list, tuple)) else ()
    )
    return (
        sys.getsizeof(item)
        + sum(map(held, inside))
        + (sum(map(held, item)) if isinstance(item, dict) else 0)
    )


def status(key: str) -> int:
    """A figure of /proc/self/status, in bytes; 0 where there is none."""
    found = re.search(rf"{key}:\s+(\d+) kB", STATUS.read_text())
    return int(found[1]) * 1024 if found else 0
