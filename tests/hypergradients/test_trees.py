from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metavpt.hypergradients import trees


@dataclass(frozen=True)
class Part:
    x: Tensor
    name: str = "part"


class Task(NamedTuple):
    parts: list[Part]
    weight: Tensor
    seed: int


TASK = Task([Part(torch.ones(2)), Part(torch.zeros(1))], torch.full((3,), 2.0), 7)


def test_map_tensors_reaches_containers_and_dataclasses() -> None:
    doubled: Any = trees.map_tensors(lambda x: 2 * x, TASK)
    assert isinstance(doubled, Task)
    assert torch.equal(doubled.parts[0].x, torch.full((2,), 2.0))
    assert torch.equal(doubled.weight, torch.full((3,), 4.0))
    assert (doubled.parts[0].name, doubled.seed) == ("part", 7)
    assert torch.equal(TASK.weight, torch.full((3,), 2.0))


def test_tensors_and_leaves_are_in_order() -> None:
    assert [len(tensor) for tensor in trees.tensors(TASK)] == [2, 1, 3]
    assert [leaf for leaf in trees.leaves(TASK) if not isinstance(leaf, Tensor)] == [
        "part",
        "part",
        7,
    ]


def test_same_is_bit_for_bit() -> None:
    nan = torch.tensor([float("nan"), 1.0])
    assert trees.same(nan, nan.clone())
    assert not trees.same(nan, torch.tensor([float("nan"), 1.0 + 1e-6]))
    assert not trees.same(torch.ones(1), torch.ones(1, dtype=torch.float64))
    assert not trees.same(torch.ones(1), torch.ones(1, 1))
    assert trees.same(float("nan"), float("nan"))
    assert not trees.same(1, 2)


def test_is_finite_looks_into_dataclasses() -> None:
    assert trees.is_finite(TASK)
    assert not trees.is_finite(TASK._replace(parts=[Part(torch.tensor([float("inf")]))]))
    assert trees.is_finite([torch.tensor([1], dtype=torch.int64)])
