"""Depth metrics against plain loops over pixels."""

import math

import pytest
import torch

from metavpt.dense_tasks.depth import DepthMetrics, DepthTask, eigen_crop
from metavpt.errors import MetaVPTError


@pytest.mark.parametrize(
    ("height", "width", "rows", "columns"),
    [
        (480, 640, slice(45, 471), slice(41, 601)),
        (240, 320, slice(22, 236), slice(20, 301)),
        (96, 128, slice(9, 95), slice(8, 121)),
    ],
)
def test_eigen_crop(height: int, width: int, rows: slice, columns: slice) -> None:
    assert eigen_crop(height, width) == (rows, columns)


def naive(
    prediction: torch.Tensor, depth: torch.Tensor, rows: range, columns: range
) -> dict[str, float]:
    """The metrics of the pixels of all images, and the mean over images of each image's own."""
    pixels = []
    for p_image, t_image in zip(prediction.tolist(), depth.tolist(), strict=True):
        pairs = [(p_image[i][j], t_image[i][j]) for i in rows for j in columns]
        pixels.append([(min(max(p, 1e-3), 10.0), t) for p, t in pairs if 1e-3 < t < 10.0])
    per_image = [errors(image) for image in pixels if image]
    return errors([pair for image in pixels for pair in image]) | {
        f"{name}_per_image": sum(image[name] for image in per_image) / len(per_image)
        for name in per_image[0]
    }


def errors(pairs: list[tuple[float, float]]) -> dict[str, float]:
    return {
        "rmse": math.sqrt(sum((p - t) ** 2 for p, t in pairs) / len(pairs)),
        "abs_rel": sum(abs(p - t) / t for p, t in pairs) / len(pairs),
        "delta1": sum(max(p / t, t / p) < 1.25 for p, t in pairs) / len(pairs),
    }


@pytest.fixture
def maps() -> tuple[torch.Tensor, torch.Tensor]:
    """Values beyond both bounds; zero, negative, NaN and infinite truth; and one frame of NaN."""
    generator = torch.Generator().manual_seed(0)
    depth = 12 * torch.rand(4, 24, 32, generator=generator)
    prediction = depth * (0.5 + torch.rand(4, 24, 32, generator=generator)) - 0.3
    for share, value in ((0.1, 0.0), (0.05, -1.0), (0.05, math.nan), (0.05, math.inf)):
        depth[torch.rand(4, 24, 32, generator=generator) < share] = value
    depth[2] = math.nan
    return prediction, depth


@pytest.mark.parametrize("crop", [True, False])
def test_metrics_are_the_naive_loops(maps: tuple[torch.Tensor, torch.Tensor], crop: bool) -> None:
    prediction, depth = maps
    metrics = DepthMetrics(crop)
    metrics.update(prediction[:1], depth[:1])
    metrics.update(prediction[1:], depth[1:])
    rows, columns = (range(2, 24), range(2, 31)) if crop else (range(24), range(32))
    assert metrics.compute() == pytest.approx(
        naive(prediction, depth, rows, columns), rel=1e-6
    )  # float32 maps
    assert metrics.num_images == 3


def test_a_frame_of_nan_depth_changes_nothing(maps: tuple[torch.Tensor, torch.Tensor]) -> None:
    prediction, depth = maps
    with_frame, without = DepthMetrics(), DepthMetrics()
    with_frame.update(prediction, depth)
    without.update(prediction[[0, 1, 3]], depth[[0, 1, 3]])
    assert with_frame.compute() == without.compute()


def test_the_range_of_true_depths_is_open_as_in_the_protocol_of_eigen() -> None:
    """Truth at and beyond both ends is left out, whatever is predicted there."""
    depth = torch.tensor([[[2.0, 10.0, 15.0, 1e-3, 4.0]]])
    prediction = torch.tensor([[[2.0, 1.0, 1.0, 1.0, 20.0]]])
    metrics = DepthMetrics(crop=False)
    metrics.update(prediction, depth)
    assert metrics.num_pixels == 2
    assert metrics.compute()["rmse"] == pytest.approx(math.sqrt((0 + 6**2) / 2))  # 20 m clipped
    target, share = DepthTask().patch_targets(depth, (1, 1))
    assert (target.item(), share.item()) == pytest.approx((3.0, 2 / 5))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_prediction_that_is_not_finite_makes_every_metric_nan(
    maps: tuple[torch.Tensor, torch.Tensor], value: float
) -> None:
    prediction, depth = maps
    prediction[1] = value
    metrics = DepthMetrics()
    metrics.update(prediction, depth)
    assert all(math.isnan(found) for found in metrics.compute().values())


def test_errors_name_the_reason() -> None:
    metrics = DepthMetrics()
    metrics.update(torch.ones(1, 24, 32), torch.zeros(1, 24, 32))
    with pytest.raises(MetaVPTError, match="no pixel"):
        metrics.compute()
    with pytest.raises(MetaVPTError, match="differ in shape"):
        metrics.update(torch.ones(1, 24, 32), torch.zeros(1, 24, 31))


def test_loss_reads_valid_pixels_only() -> None:
    depth = torch.tensor([[[2.0, 0.0], [math.nan, 20.0]]])
    prediction = torch.tensor([[[[3.0, 50.0], [50.0, 8.0]]]], requires_grad=True)
    loss, count = DepthTask().probe_loss(prediction, depth)
    assert loss.item() == pytest.approx(1.0)  # 20 m is left out, as in the metrics
    assert count == 1
    (gradient,) = torch.autograd.grad(loss, prediction)
    assert gradient.tolist() == [[[[2.0, 0.0], [0.0, 0.0]]]]
    loss, count = DepthTask().probe_loss(prediction, torch.zeros(1, 2, 2))
    assert loss.item() == count.item() == 0
