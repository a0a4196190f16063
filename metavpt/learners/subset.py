"""Subsets of an image's patches: those that a masked encoder sees, and those that are predicted."""

import math

import torch
from torch import Tensor


def gather_patches(patches: Tensor, indices: Tensor) -> Tensor:
    """Return patches[b, indices[b]]: (B, N, ...) and (B, *) int64 -> (B, *, ...)."""
    image = torch.arange(len(indices), device=indices.device).view(-1, *[1] * (indices.ndim - 1))
    return patches[image, indices]


def restrict(
    tokens: Tensor,
    rope: Tensor | None,
    grid: tuple[int, int],
    visible: Tensor,
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, tuple[int, int]]:
    """Keep the tokens and positions of some patches.

    Args:
        tokens: (B, P + N, D), with P prefix tokens, which stay.
        rope: Rotary positions (N, E), or None.
        grid: (h, w) of all patches.
        visible: Indices of the patches that stay, (B, K), in any order. Each keeps its position.
        weight: Multiplies the patch tokens, (B, K).

    Returns:
        Tokens (B, P + K, D), rotary positions (B, 1, K, E) for all heads, and (1, K) as the grid.
    """
    num_patches = math.prod(grid)
    prefix, patches = tokens.split([tokens.shape[1] - num_patches, num_patches], dim=1)
    patches = gather_patches(patches, visible)
    if weight is not None:
        patches = weight[..., None] * patches
    return (
        torch.cat([prefix, patches], dim=1),
        None if rope is None else rope[visible][:, None],
        (1, visible.shape[1]),
    )
