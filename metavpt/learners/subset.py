"""A subset of an image's patches: what a masked encoder sees, and what a predictor is asked for."""

import math

import torch
from torch import Tensor


def gather_patches(patches: Tensor, indices: Tensor) -> Tensor:
    """patches[b, indices[b]] for each image b: (B, N, ...) and (B, *) int64 -> (B, *, ...)."""
    image = torch.arange(len(indices), device=indices.device).view(-1, *[1] * (indices.ndim - 1))
    return patches[image, indices]


def restrict(
    tokens: Tensor,
    rope: Tensor | None,
    grid: tuple[int, int],
    visible: Tensor,
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, tuple[int, int]]:
    """Tokens (B, P + N, D) with their positions -> (B, P + K, D), their rotary positions, and (1, K) for a grid.

    visible: (B, K) indices of the patches that stay, in any order; each keeps its place in the image, and the P prefix tokens stay.
    weight: (B, K), by which the tokens of patches are multiplied. rope: (N, E) -> (B, 1, K, E), the same for every head.
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
