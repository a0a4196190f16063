"""The names that transformers gives the parameters of a ViT, and those of the original releases."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from metavpt.hypergradients.params import Params

# Weights on the Hugging Face hub: owner/name[@revision].
HUB_NAME = re.compile(r"(?:hf-hub:)?([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
_EMBEDDINGS = {
    "cls_token": "embeddings.cls_token",
    "mask_token": "embeddings.mask_token",
    "register_tokens": "embeddings.register_tokens",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
_ATTENTION = {
    "attn.q": "attention.attention.query",
    "attn.k": "attention.attention.key",
    "attn.v": "attention.attention.value",
    "attn.proj": "attention.output.dense",
}
_SCALED = {
    "norm1": "norm1",
    "norm2": "norm2",
    "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1",
}


@dataclass(frozen=True)
class Layout:
    """A model family in transformers' checkpoints: name in the original release -> name there.

    Block i is `prefix`i there and blocks.i in the release. Transformers keeps queries, keys and
    values apart; the release has one matrix.
    """

    prefix: str
    outside: Mapping[str, str]
    block: Mapping[str, str]

    def to_original(self, state: Params) -> Params:
        """Rename a checkpoint to the release's names.

        Names that the family lacks stay as they are.
        """
        outside, block = (
            {there: here for here, there in names.items()} for names in (self.outside, self.block)
        )
        return _joined(_renamed(state, self.prefix, "blocks.", outside, block))

    def from_original(self, state: Params) -> Params:
        """Rename a release's state dict to transformers' names."""
        return _renamed(_split(state), "blocks.", self.prefix, self.outside, self.block)


DINOV2 = Layout(
    "encoder.layer.",
    _EMBEDDINGS,
    {
        **_ATTENTION,
        **_SCALED,
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
        "mlp.w12": "mlp.weights_in",
        "mlp.w3": "mlp.weights_out",
    },
)
VIT = Layout(  # MAE, I-JEPA
    "encoder.layer.",
    _EMBEDDINGS,
    {
        **_ATTENTION,
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    },
)
_DINOV3_EMBEDDINGS = {
    "cls_token": "embeddings.cls_token",
    "mask_token": "embeddings.mask_token",
    "storage_tokens": "embeddings.register_tokens",
    "patch_embed.proj": "embeddings.patch_embeddings",
    "norm": "norm",
}
_DINOV3_BLOCK = {
    "attn.q": "attention.q_proj",
    "attn.k": "attention.k_proj",
    "attn.v": "attention.v_proj",
    "attn.proj": "attention.o_proj",
    **_SCALED,
}
DINOV3 = Layout(
    "layer.",
    _DINOV3_EMBEDDINGS,
    {**_DINOV3_BLOCK, "mlp.fc1": "mlp.up_proj", "mlp.fc2": "mlp.down_proj"},
)
DINOV3_GATED = Layout(
    "layer.",
    _DINOV3_EMBEDDINGS,
    {
        **_DINOV3_BLOCK,
        "mlp.w1": "mlp.gate_proj",
        "mlp.w2": "mlp.up_proj",
        "mlp.w3": "mlp.down_proj",
    },
)


def layout_of(state: Params) -> Layout | None:
    """Return the family of a transformers checkpoint; None if its names are not transformers'."""
    if "embeddings.patch_embeddings.weight" in state:
        return DINOV3_GATED if any(".mlp.gate_proj." in key for key in state) else DINOV3
    if "embeddings.patch_embeddings.projection.weight" in state:
        return VIT if any(".layernorm_before." in key for key in state) else DINOV2
    return None


def _renamed(
    state: Params,
    old_prefix: str,
    new_prefix: str,
    outside: Mapping[str, str],
    block: Mapping[str, str],
) -> Params:
    inside = re.compile(rf"{re.escape(old_prefix)}(\d+)\.(.+)")
    renamed = {}
    for key, value in state.items():
        match = inside.fullmatch(key)
        renamed[
            f"{new_prefix}{match[1]}.{_rename(match[2], block)}" if match else _rename(key, outside)
        ] = value
    return renamed


def _rename(key: str, names: Mapping[str, str]) -> str:
    for old, new in names.items():
        if key == old or key.startswith(f"{old}."):
            return new + key.removeprefix(old)
    return key


def _joined(state: Params) -> Params:
    """Join q, k, v to qkv. Only keys may lack a bias, which is then zero.

    Whatever else is incomplete stays apart and will not fit.
    """
    joined, parts = {}, {}
    for key, value in state.items():
        if match := re.fullmatch(r"(.+\.attn\.)([qkv])(\.(?:weight|bias))", key):
            parts.setdefault((match[1], match[3]), {})[match[2]] = value
        else:
            joined[key] = value
    for (attention, kind), found in parts.items():
        if kind == ".bias" and found.keys() == {"q", "v"}:
            found["k"] = torch.zeros_like(found["q"])
        if found.keys() == {"q", "k", "v"}:
            joined[f"{attention}qkv{kind}"] = torch.cat([found[part] for part in "qkv"])
        else:
            joined |= {f"{attention}{part}{kind}": value for part, value in found.items()}
    return joined


def _split(state: Params) -> Params:
    """Split qkv into q, k, v."""
    split = {}
    for key, value in state.items():
        if ".attn.qkv." in key:
            split |= {
                key.replace(".qkv.", f".{part}."): third
                for part, third in zip("qkv", value.chunk(3), strict=True)
            }
        else:
            split[key] = value
    return split
