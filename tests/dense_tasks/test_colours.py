"""Colours of maps."""

import numpy as np
import torch

from metavpt.dense_tasks import colours


def test_colour_clips_to_the_range_and_greys_what_is_not_finite() -> None:
    values = torch.tensor([[-1.0, 0.0, 1.0, 2.0, float("nan"), float("inf")]])
    pixels = colours.colour(values, 0.0, 1.0, "gray")
    assert pixels.dtype == np.uint8
    assert pixels[0, :, 0].tolist() == [0, 0, 255, 255, 128, 128]


def test_three_maps_are_red_green_and_blue() -> None:
    values = torch.tensor([-2.0, 0.0, 3.0]).view(3, 1, 1)
    assert colours.rgb(values, -1.0, 1.0).tolist() == [[[0, 127, 255]]]


def test_classes_have_colours_of_their_own() -> None:
    pixels = colours.classes(torch.tensor([[0, 1, 0, 255]]), num_classes=2)[0]
    assert (pixels[0] == pixels[2]).all()
    assert (pixels[0] != pixels[1]).any()
    assert (pixels[3] == 128).all()
