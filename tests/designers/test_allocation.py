"""Weights of a policy: the best within a chi-squared ball around the recipe's."""

import pytest
import torch

from metavpt import MetaVPTError
from metavpt.designers.crop import RandomCrop, WholeFrames
from metavpt.designers.feature_network import ResidualNetwork
from metavpt.designers.feature_targets import FeatureTargets, allocation
from metavpt.designers.hiding import scattered_patches


def scores() -> torch.Tensor:
    return torch.randn(5, 7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_allocation_has_a_mean_of_one_and_ignores_the_scale_of_scores() -> None:
    weights = allocation(scores(), 2.0)
    assert float(weights.mean()) == pytest.approx(1.0, rel=1e-12)
    assert float(weights.min()) == 0.0
    torch.testing.assert_close(allocation(100 * scores(), 2.0), weights, rtol=1e-5, atol=1e-5)


def test_allocation_of_no_scores_or_no_strength_is_the_recipe_bit_for_bit() -> None:
    assert torch.equal(allocation(torch.zeros(4, 3), 3.0), torch.ones(4, 3))
    assert torch.equal(allocation(scores().float(), 0.0), torch.ones(5, 7, 3))


def test_no_other_weights_as_near_to_the_recipes_score_higher() -> None:
    """Against projected gradient ascent on <w, s> with mean 1, w >= 0 and the same |w - 1|."""
    s = scores().flatten()
    best = allocation(s, 1.5)
    radius = (best - 1).norm()
    g = torch.Generator().manual_seed(1)
    for _ in range(300):
        other = (best + 0.3 * torch.randn(len(s), dtype=torch.float64, generator=g)).clamp_min(0)
        other = other / other.mean()
        if (other - 1).norm() > radius:  # moves towards the recipe keep mean and sign
            other = 1 + (other - 1) * radius / (other - 1).norm()
        assert float((other * s).mean()) <= float((best * s).mean()) + 1e-9


def test_whole_frames_are_resized_flipped_by_the_seed_and_normalised() -> None:
    images = torch.randint(0, 256, (64, 3, 8, 12), dtype=torch.uint8)
    plain = WholeFrames((0.5,) * 3, (0.25,) * 3, size=(8, 12))(images, seed=3)
    torch.testing.assert_close(plain, (images / 255 - 0.5) / 0.25)
    flipping = WholeFrames((0.5,) * 3, (0.25,) * 3, size=(8, 12), flip=0.5)
    made = flipping(images, seed=3)
    flipped = [torch.equal(own, whole.flip(-1)) for own, whole in zip(made, plain, strict=True)]
    kept = [torch.equal(own, whole) for own, whole in zip(made, plain, strict=True)]
    assert all(a != b for a, b in zip(flipped, kept, strict=True))
    assert 16 < sum(flipped) < 48
    assert torch.equal(made, flipping(images, seed=3))
    assert WholeFrames((0.5,) * 3, (0.25,) * 3, size=(4, 6))(images, 0).shape == (64, 3, 4, 6)
    assert flipping.grid(4) == (2, 3)
    with pytest.raises(MetaVPTError, match=r"recipe\.size=\[8, 12\]"):
        flipping.grid(5)


def test_scattered_patches_keep_to_their_share_and_to_the_seed() -> None:
    hidden = scattered_patches(50, 20, (0.25, 0.5), seed=1)
    counts = hidden.sum(dim=1)
    assert 5 <= int(counts.min()) < int(counts.max()) <= 10
    assert torch.equal(hidden, scattered_patches(50, 20, (0.25, 0.5), seed=1))
    assert not torch.equal(hidden, scattered_patches(50, 20, (0.25, 0.5), seed=2))


def test_residual_network_reads_neighbours_the_image_and_positions() -> None:
    torch.manual_seed(0)
    recipe = RandomCrop((0.5,) * 3, (0.25,) * 3, size=16)
    made = ResidualNetwork(recipe, 4, 6, num_outputs=2, hidden_width=8)
    states, features = torch.randn(2, 15, 6), torch.randn(2, 15, 6)
    assert not made.network(states, features, (3, 5)).any()
    for p in (made.network.write.weight, made.network.position):
        torch.nn.init.normal_(p)
    out = made.network(states, features, (3, 5))
    assert out.shape == (2, 15, 2)
    changed = features.clone()
    changed[0, 0] += 1.0
    moved = (made.network(states, changed, (3, 5)) - out).abs().sum(dim=2)
    assert (moved[0] > 0).all()  # through the mean of the image
    assert moved[0, 1] > moved[0, 14]  # and more in its neighbours
    assert not moved[1].any()


def test_a_wrong_surface_and_strength_are_named() -> None:
    recipe = RandomCrop((0.5,) * 3, (0.25,) * 3, size=16)
    with pytest.raises(MetaVPTError, match=r"designer\.surface=masks"):
        FeatureTargets(recipe, 4, 6, surface="masks")
    with pytest.raises(MetaVPTError, match=r"designer\.strength=-1"):
        FeatureTargets(recipe, 4, 6, strength=-1)
    with pytest.raises(MetaVPTError, match="surface=targets"):
        FeatureTargets(recipe, 4, 6).hardest_task(None)
