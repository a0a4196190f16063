"""Rounding errors of the hypergradient: dtypes, and the step of the difference product."""

import math
from contextlib import nullcontext

import torch

from metavpt.check.finding import Finding
from metavpt.check.scene import Scene, cosine, relative_error
from metavpt.errors import brief
from metavpt.hypergradients import params
from metavpt.hypergradients.estimators import downstream
from metavpt.hypergradients.mixed_products import (
    DifferenceProduct,
    ExactProduct,
    Product,
    default_relative_step,
)
from metavpt.hypergradients.params import Params

TRUSTED = 0.99  # cosine with float64
STEPS = tuple(10.0**-k for k in range(1, 9))


def widen(scene: Scene) -> tuple[Scene | None, Finding]:
    """Return the scene in float64, or None if the user's code does not run in it."""
    name = "float64"
    advice = (
        "cast to the dtype of theta instead of to float32; until then the checks run in float32"
    )
    try:
        wide = scene.double()
        with torch.no_grad():
            values = [(s.inner()(s.phi)(s.aligned), s.feedback(s.aligned)) for s in (scene, wide)]
    except Exception as error:
        return None, Finding(
            name,
            "warning",
            f"the problem does not run in float64: {brief(error, named=True)}",
            advice,
        )
    difference = max(
        abs(float(a) - float(b)) / max(abs(float(b)), 1e-12) for a, b in zip(*values, strict=True)
    )
    measured = f"the losses in float64 differ from the run's by {difference:.1e}"
    if not difference <= 0.05:
        return None, Finding(
            name, "warning", measured + ": another task, not another precision", advice
        )
    return wide, Finding(name, "ok", measured)


def dtypes(scene: Scene, truth: Params, exact: bool = True) -> list[Finding]:
    """Compare the one-step hypergradient in the run's dtype and in bfloat16 with `truth`."""
    findings = []

    def autocast() -> torch.autocast:  # a new one each time: torch's cannot be entered twice
        return torch.autocast(scene.device.type, torch.bfloat16)

    narrows = {
        str(scene.dtype).removeprefix("torch."): (scene, nullcontext()),
        "bfloat16": (scene.under(autocast), autocast()),
    }
    for name, (narrow, precision) in narrows.items():
        products: list[Product] = (
            [ExactProduct(), DifferenceProduct()] if exact else [DifferenceProduct()]
        )
        try:
            with precision:  # around the product too, which chooses its step by it
                cosines = {
                    type(product).__name__: cosine(narrow.one_step(product), truth)
                    for product in products
                }
        except Exception as error:
            findings.append(
                Finding(
                    name,
                    "warning",
                    f"does not run: {brief(error, named=True)}",
                    "" if narrow is scene else "train in float32",
                )
            )
            continue
        measured = "cosine with the float64 hypergradient: " + ", ".join(
            f"{key} {value:.4f}" for key, value in cosines.items()
        )
        bad = [key for key, value in cosines.items() if not value >= TRUSTED]
        advice = f"take the product in float32; in this dtype {' and '.join(bad)} cannot be trusted"
        if narrow is scene:
            advice = (
                f"{' and '.join(bad)} cannot be trusted in this dtype: see difference_step, "
                "or use a larger or better scaled loss"
            )
        findings.append(Finding(name, "warning" if bad else "ok", measured, advice if bad else ""))
    return findings


def difference_step(scene: Scene, truth: Params) -> Finding:
    """The relative step of DifferenceProduct swept in the run's dtype."""
    theta, phi = params.leaves(scene.aligned), params.leaves(scene.phi)
    _, w = downstream(scene.feedback, theta)
    with torch.enable_grad():
        loss = scene.inner()(phi)  # the trunk and g_down do not depend on the step

    def error_at(step: float | None) -> float:
        by_phi = DifferenceProduct(step)(loss, theta, w, (phi,), retain_graph=True).by[0]
        return relative_error(params.scale(by_phi, -1.0), truth)

    errors, default = {step: error_at(step) for step in STEPS}, error_at(None)
    best = min(errors, key=lambda step: errors[step] if math.isfinite(errors[step]) else math.inf)
    default_step = default_relative_step(next(iter(theta.values())))
    sweep = " ".join(f"{step:.0e}:{error:.0e}" for step, error in errors.items())
    measured = f"error {default:.1e} at the default step {default_step:.0e}, "
    measured += f"{errors[best]:.1e} at the best, {best:.0e} ({sweep})"
    if default <= 0.05:
        return Finding("difference_step", "ok", measured)
    advice = (
        f"if the strategy takes products, add +strategy.estimator.product.relative_step={best:.0e}"
        if errors[best] <= 0.5 * default
        else "if the strategy takes products, use ExactProduct: no step is accurate here"
    )
    return Finding("difference_step", "warning", measured, advice)
