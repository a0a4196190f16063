"""Cross-fitted heads against loops and least squares, in float64."""

import pytest
import torch
from helpers.differences import assert_gradient_is_that_of_differences

from metavpt.dense_tasks.depth import DepthTask
from metavpt.dense_tasks.segmentation import SegmentationTask
from metavpt.errors import MetaVPTError
from metavpt.feedback.cross_fitted import CrossFitted, PatchLabels, in_parts

TASKS = [DepthTask(), SegmentationTask(3)]


@pytest.fixture
def scene():
    """Features (6,5,3,4) and labels (6,6,8) of 3 classes, some unknown."""
    g = torch.Generator().manual_seed(0)
    features = torch.randn(6, 5, 3, 4, generator=g, dtype=torch.float64)
    depth = 2 + features.sum(dim=1).repeat_interleave(2, 1).repeat_interleave(2, 2) / 5
    depth = (depth + torch.rand(6, 6, 8, generator=g)).clamp(0.1, 9.0)
    label = torch.randint(0, 3, (6, 6, 8), generator=g)
    depth[0, :2], label[1, 3:] = 0.0, 255
    heads = CrossFitted(5, TASKS, segmentation_weight=0.5, penalty=0.1, num_folds=3)

    class Maps:
        pass

    maps = Maps()
    maps.depth, maps.label = depth, label
    target, share = heads.patch_targets(maps, (3, 4))
    image = torch.zeros(6, 3, 6, 8, dtype=torch.uint8)
    return heads, features, PatchLabels(image, target.double(), share.double()), depth, label


def test_patch_targets_are_means_over_valid_pixels(scene):
    _, _, labels, depth, label = scene
    assert labels.target.shape == labels.share.shape == (6, 4, 3, 4)
    for b in range(6):
        for i in range(3):
            for j in range(4):
                pixels = depth[b, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
                valid = pixels[pixels > 0]
                assert float(labels.share[b, 0, i, j]) == pytest.approx(len(valid) / 4)
                if len(valid):
                    assert float(labels.target[b, 0, i, j]) == pytest.approx(float(valid.mean()))
                classes = label[b, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
                known = classes[classes != 255]
                assert float(labels.share[b, 1, i, j]) == pytest.approx(len(known) / 4)
                for c in range(3 if len(known) else 0):
                    frequency = float((known == c).double().mean())
                    assert float(labels.target[b, 1 + c, i, j]) == pytest.approx(frequency)


def residuals_written_out(features, labels, own, penalty=0.1, num_folds=3):
    """y - W x - b by weighted least squares on standardised features, fold by fold."""
    x = features.movedim(1, -1).flatten(1, 2)  # (L, N, D)
    y, s = (
        labels.target[:, own].movedim(1, -1).flatten(1, 2),
        labels.share[:, own][:, :1].flatten(1),
    )
    found = torch.zeros_like(y)
    for rows in torch.arange(len(x)).chunk(num_folds):
        rest = [i for i in range(len(x)) if i not in rows.tolist()]
        a, b, w = x[rest].flatten(0, 1), y[rest].flatten(0, 1), s[rest].flatten()[:, None]
        mean, target_mean = (w * a).sum(0) / w.sum(), (w * b).sum(0) / w.sum()
        scale = ((w * (a - mean).square()).sum(0) / w.sum()).sqrt()
        z = (a - mean) / scale
        system = z.T @ (w * z) / w.sum() + penalty * torch.eye(5, dtype=torch.float64)
        weight = torch.linalg.solve(system, z.T @ (w * (b - target_mean)) / w.sum())
        found[rows] = y[rows] - (x[rows] - mean) / scale @ weight - target_mean
    return found, s[..., None]


def test_losses_are_the_unexplained_share_of_the_variance(scene):
    heads, features, labels, *_ = scene
    losses = heads(features, labels)
    for name, own in {"depth": slice(0, 1), "segmentation": slice(1, 4)}.items():
        errors, share = residuals_written_out(features, labels, own)
        target = labels.target[:, own].movedim(1, -1).flatten(1, 2)
        mean = (share * target).sum((0, 1)) / share.sum((0, 1))
        expected = (share * errors.square()).sum() / (share * (target - mean).square()).sum()
        assert float(losses[name]) == pytest.approx(float(expected), rel=1e-10)
    assert 0 < float(losses["depth"]) < 0.9  # depth can be read from these features


def test_gradient_passes_through_the_fit_of_the_heads(scene):
    heads, features, labels, *_ = scene
    for name in heads.outputs:
        assert_gradient_is_that_of_differences(
            lambda x, n=name: heads(x["features"], labels)[n], {"features": features}
        )


def test_the_fit_takes_back_what_an_affine_map_of_the_features_changes(scene):
    """Heads that follow read as much of mapped features; heads that stand still do not."""
    _, features, labels, *_ = scene
    linear = torch.eye(5, dtype=torch.float64) + 0.01 * torch.ones(5, 5, dtype=torch.float64)
    change = torch.einsum("bdhw,ed->behw", features, linear) + 0.1 - features
    slopes = []
    for through_heads in (True, False):
        heads = CrossFitted(5, TASKS, penalty=1e-10, num_folds=3, through_heads=through_heads)
        x = features.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(heads(x, labels)["depth"], x)
        slopes.append(abs(float((gradient * change).sum())))
    assert slopes[0] < 1e-6 * slopes[1]


def test_gradient_of_heads_that_stand_still(scene):
    """dL/df = -2 s e w / variation, w of the heads that the frame's own fold is not in."""
    _, features, labels, *_ = scene
    heads = CrossFitted(
        5, TASKS, segmentation_weight=0.5, penalty=0.1, num_folds=3, through_heads=False
    )
    x = features.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(heads(x, labels)["depth"], x)
    errors, _ = residuals_written_out(features, labels, slice(0, 1))
    e = errors[..., 0].unflatten(1, (3, 4))
    for b in range(6):
        slope = gradient[b] / (labels.share[b, 0] * e[b])  # (D, h, w): the same w everywhere
        finite = slope[:, torch.isfinite(slope).all(dim=0)]
        torch.testing.assert_close(finite, finite[:, :1].expand_as(finite), rtol=1e-6, atol=1e-9)


def test_residuals_point_the_way_that_lowers_the_loss(scene):
    heads, features, labels, *_ = scene
    found = heads.residuals(features, labels)
    errors, share = residuals_written_out(features, labels, slice(0, 1))
    rms = ((share * errors.square()).sum() / share.sum()).sqrt()
    torch.testing.assert_close(found.values[..., :1], errors / rms)
    assert found.directions.shape == (4, 5)
    moves = (found.share * found.values) @ found.directions
    moved = features + 0.01 * moves.transpose(1, 2).unflatten(2, (3, 4))
    before, after = heads(features, labels), heads(moved, labels)
    assert all(after[name] < before[name] for name in before)
    depth = ((found.share * found.values)[..., :1] @ found.directions[:1]).square().mean().sqrt()
    classes = ((found.share * found.values)[..., 1:] @ found.directions[1:]).square().mean().sqrt()
    assert float(depth) == pytest.approx(2 * float(classes), rel=1e-6)  # weights 1 and 0.5
    assert float(depth) == pytest.approx(1 / 1.25**0.5, rel=1e-6)


def test_a_task_of_weight_zero_is_left_out_and_wrong_options_are_named(scene):
    assert CrossFitted(5, TASKS, depth_weight=0.0).outputs == {"segmentation": slice(0, 3)}
    for options, key in [
        ({"num_folds": 1}, "num_folds"),
        ({"depth_weight": -1.0}, "depth_weight"),
        ({"depth_weight": 0.0, "segmentation_weight": 0.0}, "depth_weight"),
        ({"penalty": 0.0}, "penalty"),
    ]:
        with pytest.raises(MetaVPTError, match=key):
            CrossFitted(5, TASKS, **options)
    heads, features, labels, *_ = scene
    few = PatchLabels(*(field[:2] for field in labels))
    with pytest.raises(MetaVPTError, match="num_folds=3"):
        heads(features[:2], few)


def test_in_parts_has_the_gradient_of_the_whole_and_the_memory_of_a_part():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(8, 3, generator=g, dtype=torch.float64)
    theta = {
        "w": torch.randn(3, 4, generator=g, dtype=torch.float64),
        "frozen": torch.randn(4, generator=g, dtype=torch.float64),
    }
    alive = []

    def function(theta, part):
        alive.append(len(part))
        return (part @ theta["w"] + theta["frozen"]).tanh()

    def loss(theta, rows):
        return (rows.mean(dim=0).square().sum() + rows.prod(dim=1).sum()).sin()

    record = {}
    leaves = {name: p.clone().requires_grad_() for name, p in theta.items()}
    whole = torch.autograd.grad(loss(leaves, function(leaves, x)), list(leaves.values()))
    parts = torch.autograd.grad(
        loss(leaves, in_parts(function, leaves, x.split(2), record)), list(leaves.values())
    )
    for own, expected in zip(parts, whole, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-12, atol=1e-14)
    assert max(alive[1:]) == 2
    halves = []
    for half in (slice(0, 4), slice(4, 8)):
        rows = function(leaves, x).detach().requires_grad_()
        (by_rows,) = torch.autograd.grad(loss(leaves, rows), rows)
        halves.append(
            torch.cat(
                [
                    grad.flatten()
                    for grad in torch.autograd.grad(
                        function(leaves, x)[half], list(leaves.values()), by_rows[half]
                    )
                ]
            )
        )
    cosine = torch.nn.functional.cosine_similarity(*halves, dim=0)
    assert record["g_down_agreement"] == pytest.approx(float(cosine), rel=1e-10)
    assert_gradient_is_that_of_differences(
        lambda theta: loss(theta, in_parts(function, theta, x.split(3))), theta
    )


def test_in_parts_asks_for_the_gradients_that_are_needed_alone():
    theta = {"a": torch.ones(2, requires_grad=True), "b": torch.ones(2)}
    made = in_parts(
        lambda theta, part: part * theta["a"] * theta["b"], theta, torch.ones(4, 2).split(2)
    )
    made.sum().backward()
    assert torch.equal(theta["a"].grad, torch.full((2,), 4.0))
    assert theta["b"].grad is None
