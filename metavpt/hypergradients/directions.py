"""From the feedback gradient g_down to the direction w of the mixed product.

V = <g_down, g_pre> is the drop of the feedback loss per unit of learning rate, to first order
(V-Pretraining, section 3). A direction returns the detached w with dV/dphi = d<w, g_pre>/dphi, so
every variant of the value costs the same single product.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from typing_extensions import override

from metavpt.errors import MetaVPTError
from metavpt.hypergradients import params
from metavpt.hypergradients.optimizer_updates import Update, first_order_value, step_length
from metavpt.hypergradients.params import Params


class Aim(NamedTuple):
    """Where to take the product, and what the value is relative to.

    Attributes:
        w: The direction of the product.
        value: V. None: V = <w, g_pre>.
        unit: |g_down| times the length of the step that V is the drop in, see `Hypergradient`.
            None: the step is g_pre, so |w| |g_pre|.
    """

    w: Params
    value: Tensor | None = None
    unit: float | None = None


class Direction(Protocol):
    """A map from g_down to w. It may need the pretraining gradient or the learner's optimizer."""

    @property
    def needs_g_pre(self) -> bool:
        """Return whether the direction depends on g_pre."""
        ...

    @property
    def needs_update(self) -> bool:
        """Return whether the direction depends on the learner's optimizer."""
        ...

    def __call__(self, g_down: Params, g_pre: Params | None, update: Update | None) -> Aim:
        """Compute the direction.

        Args:
            g_down: The feedback gradient.
            g_pre: The pretraining gradient. None unless needed.
            update: The step of the learner's optimizer. None unless needed.
        """
        ...


@dataclass(frozen=True)
class Dot:
    """V = <g_down, g_pre>, w = g_down: the value of a plain gradient step."""

    needs_g_pre = False
    needs_update = False

    def __call__(self, g_down: Params, g_pre: Params | None, update: Update | None = None) -> Aim:
        """Return w = g_down."""
        return Aim(g_down)


@dataclass(frozen=True)
class Cosine:
    """V = cos(g_down, g_pre), which does not depend on the norm of either gradient.

    w = (g_down/|g_down| - V g_pre/|g_pre|) / |g_pre|.
    """

    needs_g_pre = True
    needs_update = False

    def __call__(self, g_down: Params, g_pre: Params | None, update: Update | None = None) -> Aim:
        """Compute w and V.

        Raises:
            MetaVPTError: `g_pre` is None.
        """
        if g_pre is None:
            raise MetaVPTError("Cosine: needs the pretraining gradient g_pre")
        tiny = torch.finfo(next(iter(g_pre.values())).dtype).tiny
        down = params.scale(g_down, 1 / params.norm(g_down).clamp_min(tiny))
        size = params.norm(g_pre).clamp_min(tiny)
        cosine = params.dot(down, g_pre) / size
        w = params.scale(params.add(down, g_pre, alpha=-cosine / size), 1 / size)
        return Aim(w, cosine, unit=1.0)


@dataclass(frozen=True)
class AdamAware:
    """V = <g_down, theta - theta'> for the step theta -> theta' of the learner's optimizer.

    w = dV/dg_pre. This is the first-order value under Adam's moments, weight decay and gradient
    clipping, where V-Pretraining uses the plain inner product.
    """

    needs_g_pre = True
    needs_update = True

    def __call__(self, g_down: Params, g_pre: Params | None, update: Update | None = None) -> Aim:
        """Compute w and V.

        Raises:
            MetaVPTError: `g_pre` or `update` is None.
        """
        if g_pre is None or update is None:
            raise MetaVPTError(
                "AdamAware: needs the pretraining gradient and the learner's optimizer; pass the "
                "latter to the estimator as update="
            )
        w, value = first_order_value(update, g_pre, g_down)
        with torch.no_grad():
            after, _ = update.rule.step(update.theta, update.state, g_pre)
        length = step_length(after, *update, num_steps=1, g_down=g_down)
        return Aim(w, value, unit=float(params.norm(g_down)) * length)


class Rescaled(ABC):
    """The direction `of` for a rescaled g_down.

    g_down does not depend on phi, so w stays the derivative of the value: dV/dphi = d<w,
    g_pre>/dphi.
    """

    of: Direction

    @property
    def needs_g_pre(self) -> bool:
        """Return whether `of` depends on g_pre."""
        return self.of.needs_g_pre

    @property
    def needs_update(self) -> bool:
        """Return whether `of` depends on the optimizer."""
        return self.of.needs_update

    @abstractmethod
    def factor(self, length: Tensor) -> Tensor:
        """Return the factor for a g_down of this length."""

    def __call__(self, g_down: Params, g_pre: Params | None, update: Update | None = None) -> Aim:
        """Compute the direction of the rescaled g_down."""
        factor = self.factor(params.norm(g_down))
        return self.of(params.scale(g_down, factor), g_pre, update)


@dataclass(frozen=True)
class Normalized(Rescaled):
    """The direction `of` for g_down scaled to unit length, so that its norm has no effect."""

    of: Direction = field(default_factory=Dot)

    @override
    def factor(self, length: Tensor) -> Tensor:
        return 1 / length.clamp_min(torch.finfo(length.dtype).tiny)


@dataclass(frozen=True)
class Clipped(Rescaled):
    """The direction `of` for g_down clipped to `max_norm`, so that no single batch dominates."""

    max_norm: float
    of: Direction = field(default_factory=Dot)

    def __post_init__(self) -> None:
        if not self.max_norm > 0:
            raise MetaVPTError(f"max_norm={self.max_norm}: must be positive")

    @override
    def factor(self, length: Tensor) -> Tensor:
        return self.max_norm / length.clamp_min(self.max_norm)
