"""One call on plain closures: the hypergradient of a bilevel problem."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from metavpt.errors import MetaVPTError
from metavpt.hypergradients import params
from metavpt.hypergradients.estimators import Estimator, Hypergradient, OneStep, finite
from metavpt.hypergradients.optimizer_updates import from_torch
from metavpt.hypergradients.params import Params

Parameters = Params | nn.Module | Tensor
Loss = Callable[[Any, Any], Tensor]


def hypergradient(
    inner: Loss | Sequence[Loss],
    outer: Loss,
    theta: Parameters,
    phi: Parameters,
    method: Estimator | None = None,
    *,
    optimizer: Optimizer | None = None,
    start: Params | None = None,
) -> Hypergradient:
    """Estimate the derivative of `outer` by phi, after theta was trained on `inner`.

    The result is the sum of the indirect term, through theta, and the direct term, through the phi
    that `outer` gets.

    Args:
        inner: inner(theta, phi), a scalar. A sequence holds one loss for each unlabelled batch; a
            single loss is used for all of them.
        outer: outer(theta, phi), a scalar. It may ignore phi.
        theta: The inner parameters: a dict of tensors, a module, or one tensor. Losses get a dict
            for a dict or a module (see `torch.func.functional_call`), and a tensor for a tensor.
        phi: The outer parameters, in the same forms.
        method: `OneStep()`, `Implicit(...)` or `Unrolled(...)`. Default: `OneStep()`.
        optimizer: The optimizer of theta. Methods that differentiate its step need it.
        start: The `solution` of an earlier call, from which an implicit solve starts.

    Returns:
        `by_phi` holds the gradient by name. The name is "phi" if phi is one tensor. Neither theta
        nor phi is changed, and no `.grad` is set.

    Raises:
        MetaVPTError: An argument has the wrong form. The message names it.

    Example:
        >>> theta, phi = torch.tensor([1.0]), torch.tensor([2.0])
        >>> inner = lambda theta, phi: ((theta - phi) ** 2).sum() / 2
        >>> outer = lambda theta, phi: (theta**2).sum() / 2
        >>> hypergradient(inner, outer, phi.clone(), phi, Implicit()).by_phi["phi"]
        tensor([2.])
    """
    estimator = method or OneStep()
    live = _as_params(theta, "theta")
    values, by_name = params.detach(live), params.detach(_as_params(phi, "phi"))
    losses = list(inner) if isinstance(inner, Sequence) else [inner] * estimator.num_batches
    for name, loss in [("inner", loss) for loss in losses] + [("outer", outer)]:
        if not callable(loss):
            raise MetaVPTError(f"hypergradient: {name} must be a function of (theta, phi)")
    if len(losses) != estimator.num_batches:
        raise MetaVPTError(
            f"hypergradient: inner holds {len(losses)} losses, and {type(estimator).__name__} "
            f"needs {estimator.num_batches}"
        )
    if estimator.needs_update and optimizer is None:
        raise MetaVPTError(
            f"hypergradient: {type(estimator).__name__} differentiates the optimizer's step; "
            "give optimizer="
        )
    last = values

    def outer_loss(at: Params) -> Tensor:
        nonlocal last
        last = at
        return _scalar(outer(_like(theta, at), _like(phi, by_name)), "outer")

    def inner_loss(loss: Loss) -> Callable[[Params], Callable[[Params], Tensor]]:
        return lambda of: lambda at: _scalar(loss(_like(theta, at), _like(phi, of)), "inner")

    found = estimator(
        [inner_loss(loss) for loss in losses],
        outer_loss,
        values,
        by_name,
        update=from_torch(optimizer, live) if optimizer and estimator.needs_update else None,
        start=start,
    )
    # An unrolled estimator evaluates the outer loss at the end of the unroll last.
    direct = _direct_term(outer, _like(theta, params.detach(last)), phi, by_name)
    return finite(replace(found, by_phi=params.add(found.by_phi, direct)))


def _direct_term(outer: Loss, theta: Any, phi: Parameters, values: Params) -> Params:
    """Differentiate outer(theta, phi) by phi at fixed theta; zero where it ignores phi."""
    leaves = params.leaves(values)
    with torch.enable_grad():
        value = _scalar(outer(theta, _like(phi, leaves)), "outer")
    if not value.requires_grad:
        return params.zeros_like(values)
    grads = torch.autograd.grad(value, list(leaves.values()), materialize_grads=True)
    return dict(zip(leaves, grads, strict=True))


def _as_params(given: Parameters, name: str) -> Params:
    if isinstance(given, nn.Module):
        named = params.named(given)
    elif isinstance(given, Tensor):
        named = {name: given}
    elif isinstance(given, dict):  # pyright: ignore[reportUnnecessaryIsInstance]
        named = given
    else:
        raise MetaVPTError(
            f"hypergradient: {name} must be a dict of tensors, a module or a tensor, "
            f"not {type(given).__name__}"
        )
    wrong = [
        key
        for key, value in named.items()
        if not (
            isinstance(value, Tensor)  # pyright: ignore[reportUnnecessaryIsInstance]
            and value.is_floating_point()
        )
    ]
    if wrong or not named:
        what = f"{wrong[0]!r} is no floating-point tensor" if wrong else "it holds no parameter"
        raise MetaVPTError(f"hypergradient: {name}: {what}")
    return named


def _like(given: Parameters, values: Params) -> Any:
    return next(iter(values.values())) if isinstance(given, Tensor) else values


def _scalar(value: Any, name: str) -> Tensor:
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.reshape(())
    got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    raise MetaVPTError(f"hypergradient: {name} must return a scalar tensor, not {got}")
