"""The peers on a two-block ViT, where their methods equal ours: three losses, float64."""

import pytest
from helpers.two_block_vit import TwoBlockViT, relative, warm

from metavpt.hypergradients.estimators import Implicit, OneStep, Unrolled
from metavpt.hypergradients.linear_solvers import Neumann
from metavpt.hypergradients.mixed_products import ExactProduct
from metavpt.hypergradients.optimizer_updates import SGD, AdamW

pytestmark = pytest.mark.peers

DECAY, STEP_SIZE = 1000.0, 5e-4


@pytest.fixture(scope="module", params=["dino", "mae", "cross_entropy"])
def vit(request) -> TwoBlockViT:
    return TwoBlockViT(request.param)


def test_torchopt_unrolls_adamw_as_we_do(vit):
    pytest.importorskip("torchopt")
    from metavpt.interop.torchopt import TorchOptUnroll

    update = warm(vit, AdamW(1e-2))
    ours = Unrolled(3, product=ExactProduct())(
        [vit.loss] * 3, vit.outer, vit.theta, vit.phi, update=update
    )
    theirs = TorchOptUnroll(3)([vit.loss] * 3, vit.outer, vit.theta, vit.phi, update=update)
    assert relative(theirs.by_phi, ours.by_phi) < 1e-8


def test_learn2learn_unrolls_sgd_as_we_do(vit):
    pytest.importorskip("learn2learn")
    from metavpt.interop.learn2learn import MAMLUnroll

    ours = Unrolled(3, SGD(0.1), ExactProduct())([vit.loss] * 3, vit.outer, vit.theta, vit.phi)
    theirs = MAMLUnroll(3, 0.1)([vit.loss] * 3, vit.outer, vit.theta, vit.phi)
    assert relative(theirs.by_phi, ours.by_phi) < 1e-9


def test_betty_darts_is_our_one_step_and_its_neumann_ours(vit):
    pytest.importorskip("betty")
    from metavpt.interop import betty

    one_step = OneStep(product=ExactProduct())([vit.loss], vit.outer, vit.theta, vit.phi)
    assert (
        relative(
            betty.Darts(darts_alpha=1e-5)([vit.loss], vit.outer, vit.theta, vit.phi).by_phi,
            one_step.by_phi,
        )
        < 1e-6
    )

    def convex(phi):
        """The inner loss with weight decay above its negative curvature; Neumann converges."""
        loss = vit.loss(phi)
        return lambda theta: loss(theta) + DECAY / 2 * sum(p.square().sum() for p in theta.values())

    series = Implicit(Neumann(4, step_size=STEP_SIZE), product=ExactProduct())(
        [convex], vit.outer, vit.theta, vit.phi
    )
    theirs = betty.Neumann(neumann_iterations=3, neumann_alpha=STEP_SIZE)(
        [convex], vit.outer, vit.theta, vit.phi
    )
    assert relative(theirs.by_phi, series.by_phi) < 1e-9
