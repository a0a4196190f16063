"""A photograph: from the bytes of a file to pixels of the size that is wanted."""

import io
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from metavpt.errors import reading

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
FORMATS = ("JPEG", "PNG", "WEBP", "BMP")  # others start programs (EPS) or are little tested
MAX_PIXELS = 100_000_000
# Of the file, at most, beyond the first FREE_PIXELS. A PNG of one colour has 340.
PIXELS_PER_BYTE = 1000
FREE_PIXELS = 2**22
WEBP = 4  # pixels of other formats that one of a WebP counts for: its decoder holds 19 bytes each
MAX_STRIP = 8  # times the wanted length that an image may have while it is scaled
TURNS: dict[int, Callable[[Tensor], Tensor]] = {  # EXIF orientation -> what makes (3,H,W) upright
    2: lambda image: image.flip(2),
    3: lambda image: image.flip(1, 2),
    4: lambda image: image.flip(1),
    5: lambda image: image.transpose(1, 2),
    6: lambda image: image.transpose(1, 2).flip(2),
    7: lambda image: image.transpose(1, 2).flip(1, 2),
    8: lambda image: image.transpose(1, 2).flip(1),
}
Resize = Literal["cover", "stretch"]
# Pixels converted at a time: Pillow holds 4 bytes each, and all at once would take three times
# as much again.
STRIP = 2**18


def is_image(name: str) -> bool:
    """By its ending; hidden files (macOS writes `._photo.jpg` beside photo.jpg) are none."""
    return Path(name).suffix.lower() in SUFFIXES and not name.startswith(".")


def decode(data: bytes, source: str, upright: bool = True) -> Tensor:
    """Decode an image to RGB; grey, palette and 16-bit images are converted.

    Args:
        data: The bytes of the file.
        source: The name of the image in errors.
        upright: Whether to apply the rotation in the EXIF data.

    Returns:
        uint8 (3, H, W).
    """
    with reading(f"{source}: not a readable image", "remove or replace it"):
        image = open_image(io.BytesIO(data))
        array = np.empty((image.height, image.width, 3), np.uint8)
        rows = max(1, STRIP // image.width)
        for top in range(0, image.height, rows):
            array[top : top + rows] = np.asarray(
                _rgb(image.crop((0, top, image.width, min(top + rows, image.height))))
            )
        turn = TURNS.get(_orientation(image)) if upright else None
    pixels = torch.from_numpy(array).permute(2, 0, 1)
    return turn(pixels).contiguous() if turn else pixels


def upright_size(file: Path | io.BytesIO) -> tuple[int, int]:
    """Height and width that `decode` gives of an image, from its header alone."""
    with open_image(file) as image:
        turned = _orientation(image) in (5, 6, 7, 8)
        return (image.width, image.height) if turned else (image.height, image.width)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation; 1, upright, where there is none or the EXIF data cannot be read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return int(image.getexif().get(ExifTags.Base.Orientation, 1))
        except Exception:  # damaged EXIF data fail in many ways; the pixels are good without them
            return 1


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits: PIL's own conversion to RGB would clip, not scale
        image = Image.fromarray(
            ((np.asarray(image).clip(0, 65535).astype(np.int32) + 128) // 257).astype(np.uint8)
        )
    return image if image.mode == "RGB" else image.convert("RGB")


def open_image(file: Path | io.BytesIO) -> Image.Image:
    """Open an image with PIL, without decoding it.

    Raises:
        ValueError: It has more pixels than a photo of so many bytes has: a few bytes can ask for
            any memory.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            image = Image.open(file, formats=FORMATS)
        except UnidentifiedImageError:  # its message gives the address of `file`
            raise ValueError("of no known format") from None
    num_bytes = file.stat().st_size if isinstance(file, Path) else file.getbuffer().nbytes
    most = max_pixels(num_bytes) // (WEBP if image.format == "WEBP" else 1)
    if image.width * image.height > most:
        raise ValueError(
            f"{image.width}x{image.height} pixels are more than the {most} that its "
            f"{num_bytes} bytes may hold"
        )
    return image


def max_pixels(num_bytes: float) -> int:
    """The pixels that an image of `num_bytes` may have."""
    return int(min(MAX_PIXELS, max(FREE_PIXELS, PIXELS_PER_BYTE * num_bytes)))


def middle(maps: Tensor, size: tuple[int, int], factor: float) -> Tensor:
    """Cut maps (C, H, W) to the middle of which `size` is kept once they are scaled by `factor`.

    Only maps that are much longer than wide are cut: a strip of 2 x 60,000 pixels would otherwise
    take gigabytes when it is scaled.
    """
    for dim, side in zip((1, 2), size, strict=True):
        length = min(maps.shape[dim], math.ceil(MAX_STRIP * side / factor))
        maps = maps.narrow(dim, (maps.shape[dim] - length) // 2, length)
    return maps


def fit(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Scale an image to cover `size`, antialiased, and cut it to `size` around the centre.

    Args:
        image: uint8 (3, H, W).
        size: Height and width that are wanted.

    Returns:
        uint8 (3, *size).
    """
    if tuple(image.shape[-2:]) == tuple(size):
        return image.contiguous()
    factor = max(size[0] / image.shape[1], size[1] / image.shape[2])
    image = middle(image, size, factor)
    height, width = image.shape[-2:]
    scaled = (max(size[0], round(height * factor)), max(size[1], round(width * factor)))
    # A channel at a time where that saves much memory; the result is the same.
    parts = image.split(1) if height * width > FREE_PIXELS else [image]
    options = {"mode": "bilinear", "antialias": True, "align_corners": False}
    resized = torch.cat([F.interpolate(part[None].float(), scaled, **options)[0] for part in parts])
    top, left = (scaled[0] - size[0]) // 2, (scaled[1] - size[1]) // 2
    return (
        resized[:, top : top + size[0], left : left + size[1]]
        .round()
        .clamp(0, 255)
        .to(torch.uint8)
        .contiguous()
    )


def fit_maps(
    maps: Tensor, size: tuple[int, int], resize: Resize, mode: Literal["bilinear", "nearest-exact"]
) -> Tensor:
    """Bring an image or a label map to a size, both alike.

    Args:
        maps: (C, H, W).
        size: Height and width that are wanted.
        resize: "cover" scales to cover `size` and cuts around the centre; "stretch" keeps all of
            the image and not its aspect.
        mode: "bilinear" for images, antialiased; "nearest-exact" for labels, which are never mixed.

    Returns:
        (C, *size) of the same dtype.
    """
    if tuple(maps.shape[1:]) == tuple(size):
        return maps.contiguous()
    height, width = size
    factors = [height / maps.shape[1], width / maps.shape[2]]
    if resize == "cover":
        factors = [max(factors)] * 2
        maps = middle(maps, size, factors[0])
    scaled = [
        max(side, round(length * factor))
        for side, length, factor in zip(size, maps.shape[1:], factors, strict=True)
    ]
    options = {"antialias": True, "align_corners": False} if mode == "bilinear" else {}
    resized = F.interpolate(maps[None].float(), scaled, mode=mode, **options)[0]
    top, left = (scaled[0] - height) // 2, (scaled[1] - width) // 2
    resized = resized[:, top : top + height, left : left + width]
    if not maps.is_floating_point():
        resized = resized.round().clamp(0, 255)
    return resized.to(maps.dtype).contiguous()
