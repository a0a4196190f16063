"""Damaged files and full disks, each in one clear line."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from metavpt.errors import MetaVPTError


@contextmanager
def reading(fault: str, remedy: str = "get the file again") -> Iterator[None]:
    """Raises MetaVPTError `<fault> (<reason>); <remedy>` for whatever goes wrong inside the block, which is for decoders alone.

    Of every error, not of a list of them: a damaged file fails in as many ways as its format has fields.
    """
    try:
        yield
    except MetaVPTError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise MetaVPTError(f"{fault} ({reason}); {remedy}") from None


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises MetaVPTError with the reason where `path` cannot be written inside the block: a full disk, a quota, no permission."""
    try:
        yield
    except OSError as error:
        raise MetaVPTError(
            f"{path}: cannot be written ({error.strerror or error}); what was there before is intact: make room and go on with resume=true"
        ) from error
