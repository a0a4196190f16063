"""Export of a run's vision transformer as checkpoints of timm and transformers."""

from pathlib import Path
from typing import Any, cast

import timm
import torch
from omegaconf import DictConfig
from timm.models import save_for_hf
from torch import Tensor

from metavpt.errors import MetaVPTError, check_known
from metavpt.export.loading import FORMATS, Part, backbone_options, trained_backbone
from metavpt.export.model_card import Description, Usage, class_name
from metavpt.interop.huggingface import save_transformers
from metavpt.learners.vit import OWN_MODELS, Backbone, timm_state_dict

# Our own model -> the timm architecture that it is another size of.
TIMM_NAMES = {"vit_tiny_dinov3": "vit_small_patch16_dinov3"}
NOT_TIMM = ("_target_", "name", "tail_blocks", "pretrained", "weights", "frozen_blocks")
TOLERANCE = (
    1e-4  # of the largest feature: other kernels round differently, another model is far off
)


def export_backbone(
    run: Path, config: DictConfig, folder: Path, part: Part, format: str
) -> Description:
    """Write the backbone of the newest checkpoint of `run` to `folder`/<format> for each format.

    Each format is read back by its own library and compared.
    """
    check_known(format, "format", *FORMATS)
    backbone = trained_backbone(run, config, part)
    usages = []
    for library in FORMATS[format]:
        place = folder / library
        place.mkdir(parents=True)
        usages.append(
            _save_timm(backbone, config, place)
            if library == "timm"
            else _save_transformers(backbone, place)
        )
    side = (
        " The teacher, the student's moving average, was not measured." if part == "teacher" else ""
    )
    return Description(
        f"{config.backbone.name}, continued by metavpt ({part})",
        "feature-extraction",
        _about(config, backbone),
        f"Frozen features of the student.{side}",
        _data(config),
        _licence(config),
        usages,
    )


def _save_timm(backbone: Backbone, config: DictConfig, folder: Path) -> Usage:
    """Write config.json and model.safetensors for `local-dir:<folder>` and `checkpoint_path=`."""
    name = str(config.backbone.name)
    arguments: dict[str, Any] = {
        key: value for key, value in backbone_options(config).items() if key not in NOT_TIMM
    }
    if name in OWN_MODELS:
        patches, block = (
            backbone.trunk.patch_embed,
            cast(Any, next(iter(backbone.tail.blocks.values()))),
        )
        arguments = {
            "img_size": patches.img_size[0],
            "patch_size": backbone.patch_size,
            "embed_dim": backbone.width,
        }
        arguments |= {"depth": backbone.num_blocks, "num_heads": block.attn.num_heads}
    arguments |= {
        "dynamic_img_size": True,
        "global_pool": "token" if backbone.tail.has_cls else "avg",
    }
    model = timm.create_model(TIMM_NAMES.get(name, name), num_classes=0, **arguments)
    model.load_state_dict(timm_state_dict(backbone))
    # Not the release that timm associates with the architecture.
    ours = {"pretrained_cfg": {"tag": "metavpt"}}
    save_for_hf(
        model, str(folder), model_config=ours, model_args=arguments, safe_serialization=True
    )
    read: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    _compare(backbone, read.forward_features, "timm")
    return Usage("timm", 'timm.create_model("local-dir:timm", pretrained=True)')


def _save_transformers(backbone: Backbone, folder: Path) -> Usage:
    model = save_transformers(backbone, folder)
    _compare(backbone, lambda images: model(images).last_hidden_state, "transformers")
    options = ", add_pooling_layer=False" if type(model).__name__ == "ViTModel" else ""
    return Usage(
        "transformers",
        f'transformers.{type(model).__name__}.from_pretrained("transformers"{options})',
    )


@torch.no_grad()
def _compare(backbone: Backbone, tokens: Any, library: str) -> None:
    """Raise MetaVPTError if `tokens`, images -> (B, P + N, D), differ from the backbone's."""
    images = torch.rand(
        1, 3, *backbone.trunk.patch_embed.img_size, generator=torch.Generator().manual_seed(0)
    )
    expected, found = backbone(images).patches.flatten(2).transpose(1, 2), tokens(images)
    difference: Tensor = (
        found[:, -expected.shape[1] :] - expected
    ).abs().max() / expected.abs().max()
    if not difference <= TOLERANCE:
        raise MetaVPTError(
            f"{library} gives other features than the run's backbone (relative difference "
            f"{float(difference):.1e}); nothing was exported"
        )


def _about(config: DictConfig, module: Backbone) -> str:
    backbone = config.backbone
    mean, std = (", ".join(f"{x:.4g}" for x in numbers) for numbers in (module.mean, module.std))
    size = config.problem.get("feature_size")
    measured = f" It was measured on images of {size[0]} x {size[1]} pixels." if size else ""
    source = "random weights"
    if backbone.get("weights"):
        source = f"the weights of `{backbone.weights}`"
    elif backbone.get("pretrained"):
        source = f"timm's released weights `{backbone.name}`"
    return (
        f"The vision transformer `{backbone.name}` from {source}, trained on with "
        f"`{class_name(config.problem)}` on unlabelled images, "
        f"its tasks made by `{class_name(config.strategy)}`.{measured} timm and transformers take "
        f"RGB from 0 to 1, normalised by mean ({mean}) and standard deviation ({std}); features of "
        "patches are timm's `model.forward_features(images)`. metavpt takes images as they come "
        "(`model.features(images)`)."
    )


def _data(config: DictConfig) -> list[str]:
    data: Any = config.get("data") or {}
    if "_target_" in data:
        return [_source(data)]
    return [f"{name}: {_source(of)}" for name, of in data.items()]


def _source(data: Any) -> str:
    unlabelled = ", ".join(str(name) for name in data.get("unlabelled") or [])
    place, images = data.get("path") or "generated rooms", unlabelled or "the same"
    return f"{place}, unlabelled images from {images}"


def _licence(config: DictConfig) -> str:
    backbone = config.backbone
    if backbone.get("weights"):
        start = (
            f"These weights derive from `{backbone.weights}`; the licence of that file also "
            "applies to them."
        )
    elif backbone.get("pretrained"):
        known = timm.get_pretrained_cfg(backbone.name)
        licence = (known and known.license) or "see its page"
        start = (
            f"These weights derive from `{backbone.name}`, whose licence also applies to them: "
            f"{licence}."
        )
    else:
        start = "These weights were trained from random ones, so no released weights restrict them."
    return start
