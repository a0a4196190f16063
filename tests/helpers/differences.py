"""Derivatives against central differences, in float64."""

import pytest
import torch

from metavpt import DifferenceProduct, Dot, ExactProduct, OneStep
from metavpt.hypergradients import params


def relative(a, b):
    """|a - b| / |b| of two dicts of tensors."""
    return float(params.norm(params.add(a, b, alpha=-1.0)) / params.norm(b))


def assert_gradient_is_that_of_differences(
    total, phi, step=1e-6, rtol=1e-6, atol=0.0, num_directions=1
):
    """d total / d phi along random directions, to `rtol`; every parameter of phi has a gradient."""
    live = params.leaves(phi)
    grads = dict(zip(live, torch.autograd.grad(total(live), list(live.values())), strict=True))
    assert [name for name, grad in grads.items() if not grad.any()] == []
    generator = torch.Generator().manual_seed(1)
    for _ in range(num_directions):
        direction = {
            name: torch.randn(p.shape, dtype=p.dtype, generator=generator)
            for name, p in phi.items()
        }
        slope = (
            total(params.add(phi, direction, step)) - total(params.add(phi, direction, -step))
        ) / (2 * step)
        torch.testing.assert_close(params.dot(grads, direction), slope, atol=atol, rtol=rtol)


def assert_products_are_differences(inner, outer, aligned, phi, step=1e-6):
    """Double backward, difference product and differences in phi give the same hypergradient."""
    estimator = OneStep(Dot(), ExactProduct())
    exact = estimator([inner], outer, aligned, phi)
    difference = OneStep(Dot(), DifferenceProduct())([inner], outer, aligned, phi)
    assert relative(difference.by_phi, exact.by_phi) < 1e-6
    assert [name for name, grad in exact.by_phi.items() if not grad.any()] == []
    generator = torch.Generator().manual_seed(3)
    direction = params.zip_with(
        lambda p: torch.randn(p.shape, generator=generator, dtype=p.dtype), phi
    )
    ahead, behind = (
        estimator([inner], outer, aligned, params.add(phi, direction, alpha=s)).value
        for s in (step, -step)
    )
    assert (ahead - behind) / (2 * step) == pytest.approx(
        -float(params.dot(exact.by_phi, direction)), rel=1e-6
    )
