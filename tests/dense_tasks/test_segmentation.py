"""mIoU against plain loops, with ignored pixels and classes that are absent."""

import pytest
import torch

from metavpt.dense_tasks.segmentation import SegmentationMetrics
from metavpt.errors import MetaVPTError


def naive_mious(prediction: list[int], label: list[int], num_classes: int) -> tuple[float, float]:
    """Over the classes that are predicted or true, and over those that are true."""
    ious, present = [], []
    for c in range(num_classes):
        pairs = [(p == c, t == c) for p, t in zip(prediction, label, strict=True) if t != 255]
        if union := sum(p or t for p, t in pairs):
            ious.append(sum(p and t for p, t in pairs) / union)
            present += ious[-1:] if any(t for _, t in pairs) else []
    return sum(ious) / len(ious), sum(present) / len(present)


def test_miou_is_over_the_whole_set() -> None:
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(0, 4, (6, 8, 9), generator=generator)
    prediction = torch.where(
        torch.rand(6, 8, 9, generator=generator) < 0.6,
        label,
        torch.randint(0, 6, (6, 8, 9), generator=generator),
    )
    label[torch.rand(6, 8, 9, generator=generator) < 0.2] = 255
    metrics = SegmentationMetrics(
        7
    )  # 4 and 5 are predicted but absent from the truth, 6 occurs nowhere
    for image in range(6):
        metrics.update(prediction[image : image + 1], label[image : image + 1].to(torch.uint8))
    got = metrics.compute()
    expected = naive_mious(prediction.flatten().tolist(), label.flatten().tolist(), 7)
    assert (got["miou"], got["miou_present"]) == pytest.approx(expected, abs=1e-12)
    kept = label != 255
    assert got["acc"] == pytest.approx(
        float((prediction == label)[kept].double().mean()), abs=1e-12
    )


def test_a_predicted_class_without_truth_counts_zero_as_in_mmseg() -> None:
    metrics = SegmentationMetrics(4)  # class 3 occurs nowhere and has no term
    metrics.update(torch.tensor([[[0, 0], [2, 1]]]), torch.tensor([[[0, 0], [0, 1]]]))
    assert metrics.compute() == {
        "miou": pytest.approx((2 / 3 + 1 + 0) / 3),
        "miou_present": pytest.approx((2 / 3 + 1) / 2),
        "acc": 0.75,
    }


def test_errors_name_the_reason() -> None:
    metrics = SegmentationMetrics(3)
    with pytest.raises(MetaVPTError, match="label 3 with num_classes=3"):
        metrics.update(torch.zeros(1, 1, 1, dtype=torch.int64), torch.full((1, 1, 1), 3))
    metrics.update(torch.zeros(1, 1, 1, dtype=torch.int64), torch.full((1, 1, 1), 255))
    with pytest.raises(MetaVPTError, match="no pixel"):
        metrics.compute()
