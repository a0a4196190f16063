import math

import pytest
import torch
from torch import Tensor

from metavpt.errors import MetaVPTError
from metavpt.objectives.koleo import koleo_loss


def features() -> Tensor:
    return torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def naive(x: Tensor) -> list[float]:
    """-log of the distance to the nearest other point on the sphere, pair by pair."""
    points = [[v / math.sqrt(sum(u * u for u in row)) for v in row] for row in x.tolist()]
    return [
        -math.log(min(math.dist(p, q) for j, q in enumerate(points) if j != i))
        for i, p in enumerate(points)
    ]


def test_loss_equals_the_papers_formula() -> None:
    x = features()
    torch.testing.assert_close(
        koleo_loss(x, reduction="none"),
        torch.tensor(naive(x), dtype=torch.float64),
        atol=1e-13,
        rtol=0,
    )
    assert koleo_loss(x).item() == pytest.approx(sum(naive(x)) / 6, abs=1e-13)


def test_derivatives_of_first_and_second_order() -> None:
    x = features().requires_grad_()
    assert torch.autograd.gradcheck(koleo_loss, (x,))
    assert torch.autograd.gradgradcheck(koleo_loss, (x,))


def test_duplicates_are_finite_to_the_second_order() -> None:
    x = features()
    x[1] = x[0]
    x.requires_grad_()
    terms = koleo_loss(x, reduction="none")
    assert terms[0].item() == pytest.approx(-math.log(1e-8), rel=1e-9)
    (gradient,) = torch.autograd.grad(terms.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), x)
    assert gradient.isfinite().all()
    assert second.isfinite().all()


def test_half_precision_is_summed_in_float32() -> None:
    half = features().half()
    assert koleo_loss(half).dtype == torch.float32
    torch.testing.assert_close(
        koleo_loss(half).double(), koleo_loss(half.double()), atol=1e-4, rtol=0
    )


def test_one_feature_has_no_neighbour() -> None:
    with pytest.raises(MetaVPTError, match="at least 2 rows"):
        koleo_loss(features()[:1])
    with pytest.raises(MetaVPTError, match="reduction"):
        koleo_loss(features(), reduction="sum")  # type: ignore[arg-type]
