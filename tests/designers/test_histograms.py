import numpy as np
import torch

from metavpt.designers.histograms import histograms


def test_a_panel_for_every_row_and_column() -> None:
    values = torch.randn(50)
    one = histograms({"": {"a": (values, values)}})
    four = histograms(
        {"x": {"a": (values, values), "b": (values, values + 1)}, "y": {"b": (values, values)}}
    )
    assert one.dtype == four.dtype == np.uint8
    assert one.shape[2] == 3
    assert four.shape[0] > one.shape[0]
    assert four.shape[1] > one.shape[1]


def test_what_moved_shows() -> None:
    values = torch.linspace(0, 1, 100)
    same, moved = (histograms({"": {"a": (values, now)}}) for now in (values, values / 2))
    assert (same != moved).any()
    assert np.array_equal(same, histograms({"": {"a": (values, values)}}))


def test_columns_without_values_or_spread_are_drawn() -> None:
    assert (
        histograms(
            {"": {"a": (torch.empty(0), torch.empty(0)), "b": (torch.ones(3), torch.ones(3))}}
        ).size
        > 0
    )
