"""A photograph: from the bytes of a file to pixels of the size that is wanted."""

import io
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from metavpt.errors import MetaVPTError

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}


def is_image(name: str) -> bool:
    """By its ending; hidden files (macOS writes `._photo.jpg` beside photo.jpg) are none."""
    return Path(name).suffix.lower() in SUFFIXES and not name.startswith(".")


def decode(data: bytes, source: str) -> Tensor:
    """An encoded image as RGB uint8 (3,H,W); grey, palette and 16-bit images are converted."""
    try:
        image = Image.open(io.BytesIO(data))
        if image.mode.startswith("I"):  # 16 bits: PIL's own conversion to RGB would clip, not scale
            image = Image.fromarray((np.asarray(image).astype(np.float64) / 257).round().clip(0, 255).astype(np.uint8))
        array = np.array(image.convert("RGB"))
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise MetaVPTError(f"{source}: not a readable image ({error}); remove or replace it") from None
    return torch.from_numpy(array).permute(2, 0, 1)


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
