"""Checks of the losses that an estimator is called on, made once, at its first call.

A loss that forgets theta gives a silent zero. A loss that is not pure, by dropout or by statistics
that move, gives noise: estimators evaluate it many times and compare the values.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.module import register_module_forward_pre_hook

from metavpt.errors import ImpureLossError
from metavpt.hypergradients import params
from metavpt.hypergradients.mixed_products import Loss, check_reached
from metavpt.hypergradients.params import Params
from metavpt.profiling import uncounted

ROUNDING = 1e-5  # relative; on a GPU some kernels add in another order each time
OFF = "if it is meant to be so, pass check_losses=False to the estimator"


@dataclass(frozen=True)
class ChecksLosses:
    """Base of estimators that check their losses at their first call.

    Args:
        check_losses: whether to. It costs two evaluations of each loss, without a backward pass.
    """

    check_losses: bool = field(default=True, kw_only=True)
    _has_checked: list[bool] = field(default_factory=list, init=False, repr=False, compare=False)

    def check_once(
        self,
        inner_losses: Sequence[Callable[[Params], Loss]],
        outer_loss: Loss,
        theta: Params,
        phi: Params,
    ) -> None:
        """Check the first inner loss and the outer loss, unless this estimator has done so."""
        if self.check_losses and not self._has_checked:
            with uncounted():
                check_losses(inner_losses[0], outer_loss, theta, phi)
            self._has_checked.append(True)


def check_losses(
    inner: Callable[[Params], Loss],
    outer: Loss,
    theta: Params,
    phi: Params,
) -> None:
    """Check that both losses depend on theta and are pure.

    Args:
        inner: phi -> (theta -> pretraining loss).
        outer: theta -> feedback loss.
        theta: parameters of the learner, where the losses are evaluated.
        phi: parameters of the designer.

    Raises:
        UnreachedParameterError: a loss depends on no parameter in `theta`.
        ImpureLossError: two evaluations differ, or move the statistics of a BatchNorm layer.
    """
    theta, phi = params.leaves(theta), params.leaves(phi)

    def evaluate(make: Callable[[], Loss], name: str) -> Tensor:
        with torch.enable_grad():
            value = make()(theta)
        check_reached(value, theta, name)
        return value.detach()

    for make, name in ((lambda: inner(phi), "pretraining"), (lambda: outer, "feedback")):
        _check_purity(name, partial(evaluate, make, name))


def _check_purity(name: str, evaluate: Callable[[], Tensor]) -> None:
    with _training_modules() as modules:
        first = evaluate()
        norms = [module for module in modules if isinstance(module, _BatchNorm)]
        before = [_running_mean(norm).clone() for norm in norms]
        second = evaluate()
    moved = [
        norm
        for norm, mean in zip(norms, before, strict=True)
        if not torch.equal(mean, _running_mean(norm))
    ]
    if moved:
        raise ImpureLossError(
            f"the {name} loss moves the running statistics of {_listed(moved)} in train mode: "
            f"call eval() on the model, or use track_running_stats=False; {OFF}"
        )
    if _same(first, second):
        return
    dropouts = [module for module in modules if isinstance(module, _DropoutNd)]
    cause = f", with {_listed(dropouts)} in train mode" if dropouts else ""
    raise ImpureLossError(
        f"the {name} loss is random: two evaluations gave {float(first):.6g} and "
        f"{float(second):.6g}{cause}. Call eval() on the model, or let the batch carry the "
        f"randomness; {OFF}"
    )


@contextmanager
def _training_modules() -> Iterator[list[nn.Module]]:
    """Collect the Dropout and BatchNorm modules that run in train mode meanwhile."""
    found: list[nn.Module] = []

    def note(module: nn.Module, _: object) -> None:
        if (
            module.training
            and isinstance(module, _DropoutNd | _BatchNorm)
            and not any(module is other for other in found)
        ):
            found.append(module)

    handle = register_module_forward_pre_hook(note)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Using `torch.compile")  # the hook may fire twice
            yield found
    finally:
        handle.remove()


def _running_mean(norm: _BatchNorm) -> Tensor:
    """The layer's running mean; empty where it keeps none."""
    return torch.empty(0) if norm.running_mean is None else norm.running_mean


def _same(first: Tensor, second: Tensor) -> bool:
    """Whether the values are equal: bit for bit on a CPU, to rounding elsewhere."""
    if torch.equal(first, second) or not torch.isfinite(first + second):
        return True  # what is not finite is reported by the estimator
    if first.device.type == "cpu":
        return False
    return bool((first - second).abs() <= ROUNDING * first.abs())


def _listed(modules: Sequence[nn.Module]) -> str:
    more = f" and {len(modules) - 1} more" if len(modules) > 1 else ""
    return f"{modules[0]}{more}"
