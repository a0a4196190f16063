"""Writing what a full disk must not turn into a page of traceback."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from metavpt.errors import MetaVPTError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises MetaVPTError with the reason where `path` cannot be written inside the block: a full disk, a quota, no permission."""
    try:
        yield
    except OSError as error:
        raise MetaVPTError(
            f"{path}: cannot be written ({error.strerror or error}); what was there before is intact: make room and go on with resume=true"
        ) from error
