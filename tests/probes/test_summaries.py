from typing import Any

import pytest
import torch

from metavpt.errors import MetaVPTError
from metavpt.learners.vit import Features
from metavpt.probes.summaries import SideEffects

NO_IMAGES: Any = ()


def describe(images: torch.Tensor) -> Features:
    raise NotImplementedError


class Counter:
    """Measures how often it was called, which it remembers."""

    def __init__(self, name: str) -> None:
        self.name, self.count = name, 0

    def __call__(self, describe, images) -> dict[str, float]:
        self.count += 1
        return {self.name: float(self.count)}

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]


def constant(describe, images) -> dict[str, float]:
    return {"c/one": 1.0}


def test_the_metrics_of_all_and_the_state_of_those_that_have_one() -> None:
    probes = SideEffects({"a": Counter("a/count"), "b": Counter("b/count"), "c": constant})
    assert probes(describe, NO_IMAGES) == {"a/count": 1.0, "b/count": 1.0, "c/one": 1.0}
    assert probes.state_dict() == {"a": {"count": 1}, "b": {"count": 1}}
    other = SideEffects({"a": Counter("a/count"), "b": Counter("b/count"), "c": constant})
    other.load_state_dict(probes.state_dict())
    assert (
        other(describe, NO_IMAGES)
        == probes(describe, NO_IMAGES)
        == {"a/count": 2.0, "b/count": 2.0, "c/one": 1.0}
    )
    assert SideEffects()(describe, NO_IMAGES) == {}


def test_one_name_for_two_measurements_is_an_error() -> None:
    with pytest.raises(
        MetaVPTError, match=r"problem\.probes\.b: x/count is measured by another probe"
    ):
        SideEffects({"a": Counter("x/count"), "b": Counter("x/count")})(describe, NO_IMAGES)
