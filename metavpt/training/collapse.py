"""Collapse, watched at every probe: features that lose their rank, outputs that are all alike, designers at the end of their range."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class HealthMetric(NamedTuple):
    """A number, healthy within [low, high] and while it has at least the share `keep` of what it was at first; and what to turn if not."""

    value: float
    knob: str
    low: float = -math.inf
    high: float = math.inf
    keep: float = 0.0


class Monitored(Protocol):
    """A problem with health metrics, which show a collapse."""

    def health_metrics(self) -> "dict[str, HealthMetric]":
        """Measure the learner; cheap enough for every probe."""
        ...


class Watch:
    """Says which signs are not healthy. What they were at first is part of a checkpoint."""

    def __init__(self) -> None:
        self.first: dict[str, float] = {}

    def __call__(self, signs: Mapping[str, HealthMetric]) -> list[str]:
        """A line for each: what it is, what it was at first, which option to turn."""
        found = []
        for name, sign in signs.items():
            first = self.first.setdefault(name, sign.value)
            healthy = sign.low <= sign.value <= sign.high and sign.value >= sign.keep * first
            if not healthy:  # NaN too
                found.append(
                    f"{name} is {sign.value:.3g}, at first it was {first:.3g}: {sign.knob}"
                )
        return found

    def state_dict(self) -> dict[str, Any]:
        return {"first": dict(self.first)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.first = dict(state["first"])


class Spread(NamedTuple):
    """Of distributions p_i over K outcomes, in units of log K: entropy = mean_i H(p_i), information = H(mean_i p_i) - entropy.

    Information is what the outcome tells about i, at most log N of N distributions. It vanishes in both collapses: all p_i on one outcome,
    with entropy 0, and all p_i uniform, with entropy 1.
    """

    entropy: float
    information: float

    @classmethod
    def of(cls, probs: Tensor) -> "Spread":
        """probs (N, K)."""
        p = probs.double()
        unit = math.log(p.shape[1])
        entropy = float(torch.special.entr(p).sum(dim=1).mean()) / unit
        return cls(entropy, float(torch.special.entr(p.mean(dim=0)).sum()) / unit - entropy)


def at_end(values: Tensor, end: float) -> float:
    """The share of `values` that lie at `end`, or beyond it."""
    return float((values >= end).double().mean())


def rank_sign(rank: float) -> HealthMetric:
    """Of the effective rank of features."""
    return HealthMetric(
        rank,
        "the features lose their rank; lower trainer.optimizer.lr, raise problem.teacher_momentum, or give problem.terms koleo a weight",
        keep=0.3,
    )


def outcome_signs(probs: Tensor) -> dict[str, HealthMetric]:
    """Of a teacher's probabilities of prototypes (N, K)."""
    spread = Spread.of(probs)
    uniform = "all images get the same even answer; lower problem.teacher_temperature"
    single = "all images get the same prototype; take problem.targets=sinkhorn, or raise problem.teacher_temperature"
    return {
        "output_entropy": HealthMetric(spread.entropy, ""),
        "output_information": HealthMetric(
            spread.information, uniform if spread.entropy > 0.5 else single, keep=0.1
        ),
    }


def mask_signs(masks: Iterable[Tensor | None]) -> dict[str, HealthMetric]:
    """Of masks in [0, 1] that keep a pixel with 1."""
    kept = [mask.flatten() for mask in masks if mask is not None]
    if not kept:
        return {}
    knob = "the designer hides nearly everything; raise designer.keep or designer.sparsity_weight, or lower strategy.optimizer.lr"
    return {"hidden_share": HealthMetric(at_end(-torch.cat(kept), 0.0), knob, high=0.95)}


def gate_signs(gate: Tensor, max_gate: float) -> dict[str, HealthMetric]:
    """Of gates in [0, max_gate]."""
    knob = "nearly every gate is as far open as it goes; lower strategy.optimizer.lr or raise designer.excess_weight"
    return {"open_gates": HealthMetric(at_end(gate, max_gate), knob, high=0.95)}
