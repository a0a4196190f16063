import math
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call

from metavpt.errors import MetaVPTError
from metavpt.hypergradients import params
from metavpt.learners import vit
from metavpt.learners.projection import Learner, ProjectionHead
from metavpt.learners.vit import Backbone, Hidden, create_backbone, timm_state_dict

# name, native size, another size that the patch divides
FAMILIES = {
    "vit_small_patch16_dinov3": (256, (48, 80)),
    "vit_small_patch16_dinov3_qkvb": (256, (48, 80)),
    "vit_small_patch14_dinov2": (56, (42, 70)),
    "vit_small_patch14_reg4_dinov2": (56, (42, 70)),
    "vit_small_patch16_224": (64, (48, 80)),
    "vit_base_patch16_224.mae": (64, (48, 80)),
    "vit_huge_patch14_gap_224": (56, (42, 70)),
    "eva02_tiny_patch14_224": (56, (42, 70)),
}
TINY: dict[str, Any] = {"embed_dim": 32, "depth": 3, "num_heads": 4}


def tiny(name: str, tail_blocks: int = 2, **options: Any) -> Backbone:
    torch.manual_seed(0)
    backbone = create_backbone(
        name, tail_blocks, img_size=FAMILIES[name][0], **TINY, **options
    ).double()
    for parameter in (
        backbone.parameters()
    ):  # positions, registers and layer scales are near zero at first: make all of them count
        nn.init.normal_(parameter, std=0.2)
    return backbone


def timm_twin(name: str, backbone: Backbone) -> Any:
    model = timm.create_model(
        name,
        img_size=FAMILIES[name][0],
        num_classes=0,
        global_pool="",
        dynamic_img_size=True,
        **TINY,
    ).double()
    model.load_state_dict(timm_state_dict(backbone))
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_features_equal_timms_at_native_and_other_sizes(name: str) -> None:
    backbone = tiny(name, positions="timm")
    model = timm_twin(name, backbone)
    native, other = FAMILIES[name]
    for size in ((min(native, 64),) * 2 if native == 256 else (native, native), other):
        images = torch.randn(2, 3, *size, dtype=torch.float64)
        features, expected = backbone(images), model.forward_features(images)
        grid = (size[0] // backbone.patch_size, size[1] // backbone.patch_size)
        patches = expected[:, model.num_prefix_tokens :]
        cls = expected[:, 0] if model.cls_token is not None else patches.mean(dim=1)
        assert features.patches.shape == (2, 32, *grid)
        torch.testing.assert_close(
            features.patches.flatten(2).transpose(1, 2), patches, atol=1e-10, rtol=0
        )
        torch.testing.assert_close(features.cls, cls, atol=1e-10, rtol=0)


def bicubic(new: int, old: int) -> Tensor:
    """The matrix (new, old) of cubic convolution (Keys 1981, a = -0.75) by (new + 0.1) / old."""
    matrix = torch.zeros(new, old, dtype=torch.float64)
    for row in range(new):
        place = (row + 0.5) * old / (new + 0.1) - 0.5
        for at in range(math.floor(place) - 1, math.floor(place) + 3):
            x = abs(place - at)
            if x <= 1:
                weight = 1.25 * x**3 - 2.25 * x**2 + 1
            else:
                weight = -0.75 * (x**3 - 5 * x**2 + 8 * x - 4)
            matrix[row, min(max(at, 0), old - 1)] += weight
    return matrix


@pytest.mark.parametrize("size", [(42, 70), (56, 56), (14, 98)])
def test_positions_of_dinov2_without_registers_are_interpolated_as_released(
    size: tuple[int, int],
) -> None:
    """Bicubic by a scale of (new + 0.1) / old, without antialiasing, the cls token left alone."""
    backbone = tiny("vit_small_patch14_dinov2")
    trunk = backbone.trunk
    grid = (size[0] // 14, size[1] // 14)
    positions = trunk.pos_embed[0, 1:].unflatten(0, (4, 4))
    if grid != (4, 4):
        positions = torch.einsum(
            "ia,jb,abd->ijd", bicubic(grid[0], 4), bicubic(grid[1], 4), positions
        )
    images = torch.randn(1, 3, *size, dtype=torch.float64)
    patches = trunk.patch_embed(images).flatten(1, 2)
    expected = torch.cat(
        [trunk.cls_token + trunk.pos_embed[:, :1], patches + positions.flatten(0, 1)], dim=1
    )
    torch.testing.assert_close(
        trunk._add_positions(patches, grid), expected, atol=1e-12, rtol=1e-12
    )
    assert tiny("vit_small_patch14_reg4_dinov2").trunk.interpolation == "timm"


def test_pretrained_positions_of_dinov2_are_not_left_to_timm() -> None:
    with pytest.raises(MetaVPTError, match="leave img_size out"):
        create_backbone("vit_small_patch14_dinov2", 1, pretrained=True, img_size=224)


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "vit_small_patch14_reg4_dinov2"])
def test_trunk_and_tail_are_pure_functions_of_their_parameters(name: str) -> None:
    backbone = tiny(name).train()
    images = torch.randn(2, 3, *FAMILIES[name][1], dtype=torch.float64)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    random_state = torch.get_rng_state()
    theta = params.named(backbone)
    hidden = functional_call(backbone.trunk, params.subset(theta, "trunk."), images)
    features = functional_call(backbone.tail, params.subset(theta, "tail."), (hidden,))
    assert isinstance(hidden, Hidden)
    assert torch.equal(features.cls, backbone(images).cls)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(before[key], value) for key, value in backbone.state_dict().items())
    grads = torch.autograd.grad(
        features.cls.square().sum() + features.patches.square().sum(), list(theta.values())
    )
    assert all(grad.abs().sum() > 0 for grad in grads)


def test_the_tail_holds_the_last_blocks_under_timms_indices() -> None:
    backbone = create_backbone("vit_tiny_dinov3", tail_blocks=2)
    assert list(backbone.trunk.blocks) == ["0", "1", "2", "3"]
    assert list(backbone.tail.blocks) == ["4", "5"]
    assert (backbone.patch_size, backbone.width, backbone.num_blocks) == (8, 96, 6)
    assert backbone.mean == pytest.approx((0.485, 0.456, 0.406))


def test_mean_and_std_are_those_of_the_pretrained_model() -> None:
    assert create_backbone("vit_small_patch16_224", 1, **TINY).mean == (0.5, 0.5, 0.5)


def test_tiny_dinov3_is_timms_architecture_at_another_size() -> None:
    ours = create_backbone("vit_tiny_dinov3", 1)
    theirs = timm.create_model(
        "vit_small_patch16_dinov3",
        num_classes=0,
        patch_size=8,
        img_size=64,
        embed_dim=96,
        depth=6,
        num_heads=3,
    )
    theirs.load_state_dict(timm_state_dict(ours))
    images = torch.randn(2, 3, 32, 48)
    torch.testing.assert_close(
        ours(images).cls, theirs.forward_features(images)[:, 0], atol=1e-6, rtol=0
    )


def test_gradients_can_be_differentiated_again() -> None:
    """Through interpolated positions too, with math attention (traps.md, autodiff 1)."""
    backbone = tiny("vit_small_patch14_dinov2")
    images = torch.randn(1, 3, 42, 70, dtype=torch.float64, requires_grad=True)
    theta = params.named(backbone)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        grads = torch.autograd.grad(
            backbone(images).cls.square().sum(), list(theta.values()), create_graph=True
        )
        (second,) = torch.autograd.grad(sum(grad.sum() for grad in grads), images)
    assert second.isfinite().all()
    assert second.abs().sum() > 0


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_local_weights(tmp_path: Path, suffix: str) -> None:
    source = create_backbone("vit_tiny_dinov3", 1)
    state = {
        **{key: value.contiguous() for key, value in timm_state_dict(source).items()},
        "head.weight": torch.zeros(5, 96),
    }
    file = tmp_path / f"tiny{suffix}"
    save_file(state, file) if suffix == ".safetensors" else torch.save(state, file)
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(
        create_backbone("vit_tiny_dinov3", 3, weights=file)(images).cls, source(images).cls
    )
    with pytest.raises(
        MetaVPTError,
        match=rf"tiny{suffix} does not fit vit_tiny_dinov3.*"
        r"cls_token is \(1, 1, 96\), not \(1, 1, 64\).*more",
    ):
        create_backbone("vit_tiny_dinov3", 3, weights=file, embed_dim=64, num_heads=2)


def test_weights_with_other_keys_name_the_first_of_them(tmp_path: Path) -> None:
    file = tmp_path / "other.safetensors"
    save_file({"cls": torch.zeros(1)}, file)
    with pytest.raises(
        MetaVPTError, match=r"other.safetensors does not fit vit_tiny_dinov3: missing cls_token; "
    ):
        create_backbone("vit_tiny_dinov3", 3, weights=file)


class NotATensor:
    pass


def test_unreadable_weights(tmp_path: Path) -> None:
    with pytest.raises(MetaVPTError, match="no such weights file"):
        create_backbone("vit_tiny_dinov3", 1, weights=tmp_path / "absent.pt")
    with pytest.raises(MetaVPTError, match=r"must be a \.safetensors"):
        create_backbone("vit_tiny_dinov3", 1, weights=tmp_path / "weights.npz")
    for name in ("broken.safetensors", "broken.pt"):
        (tmp_path / name).write_bytes(b"not weights at all")
        with pytest.raises(MetaVPTError, match=name):
            create_backbone("vit_tiny_dinov3", 1, weights=tmp_path / name)
    torch.save({"model": NotATensor()}, tmp_path / "pickle.pt")
    with pytest.raises(MetaVPTError, match=r"pickle\.pt: holds more than tensors"):
        create_backbone("vit_tiny_dinov3", 1, weights=tmp_path / "pickle.pt")
    torch.save({"model": {}}, tmp_path / "nested.pt")
    with pytest.raises(MetaVPTError, match=r"nested\.pt: is no state dict"):
        create_backbone("vit_tiny_dinov3", 1, weights=tmp_path / "nested.pt")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"name": "vit_small_patch16_dinov4", "tail_blocks": 1},
            r"unknown backbone .*nearest: vit_small_patch16_dinov3",
        ),
        ({"name": "vit_tiny_dino3", "tail_blocks": 1}, r"unknown backbone .*vit_tiny_dinov3"),
        ({"name": "vit_tiny_dinov3", "tail_blocks": 0}, r"tail_blocks=0 .*1\.\.6"),
        ({"name": "vit_tiny_dinov3", "tail_blocks": 7}, r"tail_blocks=7 .*6 blocks"),
        (
            {"name": "vit_tiny_dinov3", "tail_blocks": 1, "pretrained": True},
            "vit_tiny_dinov3 has no released weights",
        ),
        ({"name": "vit_tiny_dinov3", "tail_blocks": 1, "widht": 3}, "vit_tiny_dinov3: .*widht"),
        (
            {"name": "vit_small_patch16_224", "tail_blocks": 1, "widht": 3},
            "vit_small_patch16_224: .*widht",
        ),
        (
            {
                "name": "vit_tiny_dinov3",
                "tail_blocks": 1,
                "rope_type": "mixed",
                "rope_rotate_half": False,
            },
            "differ by depth",
        ),
        (
            {"name": "vit_tiny_dinov3", "tail_blocks": 1, "rope_jitter_coords": 1.5},
            "rope is random",
        ),
        (
            {"name": "vit_small_patch16_224", "tail_blocks": 1, "drop_path_rate": 0.1, **TINY},
            "drop_path1 is random",
        ),
        (
            {"name": "vit_small_patch16_224", "tail_blocks": 1, "proj_drop_rate": 0.1, **TINY},
            "is random",
        ),
        ({"name": "resnet18", "tail_blocks": 1}, r"resnet18"),
        (
            {"name": "vit_small_patch16_224.no_such_tag", "tail_blocks": 1, "pretrained": True},
            r"no_such_tag.*weights=",
        ),
    ],
)
def test_what_cannot_be_built_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(MetaVPTError, match=message):
        create_backbone(**arguments)


def test_pretrained_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(vit.timm, "create_model", offline)
    with pytest.raises(
        MetaVPTError,
        match=r"vit_small_patch16_dinov3: .*Name or service not known.*"
        r"pass a local file as weights=",
    ):
        create_backbone("vit_small_patch16_dinov3", 1, pretrained=True)


@pytest.mark.parametrize(("size", "nearest"), [((60, 64), "56x64, 64x64"), ((3, 9), "8x8, 8x16")])
def test_a_size_that_the_patch_does_not_divide(size: tuple[int, int], nearest: str) -> None:
    message = f"images of {size[0]}x{size[1]} do not divide into patches of 8x8; nearest: {nearest}"
    with pytest.raises(MetaVPTError, match=re.escape(message)):
        create_backbone("vit_tiny_dinov3", 1)(torch.zeros(1, 3, *size))


def test_head_gives_cosines_of_bottleneck_and_prototypes() -> None:
    head = ProjectionHead(16, num_prototypes=5, hidden=8, bottleneck=4).double()
    x: Tensor = torch.randn(2, 3, 16, dtype=torch.float64)
    z = head.mlp(x)
    expected = torch.stack(
        [torch.cosine_similarity(z, prototype, dim=-1) for prototype in head.prototypes], dim=-1
    )
    torch.testing.assert_close(head(x), expected, atol=1e-12, rtol=0)
    assert not [name for name, _ in head.named_parameters() if name.startswith("prototypes.")]


def test_learner_reads_the_cls_token() -> None:
    learner = Learner(
        create_backbone("vit_tiny_dinov3", 2),
        ProjectionHead(96, num_prototypes=7, hidden=8, bottleneck=4),
    )
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(learner(images), learner.head(learner.backbone(images).cls))
    assert learner(images).shape == (2, 7)


@pytest.mark.parametrize(
    "name", ["vit_small_patch16_dinov3", "vit_small_patch14_reg4_dinov2", "vit_small_patch16_224"]
)
def test_hidden_patches_show_the_mask_token_at_their_place(name: str) -> None:
    """As if the patch embedding had returned it: positions, also rotary ones, are kept."""
    backbone = tiny(name)
    size = 3 * backbone.patch_size
    images = torch.randn(2, 3, size, size, dtype=torch.float64)
    hidden = torch.tensor(
        [[True, False, False, False, True, False, False, False, True], [False] * 9]
    )
    token = torch.randn(32, dtype=torch.float64)
    seen = backbone.trunk(images, hidden=hidden, mask_token=token)
    assert torch.equal(seen.tokens[1], backbone.trunk(images).tokens[1])
    embed = backbone.trunk.patch_embed

    def embedded(x: Tensor) -> Tensor:
        return torch.where(hidden.unflatten(1, (3, 3))[..., None], token, embed(x))

    embedded.grid_size, embedded.patch_size = embed.grid_size, embed.patch_size
    del backbone.trunk.patch_embed
    backbone.trunk.patch_embed = embedded
    torch.testing.assert_close(seen.tokens, backbone.trunk(images).tokens, atol=0, rtol=0)
    backbone.trunk.patch_embed = embed
    other = images.clone()
    other[0, :, : backbone.patch_size, : backbone.patch_size] += 1.0  # a patch that is hidden
    assert torch.equal(seen.tokens, backbone.trunk(other, hidden=hidden, mask_token=token).tokens)
    assert not torch.equal(backbone.trunk(images).tokens, backbone.trunk(other).tokens)
