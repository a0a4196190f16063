"""Health of a run: collapse, non-finite steps, and labels that must not reach the learner."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from metavpt.distributed import collectives
from metavpt.errors import MetaVPTError, NonFiniteError
from metavpt.hypergradients import params, trees
from metavpt.training import checkpoint
from metavpt.training.strategy import Proposal, Strategy

DOMINANT_SHARE, DOMINANT_UPDATES = 0.95, 20  # of the regularizer in the designer's gradient
FAILURE_FILE = "failure.pt"  # in the folder of the run


class HealthMetric(NamedTuple):
    """A number with a healthy range, and what to change otherwise.

    It is healthy within [low, high] and above the share `keep` of its first value.
    """

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
        self.num_dominated = 0  # updates in a row; stays at the limit once the warning is given

    def check_regularizer(self, record: Mapping[str, float]) -> str | None:
        """Return a warning, once, where the designer has long followed its regularizer alone.

        Args:
            record: What the strategy measured in this step; not every one is a designer update.
        """
        share = record.get("regularizer_share")
        if share is None or self.num_dominated >= DOMINANT_UPDATES:
            return None
        self.num_dominated = self.num_dominated + 1 if share > DOMINANT_SHARE else 0
        if self.num_dominated < DOMINANT_UPDATES:
            return None
        return (
            f"the regularizer made more than {DOMINANT_SHARE:.0%} of the designer's gradient in "
            f"{DOMINANT_UPDATES} updates in a row (regularizer_share {share:.3f}): the feedback "
            "hardly steers; lower the designer's regularizer weights (designer.*_weight)"
        )

    def bounds(self, metrics: Mapping[str, HealthMetric]) -> dict[str, list[float | None]]:
        """Return the healthy range [low, high] of each metric, None where it has no such end."""
        found: dict[str, list[float | None]] = {}
        for name, metric in metrics.items():
            kept = metric.keep * self.first.get(name, metric.value) if metric.keep else -math.inf
            ends = (max(metric.low, kept), metric.high)
            found[name] = [end if math.isfinite(end) else None for end in ends]
        return found

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
        """Return the first values."""
        return {"first": dict(self.first), "num_dominated": self.num_dominated}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.first = dict(state["first"])
        self.num_dominated = state.get("num_dominated", 0)


class Spread(NamedTuple):
    """Entropy of distributions p_i over K outcomes, in units of log K.

    entropy = mean_i H(p_i) and information = H(mean_i p_i) - entropy. Information is what the
    outcome reveals about i, at most log N for N distributions. It vanishes in both collapses: all
    p_i on one outcome (entropy 0), and all p_i uniform (entropy 1).
    """

    entropy: float
    information: float

    @classmethod
    def of(cls, probs: Tensor) -> "Spread":
        """Compute the entropies of probabilities (N, K)."""
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
        "the features lose their rank; lower trainer.optimizer.lr, raise problem.teacher_momentum, "
        "or give problem.terms koleo a weight",
        keep=0.3,
    )


def outcome_signs(probs: Tensor) -> dict[str, HealthMetric]:
    """Of a teacher's probabilities of prototypes (N, K)."""
    spread = Spread.of(probs)
    uniform = "all images get the same even answer; lower problem.teacher_temperature"
    single = (
        "all images get the same prototype; set problem.targets=sinkhorn, "
        "or raise problem.teacher_temperature"
    )
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
    knob = (
        "the designer hides nearly everything; raise designer.keep or designer.sparsity_weight, "
        "or lower strategy.optimizer.lr"
    )
    return {"hidden_share": HealthMetric(at_end(-torch.cat(kept), 0.0), knob, high=0.95)}


def gate_signs(gate: Tensor, max_gate: float) -> dict[str, HealthMetric]:
    """Of gates in [0, max_gate]."""
    knob = (
        "nearly every gate is at its limit; lower strategy.optimizer.lr or raise "
        "designer.excess_weight"
    )
    return {"open_gates": HealthMetric(at_end(gate, max_gate), knob, high=0.95)}


class Failures:
    """Counts skipped learner steps and designer updates in a row, and ends the run at `limit`.

    Before a step that may be the last one allowed, the whole state is kept in memory; with limit 1
    that is every step. It is written to failure.pt with the task, from which `python -m
    metavpt.debug` runs the step again.
    """

    def __init__(self, limit: int, folder: Path) -> None:
        self.limit, self.folder = limit, folder
        self.steps = 0
        self.updates = 0
        self._before: dict[str, Any] | None = None

    def prepare(self, state: Callable[[], dict[str, Any]]) -> None:
        """Before a step; `state` gives what a checkpoint would hold."""
        worst = max(self.steps, self.updates)
        self._before = (
            {"random": checkpoint.random_state(), "trainer": copy.deepcopy(state())}
            if worst + 1 >= self.limit
            else None
        )

    def count_update(self, record: dict[str, float], task: Any) -> None:
        """What the strategy measured; a designer update that was skipped says so in there."""
        if record:
            self.updates = self.updates + 1 if "skipped_updates" in record else 0
        if self.updates >= self.limit:
            self._end(
                "the feedback loss, its hypergradient or the designer's step was not finite for "
                f"{self.updates} updates in a row; "
                "lower strategy.optimizer.lr or look at the labelled data",
                task,
            )

    def count_step(self, task: Any, loss: Tensor, grad_norm: Tensor) -> None:
        """A step of the learner that was skipped."""
        self.steps += 1
        if self.steps >= self.limit:
            self._end(
                "the pretraining loss or its gradient was not finite for "
                f"{self.steps} steps in a row; "
                "lower the learning rate (trainer.optimizer.lr) or look at the data",
                task,
                loss=float(loss),
                grad_norm=float(grad_norm),
            )

    def _end(self, message: str, task: Any, **values: float) -> None:
        if self._before is not None and collectives.rank() == 0:
            kept = [tensor.detach().cpu().clone() for tensor in trees.tensors(task)]
            self.folder.mkdir(parents=True, exist_ok=True)
            checkpoint.write(
                self.folder / FAILURE_FILE, {**self._before, "task": kept, "values": values}
            )
            message += f"; python -m metavpt.debug run={self.folder} runs the last one again "
            message += "and shows where it begins"
        raise NonFiniteError(message)

    @property
    def in_a_row(self) -> str | None:
        """What is being counted at the moment; None while everything is finite."""
        if self.steps:
            return f"{self.steps} steps in a row were skipped as not finite"
        if self.updates:
            return f"{self.updates} designer updates in a row were skipped as not finite"
        return None

    def state_dict(self) -> dict[str, int]:
        """Return the counts."""
        return {"steps": self.steps, "updates": self.updates}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore what `state_dict` returned."""
        self.steps, self.updates = state["steps"], state["updates"]


def check_labels(strategy: Strategy, proposal: Proposal) -> None:
    """Raise MetaVPTError for a loss on labels that the strategy does not declare."""
    if proposal.labelled_loss is not None and not getattr(strategy, "trains_on_labels", False):
        raise MetaVPTError(
            f"{type(strategy).__name__}.next_task proposes a labelled_loss: labels would train the "
            "learner itself; a control that does so on purpose sets trains_on_labels = True"
        )


@contextmanager
def untouched(learner: nn.Module, who: str) -> Iterator[None]:
    """Check that the block does not change the learner.

    The gradients must be None before it. The check has no cost: it reads whether gradients exist,
    and torch's count of writes to a tensor. A write through `.data` is not counted; only a
    comparison of the values would find it.

    Args:
        learner: The learner.
        who: What runs in the block, for the error.

    Raises:
        MetaVPTError: The block wrote to a parameter or left a gradient in `.grad`.
    """
    live = params.named(learner)
    versions = [p._version for p in live.values()]
    yield
    for (name, p), version in zip(live.items(), versions, strict=True):
        if p.grad is not None:
            raise MetaVPTError(
                f"{who} left a gradient in learner.{name}.grad, so labels would reach the learner; "
                "take gradients with torch.autograd.grad, or of theta as it is given to the loss"
            )
        if p._version != version:
            raise MetaVPTError(
                f"{who} wrote to learner.{name}: labels may reach the learner through tasks only; "
                "do not change its parameters"
            )
