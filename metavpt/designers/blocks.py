"""I-JEPA's multi-block masks with designed targets (arXiv 2301.08243, section 3, appendix A.1)."""

import math
from typing import Any

import torch
from torch import Generator, Tensor, nn
from typing_extensions import override

from metavpt.designers.choice import choose, gumbel
from metavpt.designers.crop import RandomCrop, Range
from metavpt.designers.patches import MaskedImages, PatchDesigner, generator
from metavpt.distributed import collectives
from metavpt.errors import MetaVPTError
from metavpt.learners.subset import gather_patches


class BlockMasks(PatchDesigner):
    """Target blocks to predict, and as context a large block without them.

    The designer chooses the targets among random candidates: `num_candidates` places are drawn
    uniformly per image, the logit of a place is the mean of its patches', and `num_targets` places
    are drawn by these logits. With equal logits this is the recipe: independent uniform places. The
    weights of "relaxed" and "straight_through" apply to the errors of the targets; only "score"
    sees that a target block is missing from the context.

    Scales are shares of the grid's patches, aspect is height over width. As in the released code,
    block sizes are drawn once per batch, and every image sees as many context patches as the image
    with the fewest; here these are a random subset. If targets leave fewer than `min_visible`
    patches, context patches that the fewest targets cover are visible too.
    """

    def __init__(
        self,
        recipe: RandomCrop,
        patch_size: int,
        network: nn.Module,
        num_targets: int = 4,
        num_candidates: int = 16,
        target_scale: Range = (0.15, 0.2),
        target_aspect: Range = (0.75, 1.5),
        context_scale: Range = (0.85, 1.0),
        min_visible: int = 4,
        **options: Any,
    ) -> None:
        super().__init__(recipe, patch_size, network, **options)
        if not 0 < num_targets <= num_candidates:
            raise MetaVPTError(
                f"designer.num_targets={num_targets} must be at least 1 and at most "
                f"num_candidates={num_candidates}"
            )
        for name, (low, high) in {
            "target_scale": target_scale,
            "target_aspect": target_aspect,
            "context_scale": context_scale,
        }.items():
            if not 0 < low <= high or (name.endswith("scale") and high > 1):
                raise MetaVPTError(
                    f"designer.{name}=({low}, {high}) must be two positive numbers in order, "
                    "shares at most 1"
                )
        if not 0 < min_visible <= self.num_patches:
            raise MetaVPTError(
                f"designer.min_visible={min_visible} must be at least 1 and at most the "
                f"{self.num_patches} patches"
            )
        self.num_targets, self.num_candidates, self.min_visible = (
            num_targets,
            num_candidates,
            min_visible,
        )
        self.target_scale, self.target_aspect, self.context_scale = (
            target_scale,
            target_aspect,
            context_scale,
        )

    @override
    def task(self, images: Tensor, logits: Tensor, seed: int, draw: int) -> MaskedImages:
        # All draws of a batch have blocks of one size.
        sizes, rng = generator(seed, -1), generator(seed, draw)
        target_size = block_size(self.grid, self.target_scale, self.target_aspect, sizes)
        context_size = block_size(self.grid, self.context_scale, (1.0, 1.0), sizes)
        candidates = random_blocks(
            self.grid, target_size, (len(images), self.num_candidates), rng
        ).to(images.device)
        context = random_blocks(self.grid, context_size, (len(images),), rng).to(images.device)
        noise = gumbel((len(images), self.num_candidates), rng).to(logits)
        order = collectives.drawn(lambda shape: torch.rand(shape, generator=rng), logits.shape).to(
            logits
        )

        block_logits = gather_patches(logits, candidates).mean(dim=2)  # (B, C)
        choice = choose(block_logits, noise, self.num_targets, self.estimator)
        targets = gather_patches(candidates, choice.chosen)  # (B, M, T)
        visible = context_patches(context, targets.flatten(1), order, self.min_visible)
        weight = choice.chosen_weight[..., None].expand(targets.shape)
        return MaskedImages(
            images,
            visible,
            targets,
            order.new_ones(visible.shape),
            weight,
            choice.log_prob,
            block_logits,
        )


def block_size(
    grid: tuple[int, int], scale: Range, aspect: Range, rng: Generator
) -> tuple[int, int]:
    """Draw (h, w) of a block, with share and aspect uniform in their ranges, at most the grid."""
    share, ratio = (
        low + (high - low) * float(torch.rand((), generator=rng)) for low, high in (scale, aspect)
    )
    area = int(share * math.prod(grid))
    sides = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
    return max(1, min(sides[0], grid[0])), max(1, min(sides[1], grid[1]))


def random_blocks(
    grid: tuple[int, int], size: tuple[int, int], shape: tuple[int, ...], rng: Generator
) -> Tensor:
    """Draw blocks of `size` = (h, w) uniformly and return their patch indices, (*shape, h w)."""
    top, left = (
        collectives.drawn(
            lambda shape, ends=side - block + 1: torch.randint(ends, shape, generator=rng), shape
        )
        for side, block in zip(grid, size, strict=True)
    )
    rows = top[..., None] + torch.arange(size[0])  # (*shape, h)
    columns = left[..., None] + torch.arange(size[1])
    return (rows[..., :, None] * grid[1] + columns[..., None, :]).flatten(-2)


def context_patches(context: Tensor, targets: Tensor, order: Tensor, min_visible: int) -> Tensor:
    """Return the patches of `context` (B, S) that are in none of `targets` (B, T), of shape (B, K).

    They are ordered by `order` (B, N), numbers in [0, 1). K is the least number of such patches in
    an image, and at least `min_visible`. If there are too few, patches that the fewest targets hold
    follow, and patches outside the block come last.
    """
    held = torch.zeros_like(order).scatter_add_(1, targets, order.new_ones(targets.shape))
    cost = held + torch.full_like(order, targets.shape[1]).scatter_(1, context, 0.0)
    num_visible = max(min_visible, int((cost == 0).sum(dim=1).min()))
    return (cost + order).argsort(dim=1)[:, :num_visible]
