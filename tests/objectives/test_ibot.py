import math

import pytest
import torch
from torch import Tensor

from metavpt.errors import MetaVPTError
from metavpt.objectives.dino import centered_probs, sinkhorn_probs
from metavpt.objectives.ibot import ibot_loss


def parts() -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(3, 4, 5, dtype=torch.float64, generator=g) for _ in range(2))
    hidden = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0]], dtype=torch.bool)
    return student, teacher, hidden


def naive(student: Tensor, probs: Tensor, hidden: Tensor, temperature: float) -> list[float]:
    """Patch by patch, prototype by prototype, over the hidden patches of each image."""
    losses = []
    for b in range(len(student)):
        terms = []
        for n in range(student.shape[1]):
            if hidden[b, n]:
                scores = [math.exp(s / temperature) for s in student[b, n].tolist()]
                terms.append(
                    sum(
                        -p * math.log(s / sum(scores))
                        for p, s in zip(probs[b, n].tolist(), scores, strict=True)
                    )
                )
        losses.append(sum(terms) / max(len(terms), 1))
    return losses


@pytest.mark.parametrize("targets", ["centering", "sinkhorn"])
def test_loss_equals_the_papers_sum(targets: str) -> None:
    student, teacher, hidden = parts()
    probs = (
        sinkhorn_probs(teacher, 0.07)
        if targets == "sinkhorn"
        else centered_probs(teacher, teacher.mean((0, 1)), 0.07)
    )
    expected = torch.tensor(naive(student, probs, hidden, 0.1), dtype=torch.float64)
    torch.testing.assert_close(
        ibot_loss(student, probs, hidden, 0.1, "none"), expected, atol=1e-12, rtol=0
    )
    torch.testing.assert_close(
        ibot_loss(student, probs, hidden), expected.mean(), atol=1e-12, rtol=0
    )


def test_weights_between_0_and_1_are_differentiable() -> None:
    student, teacher, _ = parts()
    hidden = torch.rand(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.1
    inputs = (
        student.requires_grad_(),
        teacher.softmax(-1).requires_grad_(),
        hidden.requires_grad_(),
    )
    assert torch.autograd.gradcheck(lambda s, p, h: ibot_loss(s, p, h, 0.5), inputs)


def test_a_batch_without_hidden_patches_is_zero_with_a_gradient() -> None:
    student, teacher, hidden = parts()
    loss = ibot_loss(student.requires_grad_(), teacher.softmax(-1), torch.zeros_like(hidden))
    loss.backward()
    assert loss.item() == 0.0
    assert student.grad is not None
    assert student.grad.eq(0).all()


def test_half_precision_is_summed_in_float32() -> None:
    student, teacher, hidden = parts()
    half, probs = student.bfloat16(), teacher.softmax(-1)
    loss = ibot_loss(half, probs, hidden)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(
        loss.double(), ibot_loss(half.double(), probs, hidden), atol=0, rtol=1e-5
    )


def test_arguments_that_do_not_fit_are_refused() -> None:
    student, teacher, hidden = parts()
    with pytest.raises(MetaVPTError, match=r"ibot_loss: needs .*\(3, 3\)"):
        ibot_loss(student, teacher, hidden[:, :3])
    with pytest.raises(MetaVPTError, match="reduction"):
        ibot_loss(student, teacher, hidden, reduction="sum")  # type: ignore[arg-type]
