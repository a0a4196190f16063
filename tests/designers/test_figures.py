import numpy as np
import torch

from metavpt.designers import figures


def test_photo_takes_bytes_and_floats() -> None:
    floats = torch.tensor([0.0, 0.5, 1.5]).view(3, 1, 1)
    assert figures.photo(floats).tolist() == [[[0, 128, 255]]]
    assert figures.photo((floats * 100).to(torch.uint8)).tolist() == [[[0, 50, 150]]]


def test_grid_puts_white_between_pictures() -> None:
    black = np.zeros((2, 3, 3), dtype=np.uint8)
    canvas = figures.grid([[black, black], [black]], gap=1)
    assert canvas.shape == (5, 7, 3)
    assert (canvas[2] == 255).all()
    assert (canvas[:, 3] == 255).all()
    assert (canvas[:2, :3] == 0).all()
    assert (canvas[3:, 4:] == 255).all()  # the second row has one picture


def test_titles_and_legend_leave_the_picture_as_it_is() -> None:
    picture = np.random.default_rng(0).integers(0, 255, (20, 90, 3), dtype=np.uint8)
    shown = figures.titled(picture, ["image", "a title that does not fit", "z"])
    assert shown.dtype == np.uint8
    assert (shown[-20:] == picture).all()
    band = shown[: figures.LINE]
    for i in range(3):  # each title stands over its own column
        assert (band[:, 30 * i : 30 * (i + 1)] < 128).any()
    entries = [
        (np.array([200, 10, 10], np.uint8), "wall"),
        (np.array([10, 200, 10], np.uint8), "x"),
    ]
    legend = figures.with_legend(picture, entries)
    assert (legend[:20] == picture).all()
    for colour, _ in entries:
        assert (legend[20:] == colour).all(axis=2).any()


def test_a_long_legend_takes_more_lines() -> None:
    picture = np.zeros((20, 120, 3), np.uint8)
    entry = (np.array([200, 10, 10], np.uint8), "a name")
    one, many = (figures.with_legend(picture, [entry] * count) for count in (1, 9))
    assert len(many) > len(one)
    assert many.shape[1] == one.shape[1] == 120
