"""Files that are written whole or not at all, and file locks."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, BinaryIO

from metavpt.errors import writing

if sys.platform != "win32":
    import fcntl


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file that replaces `path` when the block ends.

    It is written beside `path`, flushed to the disk and then renamed. A reader, also after a crash,
    finds the old contents or the new ones, never a part.

    Raises:
        MetaVPTError: The file cannot be written. The file at `path` is unchanged.
    """
    partial = path.with_name(f"{path.name}.partial")
    with writing(path):
        try:
            with partial.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
            sync_folder(path.parent)
        except BaseException:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise


def write_text(path: Path, text: str) -> None:
    """Write `text` in UTF-8 to `path`, whole or not at all, see `replacing`."""
    data = text.encode()
    with replacing(path) as file:
        file.write(data)


def sync_folder(folder: Path) -> None:
    """Flush the names in `folder`. Otherwise a power cut may undo a rename."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(file: IO[bytes]) -> Iterator[None]:
    """Hold the lock on an open file inside the block, if the system has locks."""
    lock(file, wait=True)
    try:
        yield
    finally:
        if sys.platform != "win32":
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_UN)


def lock(file: IO[bytes], wait: bool = False) -> bool:
    """Lock an open file until it is closed or its process ends.

    Args:
        file: The open file.
        wait: Whether to wait for the lock.

    Returns:
        False if another process holds the lock and `wait` is false. True otherwise, also if the
        system
        or the file system has no locks.
    """
    if sys.platform != "win32":
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # no locks on this file system
            pass
    return True
