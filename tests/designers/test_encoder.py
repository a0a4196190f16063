import pytest
import torch

from metavpt.designers.encoder import ImageEncoder, zero_linear
from metavpt.errors import MetaVPTError


@pytest.mark.parametrize("size", [(1, 1), (3, 7), (24, 32), (50, 40)])
def test_images_of_any_size_are_read_each_alone(size: tuple[int, int]) -> None:
    made = ImageEncoder(width=16, depth=3, size=16).double()
    x = torch.randn(3, 3, *size, dtype=torch.float64)
    features = made(x)
    assert features.shape == (3, 16)
    torch.testing.assert_close(made(x[1:2]), features[1:2], atol=1e-12, rtol=0)
    assert not torch.allclose(features[0], features[1])
    assert not list(made.buffers())


def test_zero_linear_is_zero_and_trainable() -> None:
    layer = zero_linear(4, 2)
    out = layer(torch.randn(3, 4))
    assert (out == 0).all()
    assert torch.autograd.grad(out.sum(), layer.weight)[0].abs().sum() > 0


def test_what_does_not_divide_is_refused() -> None:
    with pytest.raises(MetaVPTError, match="ImageEncoder"):
        ImageEncoder(width=30, depth=3)
    with pytest.raises(MetaVPTError, match="ImageEncoder"):
        ImageEncoder(width=32, depth=3, size=4)
