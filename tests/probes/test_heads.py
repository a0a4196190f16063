"""Linear heads: against the dense solve, with known answers, and without global random state."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch

from metavpt.dense_tasks.depth import DepthTask
from metavpt.dense_tasks.segmentation import SegmentationTask
from metavpt.dense_tasks.task import DenseTask
from metavpt.errors import MetaVPTError, NonFiniteError
from metavpt.probes.features import FeatureSet, extract
from metavpt.probes.heads import LinearBN, LinearHead, Ridge, enlarge

M, D, C, H, W, h, w = 5, 6, 3, 12, 20, 3, 5


class Frames(NamedTuple):
    features: torch.Tensor
    depth: torch.Tensor
    label: torch.Tensor

    def of(self, task: DenseTask) -> FeatureSet:
        return FeatureSet(self.features, task.target(self))


def score(task: DenseTask, head: LinearHead, frames: Frames) -> dict[str, float]:
    metrics = task.metrics()
    metrics.update(task.predict(head(frames.features)), task.target(frames))
    return metrics.compute()


@pytest.fixture
def frames() -> Frames:
    """Random features on unlike scales, depth with holes and labels with ignored pixels."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.logspace(-2, 2, D)[None, :, None, None]
    features = torch.randn(M, D, h, w, generator=generator) * scale + 3 * scale
    depth = 0.5 + 5 * torch.rand(M, H, W, generator=generator)
    depth[torch.rand(M, H, W, generator=generator) < 0.3] = 0
    depth[0, :4, :4] = 0  # one patch without a valid pixel
    label = torch.randint(0, C, (M, H, W), generator=generator)
    label[torch.rand(M, H, W, generator=generator) < 0.2] = 255
    return Frames(features, depth, label.to(torch.uint8))


def patch_rows(frames: Frames, num_outputs: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x (N, D), y (N, C), s (N,) patch by patch in plain loops; num_outputs 1 is depth."""
    x, y, s = [], [], []
    for m in range(M):
        for i in range(h):
            for j in range(w):
                x.append(frames.features[m, :, i, j].double().numpy())
                block = (m, slice(4 * i, 4 * i + 4), slice(4 * j, 4 * j + 4))
                depth, label = (
                    frames.depth[block].flatten().tolist(),
                    frames.label[block].flatten().tolist(),
                )
                values = (
                    [[v] for v in depth if v > 0]
                    if num_outputs == 1
                    else [[float(v == c) for c in range(C)] for v in label if v != 255]
                )
                y.append(np.mean(values, axis=0) if values else np.zeros(num_outputs))
                s.append(len(values) / 16)
    return np.array(x), np.array(y), np.array(s)


@pytest.mark.parametrize("task", [DepthTask(), SegmentationTask(C)])
@pytest.mark.parametrize("penalty", [1e-6, 0.1])
def test_ridge_is_the_dense_solve(
    frames: Frames, task: DepthTask | SegmentationTask, penalty: float
) -> None:
    x, y, s = patch_rows(frames, task.num_outputs)
    mean = np.average(x, axis=0, weights=s)
    z = (x - mean) / np.sqrt(np.average((x - mean) ** 2, axis=0, weights=s))
    root = np.sqrt(s)[:, None]
    gram_diagonal = (root * z * root * z).sum(0).mean()
    ridge_rows = np.hstack([math.sqrt(penalty * gram_diagonal) * np.eye(D), np.zeros((D, 1))])
    system = np.vstack([root * np.hstack([z, np.ones((len(z), 1))]), ridge_rows])
    solution = np.linalg.lstsq(
        system, np.vstack([root * y, np.zeros((D, task.num_outputs))]), rcond=None
    )[0]

    head = Ridge(penalty).fit(task, frames.of(task))

    ours = x @ head.weight.double().numpy().T + head.bias.double().numpy()
    # 1e-6: patch means are pooled in float32, the solve is float64.
    np.testing.assert_allclose(ours, np.hstack([z, np.ones((len(z), 1))]) @ solution, atol=1e-6)


def test_ridge_gives_no_weight_to_a_constant_feature(frames: Frames) -> None:
    features = frames.features.clone()
    features[:, 2] = 1000.7
    head = Ridge().fit(DepthTask(), FeatureSet(features, frames.depth))
    assert head.weight[0, 2] == 0
    assert torch.isfinite(head.weight).all()


def test_ridge_chunks_do_not_change_the_fit(
    frames: Frames, monkeypatch: pytest.MonkeyPatch
) -> None:
    depths = frames.of(DepthTask())
    whole = Ridge().fit(DepthTask(), depths)
    chunks = FeatureSet.chunks
    monkeypatch.setattr(FeatureSet, "chunks", lambda self: chunks(self, 2))
    torch.testing.assert_close(
        Ridge().fit(DepthTask(), depths).weight, whole.weight, rtol=1e-9, atol=1e-12
    )


def test_a_head_enlarges_bilinearly(frames: Frames) -> None:
    weight, bias = torch.randn(C, D), torch.randn(C)
    output = LinearHead(weight, bias, (H, W))(frames.features)
    small = torch.einsum("cd,mdhw->mchw", weight, frames.features) + bias[:, None, None]
    torch.testing.assert_close(
        output, torch.nn.functional.interpolate(small, (H, W), mode="bilinear", align_corners=False)
    )


def linear_frames(num: int = 24) -> Frames:
    """Frames whose labels are exact linear functions of the features, enlarged as usual."""
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(num, D, h, w, generator=generator)
    weight = torch.randn(1, D, generator=generator) / D**0.5
    depth = torch.nn.functional.softplus(
        enlarge(torch.einsum("cd,mdhw->mchw", weight, features) + 2, (H, W))
    )[:, 0]
    label = enlarge(
        torch.einsum("cd,mdhw->mchw", torch.randn(C, D, generator=generator), features), (H, W)
    ).argmax(1)
    return Frames(features, depth, label.to(torch.uint8))


def test_linear_bn_recovers_a_linear_relation() -> None:
    frames = linear_frames()
    fit = LinearBN(num_steps=600)
    depth, classes = DepthTask(lr=0.03), SegmentationTask(C, lr=0.03)
    assert score(depth, fit.fit(depth, frames.of(depth)), frames)["rmse"] < 0.03
    assert score(classes, fit.fit(classes, frames.of(classes)), frames)["miou"] > 0.95


def test_linear_bn_folds_the_norm_into_the_head() -> None:
    """After one step the running moments are 0.1 of the batch's and 0.9 of the initial ones."""
    frames, task = linear_frames(), DepthTask(lr=0.0)
    head = LinearBN(num_steps=1, batch_size=100, warmup=0, seed=3).fit(task, frames.of(task))
    kernel = 0.01 * torch.randn(1, D, generator=torch.Generator().manual_seed(3))
    rows = frames.features.movedim(1, -1).flatten(0, 2)
    mean, variance = 0.1 * rows.mean(0), 0.9 + 0.1 * rows.var(0)
    expected = ((rows - mean) / (variance + 1e-5).sqrt()) @ kernel.T
    torch.testing.assert_close(rows @ head.weight.T + head.bias, expected, rtol=1e-5, atol=1e-6)


def test_fits_repeat_exactly_and_leave_the_global_generator_alone() -> None:
    frames, fit = linear_frames(10).of(DepthTask()), LinearBN(num_steps=20)
    state = torch.get_rng_state()
    with torch.no_grad():  # probes are called from code that runs without gradients
        first, second, other = (
            fit.fit(DepthTask(), frames),
            fit.fit(DepthTask(), frames),
            LinearBN(20, seed=1).fit(DepthTask(), frames),
        )
        Ridge().fit(DepthTask(), frames)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.weight, second.weight)
    assert not torch.equal(first.weight, other.weight)
    assert not first.weight.requires_grad


def test_warm_up_then_cosine() -> None:
    fit = LinearBN(num_steps=100, warmup=0.1)
    factors = [fit._lr_factor(step) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert max(factors) == factors[9] == factors[10] == 1
    assert factors[55] == pytest.approx(0.5)
    assert 0 < factors[99] < 1e-3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Ridge(penalty=0), "penalty=0"),
        (lambda: LinearBN(num_steps=0), "num_steps=0"),
        (lambda: LinearBN(warmup=1.0), "warmup=1.0"),
        (lambda: SegmentationTask(1), "num_classes=1"),
    ],
)
def test_bad_settings_are_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(MetaVPTError, match=message):
        make()


def test_ridge_without_a_valid_pixel_says_so(frames: Frames) -> None:
    with pytest.raises(MetaVPTError, match="no valid pixel"):
        Ridge().fit(DepthTask(), FeatureSet(frames.features, torch.full((M, H, W), math.nan)))


class Batch:
    def __init__(self, size: int = H, label: int = 0) -> None:
        self.image = torch.zeros(2, 3, size, size, dtype=torch.uint8)
        self.depth, self.label = torch.ones(2, size, size), torch.full((2, size, size), label)


def test_extract_refuses_what_would_give_wrong_numbers() -> None:
    def pool(images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(images.float(), 4)

    tasks = [DepthTask(), SegmentationTask(C)]
    found = extract(pool, [Batch(), Batch()], tasks)
    assert found.keys() == {"depth", "segmentation"}
    assert found["depth"].features is found["segmentation"].features
    assert found["depth"].features.shape == (4, 3, 3, 3)
    assert found["segmentation"].target.dtype == torch.uint8
    with pytest.raises(MetaVPTError, match="no labelled batch"):
        extract(pool, [], tasks)
    with pytest.raises(MetaVPTError, match="one size"):
        extract(pool, [Batch(), Batch(16)], tasks)
    with pytest.raises(MetaVPTError, match="labels must lie"):
        extract(pool, [Batch(label=-1)], tasks)
    with pytest.raises(NonFiniteError):
        extract(lambda images: pool(images) / 0, [Batch()], tasks)
