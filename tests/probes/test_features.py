from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from metavpt.errors import MetaVPTError
from metavpt.probes.features import SlidingWindow, starts

P = 4  # pixels of a patch


def draw(height: int, width: int) -> Tensor:
    return torch.randn(
        2, 3, height, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )


def local(images: Tensor) -> Tensor:
    """Features of a patch that depend on it alone."""
    return F.avg_pool2d(images, P)


def centred(images: Tensor) -> Tensor:
    """Features that depend on all of the window."""
    return local(images) - images.mean(dim=(2, 3), keepdim=True)


@pytest.mark.parametrize("size", [(24, 36), (12, 12), (40, 44)])
@pytest.mark.parametrize("window", [(12, 12), (8, 20), (4, 4), (400, 400)])
def test_features_without_context_are_those_of_the_whole(
    size: tuple[int, int], window: tuple[int, int]
):
    images = draw(*size)
    torch.testing.assert_close(SlidingWindow(local, window, P)(images), local(images))


def test_overlaps_are_averaged_as_in_the_plain_loop():
    """Windows of 12 pixels, 8 apart, in 20 x 28; a linear head commutes with the average."""
    images = draw(20, 28)
    total, count = (
        torch.zeros(2, 3, 5, 7, dtype=torch.float64),
        torch.zeros(5, 7, dtype=torch.float64),
    )
    for top in (0, 8):
        for left in (0, 8, 16):
            features = centred(images[:, :, top : top + 12, left : left + 12])
            for i in range(3):
                for j in range(3):
                    total[:, :, top // P + i, left // P + j] += features[:, :, i, j]
                    count[top // P + i, left // P + j] += 1
    torch.testing.assert_close(SlidingWindow(centred, (12, 12), P)(images), total / count)
    assert int(count.max()) == 4


@pytest.mark.parametrize(
    ("length", "window"), [(43, 32), (32, 32), (100, 32), (7, 3), (5, 1), (64, 37)]
)
def test_windows_cover_everything_and_overlap_by_a_third(length: int, window: int):
    first = starts(length, window)
    assert (first[0], first[-1]) == (0, length - window)
    assert all(0 <= b - a <= max(1, 2 * window // 3) for a, b in pairwise(first))
    assert {patch for start in first for patch in range(start, start + window)} == set(
        range(length)
    )


def test_the_windows_of_the_paper():
    """512 x 683 in windows of 512 with patches of 16: steps of 336 pixels, mmsegmentation's 341."""
    assert (starts(32, 32), starts(42, 32)) == ([0], [0, 10])
    assert starts(100, 32) == [0, 21, 42, 63, 68]


@pytest.mark.parametrize("size", [(10, 12), (12, 2), (0, 4)])
def test_a_window_that_patches_do_not_divide_is_named(size: tuple[int, int]):
    with pytest.raises(
        MetaVPTError, match=f"probe_window={size[0]}x{size[1]}: patches of 4 pixels"
    ):
        SlidingWindow(local, size, P)
