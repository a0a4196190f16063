"""Absolute positions of a vision transformer for images of another size than its own."""

from typing import Literal

import torch
import torch.nn.functional as F
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor

from metavpt.errors import MetaVPTError

Interpolation = Literal["timm", "dinov2"]


def resample_positions(
    positions: Tensor,
    old_grid: tuple[int, int],
    new_grid: tuple[int, int],
    num_prefix: int,
    interpolation: Interpolation,
) -> Tensor:
    """Interpolate the positions of a grid of patches to another grid.

    Args:
        positions: (1, P + h w, D), those of P prefix tokens first, which stay as they are.
        old_grid: (h, w) of `positions`, in patches.
        new_grid: (h', w') to interpolate to.
        num_prefix: P.
        interpolation: "timm" is bicubic with antialiasing, as timm does it for every model and
            DINOv2 for its models with registers. "dinov2" is what DINOv2's models without registers
            were released with: no antialiasing, and a scale of (h' + 0.1) / h.

    Returns:
        (1, P + h' w', D).
    """
    if interpolation == "timm":
        return resample_abs_pos_embed(
            positions,
            new_size=list(new_grid),
            old_size=list(old_grid),
            num_prefix_tokens=num_prefix,
        )
    if interpolation != "dinov2":
        raise MetaVPTError(f"positions={interpolation!r}: choose 'timm' or 'dinov2'")
    if new_grid == old_grid:
        return positions
    prefix, patches = positions[:, :num_prefix], positions[:, num_prefix:]
    maps = patches.to(torch.promote_types(patches.dtype, torch.float32))
    maps = maps.unflatten(1, old_grid).movedim(-1, 1)
    scale = [(new + 0.1) / old for new, old in zip(new_grid, old_grid, strict=True)]
    maps = F.interpolate(maps, scale_factor=scale, mode="bicubic")
    return torch.cat([prefix, maps.flatten(2).transpose(1, 2).to(prefix.dtype)], dim=1)
