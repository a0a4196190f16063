"""States of the trunk for inputs that come again: computed once while the trunk stays as it is."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.func import functional_call

from metavpt.hypergradients import params
from metavpt.hypergradients.params import Params


class _Kept(NamedTuple):
    states: list[Any]
    weights: Params | None  # of the trunk when they were computed; None: it is frozen
    versions: list[Any]  # of a frozen trunk's tensors, which a checkpoint or another dtype changes


class TrunkStates:
    """A cache of trunk states.

    Args:
        tolerance: States are kept while |theta - theta_then| <= tolerance |theta_then| over the
            parameters of the trunk. Those of a frozen trunk are always kept.
    """

    def __init__(self, tolerance: float = 0.0) -> None:
        self.tolerance = tolerance
        self._kept: dict[Hashable, _Kept] = {}

    @torch.no_grad()
    def __call__(
        self,
        trunk: nn.Module,
        theta: Params,
        key: Hashable | None,
        inputs: Callable[[], Sequence[Any]],
    ) -> list[Any]:
        """Return the states (`Hidden`) of some inputs, one for each microbatch.

        Args:
            trunk: Of the learner.
            theta: Its trainable parameters, none if it is frozen.
            key: Names the inputs. None: their states are not kept.
            inputs: Reads what the trunk takes: images, normalised, (B, 3, H, W) each, or token
                batches. Called where no states are kept.
        """
        versions = None if theta else [(p._version, p.dtype, p.device) for p in trunk.parameters()]
        kept = None if key is None else self._kept.get(key)
        if kept is not None and self._holds(kept, theta, versions):
            return kept.states
        states = [functional_call(trunk, theta, (part,)) for part in inputs()]
        if key is not None and versions is not None:
            self._kept[key] = _Kept(states, None, versions)
        elif key is not None and self.tolerance > 0:
            self._kept[key] = _Kept(states, params.clone(theta), [])
        return states

    def _holds(self, kept: _Kept, theta: Params, frozen: list[Any] | None) -> bool:
        if kept.weights is None:
            return frozen == kept.versions
        return self.tolerance > 0 and params.drift(theta, kept.weights) <= self.tolerance
