import pytest
import torch
from helpers.ridge import Ridge

from metavpt.errors import MetaVPTError, UnreachedParameterError
from metavpt.hypergradients import params
from metavpt.hypergradients.mixed_products import (
    DifferenceProduct,
    ExactProduct,
    central_difference,
    default_relative_step,
    differentiate,
    value_and_gradient,
)

PRODUCTS = [ExactProduct(), DifferenceProduct()]


@pytest.fixture
def ridge() -> Ridge:
    return Ridge.random()


def point(ridge: Ridge) -> tuple[params.Params, params.Params, params.Params]:
    g = torch.Generator().manual_seed(1)
    theta, w = ({"theta": torch.randn(6, generator=g, dtype=torch.float64)} for _ in range(2))
    return params.leaves(theta), w, params.leaves(ridge.phi)


@pytest.mark.parametrize("product", PRODUCTS, ids=["exact", "difference"])
def test_mixed_and_hessian_products_of_ridge_have_their_closed_forms(ridge, product):
    theta, w, phi = point(ridge)
    (by_theta, by_phi), value = product(ridge.inner(phi), theta, w, (theta, phi))
    penalty = ridge.phi["log_penalty"].exp()
    torch.testing.assert_close(
        by_theta["theta"], ridge.hessian() @ w["theta"], rtol=1e-8, atol=1e-9
    )
    torch.testing.assert_close(
        by_phi["log_penalty"], penalty * theta["theta"] * w["theta"], rtol=1e-8, atol=1e-9
    )
    expected = w["theta"] @ (ridge.hessian() @ theta["theta"] - ridge.x.T @ ridge.y / 20)
    torch.testing.assert_close(value, expected.detach(), rtol=1e-9, atol=1e-10)


def test_difference_product_is_the_same_for_any_length_of_w(ridge):
    theta, w, phi = point(ridge)
    reference = DifferenceProduct()(ridge.inner(phi), theta, w, (phi,)).by[0]
    for factor in (1e-6, 1e6):
        scaled = DifferenceProduct()(ridge.inner(phi), theta, params.scale(w, factor), (phi,)).by[0]
        torch.testing.assert_close(
            scaled["log_penalty"] / factor, reference["log_penalty"], rtol=1e-7, atol=1e-9
        )


def test_difference_product_of_a_zero_direction_is_zero(ridge):
    theta, w, phi = point(ridge)
    result = DifferenceProduct()(ridge.inner(phi), theta, params.scale(w, 0.0), (phi,))
    assert float(result.value) == 0.0
    assert float(params.norm(result.by[0])) == 0.0


def float32_case(length: float, size: float):
    """L = <phi, theta^2> / 2, so d<w, dL/dtheta>/dphi = theta w, with |w| and |theta| given."""
    generator = torch.Generator().manual_seed(2)
    theta, w = (torch.randn(50, generator=generator, dtype=torch.float64) for _ in range(2))
    theta, w = (size / theta.norm() * theta).float(), (length / w.norm() * w).float()
    phi = {"phi": torch.ones(50, requires_grad=True)}
    loss = lambda theta: (phi["phi"] * theta["theta"] ** 2).sum() / 2
    return loss, {"theta": theta.requires_grad_()}, {"theta": w}, phi


@pytest.mark.parametrize("length", [1e-37, 1e-30, 1e-20, 1.0, 1e20, 1e30])
@pytest.mark.parametrize("size", [1e-10, 1.0, 5000.0])
def test_difference_product_in_float32_at_any_length_of_w_and_theta(length, size):
    if not 1e-38 < length * size**2 < 1e38:
        pytest.skip("the result itself leaves the range of float32")
    loss, theta, w, phi = float32_case(length, size)
    (by_phi,), value = DifferenceProduct()(loss, theta, w, (phi,))
    expected = theta["theta"].detach().double() * w["theta"].double()
    torch.testing.assert_close(
        by_phi["phi"].double() / length, expected / length, rtol=0.02, atol=2e-3 * size
    )
    assert float(by_phi["phi"].double().norm()) == pytest.approx(float(expected.norm()), rel=1e-2)
    assert float(value) / length / size == pytest.approx(
        float(expected.sum()) / length / size, abs=1e-2
    )


@pytest.mark.parametrize("size", [1e-10, 1.0, 5000.0])
def test_difference_product_in_float32_of_a_zero_direction_is_zero(size):
    loss, theta, w, phi = float32_case(0.0, size)
    (by_phi,), value = DifferenceProduct()(loss, theta, w, (phi,))
    assert float(value) == 0.0
    assert by_phi["phi"].tolist() == [0.0] * 50


def test_difference_product_at_a_theta_of_zero(ridge):
    """A learner that starts at zero has no size of its own to take a step relative to."""
    theta, w, phi = point(ridge)
    theta = params.leaves(params.zeros_like(params.detach(theta)))
    (by_theta, by_phi), _ = DifferenceProduct()(ridge.inner(phi), theta, w, (theta, phi))
    torch.testing.assert_close(
        by_theta["theta"], ridge.hessian() @ w["theta"], rtol=1e-8, atol=1e-9
    )
    assert float(by_phi["log_penalty"].abs().max()) < 1e-9


def test_difference_product_rejects_a_step_that_is_not_positive():
    with pytest.raises(MetaVPTError, match="relative_step=0"):
        DifferenceProduct(relative_step=0.0)


@pytest.mark.parametrize("product", PRODUCTS, ids=["exact", "difference"])
def test_an_unreached_parameter_is_named(ridge, product):
    theta, w, phi = point(ridge)
    phi["idle"] = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    with pytest.raises(UnreachedParameterError, match="idle"):
        product(ridge.inner(phi), theta, w, (phi,))


def test_a_loss_without_any_graph_names_what_it_misses():
    with pytest.raises(UnreachedParameterError, match="phi_a"):
        differentiate(torch.tensor(1.0), ({"phi_a": torch.zeros(1, requires_grad=True)},))


@pytest.mark.parametrize(
    ("num_idle", "named"),
    [
        (1, "idle0"),
        (4, "idle0, idle1, idle2, idle3"),
        (5, "idle0, idle1, idle2, idle3 and 1 more"),
        (6, "idle0, idle1, idle2, idle3 and 2 more"),
    ],
)
def test_the_error_names_what_is_unreached_alone_and_says_what_to_do(
    num_idle: int, named: str
) -> None:
    """Reached parameters on both sides, on a graph whose buffers the first attempt freed."""
    reached = {name: torch.ones(2, requires_grad=True) for name in ("first", "last")}
    idle = {f"idle{i}": torch.zeros(1, requires_grad=True) for i in range(num_idle)}
    wrt = {"first": reached["first"], **idle, "last": reached["last"]}
    value = ((reached["first"] * reached["last"]).exp() ** 2).sum()
    with pytest.raises(UnreachedParameterError) as raised:
        differentiate(value, (wrt,))
    assert str(raised.value) == (
        f"the pretraining loss does not depend on {named}: its hypergradient would be a silent "
        "zero. Use the parameter in the task, drop it from the designer, or look for a no_grad or "
        "detach on the way to the loss"
    )


def test_the_error_names_what_is_unreached_where_the_way_back_needs_no_buffers() -> None:
    """So a second attempt at the reached ones succeeds."""
    wrt = {name: torch.ones(2, requires_grad=True) for name in ("first", "idle", "last")}
    with pytest.raises(UnreachedParameterError, match=r"does not depend on idle: "):
        differentiate((wrt["first"] + wrt["last"]).sum(), (wrt,))


def test_the_error_leaves_a_graph_that_is_to_be_kept() -> None:
    wrt = {name: torch.ones(2, requires_grad=True) for name in ("reached", "idle")}
    value = wrt["reached"].exp().sum()
    with pytest.raises(UnreachedParameterError, match="idle"):
        differentiate(value, (wrt,), retain_graph=True)
    (again,) = differentiate(value, ({"reached": wrt["reached"]},))
    torch.testing.assert_close(again["reached"], wrt["reached"].exp().detach())
    with pytest.raises(RuntimeError, match="second time"):  # as it was not to be kept again
        differentiate(value, ({"reached": wrt["reached"]},))


def test_exact_product_goes_through_attention_that_is_fused_outside():
    """Fused attention has no second derivative; the product switches it off for itself alone.

    In float64: by rounding alone, the two products of a float32 loss differ by 1e-3 and more.
    """
    g = torch.Generator().manual_seed(0)
    x, q, w = (
        torch.randn(*shape, generator=g, dtype=torch.float64)
        for shape in [(2, 2, 8, 4), (4, 4), (4, 4)]
    )
    theta = {"q": q.requires_grad_()}
    phi = {"scale": torch.ones(4, dtype=torch.float64, requires_grad=True)}

    def loss(theta: params.Params) -> torch.Tensor:
        q = (x * phi["scale"]) @ theta["q"]
        return torch.nn.functional.scaled_dot_product_attention(q, x, x).square().mean()

    exact = ExactProduct()(loss, theta, {"q": w}, (phi,)).by[0]
    difference = DifferenceProduct()(loss, theta, {"q": w}, (phi,)).by[0]
    torch.testing.assert_close(exact["scale"], difference["scale"], rtol=1e-7, atol=1e-8)
    (by_theta,) = torch.autograd.grad(loss(theta), theta["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="not implemented"):
        torch.autograd.grad((by_theta * w).sum(), phi["scale"])


def test_value_and_gradient_is_zero_where_a_parameter_plays_no_part():
    theta = {"used": torch.tensor([2.0]), "head": torch.tensor([1.0])}
    value, gradient = value_and_gradient(lambda theta: (theta["used"] ** 2).sum(), theta)
    assert float(value) == 4.0
    assert gradient == {"used": torch.tensor([4.0]), "head": torch.tensor([0.0])}


@pytest.mark.parametrize("grows", [False, True], ids=["constant", "of another parameter"])
def test_value_and_gradient_of_a_loss_that_forgets_theta_is_an_error_that_names_it(grows):
    live = torch.ones(2, requires_grad=grows)
    theta = {"a": torch.ones(2), "b": torch.ones(2)}
    with pytest.raises(UnreachedParameterError, match=r"feedback loss .*\(a, b\)"):
        value_and_gradient(lambda theta: live.sum(), theta, "feedback")


def test_a_gradient_by_theta_leaves_the_graph_to_phi():
    phi, theta = (
        {name: torch.tensor([0.3, 0.7], dtype=torch.float64, requires_grad=True)}
        for name in ("phi", "theta")
    )
    trunk = phi["phi"].exp()
    for _ in range(2):
        _, gradient = value_and_gradient(lambda t: (trunk * t["theta"].exp()).sum(), theta)
        torch.testing.assert_close(
            gradient["theta"], (trunk * theta["theta"].exp()).detach(), rtol=1e-14, atol=0
        )
    (by_phi,) = torch.autograd.grad(trunk.sum(), phi["phi"])
    torch.testing.assert_close(by_phi, trunk.detach(), rtol=1e-14, atol=0)


@pytest.mark.parametrize("product", PRODUCTS, ids=["exact", "difference"])
def test_the_graph_to_phi_is_kept_when_asked_for_and_freed_otherwise(product):
    phi, theta = (
        {name: torch.tensor([0.3, 0.7], dtype=torch.float64, requires_grad=True)}
        for name in ("phi", "theta")
    )
    trunk = phi["phi"].exp()  # autograd keeps its result for the way back

    def take(**options):
        return product(
            lambda t: (trunk * t["theta"] ** 2).sum(),
            theta,
            {"theta": torch.ones(2).double()},
            (phi,),
            **options,
        )

    (kept,), _ = take(retain_graph=True)
    torch.testing.assert_close(
        kept["phi"], (2 * trunk * theta["theta"]).detach(), rtol=1e-9, atol=0
    )  # of sum_i exp(phi_i) 2 theta_i
    assert torch.equal(take().by[0]["phi"], kept["phi"])
    with pytest.raises(RuntimeError, match="second time"):
        take()


def test_the_default_step_is_that_of_the_dtype_in_which_the_loss_is_computed():
    single, double = torch.zeros(1), torch.zeros(1, dtype=torch.float64)
    assert default_relative_step(double) == pytest.approx(2.0 ** (-52 / 3) / 5, rel=1e-12)
    assert default_relative_step(single) == pytest.approx(2.0 ** (-23 / 3) / 5, rel=1e-12)
    with torch.autocast("cpu", torch.bfloat16):
        assert default_relative_step(single) == pytest.approx(2.0 ** (-7 / 3) / 5, rel=1e-12)
        assert default_relative_step(double) == pytest.approx(2.0 ** (-52 / 3) / 5, rel=1e-12)
    assert DifferenceProduct(0.5).relative_step == 0.5


@pytest.mark.parametrize("relative_step", [None, 0.5])
def test_the_step_of_a_difference_is_relative_to_theta(relative_step):
    theta, w = ({"x": torch.full((4,), value, dtype=torch.float64)} for value in (3.0, 2.0))
    ends: list[torch.Tensor] = []
    central_difference(
        lambda theta: ends.append(theta["x"]) or theta["x"].sum(), theta, w, relative_step
    )
    expected = (relative_step or default_relative_step(theta["x"])) * 3.0
    torch.testing.assert_close(ends[0] - 3.0, torch.full_like(ends[0], expected), rtol=1e-8, atol=0)
    torch.testing.assert_close(3.0 - ends[1], torch.full_like(ends[1], expected), rtol=1e-8, atol=0)
