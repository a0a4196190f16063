"""Backbones as checkpoints of transformers."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.layers.mlp import GluMlp, SwiGLU
from timm.layers.pos_embed_sincos import RotaryEmbeddingDinoV3
from torch import nn

from metavpt.errors import MetaVPTError
from metavpt.hypergradients.params import Params
from metavpt.learners.layouts import DINOV2, DINOV3, DINOV3_GATED, VIT, Layout
from metavpt.learners.vit import Backbone, timm_state_dict


class Family(NamedTuple):
    """A model class of transformers with its layout and the fields of its configuration."""

    name: str
    layout: Layout
    fields: dict[str, Any]


def save_transformers(backbone: Backbone, folder: Path) -> Any:
    """Write config.json, model.safetensors and preprocessor_config.json, and read the model back.

    Raises:
        MetaVPTError: transformers is missing, or does not have the architecture.
    """
    transformers = _transformers()
    family = _family(backbone)
    config = getattr(transformers, f"{family.name}Config")(**family.fields)
    model_class = getattr(transformers, f"{family.name}Model")
    config.architectures = [model_class.__name__]
    config.save_pretrained(folder)
    state = {
        key: value.contiguous()
        for key, value in family.layout.from_original(_original(backbone)).items()
    }
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    height, width = backbone.trunk.patch_embed.img_size
    images = {
        "image_mean": list(backbone.mean),
        "image_std": list(backbone.std),
        "size": {"height": height, "width": width},
    }
    transformers.ViTImageProcessor(**images).save_pretrained(folder)
    options = {"add_pooling_layer": False} if family.name == "ViT" else {}
    return model_class.from_pretrained(folder, **options).eval()


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MetaVPTError(
            f"transformers cannot be imported ({error}); pip install 'metavpt[export]', or export "
            "with format=timm"
        ) from error
    return transformers


def _family(backbone: Backbone) -> Family:
    trunk, block = backbone.trunk, _first_block(backbone)
    height, width = trunk.patch_embed.img_size
    hidden = block.mlp.fc2.in_features
    fields = {
        "hidden_size": backbone.width,
        "num_hidden_layers": backbone.num_blocks,
        "num_attention_heads": block.attn.num_heads,
        "layer_norm_eps": block.norm1.eps,
        "patch_size": backbone.patch_size,
        "image_size": height,
    }
    plain, gated = type(block.mlp.act) is nn.GELU, isinstance(block.mlp, SwiGLU | GluMlp)
    known_rope = trunk.rope is None or isinstance(trunk.rope, RotaryEmbeddingDinoV3)
    if (
        height != width
        or not (plain or gated)
        or not known_rope
        or not isinstance(trunk.norm_pre, nn.Identity)
    ):
        raise MetaVPTError(
            "transformers has no model of this architecture; export with format=timm"
        )
    if trunk.rope is not None:
        has_bias = getattr(block.attn, "q_bias", None) is not None
        fields |= {
            "query_bias": has_bias,
            "value_bias": has_bias,
            "rope_theta": trunk.rope.temperature,
        }
        fields |= {
            "use_gated_mlp": gated,
            "hidden_act": "silu" if gated else "gelu",
            "intermediate_size": hidden,
        }
        fields |= {
            "num_register_tokens": 0 if trunk.reg_token is None else trunk.reg_token.shape[1]
        }
        return Family("DINOv3ViT", DINOV3_GATED if gated else DINOV3, fields)
    fields["qkv_bias"] = block.attn.qkv.bias is not None
    if hasattr(block.ls1, "gamma"):
        # A gated MLP has 2/3 of the width that the ratio asks for, rounded up to a multiple of 8.
        fields |= {
            "use_swiglu_ffn": gated,
            "mlp_ratio": round(hidden * (1.5 if gated else 1.0) / backbone.width),
        }
        if trunk.reg_token is None:
            return Family("Dinov2", DINOV2, fields)
        return Family(
            "Dinov2WithRegisters",
            DINOV2,
            fields | {"num_register_tokens": trunk.reg_token.shape[1]},
        )
    return Family(
        "ViT" if backbone.tail.has_cls else "IJepa", VIT, fields | {"intermediate_size": hidden}
    )


def _original(backbone: Backbone) -> Params:
    """Undo timm's conversion: return the weights under the names of the original releases."""
    names, state = {}, timm_state_dict(backbone)
    block, width = _first_block(backbone), backbone.width
    if backbone.trunk.rope is not None:
        # Features do not depend on it.
        state["mask_token"] = torch.zeros(1, 1, width)
        names |= {"reg_token": "storage_tokens", "gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma"}
        for key in [key for key in state if key.endswith("q_bias")]:
            query, value = state.pop(key), state.pop(key.replace("q_bias", "v_bias"))
            attention = key.removesuffix("q_bias")
            state |= {f"{attention}q.bias": query, f"{attention}v.bias": value}
    elif "reg_token" in state:
        names["reg_token"] = "register_tokens"
        # In timm's model the cls token has no position.
        state["pos_embed"] = F.pad(state["pos_embed"], (0, 0, 1, 0))
    if isinstance(block.mlp, SwiGLU | GluMlp):
        names |= {
            "mlp.fc1_g": "mlp.w1",
            "mlp.fc1_x": "mlp.w2",
            "mlp.fc1.": "mlp.w12.",
            "mlp.fc2": "mlp.w3",
        }
    if hasattr(getattr(block, "ls1", None), "gamma"):
        state["mask_token"] = torch.zeros(1, width)
    return {_renamed(key, names): value for key, value in state.items()}


def _renamed(key: str, names: dict[str, str]) -> str:
    for old, new in names.items():
        key = key.replace(old, new)
    return key


def _first_block(backbone: Backbone) -> Any:
    return next(iter([*backbone.trunk.blocks.values(), *backbone.tail.blocks.values()]))
