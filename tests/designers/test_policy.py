import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.differences import assert_gradient_is_that_of_differences
from scipy.stats import ks_2samp
from torch import Generator, Tensor
from torch.func import functional_call

from metavpt.designers.encoder import ImageEncoder
from metavpt.designers.policy import (
    BLENDED,
    NUM_SETTINGS,
    WARPED,
    PolicyDesigner,
    knob_values,
    warp,
)
from metavpt.designers.views import MultiCrop
from metavpt.errors import MetaVPTError
from metavpt.hypergradients import params

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NUM_LOCAL = 2


def images(size: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(
        size, 3, 24, 32, dtype=torch.float64, generator=Generator().manual_seed(0)
    ).to(dtype)


def batch(size: int = 3, seed: int = 7, dtype: torch.dtype = torch.float64) -> Any:
    return SimpleNamespace(images=images(size, dtype), seed=seed)


def designer(
    instance_wise: bool = True, recipe: dict[str, Any] | None = None, **changes: Any
) -> PolicyDesigner:
    torch.manual_seed(0)
    made = MultiCrop(
        MEAN, STD, **({"global_size": 16, "local_size": 8, "num_local": NUM_LOCAL} | (recipe or {}))
    )
    return PolicyDesigner(
        made, ImageEncoder(width=8, depth=2, size=8) if instance_wise else None, **changes
    ).double()


def disturbed(made: PolicyDesigner, scale: float = 0.3) -> PolicyDesigner:
    """Away from the recipe, by settings of about `scale`."""
    generator = Generator().manual_seed(1)
    for parameter in made.parameters():
        with torch.no_grad():
            parameter += scale * torch.randn(
                parameter.shape, dtype=parameter.dtype, generator=generator
            )
    return made


def with_setting(
    made: PolicyDesigner, name: str, shift: float = 0.0, log_scale: float = 0.0
) -> PolicyDesigner:
    """One knob of all views set, in units of the settings themselves."""
    settings = torch.zeros(made.num_views, NUM_SETTINGS, dtype=torch.float64)
    column = WARPED.index(name) if name in WARPED else 2 * len(WARPED) + BLENDED.index(name)
    settings[:, column] = math.atanh(shift / made.reach)
    if name in WARPED:
        settings[:, len(WARPED) + column] = math.atanh(log_scale / made.reach)
    with torch.no_grad():
        made.settings.copy_(settings.flatten())
    return made


def drawn(
    made: PolicyDesigner, size: int = 300, seed: int = 3
) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """The policy of the first image changes the recipe's parameters, for each kind of view."""
    x = images(size)
    knobs = made.recipe.draw(x, seed)
    policy = made(batch(1)).policy.detach().expand(-1, size, -1)
    return [
        (knob_values(was, x), knob_values(now, x))
        for was, now in zip(knobs, made.turn(knobs, policy, x), strict=True)
    ]


@pytest.mark.parametrize("instance_wise", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 7])
def test_a_new_policy_is_the_recipe_bit_for_bit(
    instance_wise: bool, dtype: torch.dtype, size: int
) -> None:
    made = designer(
        instance_wise, {"jitter_prob": 0.5, "grayscale": 0.5, "solarize": (0.0, 0.5, 0.0)}
    ).to(dtype)
    for seed in range(4):
        task, plain = made(batch(size, seed, dtype)), made.recipe(images(size, dtype), seed)
        assert torch.equal(task.global_crops, plain.global_crops)
        assert torch.equal(task.local_crops, plain.local_crops)
        assert (task.policy == 0).all()
        assert made.regularizer(task).item() == 0


def test_uint8_and_no_local_views() -> None:
    made = designer(True, {"num_local": 0}).float()
    pixels = SimpleNamespace(images=(images(2) * 255).to(torch.uint8), seed=0)
    task, plain = made(pixels), made.recipe_task(pixels)
    assert torch.equal(task.global_crops, plain.global_crops)
    assert task.local_crops.shape == (0, 2, 3, 8, 8)


def test_a_new_policy_has_the_recipes_distributions_and_a_moved_one_has_not() -> None:
    """Two-sample Kolmogorov-Smirnov, on other draws than the recipe's."""
    always = {
        "jitter_prob": 1.0,
        "blur": (1.0, 1.0, 1.0),
        "grayscale": 0.5,
        "solarize": (0.5, 0.5, 0.5),
    }
    moved = designer(False, always)
    with torch.no_grad():
        moved.settings.fill_(math.atanh(0.3))
    recipe, new, other = (
        drawn(made, 3000, seed)
        for made, seed in ((moved, 3), (designer(True, always), 4), (moved, 4))
    )
    for kind in range(3):
        for name, values in recipe[kind][0].items():
            assert ks_2samp(values, new[kind][1][name], method="asymp").pvalue > 1e-3, (kind, name)
            assert ks_2samp(values, other[kind][1][name], method="asymp").pvalue < 1e-9, (
                kind,
                name,
            )


@pytest.mark.parametrize("name", WARPED)
@pytest.mark.parametrize("sign", [-1, 1])
def test_a_shift_moves_its_own_knob_alone_and_to_the_side_of_its_sign(name: str, sign: int) -> None:
    for was, now in drawn(with_setting(designer(False), name, shift=0.5 * sign)):
        for other in was:
            difference = now[other] - was[other]
            if other == name:
                assert (sign * difference).mean() > 0
            elif not (
                name in ("scale", "log_aspect") and other in ("scale", "log_aspect")
            ):  # a side is cut at the image's
                assert difference.abs().sum() < 1e-9


@pytest.mark.parametrize("name", BLENDED)
def test_blends_move_from_the_recipes_zero_or_one(name: str) -> None:
    up, down = (drawn(with_setting(designer(False), name, shift=s)) for s in (0.3, -0.3))
    for (was, more), (_, less) in zip(up, down, strict=True):
        torch.testing.assert_close(more[name], (was[name] + 0.3).clamp(max=1), atol=1e-12, rtol=0)
        torch.testing.assert_close(less[name], (was[name] - 0.3).clamp(min=0), atol=1e-12, rtol=0)


def test_gray_is_a_blend_of_the_view_and_its_gray() -> None:
    plain = {
        "jitter_prob": 0.0,
        "blur": (0.0, 0.0, 0.0),
        "solarize": (0.0, 0.0, 0.0),
        "num_local": 0,
    }
    coloured, gray = (
        designer(False, plain | {"grayscale": p})(batch()).global_crops for p in (0.0, 1.0)
    )
    half = with_setting(designer(False, plain | {"grayscale": 0.0}), "grayscale", shift=0.25)(
        batch()
    ).global_crops
    torch.testing.assert_close(half, 0.75 * coloured + 0.25 * gray, atol=1e-12, rtol=0)
    half = with_setting(designer(False, plain | {"grayscale": 1.0}), "grayscale", shift=-0.25)(
        batch()
    ).global_crops
    torch.testing.assert_close(half, 0.25 * coloured + 0.75 * gray, atol=1e-12, rtol=0)


def test_knobs_stay_within_bounds_at_every_extreme() -> None:
    made = designer(reach=2.0)
    x = images(500)
    for shift, log_scale in itertools.product((-2.0, 2.0), repeat=2):
        policy = torch.full((made.num_views, 500, NUM_SETTINGS), shift, dtype=torch.float64)
        policy[..., len(WARPED) : 2 * len(WARPED)] = log_scale
        for knobs in made.turn(made.recipe.draw(x, 0), policy, x):
            uncut = (knobs.sides < 1).all(
                dim=1
            )  # a side cut at the image's has the area and aspect that are left
            for name, values in knob_values(knobs, x).items():
                low, high = made.bounds.get(name, (0.0, 1.0))
                slack = 1e-5 * (high - low)
                inside = values[uncut] if name == "log_aspect" else values
                assert (
                    inside.numel() == 0
                    or low - slack <= inside.min() <= inside.max() <= high + slack
                )
            assert 0 < knobs.sides.min() <= knobs.sides.max() <= 1


def test_warp_is_monotone_with_the_closed_forms_mean_and_spread() -> None:
    """x uniform on its bounds: warped, its normal quantile is N(shift, exp(log_scale)^2)."""
    u = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    x = 2 + 3 * u
    shift, log_scale = (
        torch.tensor(0.4, dtype=torch.float64),
        torch.tensor(-0.3, dtype=torch.float64),
    )
    warped = warp(x, shift, log_scale, (2.0, 5.0))
    assert (warped.diff() > 0).all()
    z = torch.special.ndtri((warped - 2) / 3)
    assert z.mean().item() == pytest.approx(0.4, abs=1e-3)
    assert z.std().item() == pytest.approx(math.exp(-0.3), abs=1e-3)
    assert torch.equal(warp(x, 0 * shift, 0 * log_scale, (2.0, 5.0)), x)
    assert torch.equal(warp(x, shift, log_scale, (2.0, 2.0)), x)


def test_the_regularizer_is_the_divergence_of_what_warping_makes_of_a_uniform_knob() -> None:
    """Against KL(policy || recipe) of one knob by numerical integration over its bounds."""
    made = with_setting(designer(False, kl_weight=1.0), "x", shift=0.6, log_scale=0.35)
    a, b = torch.tensor(0.6, dtype=torch.float64), torch.tensor(0.35, dtype=torch.float64)
    z = torch.linspace(-9, 9, 40001, dtype=torch.float64)  # the base draw's quantile
    moved = (
        b.exp() * z + a
    )  # density of moved in x is phi(z) exp(-b) / phi(moved), against 1 for the recipe
    log_ratio = -(z.square() - moved.square()) / 2 - b
    kl = torch.trapezoid(torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi) * log_ratio, z)
    assert made.regularizer(made(batch())).item() == pytest.approx(kl.item(), rel=1e-6)


@pytest.mark.parametrize("instance_wise", [False, True])
def test_every_setting_has_a_gradient_at_the_recipe(instance_wise: bool) -> None:
    made = designer(instance_wise, {"jitter_prob": 1.0, "blur": (1.0, 1.0, 1.0)})
    task = made(batch(8))
    (grad,) = torch.autograd.grad(
        task.global_crops.sin().sum() + task.local_crops.sin().sum(), made.settings
    )
    assert (grad != 0).all()


@pytest.mark.parametrize("instance_wise", [False, True])
def test_every_parameter_is_reached(instance_wise: bool) -> None:
    made = disturbed(designer(instance_wise))
    phi = params.named(made)
    grads = torch.autograd.grad(
        made(batch()).global_crops.sin().sum(), list(phi.values())
    )  # raises for one that is not
    assert all(grad.abs().sum() > 0 for grad in grads)


@pytest.mark.parametrize("instance_wise", [False, True])
def test_gradient_equals_finite_differences(instance_wise: bool) -> None:
    made = disturbed(designer(instance_wise), 0.2)
    phi = params.clone(params.named(made))
    weight = torch.randn(2, 3, 3, 16, 16, dtype=torch.float64, generator=Generator().manual_seed(2))

    def total(at: params.Params) -> Tensor:
        task = functional_call(made, at, batch())
        return (
            (weight * task.global_crops).sum()
            + task.local_crops.square().sum()
            + made.regularizer(task)
        )

    assert_gradient_is_that_of_differences(total, phi, step=1e-7, rtol=1e-5, num_directions=3)


def test_settings_are_read_off_each_image_alone() -> None:
    made = disturbed(designer())
    whole = made(batch(3)).policy
    changed = batch(3)
    changed.images[2] = 1 - changed.images[2]
    torch.testing.assert_close(made(changed).policy[:, :2], whole[:, :2], atol=1e-12, rtol=0)
    assert not torch.allclose(made(changed).policy[:, 2], whole[:, 2])
    everywhere = disturbed(designer(False))(batch(3)).policy
    assert torch.equal(everywhere[:, 0], everywhere[:, 2])


def test_the_seed_alone_decides_and_the_global_state_is_left_alone() -> None:
    made = disturbed(designer())
    state = torch.get_rng_state()
    first, second, other = made(batch(seed=1)), made(batch(seed=1)), made(batch(seed=2))
    assert torch.equal(first.global_crops, second.global_crops)
    assert torch.equal(first.local_crops, second.local_crops)
    assert not torch.equal(first.global_crops, other.global_crops)
    assert torch.equal(torch.get_rng_state(), state)


def test_random_tasks_are_policies_within_reach() -> None:
    made = designer(reach=0.7)
    first, second = made.random_tasks(batch(40), 2)
    assert first.policy.shape == (2 + NUM_LOCAL, 40, NUM_SETTINGS)
    assert first.policy.abs().max() <= 0.7
    assert abs(first.policy.mean()) < 0.05
    assert first.policy.std().item() == pytest.approx(0.7 / math.sqrt(3), rel=0.05)
    assert not torch.equal(first.policy, second.policy)
    assert not torch.equal(first.global_crops, second.global_crops)
    assert torch.equal(first.global_crops, made.random_tasks(batch(40), 1)[0].global_crops)
    assert not made.recipe_task(batch()).global_crops.requires_grad


def test_the_figure_shows_every_knob() -> None:
    made = disturbed(designer())
    with torch.no_grad():
        picture = made.figures(batch(), made(batch()))["policy"]
    assert picture.dtype == "uint8"
    assert picture.shape[2] == 3
    assert picture.std() > 0


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(MetaVPTError, match="bounds of scale"):
        designer(scale=(0.2, 1.0))
    with pytest.raises(MetaVPTError, match="bounds of hue"):
        designer(jitter=(0.8, 0.8, 0.4, 0.05))
    made = designer()
    with pytest.raises(MetaVPTError, match="first"):
        made.refine(made.recipe_task(batch()), batch())
    for method in (made.regularizer, lambda task: made.figures(batch(), task)):
        with pytest.raises(MetaVPTError, match="no policy"):
            method(made.recipe_task(batch()))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_new_policy_is_the_recipe_bit_for_bit_on_a_gpu() -> None:
    made = designer().float().cuda()
    given = batch(7, dtype=torch.float32)
    given.images = given.images.cuda()
    task, plain = made(given), made.recipe_task(given)
    assert torch.equal(task.global_crops, plain.global_crops)
    assert torch.equal(task.local_crops, plain.local_crops)
