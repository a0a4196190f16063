"""Betty's hypergradients (Choe et al., 2023) as estimators. Fields and defaults are Betty's."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from metavpt.errors import MetaVPTError
from metavpt.hypergradients import params
from metavpt.hypergradients.estimators import (
    Hypergradient,
    InnerLoss,
    OuterLoss,
    downstream,
    finite,
)
from metavpt.hypergradients.mixed_products import value_and_gradient
from metavpt.hypergradients.optimizer_updates import Adam, Update
from metavpt.hypergradients.params import Params
from metavpt.interop import peer


@dataclass(frozen=True)
class Betty(ABC):
    """-d<w, g_pre>/dphi on one batch, with the w that betty.hypergradient makes of g_down.

    Betty sees one loss, so trunk and tail run at every use. A designer parameter that the loss does
    not reach can be a silent zero.
    """

    num_batches = 1
    needs_update = False
    method = ""

    @property
    @abstractmethod
    def grad_evals(self) -> int:
        """Return its cost in addition to that of g_down."""

    def __call__(
        self,
        inner_losses: Sequence[InnerLoss],
        outer_loss: OuterLoss,
        theta: Params,
        phi: Params,
        *,
        update: Update | None = None,
        start: Params | None = None,
    ) -> Hypergradient:
        """Estimate the hypergradient on one batch."""
        jvp, config = (
            peer("betty.hypergradient").jvp_fn_mapping[self.method],
            peer("betty.configs").Config(type=self.method, **asdict(self)),
        )
        (inner,) = inner_losses
        feedback_loss, g_down = downstream(outer_loss, theta)
        # A clone, since Betty changes theta in place.
        theta, phi = params.leaves(params.clone(theta)), params.leaves(phi)
        # Betty keeps <w, g_pre> to itself. It is the derivative by a factor on the loss, which
        # rides along with phi.
        factor = torch.ones_like(
            torch.stack([v.sum() for v in g_down.values()]).sum()
        ).requires_grad_()
        lower = Level(
            list(theta.values()),
            config,
            lambda: factor * inner(phi)(theta),
            self.adam_state(inner, theta, phi, update),
        )
        upper = Level([factor, *phi.values()], config)
        with torch.enable_grad(), self.attention():
            minus_value, *by_phi = jvp(list(g_down.values()), lower, upper, False)
        diagnostics = {"feedback_loss": feedback_loss, "g_down_norm": float(params.norm(g_down))}
        return finite(
            Hypergradient(
                dict(zip(phi, by_phi, strict=True)),
                -float(minus_value),
                1 + self.grad_evals,
                diagnostics,
                unit=diagnostics["g_down_norm"],  # that of Darts; Betty keeps other w to itself
                per_gradient=True,
            )
        )

    def adam_state(
        self, inner: InnerLoss, theta: Params, phi: Params, update: Update | None
    ) -> list[dict[str, Any]] | None:
        """Return the state of the learner's Adam that Betty reads; only `Sama` reads any."""
        return None

    def attention(self) -> Any:
        """Return the context in which attention can be differentiated as the method needs."""
        return nullcontext()


@dataclass(frozen=True)
class Darts(Betty):
    """w = g_down by a central difference with eps |w| = darts_alpha.

    This is `OneStep` with a step that is not relative to theta.
    """

    darts_alpha: float = 0.01
    method = "darts"

    @property
    def grad_evals(self) -> int:
        """Return 2, for both ends of the difference."""
        return 2


@dataclass(frozen=True)
class Sama(Betty):
    """`Darts` with w = D g_down, D the derivative of Adam's step by its gradient.

    This is `OneStep(AdamAware)` without bias correction. Betty takes D from the last step of the
    learner; here it is the step on g_pre of this batch.
    """

    sama_adam_alpha: float = 1.0
    method = "sama"
    needs_update = True

    @property
    def grad_evals(self) -> int:
        """Return 3: `Darts` and the gradient for Adam's derivative."""
        return 3

    def adam_state(
        self, inner: InnerLoss, theta: Params, phi: Params, update: Update | None
    ) -> list[dict[str, Any]] | None:
        """Return the state of Adam for Betty, with the gradient of the batch."""
        if update is None:
            raise MetaVPTError("Sama: needs the learner's optimizer; pass it as `update`")
        with torch.no_grad():
            loss = inner(phi)
        g_pre = value_and_gradient(loss, theta)[1]
        _, after = update.rule.step(update.theta, update.state, g_pre)
        g_pre = update.rule.clip(g_pre)
        states = []
        for name in theta:
            rule = update.rule.of(name)
            if not isinstance(rule, Adam):
                raise MetaVPTError(
                    f"Sama: is defined for Adam and AdamW, not {type(rule).__name__}; use Darts, "
                    "which it equals for plain SGD"
                )
            states.append(
                {
                    "lr": rule.lr,
                    "betas": rule.betas,
                    "eps": rule.eps,
                    "last_grad": g_pre[name],
                    **after.moments[name],
                }
            )
        return states


@dataclass(frozen=True)
class _SecondOrder(Betty):
    """w from Hessian products in one graph of the whole loss."""

    def attention(self) -> Any:
        return sdpa_kernel(SDPBackend.MATH)  # fused attention has no second derivative


@dataclass(frozen=True)
class Neumann(_SecondOrder):
    """w = neumann_alpha sum_{k <= neumann_iterations} (I - neumann_alpha H)^k g_down.

    This is one term more than its name says.
    """

    neumann_iterations: int = 1
    neumann_alpha: float = 1.0
    method = "neumann"

    @property
    def grad_evals(self) -> int:
        """Return 2 and one for each term."""
        return 2 + self.neumann_iterations


@dataclass(frozen=True)
class ConjugateGradient(_SecondOrder):
    """w ~ H^-1 g_down by `cg_iterations` steps, without damping, tolerance or guard.

    Correct for one iteration only: Betty 0.2.1 computes the next direction from the residual before
    the step (betty #15, corrected since). With cg_alpha other than 1 it scales the curvature in the
    step but not in the residual.
    """

    cg_iterations: int = 1
    cg_alpha: float = 1.0
    method = "cg"

    @property
    def grad_evals(self) -> int:
        """Return 2 and one for each step."""
        return 2 + self.cg_iterations


class AdamOptimizer:
    """Stands for the learner's optimizer: Betty looks for "adam" in the name of its class."""


class Level:
    """The part of Betty's Problem that its functions use: parameters, loss, optimizer state."""

    paths = ()
    cur_batch = None
    _strategy = "default"
    optimizer = AdamOptimizer()

    def __init__(
        self,
        parameters: list[Tensor],
        config: Any,
        loss: Callable[[], Tensor] | None = None,
        adam: list[dict[str, Any]] | None = None,
    ) -> None:
        self._parameters, self.config, self._loss, self._adam = parameters, config, loss, adam

    def parameters(self) -> list[Tensor]:
        """Return the parameters."""
        return self._parameters

    trainable_parameters = meta_trainable_parameters = parameters

    def training_step_exec(self, batch: None) -> Tensor:
        """Return the loss."""
        if self._loss is None:
            raise MetaVPTError("Betty asked the designer for a loss: only the learner has one")
        return self._loss()

    def get_opt_state_for_param(self, p: Tensor) -> dict[str, Any]:
        """Return the optimizer's state of a parameter."""
        index = next(i for i, q in enumerate(self._parameters) if q is p)
        return (self._adam or [])[index]

    get_opt_param_group_for_param = get_opt_state_for_param
