import math

import numpy as np
import pytest
import torch
from torch import Generator

from metavpt.designers.hiding import blockwise_mask, hidden_patches
from metavpt.designers.views import MultiCrop
from metavpt.errors import MetaVPTError


def recipe(**changes) -> MultiCrop:
    return MultiCrop((0.5,) * 3, (0.25,) * 3, global_size=16, local_size=8, num_local=1, **changes)


def images(size: int = 6) -> torch.Tensor:
    return torch.rand(size, 3, 24, 32, generator=Generator().manual_seed(0))


@pytest.mark.parametrize("grid", [(14, 14), (6, 8), (2, 2), (1, 5)])
def test_a_mask_never_hides_more_than_it_is_told_and_seldom_less(grid: tuple[int, int]) -> None:
    asked = math.prod(grid) // 2
    hidden = [
        int(blockwise_mask(grid, asked, np.random.default_rng(seed)).sum()) for seed in range(50)
    ]
    assert max(hidden) <= asked
    assert sum(hidden) >= 0.95 * asked * len(hidden)
    assert not blockwise_mask(grid, 0, np.random.default_rng(0)).any()


def test_hidden_patches_lie_in_blocks() -> None:
    """Far more neighbours are hidden than for patches drawn one by one, where half would be."""
    rng = np.random.default_rng(0)
    masks = np.stack([blockwise_mask((14, 14), 98, rng) for _ in range(50)])
    beside = masks[:, :, 1:] & masks[:, :, :-1]
    assert beside.sum() / masks[:, :, :-1].sum() > 0.75


def test_shares_and_probability_are_those_asked_for() -> None:
    shares = hidden_patches(1000, (8, 8), (0.25, 0.5), 0.5, seed=1).float().mean(dim=1)
    some = shares[shares > 0]
    assert len(some) / 1000 == pytest.approx(0.5, abs=0.05)  # 3 standard errors
    assert some.mean().item() == pytest.approx(0.375, abs=0.03)
    assert some.max() <= 0.5
    assert not hidden_patches(20, (8, 8), (0.25, 0.5), 0.0, seed=1).any()


def test_what_an_image_hides_hangs_on_the_seed_and_its_place_alone() -> None:
    few, many = (hidden_patches(n, (6, 6), (0.3, 0.5), 1.0, seed=3) for n in (3, 8))
    assert torch.equal(few, many[:3])
    assert len({tuple(mask.tolist()) for mask in many}) == 8
    assert not torch.equal(few, hidden_patches(3, (6, 6), (0.3, 0.5), 1.0, seed=4))


def test_crops_are_the_same_with_hidden_patches_and_without() -> None:
    plain, hiding = (recipe(patch_size=size, hidden_prob=1.0)(images(), 5) for size in (None, 4))
    assert plain.hidden is None
    assert hiding.hidden.shape == (2, 6, 16)
    assert hiding.hidden.dtype == torch.bool
    assert hiding.hidden.any()
    assert not torch.equal(hiding.hidden[0], hiding.hidden[1])
    assert torch.equal(plain.global_crops, hiding.global_crops)
    assert torch.equal(plain.local_crops, hiding.local_crops)


@pytest.mark.parametrize(
    "changes", [{"patch_size": 5}, {"patch_size": 4, "hidden_share": (0.5, 0.2)}]
)
def test_what_makes_no_sense_is_refused(changes: dict) -> None:
    with pytest.raises(MetaVPTError, match="hidden_share"):
        recipe(**changes)
