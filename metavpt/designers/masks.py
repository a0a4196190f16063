"""Mask designers: which pixels of a view stay sharp, and which are blurred."""

import math
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from kornia.filters import gaussian_blur2d
from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from typing_extensions import override

from metavpt.dense_tasks import colours
from metavpt.designers import figures
from metavpt.designers.designer import Designer, clamp_to_unit
from metavpt.designers.views import MultiCrop, Views
from metavpt.distributed import collectives
from metavpt.errors import MetaVPTError

NUM_PICTURES = 4


class MaskDesigner(Designer):
    """view = mu * v + (1 - mu) * Blur(v), mu = clamp(initial_keep + network(v), 0, 1) per pixel.

    A mu of 1 keeps a pixel (method.md, section 3). A network with a zero last layer and
    initial_keep 1 give exactly the recipe, bit for bit. The gradient passes at the edge of the
    clamp, so the designer can leave the recipe.

    Args:
        recipe: Makes the views v.
        network: (B, 3, H, W) -> (B, 1, H, W), any size.
        keep: The share of pixels that `regularizer` asks for.
        sparsity_weight, tv_weight, excess_weight: See `regularizer`.
        blur_sigma: In pixels.
        crops: "global" masks the global crops, "all" all crops.
        initial_keep: mu at the start.
    """

    def __init__(
        self,
        recipe: MultiCrop,
        network: nn.Module,
        keep: float = 0.6,
        sparsity_weight: float = 0.131,
        tv_weight: float = 0.144,
        blur_sigma: float = 8.0,
        crops: Literal["global", "all"] = "global",
        initial_keep: float = 1.0,
        excess_weight: float = 0.1,
    ) -> None:
        super().__init__(recipe)
        if not (0 <= keep <= 1 and 0 <= initial_keep <= 1):
            raise MetaVPTError(
                f"MaskDesigner: keep and initial_keep are shares in [0, 1], got {keep=}, "
                f"{initial_keep=}"
            )
        if crops not in ("global", "all"):
            raise MetaVPTError(f"MaskDesigner: crops must be 'global' or 'all', got {crops!r}")
        if blur_sigma <= 0:
            raise MetaVPTError(f"MaskDesigner: blur_sigma must be positive, got {blur_sigma}")
        self.network = network
        self.keep, self.initial_keep, self.blur_sigma, self.crops = (
            keep,
            initial_keep,
            blur_sigma,
            crops,
        )
        self.sparsity_weight, self.tv_weight, self.excess_weight = (
            sparsity_weight,
            tv_weight,
            excess_weight,
        )

    @override
    def refine(self, views: Views, batch: Any) -> Views:
        global_crops, masks, excess = self._mask(views.global_crops)
        if self.crops == "global" or not len(views.local_crops):
            return views._replace(global_crops=global_crops, masks=masks, excess=excess)
        local_crops, local_masks, local_excess = self._mask(views.local_crops)
        excess = torch.cat([excess, local_excess])
        return views._replace(
            global_crops=global_crops,
            local_crops=local_crops,
            masks=masks,
            local_masks=local_masks,
            excess=excess,
        )

    def randomize(self, views: Views, batch: Any, rng: torch.Generator) -> Views:
        """Mask the views by smooth random blobs that keep the share `keep`."""
        masks = random_masks(views.global_crops, self.keep, rng)
        views = views._replace(global_crops=self._blend(views.global_crops, masks), masks=masks)
        if self.crops == "global" or not len(views.local_crops):
            return views
        local_masks = random_masks(views.local_crops, self.keep, rng)
        return views._replace(
            local_crops=self._blend(views.local_crops, local_masks), local_masks=local_masks
        )

    def regularizer(self, task: Views) -> Tensor:
        """Compute the weighted sum of sparsity (mean mu - keep)^2, TV(mu) and mean excess.

        Means are over masked views and images; see `total_variation`. The excess of logits z is
        relu(z - 1) + relu(-z) per pixel.
        """
        if task.masks is None or task.excess is None:
            raise MetaVPTError(
                "MaskDesigner.regularizer: the task has no masks; it must come from the "
                "designer, not from recipe_task"
            )
        masks = [mu for mu in (task.masks, task.local_masks) if mu is not None]
        kept = collectives.mean(torch.cat([mu.mean(dim=(2, 3, 4)) for mu in masks]).mean())
        variation = torch.cat([total_variation(mu) for mu in masks]).mean()
        return (
            self.sparsity_weight * (kept - self.keep).square()
            + self.tv_weight * variation
            + self.excess_weight * task.excess.mean()
        )

    def figures(self, batch: Any, task: Views) -> dict[str, np.ndarray]:
        """Show the recipe's global crop, the mask, and the masked view; one image per row."""
        if task.masks is None:
            raise MetaVPTError(
                "MaskDesigner.figures: the task has no masks; it must come from the designer, "
                "not from recipe_task"
            )
        plain = self.recipe_task(batch)
        rows = []
        for before, mu, after in list(
            zip(plain.global_crops[0], task.masks[0], task.global_crops[0], strict=True)
        )[:NUM_PICTURES]:
            photos = [figures.photo(self.recipe.denormalize(view)) for view in (before, after)]
            rows.append([photos[0], colours.colour(mu[0], 0.0, 1.0, "gray"), photos[1]])
        columns = ["recipe's view", "mask, white keeps", "masked view"]
        return {"masks": figures.titled(figures.grid(rows), columns)}

    def _mask(self, crops: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mask crops (V, B, 3, H, W); return them with mu (V, B, 1, H, W) and the excess (V, B)."""
        views = crops.flatten(0, 1)
        logits = self.initial_keep + self.network(views)
        mu = clamp_to_unit(logits)  # a new designer stands at its edge
        # Outside [0, 1] there is no gradient and the pixel would be stuck for ever. The pull back
        # is linear, not quadratic: it must
        # still push at the edge, where a quadratic one fades before the pixel is inside again.
        excess = (F.relu(logits - 1.0) + F.relu(-logits)).mean(dim=(1, 2, 3))
        shape = crops.shape[:2]
        mu = mu.unflatten(0, shape)
        return self._blend(crops, mu), mu, excess.unflatten(0, shape)

    def _blend(self, crops: Tensor, mu: Tensor) -> Tensor:
        """Blend crops v (V, B, 3, H, W) with their blur: mu * v + (1 - mu) * Blur(v)."""
        blurred = gaussian_blur(crops.flatten(0, 1), self.blur_sigma).unflatten(0, crops.shape[:2])
        return mu * crops + (1.0 - mu) * blurred


def random_masks(crops: Tensor, keep: float, rng: torch.Generator, cells: int = 4) -> Tensor:
    """Draw masks (V, B, 1, H, W) of 0 and 1 for crops (V, B, 3, H, W).

    Noise on `cells` x `cells` is enlarged, and its top share `keep` is kept.
    """
    num_views, batch_size, _, height, width = crops.shape
    noise = (
        collectives.drawn(
            lambda shape: torch.randn(shape, generator=rng),
            (num_views, batch_size, 1, cells, cells),
            dim=1,
        )
        .flatten(0, 1)
        .to(crops)
    )
    smooth = F.interpolate(
        noise, size=(height, width), mode="bicubic", align_corners=False
    ).flatten(1)
    num_kept = round(keep * smooth.shape[1])
    masks = torch.zeros_like(smooth).scatter_(1, smooth.topk(num_kept, dim=1).indices, 1.0)
    return masks.view(num_views, batch_size, 1, height, width)


def total_variation(mu: Tensor) -> Tensor:
    """Compute the anisotropic total variation per mask: (..., 1, H, W) -> (...).

    mean_ij |mu[i+1, j] - mu[i, j]| + mean_ij |mu[i, j+1] - mu[i, j]|. A side of one pixel adds
    nothing.
    """
    rows, columns = mu.diff(dim=-2).abs(), mu.diff(dim=-1).abs()
    return sum(
        (d.mean(dim=(-3, -2, -1)) for d in (rows, columns) if d.numel()),
        mu.new_zeros(mu.shape[:-3]),
    )


def gaussian_blur(images: Tensor, sigma: float) -> Tensor:
    """Apply a separable Gaussian blur to (B, 3, H, W), cut at 3 sigma, with reflected edges.

    If 3 sigma exceeds the image's side less one pixel, the kernel is cut there and normalised
    again.
    """
    kernel = tuple(2 * min(math.ceil(3 * sigma), side - 1) + 1 for side in images.shape[-2:])
    return gaussian_blur2d(images, (kernel[0], kernel[1]), (sigma, sigma))


class UNet(nn.Module):
    """(B, 3, H, W) -> (B, 1, H, W), any size; zero at first (arXiv 1505.04597, GroupNorm and SiLU).

    Args:
        base: Channels at full resolution, doubled with each halving.
        depth: Halvings.
    """

    def __init__(self, base: int = 16, depth: int = 3) -> None:
        super().__init__()
        widths = [base * 2**level for level in range(depth + 1)]
        self.down = nn.ModuleList(
            _conv_block(before, after) for before, after in zip([3, *widths], widths, strict=False)
        )
        self.up = nn.ModuleList(
            _conv_block(skip + below, skip)
            for skip, below in zip(widths[-2::-1], widths[:0:-1], strict=True)
        )
        self.out = _zero(nn.Conv2d(base, 1, kernel_size=1))

    def forward(self, views: Tensor) -> Tensor:
        """Compute logits (B, 1, H, W) of views (B, 3, H, W)."""
        x, skips = views, []
        for level, block in enumerate(self.down):
            x = block(F.avg_pool2d(x, 2, ceil_mode=True) if level else x)
            skips.append(x)
        for block, skip in zip(self.up, skips[-2::-1], strict=True):
            x = block(
                torch.cat([skip, F.interpolate(x, size=skip.shape[-2:], mode="bilinear")], dim=1)
            )
        return self.out(x)


class PatchTransformer(nn.Module):
    """(B, 3, H, W) -> (B, 1, H, W), any size; zero at first: a transformer on patches.

    One logit per patch, enlarged bilinearly: the backbone of DiT (arXiv 2212.09748) and SiT without
    their conditioning. `width` must be a multiple of 4 and of `num_heads`.
    """

    def __init__(
        self, patch_size: int = 8, width: int = 128, depth: int = 4, num_heads: int = 4
    ) -> None:
        super().__init__()
        if width % 4 or width % num_heads:
            raise MetaVPTError(
                f"PatchTransformer: width={width} must be a multiple of 4 and of "
                f"num_heads={num_heads}"
            )
        self.patch_size = patch_size
        self.embed = nn.Conv2d(3, width, patch_size, stride=patch_size)
        self.blocks = nn.Sequential(*(Block(width, num_heads, qkv_bias=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.out = _zero(nn.Linear(width, 1))

    def forward(self, views: Tensor) -> Tensor:
        """Compute logits (B, 1, H, W) of views (B, 3, H, W)."""
        height, width = views.shape[-2:]
        padded = F.pad(
            views, (0, -width % self.patch_size, 0, -height % self.patch_size), mode="replicate"
        )
        patches = self.embed(padded)  # (B, D, h, w)
        grid = list(patches.shape[-2:])
        tokens = patches.flatten(2).transpose(1, 2)
        tokens = tokens + build_sincos2d_pos_embed(
            grid, tokens.shape[-1], device=tokens.device, dtype=tokens.dtype
        )
        logits = self.out(self.norm(self.blocks(tokens))).transpose(1, 2).unflatten(2, grid)
        return F.interpolate(logits, size=padded.shape[-2:], mode="bilinear")[..., :height, :width]


def _conv_block(before: int, after: int) -> nn.Sequential:
    groups = math.gcd(8, after)
    layers: list[nn.Module] = []
    for channels in (before, after):
        layers += [
            nn.Conv2d(channels, after, kernel_size=3, padding=1),
            nn.GroupNorm(groups, after),
            nn.SiLU(),
        ]
    return nn.Sequential(*layers)


def _zero(layer: nn.Module) -> nn.Module:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
