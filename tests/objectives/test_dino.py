import math

import pytest
import torch
from torch import Tensor

from metavpt.errors import MetaVPTError
from metavpt.objectives.dino import center_update, centered_probs, dino_loss, sinkhorn_probs


def views(
    num_globals: int = 2, num_views: int = 5, batch: int = 3, prototypes: int = 4
) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    student = list(
        torch.randn(num_views, batch, prototypes, dtype=torch.float64, generator=generator)
    )
    return student, torch.randn(
        num_globals, batch, prototypes, dtype=torch.float64, generator=generator
    ).softmax(-1)


def naive(student: list[Tensor], probs: Tensor, temperature: float) -> list[float]:
    """The paper's double sum over views, one image and one prototype at a time."""
    losses = []
    for b in range(probs.shape[1]):
        total, pairs = 0.0, 0
        for g in range(len(probs)):
            for v in range(len(student)):
                if v == g:
                    continue
                scores = [math.exp(s / temperature) for s in student[v][b].tolist()]
                total += sum(
                    -p * math.log(s / sum(scores))
                    for p, s in zip(probs[g, b].tolist(), scores, strict=True)
                )
                pairs += 1
        losses.append(total / pairs)
    return losses


@pytest.mark.parametrize(("num_globals", "num_views"), [(2, 5), (2, 2), (1, 3)])
def test_loss_equals_the_papers_sum(num_globals: int, num_views: int) -> None:
    student, probs = views(num_globals, num_views)
    expected = torch.tensor(naive(student, probs, 0.1), dtype=torch.float64)
    torch.testing.assert_close(
        dino_loss(student, probs, 0.1, reduction="none"), expected, atol=1e-12, rtol=0
    )
    torch.testing.assert_close(dino_loss(student, probs, 0.1), expected.mean(), atol=1e-12, rtol=0)


def test_loss_is_differentiable_in_both_arguments() -> None:
    student, probs = views()
    inputs = (torch.stack(student).requires_grad_(), probs.requires_grad_())
    assert torch.autograd.gradcheck(lambda s, p: dino_loss(list(s), p, 0.5), inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    student, probs = views(prototypes=4096)
    half = [s.to(dtype) for s in student]
    loss = dino_loss(half, probs.to(dtype), 0.1)
    expected = dino_loss([s.double() for s in half], probs.to(dtype).double(), 0.1)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, atol=0, rtol=1e-5)
    assert (
        sinkhorn_probs(half[0], 0.04).dtype
        == centered_probs(half[0], half[0][0], 0.04).dtype
        == torch.float32
    )


def test_centered_probs() -> None:
    student, _ = views()
    center = student[1][0]
    expected = ((student[0] - center) / 0.04).softmax(-1)
    torch.testing.assert_close(
        centered_probs(student[0], center, 0.04), expected, atol=1e-14, rtol=0
    )


def test_sinkhorn_marginals() -> None:
    logits = torch.randn(2, 12, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    probs = sinkhorn_probs(logits, 0.5, num_iters=300)
    torch.testing.assert_close(
        probs.sum(-1), torch.ones(2, 12, dtype=torch.float64), atol=1e-12, rtol=0
    )
    torch.testing.assert_close(
        probs.sum((0, 1)), torch.full((6,), 24 / 6, dtype=torch.float64), atol=1e-8, rtol=0
    )


def test_sinkhorn_equals_the_published_iteration() -> None:
    """SwAV's algorithm: exponentiate, divide by the total, then rows and columns in turn."""
    logits = torch.randn(8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    q = (logits / 0.3).exp().T
    q /= q.sum()
    for _ in range(3):
        q /= q.sum(dim=1, keepdim=True) * 5
        q /= q.sum(dim=0, keepdim=True) * 8
    torch.testing.assert_close(sinkhorn_probs(logits, 0.3), (q * 8).T, atol=1e-13, rtol=0)
    assert sinkhorn_probs(1e4 * logits, 0.04).isfinite().all()


def test_center_update_returns_a_new_centre() -> None:
    center, logits = torch.ones(4), torch.randn(2, 3, 4)
    updated = center_update(center, logits, 0.9)
    torch.testing.assert_close(updated, 0.9 * center + 0.1 * logits.mean((0, 1)), atol=1e-6, rtol=0)
    assert torch.equal(center, torch.ones(4))


def test_shapes_that_do_not_fit_are_refused() -> None:
    student, probs = views()
    with pytest.raises(MetaVPTError, match="at least 2 student views"):
        dino_loss(student[:1], probs[:1])
    with pytest.raises(MetaVPTError, match="at least 2 student views"):
        dino_loss(student[:2], probs[[0, 1, 1]])
    with pytest.raises(MetaVPTError, match="student view 2"):
        dino_loss([*student[:2], student[2][:2]], probs)
    with pytest.raises(MetaVPTError, match="reduction"):
        dino_loss(student, probs, reduction="sum")  # type: ignore[arg-type]
