from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from metavpt.designers.crop import RandomCrop
from metavpt.designers.masks import PatchTransformer, UNet
from metavpt.designers.patches import PatchMasks, PatchScores
from metavpt.errors import MetaVPTError
from metavpt.hypergradients import params

ESTIMATORS = ["straight_through", "relaxed", "score"]


class Batch(NamedTuple):
    images: Tensor
    seed: int


def batch(size: int = 3) -> Batch:
    return Batch(torch.rand(size, 3, 40, 50, generator=torch.Generator().manual_seed(0)), seed=7)


def designer(network: nn.Module | None = None, moved: bool = False, **options: Any) -> PatchMasks:
    torch.manual_seed(0)
    network = network or PatchScores(patch_size=4, width=8)
    if moved:
        nn.init.normal_(network.out.weight, std=0.5)
    return PatchMasks(RandomCrop((0.5,) * 3, (0.25,) * 3, size=24), 4, network, **options)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(
    "network",
    [PatchScores(4, 8), UNet(4, 1), PatchTransformer(4, 8, 1, 2)],
    ids=lambda n: type(n).__name__,
)
def test_a_new_designer_is_the_recipe_bit_for_bit(network, estimator) -> None:
    masks = designer(network, estimator=estimator)
    task, recipe = masks(batch()), masks.recipe_task(batch())
    for name in ("images", "visible", "targets", "visible_weight", "target_weight", "logits"):
        assert torch.equal(getattr(task, name), getattr(recipe, name)), name
    assert task.visible_weight.eq(1).all()
    assert task.target_weight.eq(1).all()


def test_every_patch_is_visible_or_a_target_in_maes_ratio() -> None:
    task = designer(moved=True)(batch())
    assert task.visible.shape == (3, 9)
    assert task.targets.shape == (3, 1, 27)
    everything = torch.cat([task.visible, task.targets[:, 0]], dim=1).sort(dim=1).values
    assert torch.equal(everything, torch.arange(36).expand(3, -1))
    assert designer(hidden=0.5).num_visible == 18


def test_the_recipe_hides_every_patch_alike() -> None:
    """Over 4,000 images: each of 36 patches is visible in a quarter of them."""
    masks = designer()
    task = masks.task(torch.zeros(4000, 3, 1, 1), torch.zeros(4000, 36), seed=3, draw=0)
    share = torch.zeros(36).scatter_add_(0, task.visible.flatten(), torch.ones(4000 * 9)) / 4000
    assert (share - 0.25).abs().max() < 4.5 * (0.25 * 0.75 / 4000) ** 0.5


def test_higher_logits_are_seen_more_often() -> None:
    logits = torch.zeros(4000, 36)
    logits[:, 5], logits[:, 6] = 2.0, -2.0
    visible = designer().task(torch.zeros(4000, 3, 1, 1), logits, seed=3, draw=0).visible
    shares = [(visible == n).any(dim=1).float().mean().item() for n in (5, 6, 7)]
    assert shares[0] > 0.75 > 0.3 > shares[2] > 0.15 > 0.06 > shares[1]


def test_random_tasks_show_the_same_images_and_begin_with_the_recipe() -> None:
    masks = designer(moved=True)
    first, second = masks.random_tasks(batch(), 2)
    assert torch.equal(first.visible, masks.recipe_task(batch()).visible)
    assert torch.equal(first.images, second.images)
    assert not torch.equal(first.visible, second.visible)
    assert not torch.equal(first.visible, masks(batch()).visible)


def test_designer_is_a_function_of_the_batch() -> None:
    masks, state = designer(moved=True), torch.get_rng_state()
    assert all(torch.equal(a, b) for a, b in zip(masks(batch()), masks(batch()), strict=True))
    assert not torch.equal(masks(batch()).visible, masks(batch()._replace(seed=8)).visible)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradient_reaches_every_parameter(estimator) -> None:
    masks = designer(moved=True, estimator=estimator)
    task = masks(batch())
    w = torch.randn(3, 1, 27, generator=torch.Generator().manual_seed(1))
    value = (
        (task.target_weight * w).sum()
        + (task.visible_weight * w[:, 0, :9]).sum()
        + (task.log_prob * w[:, 0, 0]).sum()
    )
    gradients = torch.autograd.grad(value, list(params.named(masks).values()))
    assert all(g.norm() > 0 for g in gradients)


def test_regularizer_is_the_divergence_from_uniform() -> None:
    masks = designer(moved=True, kl_weight=0.3)
    task = masks(batch())
    p = task.logits.softmax(1)
    expected = 0.3 * (p * (p * 36).log()).sum(1).mean()
    torch.testing.assert_close(masks.regularizer(task), expected, atol=1e-6, rtol=1e-5)
    assert masks.regularizer(masks.recipe_task(batch())).item() == pytest.approx(0.0, abs=1e-7)
    assert masks.regularizer(task).requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden": 1.0}, "hidden=1.0"),
        ({"hidden": 0.0}, "hidden=0.0"),
        ({"estimator": "reinforce"}, "known are relaxed"),
    ],
)
def test_options_out_of_range_are_refused(options, message) -> None:
    with pytest.raises(MetaVPTError, match=message):
        designer(**options)


def test_a_crop_that_patches_do_not_divide_is_refused() -> None:
    with pytest.raises(MetaVPTError, match=r"recipe\.size=24 does not divide into patches of 7"):
        PatchMasks(RandomCrop((0.5,) * 3, (0.25,) * 3, size=24), 7, PatchScores(7, 8))
