import pytest
import torch

from metavpt import MetaVPTError
from metavpt.data.loader import Batch
from metavpt.designers.crop import RandomCrop
from metavpt.designers.feature_targets import FeatureTargets, FeatureTask, moved, tilted

IMAGES = torch.randint(
    0, 256, (3, 3, 24, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)
BATCH = Batch(IMAGES, seed=5)


def designer(**options):
    torch.manual_seed(0)
    return FeatureTargets(
        RandomCrop((0.5,) * 3, (0.2,) * 3, size=16), patch_size=4, width=12, **options
    )


def features():
    return torch.randn(3, 16, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def in_float64(task):
    *tensors, phi = task
    return FeatureTask(
        *(part if part.dtype == torch.bool else part.double() for part in tensors), phi
    )


def test_an_untrained_designer_is_the_recipe_bit_for_bit():
    made = designer()
    for own, recipe in zip(made(BATCH)[:5], made.recipe_task(BATCH)[:5], strict=True):
        assert torch.equal(own, recipe)
    assert torch.equal(moved(features(), in_float64(made(BATCH))), features())


def test_hidden_patches_keep_to_their_share_and_to_the_seed():
    made = designer(hidden=(0.25, 0.5))
    hidden = made.recipe_task(BATCH).hidden
    assert hidden.shape == (3, 16)
    assert all(4 <= count <= 8 for count in hidden.sum(dim=1).tolist())
    assert torch.equal(hidden, made.recipe_task(BATCH).hidden)
    assert not torch.equal(hidden, made.recipe_task(Batch(IMAGES, seed=6)).hidden)


def test_the_map_moves_features_as_written_out_patch_by_patch_and_never_beyond_the_gate():
    made = designer(gate=0.7).double()
    torch.nn.init.normal_(made.map)
    task, x = in_float64(made(BATCH)), features()
    out = moved(x, task)
    mean = sum(x[b, n] for b in range(3) for n in range(16)) / 48
    y = torch.stack(
        [torch.stack([(x[b, n] - mean) @ made.map for n in range(16)]) for b in range(3)]
    )
    expected = x + 0.7 * y / (1 + (y**2).sum() / y.numel()) ** 0.5
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)  # the task was made in float32
    assert (out - x).square().mean().sqrt() < 0.7


def test_the_regularizer_is_the_mean_squared_shift_of_white_features():
    made = designer(weight=0.5).double()
    torch.nn.init.normal_(made.map)
    task = made(BATCH)
    x = torch.randn(200_000, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    sampled = 0.5 * (x @ made.map.detach()).square().mean()
    assert float(made.regularizer(task).detach()) == pytest.approx(float(sampled), rel=0.02)


def test_random_tasks_differ_share_their_images_and_shift_by_nearly_the_gate():
    first, second = (in_float64(task) for task in designer(gate=0.5).random_tasks(BATCH, 2))
    assert torch.equal(first.images, second.images)
    assert torch.equal(first.hidden, second.hidden)
    assert not torch.equal(first.map, second.map)
    for task in (first, second):
        assert 0.45 < float((moved(features(), task) - features()).square().mean().sqrt()) < 0.5


@pytest.mark.parametrize("tau", [0.5, 2.0])
def test_tilted_targets_are_the_best_within_their_trust_region(tau):
    """Of <t', A> - tau/2 |t' - t|^2 with A scaled to mean square 1; the gate takes its share."""
    values, x = torch.randn(3, 16, 12, dtype=torch.float64), features()
    task = in_float64(designer().recipe_task(BATCH))
    shift = moved(x, tilted(task, values, 1.0, tau)) - x
    scaled = values / values.square().mean().sqrt()

    def objective(s):
        return float((s * scaled).sum() - tau / 2 * s.square().sum())

    assert all(
        objective(shift + 0.1 * torch.randn_like(shift)) < objective(shift) for _ in range(20)
    )
    assert float(shift.square().mean()) == pytest.approx(1 / tau**2, rel=1e-9)
    torch.testing.assert_close(
        moved(x, tilted(task, values, 0.3, tau)) - x, 0.3 * shift, rtol=1e-9, atol=1e-12
    )


def test_greedy_targets_go_the_same_way_patch_by_patch_by_the_gate():
    values, x = torch.randn(3, 16, 12, dtype=torch.float64), features()
    shift = moved(x, tilted(in_float64(designer().recipe_task(BATCH)), values, 0.4, 0.0)) - x
    torch.testing.assert_close(
        shift.square().mean(dim=-1).sqrt(),
        torch.full((3, 16), 0.4, dtype=torch.float64),
        rtol=1e-9,
        atol=0,
    )
    assert (torch.cosine_similarity(shift, values, dim=-1) > 1 - 1e-9).all()


@pytest.mark.parametrize(
    ("options", "named"),
    [({"gate": -1.0}, "gate=-1.0"), ({"hidden": (0.5, 0.2)}, "hidden")],
)
def test_settings_that_make_no_sense_are_named(options, named):
    with pytest.raises(MetaVPTError, match=named):
        designer(**options)
