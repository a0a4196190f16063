"""Masked blocks of patches: masks of iBOT (arXiv 2111.07832), drawn as in BEiT (2106.08254)."""

import math

import numpy as np
import torch
from torch import Tensor

from metavpt.data.loader import mix

ASPECT = 0.3  # height / width of a block, log-uniform in [0.3, 1 / 0.3]
NUM_ATTEMPTS = 10  # in a row without a block that fits, then the mask stays as it is


def hidden_patches(
    num_images: int, grid: tuple[int, int], share: tuple[float, float], prob: float, seed: int
) -> Tensor:
    """Draw the masked patches of each image.

    Each image has its own seed, so its mask does not depend on the rest of the batch.

    Args:
        num_images: B.
        grid: (h, w).
        share: The range of the masked share, which is uniform and rounded down.
        prob: The probability that an image is masked at all.
        seed: The seed of the batch.

    Returns:
        bool (B, N), patches row by row.
    """
    masks = np.zeros((num_images, *grid), dtype=bool)
    for k, mask in enumerate(masks):
        rng = np.random.default_rng(mix(seed, k))
        if rng.random() < prob:
            mask[...] = blockwise_mask(grid, int(rng.uniform(*share) * mask.size), rng)
    return torch.from_numpy(masks).flatten(1)


def scattered_patches(
    num_images: int, num_patches: int, share: tuple[float, float], seed: int
) -> Tensor:
    """Hide single patches at random.

    Args:
        num_images: B.
        num_patches: N.
        share: Each image hides a share uniform in this range, rounded down.
        seed: Of the draw.

    Returns:
        bool (B, N).
    """
    rng = torch.Generator().manual_seed(seed)
    low, high = share
    shares = low + (high - low) * torch.rand(num_images, 1, generator=rng)
    order = torch.rand(num_images, num_patches, generator=rng).argsort(dim=1).argsort(dim=1)
    return order < (shares * num_patches).long()


def blockwise_mask(grid: tuple[int, int], num_hidden: int, rng: np.random.Generator) -> np.ndarray:
    """Mask at most `num_hidden` patches by random blocks (BEiT, algorithm 1).

    Blocks may overlap. They have at least (min(h, w) // 3)^2 patches (BEiT's 16 of 14 x 14), or as
    many as are still to be masked. Fewer patches are masked only if no further block fits.

    Args:
        grid: (h, w).
        num_hidden: The limit.
        rng: The source of randomness.

    Returns:
        bool (h, w), True where masked.
    """
    mask, failures = np.zeros(grid, dtype=bool), 0
    while (missing := num_hidden - int(mask.sum())) > 0 and failures < NUM_ATTEMPTS:
        area = rng.uniform(min((min(grid) // 3) ** 2, missing), missing)
        ratio = math.exp(rng.uniform(math.log(ASPECT), -math.log(ASPECT)))
        height, width = (
            max(1, round(math.sqrt(area * ratio))),
            max(1, round(math.sqrt(area / ratio))),
        )
        failures += 1
        if height > grid[0] or width > grid[1]:
            continue
        top, left = rng.integers(grid[0] - height + 1), rng.integers(grid[1] - width + 1)
        block = mask[top : top + height, left : left + width]
        if 0 < block.size - block.sum() <= missing:
            block[...] = True
            failures = 0
    return mask
