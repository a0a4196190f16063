"""What tasks and batches hold: tensors and numbers in containers, named tuples and dataclasses."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map


def map_tensors(fn: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """`tree` with `fn` of every tensor in its containers and dataclasses."""

    def leaf(value: Any) -> Any:
        if isinstance(value, Tensor):
            return fn(value)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = {
                field.name: map_tensors(fn, getattr(value, field.name))
                for field in dataclasses.fields(value)
                if field.init
            }
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
        return (
            a.shape == b.shape
            and a.dtype == b.dtype
            and torch.equal(a.nan_to_num(), b.nan_to_num())
        )
    if isinstance(a, (bool, int, float, str)) and isinstance(b, (bool, int, float, str)):
        return a == b or (a != a and b != b)  # NaN is the same as NaN
    return type(a) is type(b)


def tensors(tree: Any) -> list[Tensor]:
    """Those that `map_tensors` calls its function on, in that order."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(note, tree)
    return found


def is_finite(tree: Any) -> bool:
    """Whether no tensor in `tree` holds NaN or an infinity."""
    return all(
        bool(torch.isfinite(tensor).all()) for tensor in tensors(tree) if tensor.is_floating_point()
    )
