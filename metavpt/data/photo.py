"""A photograph: from the bytes of a file to pixels of the size that is wanted."""

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from metavpt.disk import reading

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
MAX_PIXELS = 100_000_000


def is_image(name: str) -> bool:
    """By its ending; hidden files (macOS writes `._photo.jpg` beside photo.jpg) are none."""
    return Path(name).suffix.lower() in SUFFIXES and not name.startswith(".")


def decode(data: bytes, source: str) -> Tensor:
    """An encoded image as RGB uint8 (3,H,W); grey, palette and 16-bit images are converted."""
    with reading(f"{source}: not a readable image", "remove or replace it"):
        image = open_image(io.BytesIO(data))
        if image.mode.startswith("I"):  # 16 bits: PIL's own conversion to RGB would clip, not scale
            image = Image.fromarray((np.asarray(image).astype(np.float64) / 257).round().clip(0, 255).astype(np.uint8))
        array = np.array(image.convert("RGB"))
    return torch.from_numpy(array).permute(2, 0, 1)


def open_image(file: Any) -> Image.Image:
    """PIL's image, not decoded yet. Raises ValueError for more than `MAX_PIXELS`: a few bytes can ask for any amount of memory."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        image = Image.open(file)
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width}x{image.height} pixels are more than {MAX_PIXELS}")
    return image


def fit(image: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 (3,H,W) -> (3, *size): scaled to cover `size`, antialiased, and cut to it around the centre."""
    height, width = image.shape[-2:]
    if (height, width) == size:
        return image.contiguous()
    factor = max(size[0] / height, size[1] / width)
    scaled = (max(size[0], round(height * factor)), max(size[1], round(width * factor)))
    resized = F.interpolate(image[None].float(), scaled, mode="bilinear", antialias=True, align_corners=False)[0]
    top, left = (scaled[0] - size[0]) // 2, (scaled[1] - size[1]) // 2
    return resized[:, top : top + size[0], left : left + size[1]].round().clamp(0, 255).to(torch.uint8).contiguous()
