"""The dense probe as a whole, on images whose colours give depth and class away."""

from typing import NamedTuple

import pytest
import torch

from metavpt.dense_tasks.depth import DepthTask, eigen_crop
from metavpt.dense_tasks.segmentation import SegmentationTask
from metavpt.errors import MetaVPTError
from metavpt.probes.dense import DenseProbe
from metavpt.probes.heads import LinearBN, Ridge

TASKS = [DepthTask(), SegmentationTask(2)]


class Batch(NamedTuple):
    image: torch.Tensor
    depth: torch.Tensor
    label: torch.Tensor


def batches(seed: int, num: int = 3) -> list[Batch]:
    """Images of 8 x 8 blocks: red is depth, green above one half is class 1; some labels miss."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(num):
        image = torch.randint(0, 256, (4, 3, 6, 8), generator=generator, dtype=torch.uint8)
        image = image.repeat_interleave(8, 2).repeat_interleave(8, 3)
        depth, label = 1 + image[:, 0].float() / 50, (image[:, 1] > 127).long()
        depth[:, 20:24, :9], label[:, 30:33, 5:] = 0, 255
        made.append(Batch(image, depth, label))
    return made


class Colours:
    """Mean colour of each 8 x 8 block; counts its calls."""

    calls = 0

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        assert not torch.is_grad_enabled()
        self.calls += 1
        return torch.nn.functional.avg_pool2d(images.float() / 255, 8)


def test_every_head_measures_every_task_on_one_pass_over_each_set() -> None:
    features = Colours()
    probe = DenseProbe(
        lambda: batches(0),
        lambda: batches(1, 2),
        TASKS,
        {"ridge": Ridge(), "linear_bn": LinearBN(num_steps=5)},
    )
    metrics = probe(features)
    names = (
        "depth_rmse",
        "depth_abs_rel",
        "depth_delta1",
        "depth_rmse_per_image",
        "depth_abs_rel_per_image",
        "depth_delta1_per_image",
        "seg_miou",
        "seg_miou_present",
        "seg_acc",
    )
    assert set(metrics) == {f"{head}/{name}" for head in ("ridge", "linear_bn") for name in names}
    assert features.calls == 5
    assert (
        metrics["ridge/depth_rmse"] < 0.9
    )  # blocks are enlarged bilinearly, so not 0; depth has a deviation of 1.5
    assert metrics["ridge/seg_miou"] > 0.6
    assert probe(features) == metrics


def test_predictions_have_the_size_of_the_maps() -> None:
    probe, features = DenseProbe(lambda: batches(0), lambda: batches(1), TASKS), Colours()
    image = batches(2)[0].image
    with pytest.raises(MetaVPTError, match="call the probe first"):
        probe.predict(features, image)
    probe(features)
    depth, label = probe.predict(features, image).values()
    assert depth.shape == label.shape == (4, 48, 64)
    assert label.dtype == torch.int64
    assert 1e-3 <= float(depth.min()) <= float(depth.max()) <= 10


def test_one_task_alone() -> None:
    features = Colours()
    depth_only = DenseProbe(lambda: batches(0), lambda: batches(1), [DepthTask()])
    assert all("/depth_" in name for name in depth_only(features))
    assert depth_only.predict(features, batches(2)[0].image).keys() == {"depth"}
    assert all(
        "/seg_" in name
        for name in DenseProbe(lambda: batches(0), lambda: batches(1), [SegmentationTask(2)])(
            features
        )
    )
    with pytest.raises(MetaVPTError, match="nothing to probe"):
        DenseProbe(lambda: batches(0), lambda: batches(1), [])


def test_the_global_generator_is_left_alone() -> None:
    state = torch.get_rng_state()
    DenseProbe(lambda: batches(0), lambda: batches(1), TASKS, {"linear_bn": LinearBN(num_steps=2)})(
        Colours()
    )
    assert torch.equal(torch.get_rng_state(), state)


def test_trivial_predictors_are_means_and_the_majority_of_the_train_set() -> None:
    train, val = batches(0), batches(1, 2)
    probe = DenseProbe(lambda: train, lambda: val, TASKS, {"a": Ridge(), "b": Ridge(0.1)})
    scores = probe.trivial_metrics()
    assert scores.keys() == {"mean depth image", "constant depth", "majority class"}
    known, truth = (torch.cat([b.depth for b in part]).double() for part in (train, val))
    valid = (known > 1e-3) & (known < 10)
    constant = known[valid].mean()
    pixels = (known * valid).sum(0) / valid.sum(0)
    image = torch.where(valid.any(0), pixels, constant)  # some pixels have no truth in any frame
    assert not valid.any(0).all()
    rows, columns = eigen_crop(*truth.shape[1:])
    counted = ((truth > 1e-3) & (truth < 10))[:, rows, columns]
    for name, guess in (("mean depth image", image), ("constant depth", constant)):
        errors = (guess - truth)[:, rows, columns][counted]
        rmse = float(errors.square().mean().sqrt())
        for head in "ab":
            assert scores[name][f"{head}/depth_rmse"] == pytest.approx(rmse, rel=1e-6)
    label = torch.cat([b.label for b in train])
    majority = int((label == 1).sum() > (label == 0).sum())
    asked = torch.cat([b.label for b in val])
    share = float((asked == majority).sum() / (asked != 255).sum())
    assert scores["majority class"]["a/seg_acc"] == pytest.approx(share)
    assert scores["majority class"]["a/seg_miou"] == pytest.approx(share / 2)
    names = probe(Colours()).keys()
    assert all(metrics.keys() <= names for metrics in scores.values())


def test_iou_by_class_averages_to_miou_and_is_kept_for_each_head() -> None:
    probe = DenseProbe(
        lambda: batches(0),
        lambda: batches(1),
        [SegmentationTask(4, ("sky", "road", "car", "bus"))],
        {"a": Ridge(), "b": Ridge(0.1)},
    )
    metrics = probe(Colours())
    assert probe.class_metrics.keys() == {"a/seg_iou", "b/seg_iou"}
    for head in "ab":
        names, values = zip(*probe.class_metrics[f"{head}/seg_iou"], strict=True)
        iou = torch.tensor(values)
        assert names == ("sky", "road", "car", "bus")
        assert iou.isnan().tolist() == [False, False, True, True]  # two of the classes never occur
        assert float(iou.nanmean()) == pytest.approx(metrics[f"{head}/seg_miou"])
