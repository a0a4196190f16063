"""What every policy must satisfy, whichever objective it weighs."""

from typing import Any

import pytest
import torch
from helpers.differences import relative
from helpers.small_data2vec import at, slope_of_value

from metavpt import DifferenceProduct, Dot, ExactProduct, OneStep
from metavpt.hypergradients import params
from metavpt.strategies.learned import inner_loss


def assert_products_agree(problem: Any) -> None:
    """Exact product = difference product = finite differences in phi, in float64."""
    theta, aligned, batch, g_down = at(problem)
    labelled = next(iter(problem.feedback_batches(2)))
    inner, phi = inner_loss(problem, theta, batch), params.detach(params.named(problem.designer))
    outer = lambda theta_s: problem.feedback_loss({**theta, **theta_s}, labelled)
    by = {
        kind: OneStep(Dot(), kind())([inner], outer, aligned, phi).by_phi
        for kind in (ExactProduct, DifferenceProduct)
    }
    assert params.norm(by[ExactProduct]) > 0
    assert relative(by[DifferenceProduct], by[ExactProduct]) < 1e-6
    direction = params.zip_with(torch.randn_like, phi)
    slope = slope_of_value(inner, aligned, g_down, phi, direction)
    assert slope == pytest.approx(-float(params.dot(by[ExactProduct], direction)), rel=1e-5)
