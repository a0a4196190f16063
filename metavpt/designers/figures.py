"""Pictures for reports: uint8 arrays of shape (H, W, 3)."""

from collections.abc import Sequence

import matplotlib
import numpy as np
import torch
from torch import Tensor


def colour(values: Tensor, low: float, high: float, colormap: str = "turbo") -> np.ndarray:
    """Colour a map (H, W) from `low` to `high`; values that are not finite are grey."""
    array = values.detach().float().cpu().numpy()
    unit = np.clip((array - low) / max(high - low, 1e-12), 0, 1)
    pixels = (matplotlib.colormaps[colormap](np.nan_to_num(unit))[..., :3] * 255).astype(np.uint8)
    pixels[~np.isfinite(array)] = 128
    return pixels


def photo(image: Tensor) -> np.ndarray:
    """Convert an image (3, H, W), uint8 or float in [0, 1]."""
    if image.dtype != torch.uint8:
        image = (image.detach().clamp(0, 1) * 255).round().to(torch.uint8)
    return image.permute(1, 2, 0).cpu().numpy()


def classes(labels: Tensor, num_classes: int) -> np.ndarray:
    """Colour labels (H, W); 255 is grey."""
    palette = matplotlib.colormaps["tab20"](np.arange(num_classes) % 20)[:, :3]
    indices = labels.cpu().numpy().astype(int)
    pixels = (palette[np.clip(indices, 0, num_classes - 1)] * 255).astype(np.uint8)
    pixels[indices == 255] = 128
    return pixels


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
