"""Copies of a problem, so that whatever a check does, the problem given stays as it was."""

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from metavpt.problem import Problem

AnyProblem = TypeVar("AnyProblem", bound=Problem)
PLAIN = (Tensor, torch.Generator, list, dict, set)


def twin(problem: AnyProblem) -> AnyProblem:
    """Copy `problem` with everything that has a state. Data sets and the like are shared.

    Data may fill the memory or hold open files, and no loss should write to it.
    """
    other = copy.copy(problem)
    memo: dict[int, Any] = {}  # one for all: what two attributes share, their copies share
    for name, value in vars(problem).items():
        if hasattr(value, "state_dict") or isinstance(value, PLAIN):
            try:
                setattr(other, name, copy.deepcopy(value, memo))
            except (TypeError, RuntimeError, AttributeError):
                # holds a generator that has begun, an open file, part of a graph: nothing that
                # could be copied
                continue
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
