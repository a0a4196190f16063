import math

import pytest
import torch
from torch import Tensor

from metavpt.errors import MetaVPTError
from metavpt.objectives.gram import gram_loss


def parts() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, 4, dtype=torch.float64, generator=g), torch.randn(
        2, 3, 5, dtype=torch.float64, generator=g
    )


def cosine(x: list[float], y: list[float]) -> float:
    norms = math.hypot(*x) * math.hypot(*y)
    return sum(a * b for a, b in zip(x, y, strict=True)) / norms


def naive(student: Tensor, teacher: Tensor) -> list[float]:
    """The squared Frobenius norm, entry by entry, over the number of entries."""
    losses = []
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        errors = [
            (cosine(s[i], s[j]) - cosine(t[i], t[j])) ** 2
            for i in range(len(s))
            for j in range(len(s))
        ]
        losses.append(sum(errors) / len(errors))
    return losses


def test_loss_equals_the_papers_formula() -> None:
    student, teacher = parts()
    expected = torch.tensor(naive(student, teacher), dtype=torch.float64)
    torch.testing.assert_close(gram_loss(student, teacher, "none"), expected, atol=1e-13, rtol=0)
    torch.testing.assert_close(gram_loss(student, teacher), expected.mean(), atol=1e-13, rtol=0)


def test_rotating_all_patches_together_costs_nothing() -> None:
    student, _ = parts()
    rotation = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    assert gram_loss(3 * student @ rotation, student).item() == pytest.approx(0.0, abs=1e-28)


def test_loss_is_differentiable_in_both_arguments() -> None:
    assert torch.autograd.gradcheck(gram_loss, tuple(part.requires_grad_() for part in parts()))


def test_half_precision_is_summed_in_float32() -> None:
    student, teacher = (part.bfloat16() for part in parts())
    assert gram_loss(student, teacher).dtype == torch.float32
    torch.testing.assert_close(
        gram_loss(student, teacher).double(),
        gram_loss(student.double(), teacher.double()),
        atol=1e-6,
        rtol=0,
    )


def test_other_patches_are_refused() -> None:
    student, teacher = parts()
    with pytest.raises(MetaVPTError, match="of the same patches"):
        gram_loss(student, teacher[:, :2])
    with pytest.raises(MetaVPTError, match="reduction"):
        gram_loss(student, teacher, reduction="sum")  # type: ignore[arg-type]
