import pytest
import torch
from torch import Tensor

from metavpt.errors import MetaVPTError
from metavpt.objectives.mae import mae_loss, normalized_pixels


def parts() -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    predictions, pixels = (
        torch.randn(2, 1, 5, 12, dtype=torch.float64, generator=g) for _ in range(2)
    )
    return predictions, pixels, torch.rand(2, 1, 5, dtype=torch.float64, generator=g)


def naive(predictions: Tensor, pixels: Tensor, weights: Tensor) -> list[float]:
    """Patch by patch, pixel by pixel: the squared error of a patch, averaged over masked ones."""
    losses = []
    for p_image, x_image, w_image in zip(
        predictions.tolist(), pixels.tolist(), weights.tolist(), strict=True
    ):
        total, weight = 0.0, 0.0
        for p_patch, x_patch, w in zip(p_image[0], x_image[0], w_image[0], strict=True):
            total += (
                w * sum((p - x) ** 2 for p, x in zip(p_patch, x_patch, strict=True)) / len(p_patch)
            )
            weight += w
        losses.append(total / weight)
    return losses


def test_loss_equals_the_papers_sum() -> None:
    predictions, pixels, weights = parts()
    for w in (None, weights):
        expected = torch.tensor(
            naive(predictions, pixels, torch.ones_like(weights) if w is None else w),
            dtype=torch.float64,
        )
        torch.testing.assert_close(
            mae_loss(predictions, pixels, w, "none"), expected, atol=1e-13, rtol=0
        )
        torch.testing.assert_close(
            mae_loss(predictions, pixels, w), expected.mean(), atol=1e-13, rtol=0
        )
    assert torch.equal(
        mae_loss(predictions, pixels), mae_loss(predictions, pixels, torch.ones_like(weights))
    )


def test_loss_is_differentiable_in_predictions_and_weights() -> None:
    predictions, pixels, weights = parts()
    assert torch.autograd.gradcheck(
        lambda p, w: mae_loss(p, pixels, w),
        (predictions.requires_grad_(), weights.requires_grad_()),
    )


def test_pixels_are_normalised_patch_by_patch_row_by_row() -> None:
    images = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    pixels = normalized_pixels(images, 2)
    assert pixels.shape == (2, 6, 12)
    for n in range(6):
        top, left = 2 * (n // 3), 2 * (n % 3)
        patch = images[1, :, top : top + 2, left : left + 2].flatten()
        variance = ((patch - patch.mean()) ** 2).sum() / 11
        torch.testing.assert_close(
            pixels[1, n], (patch - patch.mean()) / (variance + 1e-6) ** 0.5, atol=1e-13, rtol=0
        )
    assert normalized_pixels(torch.ones(1, 3, 4, 4), 2).eq(0).all()  # a patch of one colour


def test_shapes_that_do_not_fit_are_refused() -> None:
    predictions, pixels, _ = parts()
    with pytest.raises(MetaVPTError, match=r"mae_loss: predictions and pixels"):
        mae_loss(predictions, pixels[:, :, :3])
    with pytest.raises(MetaVPTError, match="reduction"):
        mae_loss(predictions, pixels, reduction="sum")  # type: ignore[arg-type]
