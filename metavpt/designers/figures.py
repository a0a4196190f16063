"""Pictures for reports: uint8 arrays of shape (H, W, 3)."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

LINE = 14  # pixels of a line of text
INK = (40, 40, 40)


def photo(image: Tensor) -> np.ndarray:
    """Convert an image (3, H, W), uint8 or float in [0, 1]."""
    if image.dtype != torch.uint8:
        image = (image.detach().clamp(0, 1) * 255).round().to(torch.uint8)
    return image.permute(1, 2, 0).cpu().numpy()


def titled(picture: np.ndarray, columns: Sequence[str]) -> np.ndarray:
    """Write the titles of equal columns above a picture, cut to the width of a column."""
    width = picture.shape[1] // len(columns)
    band = Image.new("RGB", (picture.shape[1], LINE), "white")
    draw, font = ImageDraw.Draw(band), _font()
    for i, title in enumerate(columns):
        while len(title) > 1 and draw.textlength(title, font) > width - 2:
            title = title[:-2].rstrip() + "\N{HORIZONTAL ELLIPSIS}"
        draw.text((i * width + 1, 0), title, INK, font)
    return np.concatenate([np.asarray(band), picture])


def with_legend(picture: np.ndarray, entries: Sequence[tuple[np.ndarray, str]]) -> np.ndarray:
    """Write a legend below a picture: a patch of each colour, uint8 (3,), and its name."""
    width, font = picture.shape[1], _font()
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    places, x, y = list[tuple[int, int]](), 0, 2
    for _, name in entries:
        length = LINE + 4 + int(measure.textlength(name, font))
        if x and x + length > width:
            x, y = 0, y + LINE
        places.append((x, y))
        x += length + 6
    band = Image.new("RGB", (width, y + LINE), "white")
    draw = ImageDraw.Draw(band)
    for (left, top), (colour_of, name) in zip(places, entries, strict=True):
        red, green, blue = (int(part) for part in colour_of)
        draw.rectangle((left, top + 2, left + LINE - 5, top + LINE - 3), (red, green, blue))
        draw.text((left + LINE, top), name, INK, font)
    return np.concatenate([picture, np.asarray(band)])


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(LINE - 3)


def grid(rows: Sequence[Sequence[np.ndarray]], gap: int = 2) -> np.ndarray:
    """Arrange pictures of one size in rows and columns on white."""
    height, width = rows[0][0].shape[:2]
    shape = (len(rows) * (height + gap) - gap, len(rows[0]) * (width + gap) - gap, 3)
    canvas = np.full(shape, 255, dtype=np.uint8)
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            canvas[
                i * (height + gap) : i * (height + gap) + height,
                j * (width + gap) : j * (width + gap) + width,
            ] = picture
    return canvas
