"""The encoder on some of its patches, for every family: absolute and rotary positions."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metavpt.learners.subset import gather_patches
from metavpt.learners.vit import Backbone, Hidden, create_backbone

# name -> native size, another size that the patch divides
FAMILIES = {
    "vit_small_patch16_dinov3": (256, (32, 48)),
    "vit_small_patch14_reg4_dinov2": (56, (42, 70)),
    "vit_small_patch16_224": (64, (48, 80)),
    "vit_base_patch16_224.mae": (64, (48, 80)),
    "vit_huge_patch14_gap_224": (56, (42, 70)),
    "eva02_tiny_patch14_224": (56, (42, 70)),
}
TINY: dict[str, Any] = {"embed_dim": 32, "depth": 3, "num_heads": 4}


def encoder(name: str) -> tuple[Backbone, Tensor]:
    torch.manual_seed(0)
    native, size = FAMILIES[name]
    backbone = create_backbone(name, 1, img_size=native, **TINY).double()
    for parameter in backbone.parameters():
        nn.init.normal_(parameter, std=0.2)
    return backbone, torch.randn(2, 3, *size, dtype=torch.float64)


def shuffled(num_patches: int) -> Tensor:
    return torch.stack(
        [torch.randperm(num_patches, generator=torch.Generator().manual_seed(b)) for b in range(2)]
    )


def test_gather_patches() -> None:
    patches = torch.randn(2, 5, 3)
    indices = torch.tensor([[[4, 0], [1, 1]], [[2, 3], [0, 4]]])
    gathered = gather_patches(patches, indices)
    for b in range(2):
        for m in range(2):
            for t in range(2):
                assert torch.equal(gathered[b, m, t], patches[b, indices[b, m, t]])


@pytest.mark.parametrize("name", FAMILIES)
def test_all_patches_are_the_full_forward(name: str) -> None:
    """Bit for bit in their own order, and wherever else they stand."""
    backbone, images = encoder(name)
    full = backbone(images)
    tokens = full.patches.flatten(2).transpose(1, 2)
    features = backbone.tail(backbone.trunk(images, torch.arange(tokens.shape[1]).expand(2, -1)))
    assert torch.equal(features.patches[:, :, 0].transpose(1, 2), tokens)
    assert torch.equal(features.cls, full.cls)
    order = shuffled(tokens.shape[1])
    features = backbone.tail(backbone.trunk(images, order))
    torch.testing.assert_close(
        features.patches[:, :, 0].transpose(1, 2),
        gather_patches(tokens, order),
        atol=1e-12,
        rtol=1e-12,
    )
    torch.testing.assert_close(features.cls, full.cls, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", FAMILIES)
def test_some_patches_are_the_blocks_on_those_alone(name: str) -> None:
    """Against each image alone, block by block, with the unbatched table of rotary positions."""
    backbone, images = encoder(name)
    trunk = backbone.trunk
    num_patches = (images.shape[2] // backbone.patch_size) * (
        images.shape[3] // backbone.patch_size
    )
    visible = shuffled(num_patches)[:, :3]
    hidden = trunk(images, visible)
    features = backbone.tail(hidden)
    assert hidden.grid == (1, 3)
    assert features.patches.shape == (2, 32, 1, 3)
    trunk.blocks, blocks = nn.ModuleDict(), trunk.blocks
    embedded = trunk(images)
    trunk.blocks = blocks
    num_prefix = embedded.tokens.shape[1] - num_patches
    for b in range(2):
        kept = torch.cat([torch.arange(num_prefix), num_prefix + visible[b]])
        x = embedded.tokens[b : b + 1, kept]
        rope = None if embedded.rope is None else embedded.rope[visible[b]]
        for block in blocks.values():
            x = block(x) if rope is None else block(x, rope=rope)
        expected = backbone.tail(Hidden(x, rope, (1, 3)))
        torch.testing.assert_close(features.patches[b], expected.patches[0], atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(features.cls[b], expected.cls[0], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "vit_base_patch16_224.mae"])
def test_weights_of_1_change_no_bit_and_others_are_differentiable(name: str) -> None:
    backbone, images = encoder(name)
    visible = shuffled(6)[:, :3]
    plain = backbone.trunk(images, visible).tokens
    assert torch.equal(
        backbone.trunk(images, visible, torch.ones(2, 3, dtype=torch.float64)).tokens, plain
    )
    weight = torch.rand(2, 3, dtype=torch.float64, requires_grad=True)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert torch.autograd.gradcheck(
            lambda w: backbone.trunk(images, visible, w).tokens.sum(dim=(1, 2)), (weight,)
        )
