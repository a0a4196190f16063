"""Pictures of a run for its page: a few steps of each name, within a size limit."""

import base64
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from metavpt.data.photo import open_image

MAX_BYTES = 9_000_000  # of all pictures; 12 MB in base64, so the page stays below 15 MB
QUALITY = 85  # of a WebP, which is a tenth of the PNG of a photo and looks the same


class Picture(NamedTuple):
    """A picture of one step, embedded in the page.

    Attributes:
        step: The training step.
        source: A data URI.
        wide: Whether it needs a wide cell.
    """

    step: int
    source: str  # data URI
    wide: bool


class Gallery(NamedTuple):
    """Pictures by name in the order of their steps, and the number of pictures not shown."""

    groups: dict[str, list[Picture]]
    num_left_out: int


def gallery(folder: Path, max_steps: int = 8, max_bytes: float = MAX_BYTES) -> Gallery:
    """Select pictures from the files figures/<name>-step<N>.png.

    Above the size limit, middle steps are dropped first, then whole names.

    Args:
        folder: The folder figures/.
        max_steps: The limit on steps per name.
        max_bytes: The limit on the encoded size of all pictures.
    """
    found: dict[str, dict[int, Path]] = {}
    for path in sorted(folder.glob("*.png")):
        match = re.fullmatch(r"(.+)-step(\d+)", path.stem)
        if match and _is_readable(path):
            found.setdefault(match[1], {})[int(match[2])] = path
    encoded: dict[Path, bytes] = {}

    def num_bytes(steps: Sequence[tuple[int, Path]]) -> int:
        encoded.update({path: _encoded(path) for _, path in steps if path not in encoded})
        return sum(len(encoded[path]) for _, path in steps)

    count = max_steps
    while (
        count > 2 and sum(num_bytes(_spread(paths, count)) for paths in found.values()) > max_bytes
    ):
        count -= 1
    groups, room = {}, max_bytes
    for name, paths in found.items():
        steps = _spread(paths, count)
        room -= num_bytes(steps)
        if room >= 0:
            groups[name] = [_picture(step, path, encoded[path]) for step, path in steps]
    return Gallery(groups, sum(map(len, found.values())) - sum(map(len, groups.values())))


def _spread(paths: dict[int, Path], count: int) -> list[tuple[int, Path]]:
    """Select `count` steps at even distances, the first and the last included."""
    steps = sorted(paths.items())
    if count == 1:
        return steps[-1:]
    return [
        steps[i]
        for i in sorted({round(i) for i in np.linspace(0, len(steps) - 1, min(count, len(steps)))})
    ]


def _is_readable(path: Path) -> bool:
    try:
        with open_image(path) as image:
            image.verify()
    except Exception:  # a PNG that a killed run left half written fails in several ways
        return False
    return True


def _encoded(path: Path) -> bytes:
    """Encode the file as WebP, unless the file itself is smaller."""
    buffer = io.BytesIO()
    with open_image(path) as image:
        image.convert("RGB").save(buffer, "WEBP", quality=QUALITY)
    return min(path.read_bytes(), buffer.getvalue(), key=len)


def _picture(step: int, path: Path, data: bytes) -> Picture:
    with open_image(path) as image:
        wide = image.width > 1.8 * image.height
    kind = "webp" if data.startswith(b"RIFF") else "png"
    return Picture(step, f"data:image/{kind};base64,{base64.b64encode(data).decode()}", wide)
