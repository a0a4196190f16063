"""A backbone written for transformers, read back by it and by us."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from metavpt.errors import MetaVPTError
from metavpt.interop.huggingface import save_transformers
from metavpt.learners.vit import Backbone, create_backbone

TINY: dict[str, Any] = {
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 4,
    "img_size": 32,
    "patch_size": 8,
}
MODELS = {
    "vit_small_patch16_dinov3": "DINOv3ViTModel",
    "vit_small_patch16_dinov3_qkvb": "DINOv3ViTModel",
    "vit_small_plus_patch16_dinov3_qkvb": "DINOv3ViTModel",
    "vit_small_patch14_dinov2": "Dinov2Model",
    "vit_small_patch14_reg4_dinov2": "Dinov2WithRegistersModel",
    "vit_giant_patch14_reg4_dinov2": "Dinov2WithRegistersModel",
    "vit_base_patch16_224.mae": "ViTModel",
    "vit_huge_patch14_gap_224": "IJepaModel",
}


def random_backbone(name: str) -> Backbone:
    torch.manual_seed(0)
    sizes: dict[str, Any] = TINY | (
        {"embed_dim": 48} if "giant" in name else {}
    )  # its gated MLP is rounded alike by both
    backbone = create_backbone(name, 1, **sizes)
    for parameter in backbone.parameters():
        nn.init.normal_(parameter, std=0.2)
    return backbone.eval()


@pytest.mark.parametrize(("name", "model_class"), MODELS.items())
def test_transformers_gives_the_features_of_the_backbone(
    name: str, model_class: str, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    backbone = random_backbone(name)
    save_transformers(backbone, tmp_path)
    images = torch.randn(2, 3, 32, 32)
    options = {"add_pooling_layer": False} if model_class == "ViTModel" else {}
    model, loading = getattr(transformers, model_class).from_pretrained(
        tmp_path, output_loading_info=True, **options
    )
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    with torch.no_grad():
        tokens, features = model.eval()(images).last_hidden_state, backbone(images)
    patches = features.patches.flatten(2).transpose(1, 2)
    torch.testing.assert_close(tokens[:, -16:], patches, atol=1e-5, rtol=0)
    if backbone.tail.has_cls:
        torch.testing.assert_close(tokens[:, 0], features.cls, atol=1e-5, rtol=0)


def test_images_are_prepared_as_the_backbone_wants_them(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    backbone = random_backbone("vit_small_patch14_dinov2")
    save_transformers(backbone, tmp_path)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    prepared = processor(torch.full((3, 8, 8), 255, dtype=torch.uint8), return_tensors="pt")[
        "pixel_values"
    ]
    assert prepared.shape == (1, 3, 32, 32)
    expected = (1 - torch.tensor(backbone.mean)) / torch.tensor(backbone.std)
    torch.testing.assert_close(prepared[0, :, 0, 0], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("eva02_tiny_patch14_224", TINY), ("vit_small_patch14_dinov2", TINY | {"img_size": (32, 48)})],
)
def test_an_architecture_that_transformers_lacks(
    name: str, sizes: dict[str, Any], tmp_path: Path
) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(
        MetaVPTError, match="no model of this architecture; export with format=timm"
    ):
        save_transformers(create_backbone(name, 1, **sizes), tmp_path)
    assert not list(tmp_path.iterdir())


def test_without_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        MetaVPTError, match=r"transformers cannot be imported .*metavpt\[export\].*format=timm"
    ):
        save_transformers(create_backbone("vit_tiny_dinov3", 1), tmp_path)
