import numpy as np
import pytest
import torch

from metavpt.data.frames import make_frame
from metavpt.errors import MetaVPTError

IMAGE, LABEL = np.zeros((2, 3, 3), np.uint8), np.zeros((2, 3), np.int64)


def test_unknown_depth_becomes_zero():
    depth = np.array([[np.nan, np.inf, -np.inf], [-1.0, 0.0, 2.5]])
    frame = make_frame(IMAGE, depth, LABEL, "a.mat: frame 0")
    assert frame.image.shape == (3, 2, 3)
    assert frame.image.dtype == torch.uint8
    assert frame.label.dtype == torch.int64
    torch.testing.assert_close(frame.depth, torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 2.5]]))


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_a_depth_map_without_valid_pixel_is_named(value: float):
    with pytest.raises(MetaVPTError, match=r"a\.mat: frame 7: the depth map has no valid pixel"):
        make_frame(IMAGE, np.full((2, 3), value), LABEL, "a.mat: frame 7")
