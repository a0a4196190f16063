"""Directions of metrics are stated and looked up, never guessed."""

import pytest

from metavpt.errors import MetaVPTError
from metavpt.metrics import check_directions, sign

STATED = check_directions({"ridge/rmse": "lower", "miou": "higher"}, "metrics")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ridge/rmse", -1),
        ("miou", 1),
        ("linear/miou", 1),  # an entry without a `/` holds for every head
        ("rmse", 0),  # an entry with one does not
        ("knn/accuracy", 0),  # a telling name is no statement
        ("loss", 0),
    ],
)
def test_sign_is_what_was_stated(name, expected):
    assert sign(name, STATED) == expected


def test_sign_prefers_the_full_name():
    assert sign("odd/loss", {"odd/loss": "higher", "loss": "lower"}) == 1


def test_check_directions_names_the_key_and_the_choices():
    with pytest.raises(MetaVPTError, match=r"^metrics\.loss=down: write lower or higher"):
        check_directions({"miou": "higher", "loss": "down"}, "metrics")
