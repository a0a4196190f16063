"""The identities of the estimators on a two-block ViT, in float64, under a DINO, a MAE-like and a cross-entropy loss."""

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

from metavpt import params
from metavpt.directions import AdamAware, Cosine, Dot
from metavpt.hypergradient import Implicit, OneStep, Unrolled
from metavpt.learners.vit import create_backbone
from metavpt.linear_solve import Neumann
from metavpt.objectives.dino import dino_loss
from metavpt.optimizers import SGD, AdamW, Update
from metavpt.products import DifferenceProduct, ExactProduct

B, SIDE, WIDTH = 3, 16, 16


class Toy:
    """A two-block ViT whose pixels the designer scales and shifts: every loss sees phi through the whole trunk. S is the last block."""

    def __init__(self, objective: str) -> None:
        torch.manual_seed(0)
        backbone = create_backbone(
            "vit_tiny_dinov3", 1, depth=2, embed_dim=WIDTH, num_heads=2, patch_size=8, img_size=SIDE, init_values=1.0
        )
        self.backbone = backbone.double()
        g = torch.Generator().manual_seed(1)
        self.images, self.other = (torch.randn(B, 3, SIDE, SIDE, generator=g, dtype=torch.float64) for _ in range(2))
        self.head = 0.2 * torch.randn(WIDTH, 7, generator=g, dtype=torch.float64)
        self.decoder = torch.randn(WIDTH, 192, generator=g, dtype=torch.float64)
        self.goal = torch.randn(B, WIDTH, generator=g, dtype=torch.float64)
        self.labels = torch.tensor([0, 3, 6])
        self.theta = params.clone(params.subset(params.named(self.backbone), "tail."))
        self.phi = {
            "scale": torch.rand(3, 1, 1, generator=g, dtype=torch.float64) + 0.5,
            "shift": torch.zeros(3, SIDE, SIDE, dtype=torch.float64),
        }
        self.loss = getattr(self, objective)

    def tail(self, theta, hidden):
        return functional_call(self.backbone.tail, theta, (hidden,))

    def view(self, phi, images):
        return phi["scale"] * images + phi["shift"]

    def dino(self, phi):
        hidden = [self.backbone.trunk(self.view(phi, x)) for x in (self.images, self.images.flip(-1))]
        targets = (self.backbone(self.other).cls @ self.head / 0.5).softmax(-1).detach().expand(2, -1, -1)
        return lambda theta: dino_loss([self.tail(theta, h).cls @ self.head for h in hidden], targets, temperature=0.5)

    def mae(self, phi):
        """Reconstruct the pixels of patches from an image whose other half is blank."""
        blank = torch.ones(1, 1, SIDE, SIDE, dtype=torch.float64)
        blank[..., SIDE // 2 :] = 0
        hidden = self.backbone.trunk(self.view(phi, self.images) * blank)
        pixels = F.unfold(self.images, 8, stride=8).transpose(1, 2)
        return lambda theta: (self.tail(theta, hidden).patches.flatten(2).transpose(1, 2) @ self.decoder / 8 - pixels).square().mean()

    def cross_entropy(self, phi):
        hidden = self.backbone.trunk(self.view(phi, self.images))
        return lambda theta: F.cross_entropy(self.tail(theta, hidden).cls @ self.head, self.labels)

    def outer(self, theta):
        return (self.tail(theta, self.backbone.trunk(self.other)).cls - self.goal).square().mean()


@pytest.fixture(scope="module", params=["dino", "mae", "cross_entropy"])
def toy(request) -> Toy:
    return Toy(request.param)


def relative(a, b) -> float:
    return float(params.norm(params.add(a, b, alpha=-1.0)) / params.norm(b))


def warm(toy, rule) -> Update:
    """`rule` after a step on some gradient. Adam's very first step is the gradient's sign, which finite differences cannot see through."""
    g = torch.Generator().manual_seed(5)
    gradient = params.zip_with(lambda p: 0.1 * torch.randn(p.shape, generator=g, dtype=p.dtype), toy.theta)
    return Update(rule, toy.theta, rule.step(toy.theta, rule.init(toy.theta), gradient)[1])


def after_steps(toy, phi, update, num_steps, create_graph=False):
    """theta after the plain unroll: the reference."""
    rule, theta, state = update.rule, params.leaves(toy.theta), update.state
    for _ in range(num_steps):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            gradient = torch.autograd.grad(toy.loss(phi)(theta), list(theta.values()), create_graph=create_graph)
        theta, state = rule.step(theta, state, dict(zip(theta, gradient, strict=True)))
    return theta


def slope(fn, phi, direction, step=1e-5):
    """d fn(phi + s direction) / ds, a central difference."""
    return float((fn(params.add(phi, direction, alpha=step)) - fn(params.add(phi, direction, alpha=-step))) / (2 * step))


def random_direction(toy):
    g = torch.Generator().manual_seed(4)
    return params.zip_with(lambda p: torch.randn(p.shape, generator=g, dtype=p.dtype), toy.phi)


@pytest.mark.parametrize("direction", [Dot(), Cosine(), AdamAware()], ids=lambda d: type(d).__name__)
def test_exact_is_difference_is_finite_differences(toy, direction):
    update = warm(toy, AdamW(1e-2))
    exact, difference = (
        OneStep(direction, product)([toy.loss], toy.outer, toy.theta, toy.phi, update=update)
        for product in (ExactProduct(), DifferenceProduct())
    )
    assert relative(difference.by_phi, exact.by_phi) < 1e-6
    along = random_direction(toy)
    value = lambda phi: OneStep(direction, ExactProduct())([toy.loss], toy.outer, toy.theta, phi, update=update).value  # noqa: E731
    assert -slope(value, toy.phi, along) == pytest.approx(float(params.dot(exact.by_phi, along)), rel=1e-5)


def test_one_step_is_the_first_neumann_term(toy):
    one = OneStep(product=ExactProduct(), step_size=0.3)([toy.loss], toy.outer, toy.theta, toy.phi)
    series = Implicit(Neumann(1, step_size=0.3), product=ExactProduct())([toy.loss], toy.outer, toy.theta, toy.phi)
    assert relative(one.by_phi, series.by_phi) < 1e-12


def test_one_step_differs_from_one_unrolled_step_by_the_square_of_lr(toy):
    def gap(lr):
        one = OneStep(product=ExactProduct(), step_size=lr)([toy.loss], toy.outer, toy.theta, toy.phi)
        unrolled = Unrolled(1, SGD(lr), ExactProduct())([toy.loss], toy.outer, toy.theta, toy.phi)
        return float(params.norm(params.add(one.by_phi, unrolled.by_phi, alpha=-1.0)))

    assert gap(1e-5) / gap(1e-6) == pytest.approx(100, rel=0.02)


@pytest.mark.parametrize("rule", [SGD(0.1, momentum=0.9), AdamW(1e-2)], ids=lambda r: type(r).__name__)
def test_unrolled_is_backprop_and_finite_differences(toy, rule):
    update = warm(toy, rule)
    exact, difference = (
        Unrolled(3, product=product)([toy.loss] * 3, toy.outer, toy.theta, toy.phi, update=update)
        for product in (ExactProduct(), DifferenceProduct())
    )
    phi = params.leaves(toy.phi)
    loss = toy.outer(after_steps(toy, phi, update, 3, create_graph=True))
    reference = dict(zip(phi, torch.autograd.grad(loss, list(phi.values())), strict=True))
    assert relative(exact.by_phi, reference) < 1e-9
    assert relative(difference.by_phi, reference) < 1e-6
    along = random_direction(toy)
    differences = slope(lambda phi: toy.outer(params.detach(after_steps(toy, phi, update, 3))).detach(), toy.phi, along)
    assert differences == pytest.approx(float(params.dot(reference, along)), rel=1e-5)


def test_adam_aware_value_is_the_realised_drop_to_first_order(toy):
    """After one real torch.optim.AdamW step, the realised drop differs from the value by the square of lr."""

    def gap(lr):
        live = {name: torch.nn.Parameter(p.clone()) for name, p in toy.theta.items()}
        optimizer = torch.optim.AdamW(live.values(), lr=lr)
        rule = AdamW(lr)
        value = OneStep(AdamAware(), ExactProduct())(
            [toy.loss], toy.outer, toy.theta, toy.phi, update=Update(rule, toy.theta, rule.init(toy.theta))
        ).value
        toy.loss(toy.phi)(live).backward()
        optimizer.step()
        with torch.no_grad():
            return abs(value - float(toy.outer(toy.theta) - toy.outer(live)))

    assert gap(1e-4) / gap(1e-5) == pytest.approx(100, rel=0.1)
