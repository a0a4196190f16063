"""Released weights in every layout: the features are those of the library that wrote them."""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from metavpt.errors import MetaVPTError
from metavpt.learners import vit, weights
from metavpt.learners.vit import Backbone, create_backbone, timm_state_dict

TINY: dict[str, Any] = {
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 4,
    "img_size": 32,
    "patch_size": 8,
}
LARGER, COARSER, OTHER_HEADS = (
    dict(TINY, **other) for other in ({"img_size": 64}, {"patch_size": 16}, {"num_heads": 2})
)
CONFIG: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
HIDDEN = {"intermediate_size": 128, "layer_norm_eps": 1e-6}
DECODER = {
    "decoder_hidden_size": 32,
    "decoder_num_attention_heads": 4,
    "decoder_num_hidden_layers": 1,
}
DINOV3 = {"intermediate_size": 128, "num_register_tokens": 4}
# model of transformers, its options, the architecture in timm
TRANSFORMERS = [
    ("Dinov2Model", {}, "vit_small_patch14_dinov2"),
    ("Dinov2Model", {"use_swiglu_ffn": True}, "vit_giant_patch14_dinov2"),
    ("Dinov2WithRegistersModel", {}, "vit_small_patch14_reg4_dinov2"),
    ("DINOv3ViTModel", DINOV3, "vit_small_patch16_dinov3_qkvb"),
    ("DINOv3ViTModel", DINOV3 | {"query_bias": False, "value_bias": False},
        "vit_small_patch16_dinov3"),
    ("DINOv3ViTModel", DINOV3 | {"use_gated_mlp": True, "hidden_act": "silu"},
        "vit_small_plus_patch16_dinov3_qkvb"),
    ("IJepaModel", HIDDEN, "vit_huge_patch14_gap_224"),
    ("ViTMAEModel", HIDDEN | {"mask_ratio": 0.0}, "vit_base_patch16_224.mae"),
    ("ViTMAEForPreTraining", HIDDEN | DECODER | {"mask_ratio": 0.0}, "vit_base_patch16_224.mae"),
]  # fmt: skip


def random_parameters(model: Any) -> Any:
    """Every parameter counts: initial layer scales, positions and biases are near zero."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def transformers_model(name: str, options: dict[str, Any]) -> Any:
    transformers = pytest.importorskip("transformers")
    config = re.sub(r"(ForPreTraining|Model)$", "Config", name)
    return random_parameters(
        getattr(transformers, name)(getattr(transformers, config)(**CONFIG, **options))
    )


def transformers_tokens(model: Any, images: Tensor) -> Tensor:
    if not type(model).__name__.startswith("ViTMAE"):
        return model(images).last_hidden_state
    encoder = getattr(
        model, "vit", model
    )  # it shuffles patches by noise; with this noise they stay where they are
    return encoder(images, noise=torch.arange(16.0).expand(len(images), -1)).last_hidden_state


def assert_features_are(backbone: Backbone, tokens: Tensor, images: Tensor) -> None:
    features = backbone.eval()(images)
    patches = features.patches.flatten(2).transpose(1, 2)
    torch.testing.assert_close(patches, tokens[:, -patches.shape[1] :], atol=1e-5, rtol=0)
    if backbone.tail.has_cls:
        torch.testing.assert_close(features.cls, tokens[:, 0], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("name", "options", "architecture"), TRANSFORMERS)
def test_a_folder_of_transformers_gives_its_features(
    name: str, options: dict[str, Any], architecture: str, tmp_path: Path
) -> None:
    model = transformers_model(name, options)
    model.save_pretrained(tmp_path)
    images = torch.randn(2, 3, 32, 32)
    sizes: dict[str, Any] = TINY | (
        {"mlp_ratio": 176 / 32} if "giant" in architecture else {}
    )  # of both halves of its gated MLP
    with torch.no_grad():
        assert_features_are(
            create_backbone(architecture, 1, weights=tmp_path, **sizes),
            transformers_tokens(model, images),
            images,
        )


def test_a_folder_in_several_files(tmp_path: Path) -> None:
    model = transformers_model("IJepaModel", HIDDEN)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert_features_are(
            create_backbone("vit_huge_patch14_gap_224", 1, weights=tmp_path, **TINY),
            model(images)[0],
            images,
        )


def dinov2(state: dict[str, Tensor]) -> Any:
    return {**state, "mask_token": torch.randn(1, 32)}


def dinov2_registers(state: dict[str, Tensor]) -> Any:
    """There the cls token has a position of its own, in timm's model it is added to it."""
    state = {**state, "mask_token": torch.randn(1, 32), "register_tokens": state["reg_token"]}
    position = torch.randn(1, 1, 32)
    state |= {
        "cls_token": state["cls_token"] - position,
        "pos_embed": torch.cat([position, state["pos_embed"]], dim=1),
    }
    del state["reg_token"]
    return {
        "teacher": {f"backbone.{key}": value for key, value in state.items()}
        | {"dino_head.mlp.0.weight": torch.randn(2, 2)}
    }


def dinov3(state: dict[str, Tensor]) -> Any:
    """The bias of the keys is there, with a mask that is zero for it."""
    made = {"mask_token": torch.randn(1, 32), "rope_embed.periods": torch.randn(2)}
    for key, value in state.items():
        if key.endswith("q_bias"):
            attention = key.removesuffix("q_bias")
            made[f"{attention}qkv.bias"] = torch.cat(
                [value, torch.randn(32), state[f"{attention}v_bias"]]
            )
            made[f"{attention}qkv.bias_mask"] = torch.cat(
                [torch.ones(32), torch.zeros(32), torch.ones(32)]
            )
        elif not key.endswith("v_bias"):
            made[
                key.replace("reg_token", "storage_tokens")
                .replace("gamma_1", "ls1.gamma")
                .replace("gamma_2", "ls2.gamma")
            ] = value
    return made


def mae(state: dict[str, Tensor]) -> Any:
    decoder = {
        "mask_token": torch.randn(1, 1, 8),
        "decoder_embed.weight": torch.randn(8, 32),
        "decoder_blocks.0.norm1.bias": torch.randn(8),
    }
    return {"model": {**state, **decoder}, "args": argparse.Namespace(epochs=800), "epoch": 799}


def ijepa(state: dict[str, Tensor]) -> Any:
    """As the released training code saves it; the target encoder is the one that is evaluated."""
    target = {f"module.{key}": value for key, value in state.items()}
    context = {key: torch.zeros_like(value) for key, value in target.items()}
    return {
        "encoder": context,
        "target_encoder": target,
        "predictor": {"module.predictor_embed.weight": torch.randn(2, 2)},
        "epoch": 300,
    }


@pytest.mark.parametrize(
    ("architecture", "release"),
    [
        ("vit_small_patch14_dinov2", dinov2),
        ("vit_small_patch14_reg4_dinov2", dinov2_registers),
        ("vit_small_patch16_dinov3_qkvb", dinov3),
        ("vit_base_patch16_224.mae", mae),
        ("vit_huge_patch14_gap_224", ijepa),
    ],
)
def test_the_layouts_of_the_original_releases(
    architecture: str, release: Any, tmp_path: Path
) -> None:
    source = random_parameters(create_backbone(architecture, 1, **TINY))
    file = tmp_path / "checkpoint.pth.tar"
    torch.save(release(timm_state_dict(source)), file)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        found, expected = (
            create_backbone(architecture, 1, weights=file, **TINY)(images),
            source(images),
        )
    torch.testing.assert_close(found.cls, expected.cls, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.patches, expected.patches, atol=1e-5, rtol=0)


def test_the_pretrained_ijepa_is_the_target_encoder_of_its_release(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """timm names the file of the release and takes the context encoder of it."""
    name = "vit_huge_patch14_gap_224.in1k_ijepa"
    source = random_parameters(create_backbone(name, 1, **TINY))
    file = tmp_path / "IN1K-vit.h.14-300e.pth.tar"
    torch.save(ijepa(timm_state_dict(source)), file)
    asked: list[str] = []
    monkeypatch.setattr(vit, "download_cached_file", lambda url: asked.append(url) or str(file))
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        found = create_backbone(name, 1, pretrained=True, **TINY)(images).patches
        torch.testing.assert_close(found, source(images).patches, atol=1e-5, rtol=0)
    assert [url.rpartition("/")[2] for url in asked] == [file.name]


def test_dinov3_without_bias_takes_a_bias_of_zeros_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = dinov3(
        timm_state_dict(
            random_parameters(create_backbone("vit_small_patch16_dinov3_qkvb", 1, **TINY))
        )
    )
    torch.save(state, tmp_path / "biased.pth")
    with pytest.raises(MetaVPTError, match=r"blocks\.0\.attn\.qkv\.bias is not zero; .*_qkvb"):
        create_backbone("vit_small_patch16_dinov3", 1, weights=tmp_path / "biased.pth", **TINY)
    torch.save(
        {k: torch.zeros_like(v) if k.endswith("qkv.bias") else v for k, v in state.items()},
        tmp_path / "zero.pth",
    )
    create_backbone("vit_small_patch16_dinov3", 1, weights=tmp_path / "zero.pth", **TINY)
    assert not capsys.readouterr().out  # timm prints there
    torch.save({k: v for k, v in state.items() if "bias_mask" not in k}, tmp_path / "keys.pth")
    with pytest.raises(MetaVPTError, match="not zero for the keys"):
        create_backbone("vit_small_patch16_dinov3_qkvb", 1, weights=tmp_path / "keys.pth", **TINY)


def test_positions_of_another_image_size_are_resampled_and_nothing_else(tmp_path: Path) -> None:
    source = create_backbone("vit_small_patch14_dinov2", 1, **TINY)
    save_file(timm_state_dict(source), tmp_path / "a.safetensors")
    larger = create_backbone(
        "vit_small_patch14_dinov2", 1, weights=tmp_path / "a.safetensors", **LARGER
    )
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(
        larger(images).cls, source(images).cls, atol=1e-5, rtol=0
    )  # which resamples as well
    assert larger.trunk.pos_embed.shape[1] == 1 + 8 * 8
    with pytest.raises(
        MetaVPTError, match=r"patch_embed\.proj\.weight is \(32, 3, 8, 8\), not \(32, 3, 16, 16\)"
    ):
        create_backbone(
            "vit_small_patch14_dinov2", 1, weights=tmp_path / "a.safetensors", **COARSER
        )


@pytest.mark.parametrize(
    "architecture",
    ["vit_huge_patch14_gap_224", "vit_small_patch16_dinov3", "vit_small_patch14_reg4_dinov2"],
)
def test_weights_of_another_family_do_not_fit(architecture: str, tmp_path: Path) -> None:
    save_file(
        timm_state_dict(create_backbone("vit_base_patch16_224.mae", 1, **TINY)),
        tmp_path / "mae.safetensors",
    )
    with pytest.raises(MetaVPTError, match=f"mae.safetensors does not fit {architecture}: "):
        create_backbone(architecture, 1, weights=tmp_path / "mae.safetensors", **TINY)


def test_what_shapes_do_not_show_is_read_from_the_configuration(tmp_path: Path) -> None:
    transformers_model("DINOv3ViTModel", DINOV3).save_pretrained(tmp_path)
    with pytest.raises(MetaVPTError, match="num_attention_heads is 4, not 2"):
        create_backbone("vit_small_patch16_dinov3_qkvb", 1, weights=tmp_path, **OTHER_HEADS)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"rope_theta": 50.0}))
    with pytest.raises(MetaVPTError, match=r"rope_theta is 50\.0, not 100"):
        create_backbone("vit_small_patch16_dinov3_qkvb", 1, weights=tmp_path, **TINY)


def test_two_backbones_in_one_file_are_an_error(tmp_path: Path) -> None:
    state = timm_state_dict(create_backbone("vit_base_patch16_224.mae", 1, **TINY))
    torch.save(
        {f"{who}.{key}": value for who in ("student", "teacher") for key, value in state.items()},
        tmp_path / "both.pt",
    )
    with pytest.raises(MetaVPTError, match=r"holds 2 backbones \(student\., teacher\.\)"):
        create_backbone("vit_base_patch16_224.mae", 1, weights=tmp_path / "both.pt", **TINY)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(MetaVPTError, match=r"holds neither model\.safetensors nor"):
        create_backbone("vit_tiny_dinov3", 1, weights=tmp_path)


def test_a_name_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def download(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision, allow_patterns))
        folder = tmp_path / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text("{}")
        if "pytorch_model*.bin*" in allow_patterns:
            torch.save(timm_state_dict(source), folder / "pytorch_model.bin")
        return str(folder)

    source = create_backbone("vit_tiny_dinov3", 1)
    monkeypatch.setattr(weights, "snapshot_download", download)
    found = create_backbone("vit_tiny_dinov3", 1, weights="hf-hub:someone/vit@v2")
    assert [(name, revision) for name, revision, _ in asked] == [("someone/vit", "v2")] * 2
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(found(images).cls, source(images).cls)


def test_a_name_on_the_hub_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise OSError("Name or service not known\nsecond line")

    monkeypatch.setattr(weights, "snapshot_download", offline)
    message = (
        r"weights=someone/vit: no such file or folder here.*"
        r"\(Name or service not known second line\); without network pass a local"
    )
    with pytest.raises(MetaVPTError, match=message):
        create_backbone("vit_tiny_dinov3", 1, weights="someone/vit")
