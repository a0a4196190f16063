import pytest
import torch
import torch.nn.functional as F
from helpers.differences import relative
from torch.func import hessian, jacrev

from metavpt.errors import MetaVPTError
from metavpt.hypergradients import params
from metavpt.hypergradients.curvature import ComposedLoss, GaussNewton, Hessian
from metavpt.hypergradients.estimators import Implicit, Unrolled
from metavpt.hypergradients.linear_solvers import ConjugateGradient, DampedLanczos
from metavpt.hypergradients.mixed_products import DifferenceProduct, ExactProduct
from metavpt.hypergradients.optimizer_updates import SGD

LABELS = torch.tensor([0, 2, 1, 1])


def network():
    """Logits of a small network that is not linear in theta, and its cross-entropy."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, generator=g, dtype=torch.float64)
    theta = {
        "a": torch.randn(3, 5, generator=g, dtype=torch.float64),
        "b": torch.randn(5, 3, generator=g, dtype=torch.float64),
    }
    loss = ComposedLoss(
        lambda t: F.layer_norm(x @ t["a"], (5,)).tanh() @ t["b"],
        lambda z: F.cross_entropy(z, LABELS),
    )
    return (
        loss,
        theta,
        params.zip_with(lambda p: torch.randn(p.shape, generator=g, dtype=p.dtype), theta),
    )


def flat(p):
    return torch.cat([value.reshape(-1) for value in p.values()])


def unflat(vector):
    return {"a": vector[:15].view(3, 5), "b": vector[15:].view(5, 3)}


def test_gauss_newton_is_the_dense_matrix():
    loss, theta, v = network()
    jacobian = jacrev(lambda vector: loss.outputs(unflat(vector)).reshape(-1))(flat(theta))
    inner = hessian(lambda z: loss.criterion(z.view(4, 3)))(loss.outputs(theta).reshape(-1))
    expected = jacobian.T @ inner @ jacobian @ flat(v)
    torch.testing.assert_close(
        flat(GaussNewton()(loss, params.leaves(theta), v, ExactProduct())),
        expected,
        rtol=1e-12,
        atol=1e-12,
    )


@pytest.mark.parametrize(
    "product", [ExactProduct(), DifferenceProduct()], ids=["exact", "difference"]
)
def test_hessian_is_the_dense_matrix(product):
    loss, theta, v = network()
    dense = hessian(lambda vector: loss(unflat(vector)))(flat(theta))
    torch.testing.assert_close(
        flat(Hessian()(loss, params.leaves(theta), v, product)),
        dense @ flat(v),
        rtol=1e-7,
        atol=1e-8,
    )


def test_implicit_with_gauss_newton_meets_no_negative_curvature_where_the_hessian_does():
    loss, theta, goal = network()
    phi = {"scale": torch.ones((), dtype=torch.float64)}
    inner = lambda phi: ComposedLoss(
        loss.outputs, lambda z: F.cross_entropy(z * phi["scale"], LABELS)
    )
    estimate = lambda solve, curvature: (
        Implicit(solve, damping=1e-2, product=ExactProduct(), curvature=curvature)(
            [inner], lambda t: params.dot(goal, t), theta, phi
        ).diagnostics
    )
    by_gauss_newton = estimate(ConjugateGradient(60, 1e-8), GaussNewton())
    assert by_gauss_newton["min_curvature"] > 0
    assert by_gauss_newton["converged"] == 1
    by_hessian = estimate(DampedLanczos(60, 1e-8), Hessian())
    assert by_hessian["min_curvature"] < 0
    assert by_hessian["damping"] > 1e-2


def test_gauss_newton_takes_the_other_curvature_of_a_loss_that_does_not_show_its_outputs():
    loss, theta, v = network()
    hidden = lambda theta: loss(theta)
    found = GaussNewton(otherwise=Hessian())(hidden, params.leaves(theta), v, ExactProduct())
    expected = Hessian()(loss, params.leaves(theta), v, ExactProduct())
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_gauss_newton_needs_to_see_the_outputs():
    with pytest.raises(MetaVPTError, match="ComposedLoss"):
        GaussNewton()(
            lambda theta: theta["a"].sum(),
            {"a": torch.ones(1)},
            {"a": torch.ones(1)},
            ExactProduct(),
        )


@pytest.mark.parametrize("kept_graphs", [0, 1, 3])
@pytest.mark.parametrize(
    ("product", "error"),
    [(ExactProduct(), 1e-12), (DifferenceProduct(), 1e-8)],
    ids=["exact", "difference"],
)
def test_unrolled_differentiates_what_a_loss_holds_of_each_step(product, error, kept_graphs):
    """Weights of the squares, held in a gradient, move with phi and theta: against autograd."""
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 3, 6, 4, generator=rng, dtype=torch.float64)  # steps, samples, features
    theta = {"w": torch.randn(4, generator=rng, dtype=torch.float64)}
    phi = {"a": torch.tensor([0.5, -0.3], dtype=torch.float64)}

    def loss(k, phi, seen, theta):
        weights = torch.sigmoid(phi["a"][0] * seen + phi["a"][1])
        return (weights * (x[k] @ theta["w"] - y[k, :, 0]).square()).mean()

    def composed(k, phi, at):
        seen = x[k] @ at["w"]
        return ComposedLoss(
            lambda theta: theta["w"][None],
            lambda w: loss(k, phi, seen, {"w": w[0]}),
            at=lambda theta: composed(k, phi, theta),
        )

    outer = lambda theta: (theta["w"] - 1).square().sum()
    found = Unrolled(3, SGD(0.2), product, kept_graphs=kept_graphs)(
        [lambda phi, k=k: composed(k, phi, theta) for k in range(3)], outer, theta, phi
    )
    phi, after = params.leaves(phi), params.leaves(theta)
    for k in range(3):
        moving = params.views(after)
        (gradient,) = torch.autograd.grad(
            loss(k, phi, x[k] @ after["w"], moving), moving["w"], create_graph=True
        )
        after = {"w": after["w"] - 0.2 * gradient}
    (expected,) = torch.autograd.grad(outer(after), phi["a"])
    assert float(expected.norm()) > 1e-2
    assert relative(found.by_phi, {"a": expected}) < error
