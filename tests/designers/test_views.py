import math
from typing import Any

import pytest
import torch
from kornia.enhance import adjust_hue
from torch import Generator, Tensor

from metavpt.designers.crop import random_crop
from metavpt.designers.views import MultiCrop
from metavpt.errors import MetaVPTError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PLAIN: dict[str, Any] = {
    "flip": 0.0,
    "jitter_prob": 0.0,
    "grayscale": 0.0,
    "blur": (0.0, 0.0, 0.0),
    "solarize": (0.0, 0.0, 0.0),
}


def recipe(**changes: Any) -> MultiCrop:
    return MultiCrop(MEAN, STD, **({"global_size": 32, "local_size": 16, "num_local": 3} | changes))


def images(batch: int = 4, height: int = 30, width: int = 40) -> Tensor:
    return torch.rand(
        batch, 3, height, width, dtype=torch.float64, generator=Generator().manual_seed(0)
    )


def unnormalise(views: Tensor) -> Tensor:
    return views * views.new_tensor(STD).view(3, 1, 1) + views.new_tensor(MEAN).view(3, 1, 1)


def test_shapes_and_types() -> None:
    pixels = (images() * 255).to(torch.uint8)
    views = recipe()(pixels, seed=0)
    assert views.global_crops.shape == (2, 4, 3, 32, 32)
    assert views.local_crops.shape == (3, 4, 3, 16, 16)
    assert views.masks is views.local_masks is views.excess is None
    assert torch.equal(views.global_crops, recipe()(pixels / 255, seed=0).global_crops)
    assert recipe(num_local=0)(pixels, seed=0).local_crops.shape == (0, 4, 3, 16, 16)


def test_the_seed_alone_decides_and_the_global_state_is_left_alone() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = recipe()(images(), seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    second, other = recipe()(images(), seed=3), recipe()(images(), seed=4)
    assert torch.equal(first.global_crops, second.global_crops)
    assert torch.equal(first.local_crops, second.local_crops)
    assert not torch.equal(first.global_crops, other.global_crops)
    assert not torch.equal(first.global_crops[0], first.global_crops[1])


def test_differentiable_in_float_images() -> None:
    generator = Generator().manual_seed(5)
    x = images(2, 12, 14).mul(0.6).add(0.2).requires_grad_()
    direction = torch.randn(x.shape, dtype=torch.float64, generator=generator)
    transform = recipe(global_size=12, local_size=6, jitter=(0.1, 0.1, 0.1, 0.1))

    def total(at: Tensor) -> Tensor:
        views = transform(at, seed=1)
        return views.global_crops.sin().sum() + views.local_crops.sin().sum()

    (grad,) = torch.autograd.grad(total(x), x)
    slope = (total(x + 1e-6 * direction) - total(x - 1e-6 * direction)) / 2e-6
    torch.testing.assert_close((grad * direction).sum(), slope, atol=0, rtol=1e-6)


def test_without_augmentation_a_constant_stays() -> None:
    views = recipe(**PLAIN)(torch.full((2, 3, 20, 20), 0.25), seed=0)
    torch.testing.assert_close(
        unnormalise(views.global_crops),
        torch.full_like(views.global_crops, 0.25),
        atol=1e-6,
        rtol=0,
    )


def ramp(height: int, width: int, batch: int) -> Tensor:
    """Channels hold x, y and 1 in pixels, so that a crop tells where it was taken."""
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    return torch.stack([x, y, torch.ones_like(x)]).double().expand(batch, -1, -1, -1)


@pytest.mark.parametrize(("height", "width"), [(300, 400), (200, 600)])
def test_crops_have_the_area_and_shape_asked_for(height: int, width: int) -> None:
    crop = random_crop(ramp(height, width, 4000), 8, (0.2, 0.5), 0.5, Generator().manual_seed(0))
    assert (crop[:, 2] - 1).abs().max() < 1e-12  # nothing from outside the image
    # An inner difference is side / 8, free of the clamped border; its sign tells the flip.
    step_x, step_y = crop[:, 0, 4, 4] - crop[:, 0, 4, 3], crop[:, 1, 4, 4] - crop[:, 1, 3, 4]
    sides = 8 * torch.stack([step_x.abs(), step_y])
    area, ratio = sides.prod(0) / (height * width), sides[0] / sides[1]
    assert area.max() < 0.5 + 1e-6
    assert 3 / 4 - 1e-6 < ratio.min() < ratio.max() < 4 / 3 + 1e-6
    assert abs((step_x < 0).double().mean() - 0.5) < 0.03
    if (height, width) == (300, 400):  # every draw fits: the area is uniform
        assert area.min() > 0.2 - 1e-6
        assert abs(area.mean() - 0.35) < 0.01
        assert abs(ratio.log().mean()) < 0.02
    center = crop[:, :2].mean(dim=(2, 3))
    assert abs(center[:, 0].mean() / width - 0.5) < 0.01


def test_an_image_too_long_for_any_draw_is_cut_to_fit() -> None:
    crop = random_crop(ramp(10, 1000, 8), 4, (1.0, 1.0), 0.0, Generator().manual_seed(0))
    assert crop.isfinite().all()
    assert (crop[:, 2] - 1).abs().max() < 1e-12


def test_each_transform_has_its_probability() -> None:
    x = images(600, 8, 8).float()
    plain = recipe(global_size=8, num_local=0, **PLAIN)(x, seed=0).global_crops
    # Solarisation and blur are drawn last, so the draws before them are the same as without.
    solarized = recipe(global_size=8, num_local=0, **(PLAIN | {"solarize": (0.0, 0.2, 0.0)}))(
        x, seed=0
    ).global_crops
    assert torch.equal(solarized[0], plain[0])
    changed = (solarized[1] != plain[1]).flatten(1).any(1)
    assert abs(changed.float().mean() - 0.2) < 0.05
    before, after = unnormalise(plain[1][changed]), unnormalise(solarized[1][changed])
    torch.testing.assert_close(
        after, torch.where(before >= 0.5, 1 - before, before), atol=1e-5, rtol=0
    )
    gray = unnormalise(
        recipe(global_size=8, num_local=0, **(PLAIN | {"grayscale": 0.2}))(x, seed=0).global_crops
    )
    is_gray = (gray[:, :, 0] - gray[:, :, 2]).abs().amax((-2, -1)) < 1e-5
    assert abs(is_gray.float().mean() - 0.2) < 0.05


def test_jitter_of_hue_turns_by_a_share_of_the_circle() -> None:
    x = images(3, 6, 6)
    transform = recipe(jitter=(0.0, 0.0, 0.0, 0.1))
    order, factors = transform._draw_jitter(len(x), Generator().manual_seed(0))
    turned = transform._jitter(x, order, factors.to(x))
    angles = torch.linspace(-0.1, 0.1, 2001, dtype=torch.float64) * 2 * math.pi
    for before, after in zip(x, turned, strict=True):
        distance = (
            (adjust_hue(before.expand(2001, -1, -1, -1), angles) - after).abs().amax((1, 2, 3))
        )
        assert distance.min() < 2e-3
    assert torch.equal(recipe(jitter=(0.0, 0.0, 0.0, 0.0))._jitter(x, order, factors.to(x)), x)


def test_blur_on_crops_smaller_than_its_kernel() -> None:
    assert (
        recipe(global_size=3, local_size=1, blur=(1.0, 1.0, 1.0))(images(), seed=0)
        .global_crops.isfinite()
        .all()
    )


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(3, 8, 8), r"\(B, 3, H, W\)"),
        (torch.zeros(1, 1, 8, 8), r"\(B, 3, H, W\)"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.int64), "uint8"),
    ],
)
def test_images_of_another_kind_are_refused(bad: Tensor, message: str) -> None:
    with pytest.raises(MetaVPTError, match=message):
        recipe()(bad, seed=0)


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(MetaVPTError, match="local_scale"):
        recipe(local_scale=(0.5, 0.1))
    with pytest.raises(MetaVPTError, match="num_local"):
        recipe(num_local=-1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_seed_gives_the_same_views_on_every_device() -> None:
    state = torch.cuda.get_rng_state()
    cpu, gpu = recipe()(images(), seed=0), recipe()(images().cuda(), seed=0)
    torch.testing.assert_close(gpu.global_crops.cpu(), cpu.global_crops, atol=1e-8, rtol=0)
    torch.testing.assert_close(gpu.local_crops.cpu(), cpu.local_crops, atol=1e-8, rtol=0)
    assert torch.equal(torch.cuda.get_rng_state(), state)
