"""Colours of maps, as uint8 arrays (H, W, 3)."""

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


def rgb(values: Tensor, low: float, high: float) -> np.ndarray:
    """Show three maps (3, H, W) from `low` to `high` as red, green and blue."""
    unit = (values.detach().float().cpu() - low) / max(high - low, 1e-12)
    return (unit.clamp(0, 1) * 255).to(torch.uint8).movedim(0, -1).numpy()


def scale(low: str, high: str, colormap: str = "turbo") -> list[tuple[np.ndarray, str]]:
    """Return the legend of `colour`: its first and its last colour, and what they stand for."""
    ends = [np.array(matplotlib.colormaps[colormap](end)[:3]) * 255 for end in (0.0, 1.0)]
    return [(end.astype(np.uint8), text) for end, text in zip(ends, (low, high), strict=True)]


def classes(labels: Tensor, num_classes: int) -> np.ndarray:
    """Colour labels (H, W); 255 is grey."""
    indices = labels.cpu().numpy().astype(int)
    pixels = class_colours(num_classes)[np.clip(indices, 0, num_classes - 1)]
    pixels[indices == 255] = 128
    return pixels


def class_colours(num_classes: int) -> np.ndarray:
    """Return the colours of `classes`, uint8 of shape (C, 3)."""
    palette = matplotlib.colormaps["tab20"](np.arange(num_classes) % 20)[:, :3]
    return (palette * 255).astype(np.uint8)
