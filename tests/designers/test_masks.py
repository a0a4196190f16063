from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.differences import assert_gradient_is_that_of_differences
from torch import Generator, Tensor, nn
from torch.func import functional_call

from metavpt.designers.masks import (
    MaskDesigner,
    PatchTransformer,
    UNet,
    gaussian_blur,
    random_masks,
    total_variation,
)
from metavpt.designers.views import MultiCrop, Views
from metavpt.errors import MetaVPTError
from metavpt.hypergradients import params

NETWORKS = {
    "unet": lambda: UNet(base=4, depth=2),
    "transformer": lambda: PatchTransformer(patch_size=4, width=8, depth=1, num_heads=2),
}


def batch(size: int = 2) -> Any:
    return SimpleNamespace(
        images=torch.rand(
            size, 3, 24, 32, dtype=torch.float64, generator=Generator().manual_seed(0)
        ),
        seed=7,
    )


def designer(network: str = "unet", randomised: bool = False, **changes: Any) -> MaskDesigner:
    torch.manual_seed(0)
    recipe = MultiCrop(
        (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), global_size=16, local_size=8, num_local=2
    )
    made = MaskDesigner(recipe, NETWORKS[network](), **({"blur_sigma": 2.0} | changes)).double()
    if randomised:  # away from the clamp's kinks: mu within 0.5 +- 0.4
        nn.init.normal_(made.network.out.weight, std=0.02)
        made.initial_keep = 0.5
    return made


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("on", ["global", "all"])
def test_a_new_designer_is_the_recipe_bit_for_bit(network: str, on: str) -> None:
    made = designer(network, crops=on)
    task, plain = made(batch()), made.recipe_task(batch())
    assert torch.equal(task.global_crops, plain.global_crops)
    assert torch.equal(task.local_crops, plain.local_crops)
    assert (task.masks == 1).all()
    assert (task.excess == 0).all()
    assert plain.masks is None
    grads = torch.autograd.grad(
        task.global_crops.square().sum(), list(made.network.out.parameters())
    )
    assert all(
        grad.abs().sum() > 0 for grad in grads
    )  # the clamp lets the designer leave the recipe


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("randomised", [False, True])
def test_every_parameter_is_reached(network: str, randomised: bool) -> None:
    made = designer(network, randomised)
    phi = params.named(made)
    grads = torch.autograd.grad(
        made(batch()).global_crops.sin().sum(), list(phi.values())
    )  # raises for one that is not
    if randomised:
        silent = [name for name, grad in zip(phi, grads, strict=True) if not grad.abs().sum()]
        assert all(name.endswith("attn.qkv.bias") for name in silent)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("on", ["global", "all"])
def test_gradient_equals_finite_differences(network: str, on: str) -> None:
    made = designer(network, randomised=True, crops=on)
    phi = params.clone(params.named(made))
    inner = made(batch()).masks
    assert 0.01 < inner.min() < inner.max() < 0.99

    def total(at: params.Params) -> Tensor:
        task = functional_call(made, at, batch())
        return task.global_crops.sum() + task.local_crops.sum() + made.regularizer(task)

    assert_gradient_is_that_of_differences(total, phi, atol=1e-6, num_directions=3)


def test_masked_views_follow_the_formula() -> None:
    made = designer(randomised=True, crops="all")
    task, plain = made(batch()), made.recipe_task(batch())
    assert task.excess.shape == (4, 2)
    for masked, view, mu in (
        (task.global_crops, plain.global_crops, task.masks),
        (task.local_crops, plain.local_crops, task.local_masks),
    ):
        blurred = gaussian_blur(view.flatten(0, 1), 2.0).unflatten(0, view.shape[:2])
        torch.testing.assert_close(masked, mu * view + (1 - mu) * blurred, atol=1e-14, rtol=0)
    global_only = designer(randomised=True)(batch())
    assert torch.equal(global_only.local_crops, plain.local_crops)
    assert global_only.local_masks is None


def naive_regularizer(made: MaskDesigner, masks: list[Tensor], excess: Tensor) -> float:
    kept, variation = [], []
    for mask in masks:
        for mu in mask.flatten(0, 1)[:, 0].tolist():
            height, width = len(mu), len(mu[0])
            kept.append(sum(sum(row) for row in mu) / (height * width))
            rows = sum(
                abs(mu[i + 1][j] - mu[i][j]) for i in range(height - 1) for j in range(width)
            ) / ((height - 1) * width)
            columns = sum(
                abs(mu[i][j + 1] - mu[i][j]) for i in range(height) for j in range(width - 1)
            ) / (height * (width - 1))
            variation.append(rows + columns)
    mean = sum(kept) / len(kept)
    extra = sum(sum(row) for row in excess.tolist()) / excess.numel()
    return (
        made.sparsity_weight * (mean - made.keep) ** 2
        + made.tv_weight * sum(variation) / len(variation)
        + made.excess_weight * extra
    )


@pytest.mark.parametrize("on", ["global", "all"])
def test_regularizer_equals_loops(on: str) -> None:
    made = designer(crops=on, keep=0.4, sparsity_weight=0.3, tv_weight=0.7, excess_weight=0.2)
    nn.init.normal_(made.network.out.weight, std=2.0)
    task = made(batch())
    masks = [mask for mask in (task.masks, task.local_masks) if mask is not None]
    assert made.regularizer(task).item() == pytest.approx(
        naive_regularizer(made, masks, task.excess), abs=1e-12
    )
    views = made.recipe_task(batch())
    crops = [views.global_crops, views.local_crops][: len(masks)]
    logits = [1 + made.network(crop.flatten(0, 1)) for crop in crops]
    expected = torch.cat(
        [((z - 1).clamp(min=0) + (-z).clamp(min=0)).mean((1, 2, 3)) for z in logits]
    )
    torch.testing.assert_close(task.excess.flatten(), expected, atol=1e-14, rtol=0)
    assert task.excess.min() > 0


def test_the_excess_term_pulls_stuck_pixels_back() -> None:
    made = designer(initial_keep=0.5, keep=0.5, tv_weight=0.0)
    nn.init.constant_(made.network.out.bias, 2.0)  # every pixel is clamped
    task = made(batch())
    (value_grad,) = torch.autograd.grad(
        task.global_crops.sum(), made.network.out.bias, retain_graph=True
    )
    (pull,) = torch.autograd.grad(made.regularizer(task), made.network.out.bias)
    assert value_grad.item() == 0
    assert pull.item() == pytest.approx(made.excess_weight, abs=1e-12)


def test_total_variation_of_a_step() -> None:
    mu = torch.zeros(2, 1, 4, 6, dtype=torch.float64)
    mu[..., 3:] = 1.0  # each of 4 rows has one step in 5 differences
    assert total_variation(mu).tolist() == pytest.approx([0.2, 0.2], abs=1e-14)
    assert total_variation(torch.ones(2, 1, 1, 1)).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("size", [(1, 1), (3, 7), (16, 16), (17, 30)])
def test_networks_take_any_size(network: str, size: tuple[int, int]) -> None:
    made = NETWORKS[network]()
    nn.init.normal_(made.out.weight)
    logits = made(torch.randn(2, 3, *size))
    assert logits.shape == (2, 1, *size)
    assert logits.isfinite().all()
    assert not list(made.buffers())


def test_networks_see_each_image_alone() -> None:
    for make in NETWORKS.values():
        made = make().double()
        nn.init.normal_(made.out.weight)
        views = torch.randn(3, 3, 9, 9, dtype=torch.float64)
        torch.testing.assert_close(made(views)[1:2], made(views[1:2]), atol=1e-12, rtol=0)


@pytest.mark.parametrize("size", [(1, 1), (4, 20), (40, 40)])
def test_blur_keeps_constants_and_takes_any_size(size: tuple[int, int]) -> None:
    constant = torch.full((1, 3, *size), 0.3, dtype=torch.float64)
    torch.testing.assert_close(gaussian_blur(constant, 8.0), constant, atol=1e-12, rtol=0)


def test_blur_of_an_impulse_is_a_gaussian() -> None:
    image = torch.zeros(1, 1, 21, 21, dtype=torch.float64)
    image[..., 10, 10] = 1.0
    weights = torch.exp(-(torch.arange(-6, 7, dtype=torch.float64) ** 2) / (2 * 2.0**2))
    weights /= weights.sum()
    torch.testing.assert_close(
        gaussian_blur(image, 2.0)[0, 0, 4:17, 4:17], weights[:, None] * weights, atol=1e-14, rtol=0
    )


def test_seed_decides_and_global_state_is_left_alone() -> None:
    made = designer(randomised=True)
    state = torch.get_rng_state()
    first, second = made(batch()), made(batch())
    assert torch.equal(first.global_crops, second.global_crops)
    assert torch.equal(torch.get_rng_state(), state)


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(MetaVPTError, match="keep"):
        designer(keep=1.5)
    with pytest.raises(MetaVPTError, match="crops must be"):
        designer(crops="local")
    with pytest.raises(MetaVPTError, match="blur_sigma"):
        designer(blur_sigma=0.0)
    with pytest.raises(MetaVPTError, match="multiple of 4"):
        PatchTransformer(width=6)
    made = designer()
    plain: Views = made.recipe_task(batch())
    with pytest.raises(MetaVPTError, match="no masks"):
        made.regularizer(plain)


def test_random_masks_keep_exactly_the_share_that_is_asked_for():
    crops = torch.zeros(2, 3, 3, 20, 30)
    masks = random_masks(crops, 0.4, torch.Generator().manual_seed(0))
    assert masks.shape == (2, 3, 1, 20, 30)
    assert set(masks.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(masks.mean(dim=(2, 3, 4)), torch.full((2, 3), 0.4))
    assert not torch.equal(masks[0, 0], masks[0, 1])


@pytest.mark.parametrize("on", ["global", "all"])
def test_random_tasks_are_the_views_of_the_recipe_under_other_masks(on: str) -> None:
    made = designer(keep=0.5, crops=on)
    views, (first, second) = made.recipe_task(batch()), made.random_tasks(batch(), 2)
    kept = first.masks.bool().expand_as(views.global_crops)
    assert torch.equal(first.global_crops[kept], views.global_crops[kept])
    assert not torch.equal(first.masks, second.masks)
    assert torch.equal(first.masks, made.random_tasks(batch(), 1)[0].masks)
    assert (first.local_masks is None) == (on == "global")
