"""Copies of a problem and of its batches, so that whatever a check does, the problem given stays as it was."""

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from metavpt.problem import Problem

AnyProblem = TypeVar("AnyProblem", bound=Problem)
PLAIN = (Tensor, torch.Generator, list, dict, set)


def twin(problem: AnyProblem) -> AnyProblem:
    """A copy of `problem` with modules, tensors, containers and all else that has a state of its own; data sets and the like are shared.

    Data may fill the memory or hold open files, and no loss has business to write to it.
    """
    other = copy.copy(problem)
    memo: dict[int, Any] = {}  # one for all: what two attributes share, their copies share
    for name, value in vars(problem).items():
        if hasattr(value, "state_dict") or isinstance(value, PLAIN):
            try:
                setattr(other, name, copy.deepcopy(value, memo))
            except (TypeError, RuntimeError, AttributeError):
                continue  # holds a generator that has begun, an open file, part of a graph: nothing that could be copied
    return other


def to_double(problem: AnyProblem) -> AnyProblem:
    """A twin with every module and every tensor attribute in float64."""
    other = twin(problem)
    for name, value in list(vars(other).items()):
        if isinstance(value, nn.Module):
            value.double()
        elif isinstance(value, Tensor) and value.is_floating_point():
            setattr(other, name, value.double())
    return other


def map_tensors(fn: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """`tree` with `fn` of every tensor in its containers and dataclasses."""

    def leaf(value: Any) -> Any:
        if isinstance(value, Tensor):
            return fn(value)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = {field.name: map_tensors(fn, getattr(value, field.name)) for field in dataclasses.fields(value) if field.init}
            return dataclasses.replace(value, **fields)
        return value

    return tree_map(leaf, tree)


def leaves(tree: Any) -> Iterator[Any]:
    """What the containers and dataclasses of `tree` hold, in order."""
    for value in tree_leaves(tree):
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            for field in dataclasses.fields(value):
                yield from leaves(getattr(value, field.name))
        else:
            yield value


def same(a: Any, b: Any) -> bool:
    """Whether two values are the same bit for bit; True for what cannot be compared."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.nan_to_num(), b.nan_to_num())
    if isinstance(a, (bool, int, float, str)) and isinstance(b, (bool, int, float, str)):
        return a == b or (a != a and b != b)  # NaN is the same as NaN
    return type(a) is type(b)
